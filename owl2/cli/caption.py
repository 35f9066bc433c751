"""`owl2 caption`: captions for the images of a folder."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from owl2.cli.options import (
    ActivationBits,
    Base,
    Choice,
    Device,
    Dtype,
    JsonSchema,
    Model,
    Quantize,
    structured_outputs,
)


def caption(
    folder: Annotated[Path, typer.Argument(help="Folder with the images.")],
    model: Model,
    output_file: Annotated[Path, typer.Option(help="JSONL file to write, one line per image.")],
    prompt: Annotated[
        str, typer.Option(help="Prompt for each image.")
    ] = "Provide a one-sentence caption for the provided image.",
    recursive: Annotated[bool, typer.Option("--recursive", help="Include subfolders.")] = False,
    engine: Annotated[str, typer.Option(help="owl2 or vllm.")] = "owl2",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per caption.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 32,
    json_schema: JsonSchema = None,
    choice: Choice = None,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    activation_bits: ActivationBits = 16,
) -> None:
    """Caption all images of a folder, or ask the same question about each.

    The same command resumes after an interruption. Several processes share the work when started
    with torchrun or srun (RANK, WORLD_SIZE).
    """
    from owl2.caption.command import CaptionConfig
    from owl2.caption.command import caption as run_caption
    from owl2.engine.load_model import ModelArgs
    from owl2.scoring.methods import check_answers

    check_answers(model)
    model_args = ModelArgs(
        model, device, dtype, quantize=quantize, base=base, activation_bits=activation_bits
    )
    config = CaptionConfig(
        folder,
        model_args,
        output_file,
        prompt,
        recursive,
        engine,
        max_new_tokens,
        batch_size,
        structured_outputs(json_schema, choice),
    )
    run_caption(config, Console(highlight=False))
