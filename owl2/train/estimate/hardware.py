"""The devices of an estimate: number, memory and speed."""

import re
from dataclasses import dataclass

from owl2.errors import ErrorCode, InputError
from owl2.registry import look_up

MIB, GIB, TERA = 2**20, 2**30, 1e12
# The CUDA context, kernel workspaces and fragmentation take the rest of a GPU's memory.
USABLE_FRACTION = 0.92
# The fraction of a GPU's peak that training of such models typically reaches (MFU).
DEFAULT_MFU = 0.4
UNITS = {"": 1, "K": 2**10, "M": MIB, "G": GIB, "T": 2**40}
# Memory in GiB and dense bfloat16 peak in TFLOP/s, from the data sheets.
GPUS = {
    "h200": (141e9 / GIB, 989),
    "h100": (80, 989),
    "a100": (80, 312),
    "a100-40": (40, 312),
    "l40s": (48, 362),
    "a10": (24, 125),
    "rtx4090": (24, 165),
    "rtx3090": (24, 71),
}


@dataclass(frozen=True)
class Hardware:
    """A number of identical devices.

    Attributes:
        devices: Number of devices; 1 for a CPU.
        device_type: "cuda" or "cpu"; it decides the default dtype of a recipe.
        memory: Bytes per device; None if unknown.
        tflops: TFLOP/s that one device reaches in training; None if unknown.
    """

    devices: int = 1
    device_type: str = "cuda"
    name: str | None = None
    memory: int | None = None
    tflops: float | None = None

    @classmethod
    def from_options(
        cls,
        gpus: int = 1,
        gpu: str | None = None,
        memory: str | None = None,
        tflops: float | None = None,
    ) -> "Hardware":
        """The hardware that the options of `owl2 plan` describe.

        Args:
            gpus: Number of GPUs; 0 for the CPU.
            gpu: A name in `GPUS`.
            memory: Memory per device, such as "80G" (GiB); default: that of the GPU.
            tflops: Measured TFLOP/s per device; default: 40 % of the peak of the GPU.

        Raises:
            InputError: An unknown GPU, or an invalid memory size.
        """
        size = None if memory is None else parse_size(memory)
        if gpu is not None:
            gibibytes, peak = look_up("GPU", gpu.lower(), GPUS)
            size = size or int(gibibytes * GIB)
            tflops = tflops or peak * DEFAULT_MFU
            gpu = gpu.upper()
        return cls(max(1, gpus), "cuda" if gpus else "cpu", gpu, size, tflops)

    @property
    def title(self) -> str:
        """A description such as "8 x H100, 80 GiB"."""
        devices = "CPU" if self.device_type == "cpu" else f"{self.devices} x {self.name or 'GPU'}"
        return devices if self.memory is None else f"{devices}, {self.memory / GIB:,.0f} GiB"

    @property
    def flops_per_second(self) -> float | None:
        """FLOP/s of all devices together."""
        return None if self.tflops is None else self.tflops * TERA * self.devices

    def fits(self, size: int) -> bool | None:
        """Whether `size` bytes of tensors fit on a device; None if its memory is unknown."""
        return None if self.memory is None else size <= USABLE_FRACTION * self.memory


def parse_size(text: str) -> int:
    """Bytes of "80G", "80GB" or "80 GiB"; units are powers of two.

    Raises:
        InputError: The text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", text.upper())
    if match is None or not float(match[1]):
        raise InputError(
            f"{text!r} is not a memory size; write it as 80G", ErrorCode.INVALID_FORMAT
        )
    return int(float(match[1]) * UNITS[match[2]])
