"""Attention: the functions, backends and kernels that run in each patched layer."""
