"""The memory that this process can still use, and a check before weights are read."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from owl2.errors import ErrorCode, InputError

MEMORY, CGROUP, ADDRESS_SPACE = "free memory", "limit of the cgroup", "limit of the address space"
GB = 10**9
CGROUPS = Path("/sys/fs/cgroup")
STATUS = Path("/proc/self/status")


def memory_limits() -> dict[str, int]:
    """The bytes that this process can still use, by the kind of limit.

    `MEMORY` includes caches that the system can drop. Limits that are not set are absent.
    """
    limits = {MEMORY: psutil.virtual_memory().available}
    if cgroup := [limit for folder in _cgroups() if (limit := _cgroup_limit(folder)) is not None]:
        limits[CGROUP] = min(cgroup)
    if sys.platform != "win32":
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            limits[ADDRESS_SPACE] = soft - psutil.Process().memory_info().vms
    return limits


def available_memory() -> int:
    """The smallest of `memory_limits`."""
    return min(memory_limits().values())


def peak_resident_memory() -> int:
    """The largest number of bytes in memory since this process started."""
    # On Linux, the maximum of getrusage includes that of the process that started this one.
    if STATUS.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())):
        return int(found[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def require_memory(purpose: str, needed: int, mapped: int = 0, advice: str = "") -> None:
    """Check that this process can use `needed` more bytes.

    Args:
        purpose: For the message, such as "Loading MODEL".
        mapped: Bytes of files that are memory-mapped in addition. They count as address space.

    Raises:
        InputError: They exceed a limit; the message has both figures and `advice`.
    """
    for name, available in memory_limits().items():
        total = needed + mapped if name == ADDRESS_SPACE else needed
        if total > available:
            raise InputError(
                f"{purpose} needs {format_size(total)} of memory, but only "
                f"{format_size(max(0, available))} can be used ({name}). {advice}".rstrip(),
                ErrorCode.OUT_OF_MEMORY,
            )


def format_size(size: float) -> str:
    """Bytes in GB, or in MB below 0.1 GB."""
    return f"{size / GB:,.1f} GB" if size >= GB / 10 else f"{size / 1e6:,.1f} MB"


def _cgroups() -> Iterator[Path]:
    """The memory cgroups of this process and their parents, of version 1 or 2."""
    file = Path("/proc/self/cgroup")
    for line in file.read_text().splitlines() if file.is_file() else ():
        _, controllers, path = line.split(":", 2)
        root = CGROUPS if not controllers else CGROUPS / "memory"
        if not controllers or "memory" in controllers.split(","):
            # In a container the path can be that of the host; the root is the container's then.
            folder = root / path.lstrip("/")
            yield from (folder, *(parent for parent in folder.parents if root in parent.parents))
            yield root


def _cgroup_limit(folder: Path) -> int | None:
    """The bytes that a cgroup can still use; None without a limit."""
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            total, used = ((folder / name).read_text().strip() for name in (limit, usage))
            statistics = (folder / "memory.stat").read_text().split()
        except OSError:  # no such cgroup, or of the other version
            continue
        if total == "max" or int(total) >= 2**62:
            return None
        fields = dict(zip(statistics[::2], map(int, statistics[1::2]), strict=True))
        # Cached file contents, which the system drops first.
        cached = fields.get("inactive_file", fields.get("total_inactive_file", 0))
        return int(total) - int(used) + cached
    return None
