"""Measuring: implementations take turns, so that what else the machine does slows all of them."""

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from owl2.bench.cases import Figure, Run
from owl2.bench.roofline import synchronize

PATIENCE = 25.0  # seconds after which a figure has no further round, unless it has had but one
LEAST_ROUNDS = 2
OWL2, FIXED = "owl2", ("textbook", "owl2", "llama")
PER = {"ms": 1e3, "s": 1.0, "MiB": 2.0**-20}

Costs = dict[str, list[float]]  # by implementation: seconds a token or in all, or bytes


def measure(figure: Figure, rounds: int, device: torch.device) -> Iterator[Costs]:
    """The costs so far, after each round."""
    costs: Costs = {name: [] for name in figure.runs}
    rounds = min(rounds, figure.most or rounds)
    if figure.unit != "MiB":
        for name, run in figure.runs.items():
            if figure.warm is None or name in figure.warm:
                run.call()  # compiles, allocates, fills caches
    began = time.perf_counter()
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - began > PATIENCE:
            return
        for name, run in figure.runs.items():
            cost = run.call() if figure.unit == "MiB" else timed(run.call, device) / run.work
            costs[name].append(cost)
        yield costs


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds."""
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def result(figure: Figure, costs: Costs) -> dict[str, Any]:
    """A figure's entry in ``bench.json``; medians.

    Returns:
        ``textbook``, ``owl2``, ``llama`` (None where there is no such) and further implementations
        in ``unit``; ``ratio``, ``limit_share``, ``against_NAME``; ``spread``, the smallest and the
        largest by name; ``rounds``.
    """
    middle = {name: median(found) for name, found in costs.items()}
    told = {name: in_unit(figure.unit, cost) for name, cost in middle.items()}
    first, second = figure.ratio
    ours: Run = figure.runs[OWL2]
    return {
        **{name: told.get(name) for name in FIXED},
        **{name: value for name, value in told.items() if name not in FIXED},
        "unit": figure.unit,
        "ratio": middle[first] / middle[second],
        "limit_share": (
            None if figure.least is None else figure.least / (middle[OWL2] * ours.work)
        ),
        **{
            f"against_{name}": cost / middle[OWL2]
            for name, cost in middle.items()
            if name not in FIXED
        },
        "spread": {
            name: sorted(in_unit(figure.unit, cost) for cost in (min(found), max(found)))
            for name, found in costs.items()
        },
        "rounds": len(costs[OWL2]),
    }


def in_unit(unit: str, cost: float) -> float:
    """Seconds or bytes as a figure tells them."""
    return 1 / cost if unit == "tokens/s" else cost * PER[unit]
