"""What the machine can do at most: the limits that figures are shares of, measured.

A bound has to be what the machine reaches, so each is the best of several shapes and repetitions,
while figures are medians.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F

SQUARES = {"cpu": (1024, 2048), "cuda": (4096, 8192), "mps": (2048, 4096)}  # rows and columns
READ_BYTES = {"cpu": 2**29, "cuda": 2**32, "mps": 2**29}  # far beyond any cache
SECONDS = 1.0  # of measuring each


@dataclass(frozen=True)
class Limits:
    """Measured bounds.

    Attributes:
        matmul: FLOPs a second of a matrix product in the model's dtype.
        matvec: bytes of a matrix read a second in its product with one vector, same dtype.
        read: bytes a second read from memory.
    """

    matmul: float
    matvec: float
    read: float

    def seconds(self, flops: float = 0.0, read: float = 0.0) -> float:
        """The least time for so many FLOPs and for bytes read, whichever takes longer."""
        return max(flops / self.matmul, read / self.read)

    def as_json(self) -> dict[str, Any]:
        """In units that people know: GFLOP/s, GB/s."""
        units = {"matmul": "matmul_gflops", "matvec": "matvec_gb_s", "read": "read_gb_s"}
        return {units[name]: value / 1e9 for name, value in asdict(self).items()}


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure them; takes some seconds, and 0.5 GB of memory (4 GB of a GPU's)."""
    kind = device.type
    matmul = max(_matmul(size, device, dtype) for size in SQUARES[kind])
    return Limits(matmul, _matvec(READ_BYTES[kind], device, dtype), _read(READ_BYTES[kind], device))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _best(run: Callable[[], Any], device: torch.device, seconds: float = SECONDS) -> float:
    """The shortest of as many runs as fit into `seconds`, three at least."""
    run()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < end:
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found)


def _matmul(size: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    # As a Linear multiplies: by the transposed weight.
    return 2 * size**3 / _best(lambda: F.linear(a, b), device)


def _matvec(size: int, device: torch.device, dtype: torch.dtype) -> float:
    columns = 4096
    matrix = torch.zeros(size // 4 // columns, columns, device=device, dtype=dtype)
    vector = torch.zeros(1, columns, device=device, dtype=dtype)
    return matrix.nbytes / _best(lambda: F.linear(vector, matrix), device)


def _read(size: int, device: torch.device) -> float:
    numbers = torch.zeros(size // 4, device=device)
    return numbers.nbytes / _best(lambda: numbers.sum(), device)
