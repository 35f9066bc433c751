"""The notebooks in examples/ run without changes in an empty directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
ON_EACH = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def test_examples_exist():
    names = {notebook.stem for notebook in NOTEBOOKS}
    assert names == {"ask_about_images", "attention_maps", "finetune_on_100_images"}
    readme = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    assert all(f"({name}.ipynb)" in readme for name in names)


@ON_EACH
def test_notebook_has_no_outputs_and_one_model_variable(notebook):
    code = ["".join(cell["source"]) for cell in cells_of(notebook) if cell["cell_type"] == "code"]
    assert not [cell for cell in cells_of(notebook) if cell.get("outputs")]
    assert [text for text in code if 'MODEL = "tiny"' in text] == code[:1]
    assert "MAGAer13/mplug-owl2-llama2-7b" in code[0]


@pytest.mark.slow  # run by `make docs`
@ON_EACH
def test_notebook_runs(notebook, tmp_path):
    """Executes all code cells in one namespace, as Jupyter does, in a process of their own."""
    code = "\n\n".join("".join(c["source"]) for c in cells_of(notebook) if c["cell_type"] == "code")
    script = tmp_path / f"{notebook.stem}.py"
    script.write_text(code, encoding="utf-8")
    folder = tmp_path / "empty"
    folder.mkdir()
    run = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    if notebook.stem == "finetune_on_100_images":
        before, after = [
            int(word) for word in run.stdout.replace("%", " ").split() if word.isdigit()
        ][-2:]
        assert after >= 80 > before
