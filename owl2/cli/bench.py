"""Commands that measure: bench."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer()


@app.command("bench")
def measure_speed(
    model: Annotated[
        str | None, typer.Option(help="A checkpoint: directory or hub id. Or give a --size.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="bench, tiny or 7b with random weights; default: bench.")
    ] = None,
    figures: Annotated[
        str | None, typer.Option(help="Names, separated by commas; default: all.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for bench.json, bench.md and bench.png.")
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Rounds of each figure; of slow ones fewer, but two.")
    ] = 7,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; default: bfloat16 if it is fast here."),
    ] = None,
) -> None:
    """Measure speed and memory beside a textbook's implementation and a plain LLaMA.

    Ctrl-C ends it; what has been measured is shown and kept.
    """
    from owl2.bench.run import Settings, bench

    results = bench(Settings(model, size, figures, output, repeats, device, dtype), Console())
    if not results["finished"]:
        raise typer.Exit(130)
