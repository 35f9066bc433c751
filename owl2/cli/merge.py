"""`owl2 merge`: a plain checkpoint from an adapter and its base model."""

from pathlib import Path
from typing import Annotated

import typer


def merge(
    adapter: Annotated[str, typer.Argument(help="What training with an adapter left.")],
    output: Annotated[Path, typer.Option(help="Directory for the plain checkpoint.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the base's.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model, if it is not where the adapter says.")
    ] = None,
) -> None:
    """Make one plain checkpoint of an adapter and its base model."""
    from owl2.train.adapters import merge as merge_adapter

    print(f"the merged model is in {merge_adapter(adapter, output, dtype, base)}")
