"""What runs in each layer: attention functions, backends and kernels."""
