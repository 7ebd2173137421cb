"""The reference model: a byte-level language model of Python's own standard library."""
