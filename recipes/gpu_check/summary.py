"""Collects the results of all steps of `recipes/gpu_check.sh` in one JSON file.

    python summary.py FOLDER [--dry]

FOLDER/steps.tsv has the name and the exit code of each step, FOLDER/NAME.json its result. The exit
code is 0 if no step failed.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

STATUS = {0: "passed", 77: "skipped", 124: "timed out", 137: "timed out"}


def collect(folder: Path) -> dict[str, dict[str, Any]]:
    """The result of each step by its name; a step that was stopped has no values."""
    steps = {}
    for line in (folder / "steps.tsv").read_text().splitlines():
        name, code, seconds, reason = line.split("\t")
        result = {"status": STATUS.get(int(code), "failed"), "seconds": float(seconds)}
        result["reason"] = reason or f"exit code {code}"
        file = folder / f"{name}.json"
        if file.exists():
            result = json.loads(file.read_text()) | {"seconds": float(seconds)}
        steps[name] = result
    return steps


def main() -> None:
    """Collect, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    steps = collect(given.folder)
    passed = all(step["status"] in ("passed", "skipped") for step in steps.values())
    output = given.folder / "gpu_check.json"
    result = {"dry": given.dry, "passed": passed, "steps": steps}
    output.write_text(json.dumps(result, indent=2) + "\n")
    for name, step in steps.items():
        print(
            f"{name:<16} {step['status']:<10} {step['seconds']:>4.0f} s  {step.get('reason') or ''}"
        )
    print(f"results in {output}")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
