"""vLLM against the engine of owl2 on the same GPU: equal tokens, and throughput.

`recipes/serving/throughput.py` measures. The environment variable VLLM_PYTHON is the Python command
of an environment with vLLM and owl2; default: this one.
"""

import json
import os
import shlex
import subprocess
import sys

from step import ROOT, SkippedError, Step, main

SCRIPT = ROOT / "recipes" / "serving" / "throughput.py"
NEW_TOKENS = 32
EQUAL = 0.5  # of sixteen answers; near ties of random weights change with the order of sums


def check(step: Step) -> None:
    """At least half of the answers of float32 weights are equal."""
    python = os.environ.get("VLLM_PYTHON", sys.executable)
    code = "import vllm"
    if not step.dry:
        code += "; from vllm.platforms import current_platform as p; assert p.is_cuda(), 'no CUDA'"
    found = subprocess.run(
        [*shlex.split(python), "-c", code], capture_output=True, text=True, check=False
    )
    if found.returncode:
        lines = found.stderr.strip().splitlines()
        raise SkippedError(f"{python} cannot use vLLM: {lines[-1] if lines else 'no message'}")
    folder = step.folder / "vllm"
    size = "tiny" if step.dry else "bench"
    step.run(sys.executable, SCRIPT, "make", folder, "--size", size, "--dtype", "float32")
    options = ("--rounds", "1", "--new", str(NEW_TOKENS), "--vllm", python)
    step.run(sys.executable, SCRIPT, "all", folder, *options)
    runs = json.loads((folder / "throughput.json").read_text())
    requests = {name: rounds[0]["requests"] for name, rounds in runs.items()}
    for count in requests["ours"]:
        answers = [requests[name][count]["answers"] for name in ("ours", "vllm")]
        equal = sum(a == b for a, b in zip(*answers, strict=True)) / int(count)
        step.check(f"{count} requests: equal answers", equal, least=EQUAL if count == "16" else 0)
        step.values[f"tokens_per_second_{count}"] = {
            name: by_count[count]["tokens_per_second"] for name, by_count in requests.items()
        }


if __name__ == "__main__":
    main(check)
