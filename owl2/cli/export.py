"""`owl2 export`: a checkpoint for the authors' code."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    model: Annotated[str, typer.Argument(help="Checkpoint: a directory or a hub id.")],
    output: Annotated[Path, typer.Argument(help="Directory for the exported checkpoint.")],
    target: Annotated[
        Literal["authors"], typer.Option("--for", help="Code that loads it: that of the authors.")
    ] = "authors",
) -> None:
    """Write a checkpoint that the authors' code loads with the same logits.

    Weights that the model shares between modalities are written twice.
    """
    from rich.console import Console

    from owl2.checkpoints.export import export_checkpoint
    from owl2.progress import ProgressReporter

    console = Console(highlight=False)
    with ProgressReporter(console, "export", unit="weights", delay=2.0) as progress:
        remarks = export_checkpoint(model, output, progress=progress.advance)
    for remark in remarks:
        console.print(remark, markup=False)
    print(f"The checkpoint for the authors' code is in {output}")
