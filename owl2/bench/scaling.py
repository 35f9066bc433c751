"""`owl2 bench --scaling`: the cost against one quantity, all others being constant.

`CURVES` lists the curves. A curve has points, and each point has one or more series, which are
benchmark cases of owl2 alone. Points that do not fit into memory or time are skipped.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from owl2.bench.cases import owl2_decode, owl2_encode, owl2_prefill
from owl2.bench.implementations import Implementations
from owl2.bench.measure import MIN_ROUNDS, BenchCase, Roofline, case_result, measure_case
from owl2.bench.presets import BenchModel
from owl2.bench.training import MeasurementError
from owl2.bench.workload import TEXT_TOKENS, BenchRequest
from owl2.memory import format_size
from owl2.runtime import free_memory

DEFAULT_SIZES = ("135m", "bench", "1b", "3b", "7b")
MAX_POINT_SECONDS = 180.0  # a point that would take longer is skipped
MEMORY_FACTOR = 1.15  # memory over that of the weights: activations, the KV cache, the process

Cases = Mapping[str, Callable[[Implementations], BenchCase]]  # by series


@dataclass(frozen=True)
class Curve:
    """A quantity, its values, and what is measured at each.

    Attributes:
        title: What a value of the quantity is, for tables and plots.
        points: In ascending order.
        cases: The series of a point.
    """

    title: str
    points: Sequence[int]
    cases: Callable[[int], Cases]


def _images(count: int) -> Cases:
    def request(impls: Implementations) -> BenchRequest:
        ids = impls.workload.prompt_ids(images=count)
        return BenchRequest(ids, impls.workload.pixels(count))

    return {
        "encode": lambda impls: owl2_encode(impls, count),
        "prefill": lambda impls: owl2_prefill(impls, [request(impls)]),
    }


def _context(length: int) -> Cases:
    def request(impls: Implementations) -> BenchRequest:
        return BenchRequest(impls.workload.text_ids(length))

    return {
        "prefill": lambda impls: owl2_prefill(impls, [request(impls)]),
        "decode": lambda impls: owl2_decode(impls, request(impls), 1),
    }


def _concurrency(count: int) -> Cases:
    return {
        "prefill": lambda impls: owl2_prefill(
            impls, [impls.workload.request() for _ in range(count)]
        ),
        "decode": lambda impls: owl2_decode(impls, impls.workload.request(), count),
    }


CURVES: dict[str, Curve] = {
    "images": Curve(
        f"images of a prompt with {TEXT_TOKENS} text tokens", (1, 2, 4, 8, 16), _images
    ),
    "context": Curve("text tokens of a prompt", (256, 512, 1024, 2048), _context),
    "concurrency": Curve(
        "concurrent requests with an image", (1, 2, 4, 8, 16, 32, 64), _concurrency
    ),
    "sizes": Curve("parameters", (), lambda _: _concurrency(1)),  # the sizes are an option
}


def measure_curves(
    source: BenchModel,
    names: Sequence[str],
    sizes: Sequence[str],
    repeats: int,
    roofline: Roofline,
    results: dict[str, Any],
    progress: Callable[[str], None],
) -> None:
    """Fill `curves` and `skipped` of the results; a point appears when its series are measured.

    Args:
        source: The model of all curves except `sizes`.
        names: Names in `CURVES`.
        sizes: Names in `PRESETS`, for the curve `sizes`.
        repeats: Rounds per series.
        progress: Called with the name of each point.

    Raises:
        InputError: Unknown model or size.
    """
    models = [replace(source, model=None, size=size) for size in sizes]
    impls: Implementations | None = None
    for name in names:
        curve = CURVES[name]
        points = [(x, f"{x}", source) for x in curve.points]
        if name == "sizes":
            points = sorted((model.num_parameters(), model.size or "", model) for model in models)
        measured: dict[str, Any] = {"title": curve.title, "points": []}
        results["curves"][name] = measured
        seconds_per_x = 0.0
        for x, label, model in points:
            progress(f"{name} {label}")
            try:
                if impls is None or impls.source != model:
                    impls = None  # frees the memory of the previous model
                    _check_memory(model)
                _check_seconds(x * seconds_per_x)
                impls = Implementations(model, roofline) if impls is None else impls
                started = time.perf_counter()
                cases = {
                    series: _measure(make(impls), repeats, impls.model.device)
                    for series, make in curve.cases(x).items()
                }
            except (MeasurementError, torch.OutOfMemoryError) as error:
                results["skipped"][f"{name} {label}"] = str(error).splitlines()[0]
                continue
            rounds = max(case["rounds"] for case in cases.values())
            minimum = (1 + MIN_ROUNDS) / (1 + rounds)  # a slow point has fewer rounds
            seconds_per_x = minimum * (time.perf_counter() - started) / x
            measured["points"].append({"x": x, "label": label, "cases": cases})


def _measure(case: BenchCase, repeats: int, device: torch.device) -> dict[str, Any]:
    return case_result(case, list(measure_case(case, repeats, device))[-1])


def _check_seconds(expected: float) -> None:
    """The expected time is that of the previous point, in proportion to the quantity."""
    if expected > MAX_POINT_SECONDS:
        raise MeasurementError(
            f"expected to take {expected:.0f} s, more than {MAX_POINT_SECONDS:.0f} s"
        )


def _check_memory(model: BenchModel) -> None:
    """Before the weights are created; the size of a checkpoint is not checked."""
    if model.model is not None:
        return
    device, dtype = model.device_and_dtype()
    needed = model.num_parameters() * dtype.itemsize * MEMORY_FACTOR
    free = free_memory(device)
    if needed > free:
        raise MeasurementError(
            f"needs {format_size(needed)} of memory; {format_size(free)} are available"
        )
