"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="Checkpoint: a directory or a hub id.")]
Images = Annotated[
    list[str] | None,
    typer.Option(
        help="Image file or URL; repeatable. Replaces the <|image|> placeholders of the question "
        "in order, or precedes the question."
    ),
]
Base = Annotated[
    str | None,
    typer.Option(help="Base model of an adapter; default: the one that the adapter names."),
]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Quantize = Annotated[
    str | None, typer.Option(help="8bit or 4bit: quantize the weights of the decoder.")
]
Recipe = Annotated[Path, typer.Argument(help="A YAML file; see recipes/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Override keys of the recipe, e.g. learning_rate=1e-4 or data.0.count=100.",
        show_default=False,
    ),
]
