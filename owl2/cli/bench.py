"""`owl2 bench`: speed and memory against baselines."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from owl2.cli.options import Device, Dtype
from owl2.errors import ErrorCode, InputError


def bench(
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint: a directory or a hub id. Alternative to --size."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="tiny, 135m, bench (284 M parameters), 1b, 3b or 7b (8.2 B): a model with random "
            "weights. Default: bench."
        ),
    ] = None,
    cases: Annotated[
        str | None,
        typer.Option(help="Comma-separated cases or, with --scaling, curves. Default: all."),
    ] = None,
    scaling: Annotated[
        bool,
        typer.Option(
            "--scaling",
            help="Measure the cost against the number of images, the context length, the number "
            "of concurrent requests, and the size of the model.",
        ),
    ] = False,
    sizes: Annotated[
        str | None,
        typer.Option(
            help="--scaling: comma-separated sizes of the curve `sizes`. Those that do not fit "
            "into memory or time are skipped. Default: 135m,bench,1b,3b,7b."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Directory for bench.json, bench.md and bench.png, or scaling.json, scaling.md "
            "and a plot per curve."
        ),
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
    from owl2.bench.run import bench_scaling

    if sizes is not None and not scaling:
        raise InputError("--sizes needs --scaling.", ErrorCode.CONFLICT)
    source = BenchModel(model, size, device, dtype)
    options: dict[str, Any] = {"cases": cases, "output": output, "repeats": repeats}
    if scaling:
        results = bench_scaling(source, Console(), sizes=sizes, **options)
    else:
        results = run_bench(source, Console(), **options)
    if not results["finished"]:
        raise typer.Exit(130)
