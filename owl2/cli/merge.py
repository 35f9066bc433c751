"""`owl2 merge`: a complete checkpoint from an adapter and its base model."""

from pathlib import Path
from typing import Annotated

import typer

from owl2.cli.options import Base


def merge(
    adapter: Annotated[str, typer.Argument(help="Adapter: a directory or a hub id.")],
    output: Annotated[Path, typer.Option(help="Directory for the merged checkpoint.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; default: that of the base model."),
    ] = None,
    base: Base = None,
) -> None:
    """Merge an adapter into its base model."""
    from owl2.train.adapters import merge as merge_adapter

    print(f"The merged model is in {merge_adapter(adapter, output, dtype, base)}")
