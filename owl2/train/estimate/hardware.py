"""The devices that a run is planned for: how many, how large, how fast."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from owl2.errors import InputError
from owl2.registry import look_up

GIB = 2**30
MIB = 2**20
TERA = 1e12
# Of a GPU's memory the CUDA context takes some hundred MB, kernels their workspaces, and the
# allocator loses some between pieces of different sizes.
USABLE = 0.92
# Of a GPU's peak that training of such models reaches; the share hangs on shapes and kernels.
REACHED = 0.4
UNITS = {"": 1, "K": 2**10, "M": MIB, "G": GIB, "T": 2**40}


class Card(NamedTuple):
    """A GPU: memory in GiB, dense bfloat16 peak in TFLOP/s, as its maker gives them."""

    memory: float
    peak: float


GPUS = {
    "h200": Card(141e9 / GIB, 989),
    "h100": Card(80, 989),
    "a100": Card(80, 312),
    "a100-40": Card(40, 312),
    "l40s": Card(48, 362),
    "a10": Card(24, 125),
    "rtx4090": Card(24, 165),
    "rtx3090": Card(24, 71),
}


@dataclass(frozen=True)
class Machine:
    """Devices, all alike.

    Attributes:
        devices: how many compute together; 1 for a CPU.
        kind: "cuda" or "cpu", which decides what precision a recipe has by itself.
        memory: bytes of one device; None if not known.
        tflops: what one device reaches while training, in TFLOP/s; None if not known.
    """

    devices: int = 1
    kind: str = "cuda"
    name: str | None = None
    memory: int | None = None
    tflops: float | None = None

    @classmethod
    def of(
        cls,
        gpus: int = 1,
        gpu: str | None = None,
        memory: str | None = None,
        tflops: float | None = None,
    ) -> "Machine":
        """What a user says of it.

        Args:
            gpus: 0 for a CPU.
            gpu: a name in `GPUS`.
            memory: of one device, as "80G" (GiB); default: that GPU's.
            tflops: reached by one device; default: 40 % of that GPU's peak.

        Raises:
            InputError: for a GPU that is not known, or memory that is no size.
        """
        card = None if gpu is None else look_up("GPU", gpu.lower(), GPUS)
        size = None if memory is None else parse_size(memory)
        if card is not None:
            size = int(card.memory * GIB) if size is None else size
            tflops = card.peak * REACHED if tflops is None else tflops
        name = None if gpu is None else gpu.upper()
        return cls(max(1, gpus), "cuda" if gpus else "cpu", name, size, tflops)

    @property
    def title(self) -> str:
        """For people."""
        what = "the CPU" if self.kind == "cpu" else f"{self.devices} x {self.name or 'GPU'}"
        return what if self.memory is None else f"{what} of {self.memory / GIB:,.0f} GiB"

    @property
    def speed(self) -> float | None:
        """FLOPs a second of all devices."""
        return None if self.tflops is None else self.tflops * TERA * self.devices

    def holds(self, size: int) -> bool | None:
        """Whether a device has room for so many bytes of tensors; None if that is not known."""
        return None if self.memory is None else size <= USABLE * self.memory


def parse_size(text: str) -> int:
    """Bytes of "80G", "80GB", "80 GiB": GPUs are sold by powers of two.

    Raises:
        InputError: if it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", text.upper())
    if match is None or not float(match[1]):
        raise InputError(f"{text!r} is no amount of memory; write it as 80G")
    return int(float(match[1]) * UNITS[match[2]])
