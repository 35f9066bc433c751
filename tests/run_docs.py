"""Runs the `sh` blocks of the how-tos as they stand: `make docs`.

    python tests/run_docs.py [PAGE...]      e.g. finetune; default: all that have some

Each page runs in a folder of its own, in which are this repository's recipes/ and the demo's runs,
or those of `make demo-quick` in their place; the first command that fails ends it.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.documents import blocks  # noqa: E402  # found only from here on


def run(page: Path) -> int:
    """The exit code of a page's commands."""
    script = "\n".join(blocks(page.read_text(encoding="utf-8"), "sh"))
    if not script:
        return 0
    print(f"\n\033[1m{page.relative_to(ROOT)}\033[0m", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipes").symlink_to(ROOT / "recipes")
        (Path(folder) / "runs").mkdir()
        (Path(folder) / "runs" / "demo").symlink_to(_demo())
        bin_directory = Path(sys.executable).parent
        environment = os.environ | {"PATH": f"{bin_directory}:{os.environ['PATH']}"}
        return subprocess.run(
            ["bash", "-exuo", "pipefail", "-c", script], cwd=folder, env=environment
        ).returncode


def _demo() -> Path:
    for name in ("demo", "demo-quick"):
        if (ROOT / "runs" / name / "model").is_dir():
            return ROOT / "runs" / name
    sys.exit("the how-tos go on from the demo's model: run `make demo` or `make demo-quick`")


def main(names: list[str]) -> int:
    """The first exit code that is not 0."""
    pages = [ROOT / "docs" / f"{name}.md" for name in names]
    for page in pages or sorted((ROOT / "docs").glob("*.md")):
        if page.name != "log.md" and (code := run(page)):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
