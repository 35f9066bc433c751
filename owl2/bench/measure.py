"""Measurements: the limits of the machine (the roofline), and the cost of a benchmark case."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

MATMUL_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192), "mps": (2048, 4096)}
READ_BYTES = {"cpu": 2**29, "cuda": 2**32, "mps": 2**29}  # far beyond any cache
ROOFLINE_SECONDS = 1.0  # per limit
MAX_SECONDS = 25.0  # a case starts no further round after this time
MIN_ROUNDS = 2  # even if they take longer
# Every case has an entry for these; other implementations are compared with owl2 as `vs_NAME`.
STANDARD = ("baseline", "owl2", "llama")

Costs = dict[str, list[float]]  # per implementation: seconds per unit of work, or bytes


@dataclass(frozen=True)
class Roofline:
    """Measured limits of the machine.

    Attributes:
        matmul: FLOP/s of a matrix product in the dtype of the model.
        read: bytes/s read from memory.
    """

    matmul: float
    read: float

    def seconds(self, flops: float = 0.0, read: float = 0.0) -> float:
        """The minimum time for `flops` FLOPs and `read` bytes, whichever takes longer."""
        return max(flops / self.matmul, read / self.read)


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measure the limits. Takes some seconds and 0.5 GB of memory (4 GB on a GPU).

    A limit must be attainable, so each is the best of several runs, while cases use medians.
    """

    def best(call: Callable[[], Any]) -> float:
        call()
        seconds: list[float] = []
        end = time.perf_counter() + ROOFLINE_SECONDS
        while len(seconds) < 3 or time.perf_counter() < end:
            seconds.append(time_call(call, device))
        return min(seconds)

    def matmul(size: int) -> float:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        # As in a Linear: by the transposed weight.
        return 2 * size**3 / best(lambda: F.linear(a, b))

    values = torch.zeros(READ_BYTES[device.type] // 4, device=device)
    return Roofline(
        max(matmul(edge) for edge in MATMUL_SIZES[device.type]), values.nbytes / best(values.sum)
    )


@dataclass(frozen=True)
class Run:
    """One implementation of a case. A call takes the measured time, or returns bytes.

    Attributes:
        work: Tokens per call; 1 for times and memory.
    """

    call: Callable[[], Any]
    work: float = 1.0


@dataclass(frozen=True)
class BenchCase:
    """Implementations that are compared.

    Attributes:
        unit: ms, tokens/s or MiB.
        runs: By name, in the order of each round.
        min_seconds: The time of one call of owl2 at the limits of the machine, if known.
        ratio: Names of two runs; the reported ratio is the cost of the first over the second.
        max_rounds: Limit of the number of rounds.
        warm_up: Runs that are called once before; None: all.
    """

    unit: str
    runs: Mapping[str, Run]
    min_seconds: float | None = None
    ratio: tuple[str, str] = ("baseline", "owl2")
    max_rounds: int | None = None
    warm_up: Collection[str] | None = None


def measure_case(case: BenchCase, rounds: int, device: torch.device) -> Iterator[Costs]:
    """Yield the costs so far after each round.

    The implementations alternate, so other load on the machine affects all of them.
    """
    costs: Costs = {name: [] for name in case.runs}
    if case.unit != "MiB":
        for name, run in case.runs.items():
            if case.warm_up is None or name in case.warm_up:
                run.call()  # compiles, allocates and fills caches
    started = time.perf_counter()
    for index in range(min(rounds, case.max_rounds or rounds)):
        if index >= MIN_ROUNDS and time.perf_counter() - started > MAX_SECONDS:
            return
        for name, run in case.runs.items():
            cost = run.call() if case.unit == "MiB" else time_call(run.call, device) / run.work
            costs[name].append(cost)
        yield costs


def time_call(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the device has finished the work of `call`."""
    synchronize: Callable[[], None] = getattr(torch, device.type).synchronize
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started


def case_result(case: BenchCase, costs: Costs) -> dict[str, Any]:
    """The entry of a case in ``bench.json``.

    Returns:
        The median of each implementation in `unit` (None for a missing one of `STANDARD`),
        `ratio` (None without a run to compare with), `roofline_fraction`, `vs_NAME`, `spread`
        (minimum and maximum per implementation) and `rounds`.
    """

    def convert(cost: float) -> float:
        return {"tokens/s": 1 / cost, "ms": cost * 1e3, "MiB": cost / 2**20}[case.unit]

    medians = {name: median(values) for name, values in costs.items()}
    others = [name for name in medians if name not in STANDARD]
    first, second = case.ratio
    owl2_seconds = medians["owl2"] * case.runs["owl2"].work
    return {
        **dict.fromkeys(STANDARD),
        **{name: convert(cost) for name, cost in medians.items()},
        "unit": case.unit,
        "ratio": medians[first] / medians[second] if first in medians else None,
        "roofline_fraction": case.min_seconds and case.min_seconds / owl2_seconds,
        **{f"vs_{name}": medians[name] / medians["owl2"] for name in others},
        "spread": {
            name: sorted((convert(min(values)), convert(max(values))))
            for name, values in costs.items()
        },
        "rounds": len(costs["owl2"]),
    }
