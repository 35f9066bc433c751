"""`owl2 eval --list`: what there is, and whether its data is."""

import subprocess
import sys

import pytest
from rich.console import Console

from owl2.eval.listing import data_state, show_tasks
from owl2.eval.questions import Broken
from owl2.eval.recipes import recipes


@pytest.fixture
def listed(capsys):
    def run(data):
        show_tasks(data, Console(width=160))
        return capsys.readouterr().out

    return run


def test_every_task_is_there_with_its_state(listed, tmp_path, task):
    out = listed(tmp_path)
    table = {line.split("│")[2].strip(): line for line in out.splitlines() if line.count("│") == 7}
    assert {*recipes(), "made"} == table.keys()
    assert "found" in table["made"]
    assert "missing" in table["vqav2"]
    assert "79.4" in table["vqav2"]
    assert "needed" in table["mm_vet"]
    assert "needed" not in table["vqav2"]
    [line] = [line for line in out.splitlines() if line.startswith("textvqa: ")]
    for words in (str(tmp_path / "textvqa"), "textvqa.org", "CC BY 4.0"):
        assert words in line


def test_without_a_folder_it_says_where_it_would_look(listed, task):
    assert "--data DIR" in listed(None).splitlines()[-1]


def test_data_that_is_wrong_or_broken_is_not_found(task, samples, tmp_path, questions):
    assert data_state(task, None).found
    samples.insert(0, Broken("1", "lost"))
    assert data_state(task, None).found, "the second can be asked"
    samples[:] = [Broken("1", "lost")]
    assert "no question in it can be asked" in data_state(task, None).why


def test_a_file_that_is_not_what_it_should_be(listed, tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "dataset_coco.json").write_text("[]")
    [line] = [line for line in listed(tmp_path).splitlines() if line.startswith("coco: ")]
    assert line.startswith("coco: wrong: ")
    assert "dataset_coco.json" in line


def test_no_suite_is_imported():
    code = (
        "import sys; from rich.console import Console; from owl2.eval.listing import show_tasks\n"
        "show_tasks(None, Console())\n"
        "assert not {'lm_eval', 'lmms_eval', 'pycocoevalcap', 'matplotlib'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
