"""`tune_malloc` keeps freed memory, so that new tensors cause no page faults."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from owl2.runtime import tune_malloc
if sys.argv[1] == "tuned":
    tune_malloc()
def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def allocate():
    for _ in range(10):
        torch.zeros(16_000_000)  # 64 MB
allocate()
before = page_faults()
allocate()
print(page_faults() - before)
"""


def page_faults(mode: str) -> int:
    command = [sys.executable, "-c", CODE, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="tune_malloc changes glibc only")
@pytest.mark.slow
def test_freed_memory_is_used_again():
    assert page_faults("tuned") < page_faults("default") / 10
