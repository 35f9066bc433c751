"""`owl2 bench`: speed and memory against baselines."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from owl2.cli.options import Device, Dtype


def bench(
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint: a directory or a hub id. Alternative to --size."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="bench, tiny or 7b: a model with random weights. Default: bench."),
    ] = None,
    cases: Annotated[
        str | None, typer.Option(help="Comma-separated cases to measure. Default: all.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for bench.json, bench.md and bench.png.")
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Rounds per case; slow cases run fewer, at least two.")
    ] = 7,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure speed and memory against a baseline implementation and a plain LLaMA.

    Ctrl-C stops the benchmark; results measured so far are printed and saved.
    """
    from owl2.bench.presets import BenchModel
    from owl2.bench.run import bench as run_bench

    source = BenchModel(model, size, device, dtype)
    results = run_bench(source, Console(), cases=cases, output=output, repeats=repeats)
    if not results["finished"]:
        raise typer.Exit(130)
