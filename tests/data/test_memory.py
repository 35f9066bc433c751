"""Memory while shards of any size are read. The long run prints its results:
`python -m pytest -m slow -s tests/data/test_memory.py`."""

import io
import time
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from owl2.data.sample import Sample
from owl2.data.webdataset import TarDataset
from tests.data.tars import write_tar

STATUS = Path("/proc/self/statm")


def resident_megabytes() -> float:
    return int(STATUS.read_text().split()[1]) * 4096 / 1e6


def images(edge: int) -> list[bytes]:
    """PNG images of noise, which compresses badly: 12 kB for an edge of 64."""
    rng = Random(0)
    files = []
    for _ in range(20):
        file = io.BytesIO()
        Image.frombytes("RGB", (edge, edge), rng.randbytes(3 * edge * edge)).save(file, "PNG")
        files.append(file.getvalue())
    return files


def write(directory: Path, samples: int, shards: int, edge: int) -> int:
    """Writes captioned images to shards, and returns their total size in bytes."""
    kinds = images(edge)
    each = samples // shards
    for shard in range(shards):
        numbers = range(shard * each, (shard + 1) * each)
        files = (
            (f"{number:08}.{ending}", kinds[number % len(kinds)] if ending == "png" else b"noise")
            for number in numbers
            for ending in ("png", "txt")
        )
        write_tar(directory / f"{shard:05}.tar", files)
    return sum(path.stat().st_size for path in directory.glob("*.tar"))


@pytest.mark.skipif(not STATUS.exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("samples", "shards", "edge", "shuffle_buffer"),
    [(4000, 1, 64, 100), pytest.param(200_000, 100, 32, 1000, marks=pytest.mark.slow)],
)
def test_memory_does_not_grow_with_the_data(tmp_path, samples, shards, edge, shuffle_buffer):
    size = write(tmp_path, samples, shards, edge)
    stream = TarDataset(str(tmp_path / "*.tar")).stream(seed=0, shuffle_buffer=shuffle_buffer)
    began = time.perf_counter()
    found: list[float] = []
    seen: set[str] = set()
    for number, (sample, state) in enumerate(islice(stream, samples), start=1):
        assert isinstance(sample, Sample) and state["epoch"] == 0
        if number % (samples // 20) == 0:
            found.append(resident_megabytes())
            seen.add(sample.source)
    seconds = time.perf_counter() - began
    print(
        f"\n{samples:,} samples, {size / 1e6:,.0f} MB in {shards} shards, buffer {shuffle_buffer}: "
        f"{found[1]:.0f} MB resident after 10 %, {found[-1]:.0f} MB at the end, most "
        f"{max(found):.0f} MB; {samples / seconds:,.0f} samples/s"
    )
    assert len(seen) == 20
    assert max(found) - found[1] < 2
