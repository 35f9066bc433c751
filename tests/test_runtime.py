"""Memory that is freed stays with the process: no fresh pages for each tensor."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from owl2.runtime import tune_malloc
if sys.argv[1] == "kept":
    tune_malloc()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    for _ in range(10):
        torch.zeros(16_000_000)  # 64 MB
work()
before = faults()
work()
print(faults() - before)
"""


def faults(how: str) -> int:
    run = [sys.executable, "-c", CODE, how]
    return int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries are left as they are")
@pytest.mark.slow
def test_freed_memory_is_used_again():
    assert faults("kept") < faults("as it is") / 10
