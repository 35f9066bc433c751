"""Runs the `sh` blocks of the guides: `make docs`.

    python tests/run_docs.py [PAGE...]      such as finetune; default: all pages with `sh` blocks

Each page runs in its own directory, which contains recipes/ of this repository and the runs of
`make demo` or `make demo-quick`. The first command that fails ends the page.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.documents import blocks  # noqa: E402  # importable after the previous line


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
    sys.exit("the guides use the model of the demo: run `make demo` or `make demo-quick` first")


def main(names: list[str]) -> int:
    """The first exit code that is not 0."""
    pages = [ROOT / "docs" / f"{name}.md" for name in names]
    for page in pages or sorted((ROOT / "docs").glob("*.md")):
        if page.name != "log.md" and (code := run(page)):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
