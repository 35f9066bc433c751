"""One step of `recipes/gpu_check.sh`: its arguments, its JSON file and its exit code."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
PASSED, FAILED, SKIPPED = 0, 1, 77  # exit codes; 77 as in automake


class SkippedError(Exception):
    """A step that this machine cannot run; the message is the reason."""


@dataclass
class Step:
    """What a step needs, and what it has found.

    Attributes:
        dry: Run on the CPU with tiny models.
        folder: For models and other files; shared by all steps.
        values: Measured values by name, for the JSON file.
        checks: `name`, `value`, the allowed `least` and `most`, and `passed`.
    """

    dry: bool
    folder: Path
    values: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> str:
        """cuda, or cpu for a dry run."""
        return "cpu" if self.dry else "cuda"

    def check(
        self, name: str, value: float, *, least: float = 0.0, most: float = float("inf")
    ) -> None:
        """Record a value; the step fails unless it is between `least` and `most`."""
        bounds = {"least": least, "most": None if most == float("inf") else most}
        passed = bool(least <= value <= most)  # False for NaN
        self.checks.append({"name": name, "value": float(value), **bounds, "passed": passed})

    def run(self, *command: str | Path) -> None:
        """Run a command in the repository; raises `CalledProcessError` if it fails."""
        text = [str(part) for part in command]
        print("$", *text, flush=True)
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        subprocess.run(text, cwd=ROOT, env=environment, check=True)

    def owl2(self, *arguments: str | Path) -> None:
        """Run a command of owl2."""
        self.run(sys.executable, "-m", "owl2", *arguments)

    def checkpoint(self, size: str) -> Path:
        """A checkpoint with random weights in bfloat16; written on first use."""
        path = self.folder / f"checkpoint-{size}"
        if not (path / "pytorch_model.bin.index.json").exists():
            shutil.rmtree(path, ignore_errors=True)  # of a run that was stopped
            script = ROOT / "recipes" / "speed" / "random_checkpoint.py"
            self.run(sys.executable, script, path, "--size", size)
        return path


def main(check: Callable[[Step], None], arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a step, write its JSON file, and exit with `PASSED`, `FAILED` or `SKIPPED`."""
    parser = argparse.ArgumentParser(description=sys.modules[check.__module__].__doc__)
    parser.add_argument("folder", type=Path, help="for models and other files")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    parser.add_argument("--dry", action="store_true", help="run on the CPU with tiny models")
    given = parser.parse_args(arguments)
    step = Step(given.dry, given.folder.absolute())
    started = time.perf_counter()
    reason = None
    try:
        check(step)
        code = PASSED if all(one["passed"] for one in step.checks) else FAILED
    except SkippedError as skipped:
        code, reason = SKIPPED, str(skipped)
        print(f"skipped: {reason}")
    except Exception as error:  # recorded, so that later steps run
        traceback.print_exc()
        code, reason = FAILED, f"{type(error).__name__}: {error}"
    for one in step.checks:
        print(f"{'ok' if one['passed'] else 'FAILED'}: {one['name']} = {one['value']:.4g}")
    result = {
        "status": {PASSED: "passed", FAILED: "failed", SKIPPED: "skipped"}[code],
        "reason": reason,
        "seconds": time.perf_counter() - started,
        "values": step.values,
        "checks": step.checks,
    }
    given.output.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(code)
