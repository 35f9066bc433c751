"""Quantized checkpoints (`owl2 quantize`). Start with `quantize_checkpoint`."""
