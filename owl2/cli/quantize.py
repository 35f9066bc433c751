"""`owl2 quantize`: a checkpoint with 4-bit or 8-bit weights."""

from pathlib import Path
from typing import Annotated

import typer


def quantize(
    model: Annotated[str, typer.Argument(help="Checkpoint: a directory or a hub id.")],
    output: Annotated[Path, typer.Argument(help="Directory for the quantized checkpoint.")],
    bits: Annotated[int, typer.Option(help="4 or 8: of the weights in the decoder.")] = 4,
    method: Annotated[
        str, typer.Option(help="rtn: round to nearest. gptq: calibrate on data.")
    ] = "rtn",
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="Data for gptq, repeatable: a .json or .jsonl file, tar files, the name of a "
            "dataset, or python_reference (text that Python contains; the default).",
            show_default=False,
        ),
    ] = None,
    calibration_samples: Annotated[
        int, typer.Option(min=1, help="Number of calibration samples.")
    ] = 128,
    calibration_length: Annotated[
        int, typer.Option(min=2, help="Tokens of a calibration sample.")
    ] = 512,
    modules_8bit: Annotated[
        list[str] | None,
        typer.Option(
            "--modules-8bit",
            help="Modules with 8 bits, repeatable: a part of their names, such as down_proj or "
            "layers.0.",
            show_default=False,
        ),
    ] = None,
    share_embeddings: Annotated[
        bool,
        typer.Option(
            "--share-embeddings",
            help="Store the embeddings of a model with tied embeddings once, with the 8 bits of "
            "the head.",
        ),
    ] = False,
) -> None:
    """Write a checkpoint with quantized weights, which loads faster and needs less memory."""
    from rich.console import Console

    from owl2.quantization.calibration_data import PYTHON_REFERENCE
    from owl2.quantization.command import Calibration
    from owl2.quantization.command import quantize as write_quantized

    samples = None
    if calibration or method == "gptq":
        sources = calibration or [PYTHON_REFERENCE]
        samples = Calibration(sources, calibration_samples, calibration_length)
    written = write_quantized(
        model,
        output,
        bits,
        method=method,
        modules_8bit=modules_8bit or (),
        share_embeddings=share_embeddings,
        calibration=samples,
        console=Console(highlight=False),
    )
    print(f"The quantized checkpoint is in {written}")
