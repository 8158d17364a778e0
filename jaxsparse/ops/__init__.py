"""Kernels that read sparse arrays: every op is a folder with its reference beside it."""
