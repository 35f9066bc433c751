"""Weight files are read in the background."""

import os

import pytest

from owl2.checkpoints import read_ahead as module
from owl2.checkpoints.read_ahead import STEP, read_ahead

pytestmark = pytest.mark.skipif(
    not hasattr(os, "posix_fadvise"), reason="the system has no posix_fadvise"
)


def test_requests_cover_all_weight_files(tmp_path, monkeypatch):
    sizes = {"a.safetensors": 2 * STEP + 5, "b.bin": 7, "notes.txt": 9}
    for name, size in sizes.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    requests = []

    def advise(descriptor, start, length, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        requests.append((os.fstat(descriptor).st_size, start, start + length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    thread = read_ahead(tmp_path)
    assert thread is not None
    thread.join()
    large = 2 * STEP + 5
    assert requests == [
        *((large, start, start + STEP) for start in (0, STEP, 2 * STEP)),
        (7, 0, STEP),
    ]


@pytest.mark.parametrize("model", [None, "MAGAer13/mplug-owl2-llama2-7b", "missing"])
def test_nothing_to_read(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_ahead(model) is None


def test_files_larger_than_the_memory_are_not_read(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(bytes(10))
    monkeypatch.setattr(module, "available_memory", lambda: 9)
    assert read_ahead(tmp_path) is None
    monkeypatch.setattr(module, "available_memory", lambda: 10)
    thread = read_ahead(tmp_path)
    assert thread is not None
    thread.join()
