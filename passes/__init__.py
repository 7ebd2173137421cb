"""Rewrites, one a file: configuration, check and rewrite of each in one class."""
