"""CPU kernels for the decoder layers, and weight-only quantization that uses them."""
