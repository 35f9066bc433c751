"""Memory that is freed stays with the process: no fresh pages for each tensor."""

import subprocess
import sys

CODE = """
import resource, sys, torch
from owl2.model.allocation import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
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


def test_freed_memory_is_used_again():
    if sys.platform != "linux":
        return  # other systems' libraries are left as they are
    assert faults("kept") < faults("as it is") / 10
