"""Executables and lowerings."""
