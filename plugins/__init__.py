"""CUDA kernels of the custom ops, and what compiles and loads them as TensorRT plugins."""
