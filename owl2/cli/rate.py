"""`owl2 rate`: scores of images and videos."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from owl2.cli.options import ActivationBits, Base, Device, Dtype, Model, Quantize


def rate(
    images: Annotated[
        list[Path],
        typer.Argument(help="Folders, files, and JSONL files with rows {'image': path}."),
    ],
    model: Model,
    output_file: Annotated[
        Path, typer.Option(help="JSONL or CSV file to write, one line per image.")
    ],
    task: Annotated[
        Literal["quality", "aesthetics"], typer.Option(help="What is rated.")
    ] = "quality",
    kind: Annotated[
        Literal["image", "video"],
        typer.Option(help="Rate images, or videos at one frame a second."),
    ] = "image",
    html: Annotated[
        Path | None, typer.Option(help="HTML page to write: thumbnails sorted by score.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="q-align, q-instruct, deqa-score or compare2score; default: that of the model."
        ),
    ] = None,
    prompt_form: Annotated[
        str | None,
        typer.Option(
            help="hub, evaluation or pyiqa, or a prompt with <|image|>; default: the first of the "
            "method."
        ),
    ] = None,
    score_range: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Scores of the worst and the best level, such as 0 1 or 1 5."),
    ] = None,
    boost: Annotated[
        bool, typer.Option("--boost", help="Average three words per level (Q-Instruct).")
    ] = False,
    anchors: Annotated[
        Path | None, typer.Option(help="Folder with the five anchor images of Compare2Score.")
    ] = None,
    recursive: Annotated[bool, typer.Option("--recursive", help="Include subfolders.")] = False,
    engine: Annotated[str, typer.Option(help="owl2 or vllm.")] = "owl2",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 16,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    activation_bits: ActivationBits = 16,
) -> None:
    """Rate the quality or the aesthetics of images with OneAlign, Q-Instruct, DeQA-Score, ...

    The same command resumes after an interruption. Several processes share the work when started
    with torchrun or srun (RANK, WORLD_SIZE).
    """
    from owl2.engine.load_model import ModelArgs
    from owl2.rate.command import RateConfig
    from owl2.rate.command import rate as run_rate

    config = RateConfig(
        images,
        ModelArgs(
            model, device, dtype, quantize=quantize, base=base, activation_bits=activation_bits
        ),
        output_file,
        html,
        task,
        kind,
        method,
        prompt_form,
        score_range,
        boost,
        anchors,
        recursive,
        engine,
        batch_size,
    )
    run_rate(config, Console(highlight=False))
