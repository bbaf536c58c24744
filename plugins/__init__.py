"""CUDA kernels of the custom ops; what compiles them, calls them from Python, and makes them TensorRT plugins."""
