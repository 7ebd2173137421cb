"""Triton kernels, one concept a file, for the dialect operators of the same names."""
