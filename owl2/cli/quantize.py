"""`owl2 quantize`: a checkpoint with 4-bit or 8-bit weights."""

from pathlib import Path
from typing import Annotated

import typer


def quantize(
    model: Annotated[str, typer.Argument(help="Checkpoint: a directory or a hub id.")],
    output: Annotated[Path, typer.Argument(help="Directory for the quantized checkpoint.")],
    bits: Annotated[int, typer.Option(help="4 or 8: of the weights in the decoder.")] = 4,
) -> None:
    """Write a checkpoint with quantized weights, which loads faster and needs less memory."""
    from owl2.checkpoints.hf_quantizer import Owl2QuantizationConfig
    from owl2.quantization.quantize_checkpoint import quantize_checkpoint

    config = Owl2QuantizationConfig(bits)
    print(f"The quantized checkpoint is in {quantize_checkpoint(model, output, config)}")
