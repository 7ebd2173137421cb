"""The CUDA target: programs compiled by Inductor, with our Triton kernels, and decode steps replayed as CUDA graphs."""
