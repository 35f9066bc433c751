"""C++ kernels: `build.py` compiles them, `ops.py` calls them."""
