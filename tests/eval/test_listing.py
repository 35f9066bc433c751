"""`owl2 eval --list`: what there is, and whether its data is."""

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from owl2.eval.listing import data_state, show_tasks
from owl2.eval.samples import Broken
from owl2.eval.task_config import recipes
from owl2.eval.tasks import find_tasks

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def listed(capsys):
    def run(data):
        show_tasks(data, Console(width=80))
        return capsys.readouterr().out

    return run


def test_every_task_is_there_with_its_state(listed, tmp_path, task):
    out = listed(tmp_path)
    rows = [line for line in out.splitlines() if line.count("│") == 6]
    table = {name: row for row in rows if (name := row.split("│")[2].strip())}
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


def test_a_task_without_files_is_read(task, samples, tmp_path, questions):
    assert data_state(task, None).found
    samples.insert(0, Broken("1", "lost"))
    assert data_state(task, None).found, "the second can be asked"
    samples[:] = [Broken("1", "lost")]
    assert "no question in it can be asked" in data_state(task, None).why


def test_all_files_have_to_be_there(tmp_path):
    [coco] = find_tasks("coco")
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "dataset_coco.json").write_text("[]")
    state = data_state(coco, tmp_path)
    assert not state.found
    assert state.why.startswith("val2014/COCO_val2014_*.jpg not in")
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "COCO_val2014_1.jpg").write_bytes(b"")
    assert data_state(coco, tmp_path).found, "images may lie where other tasks find them, too"


def test_one_of_two_names_is_enough(tmp_path):
    [mmbench] = find_tasks("mmbench")
    assert not data_state(mmbench, tmp_path).found
    (tmp_path / "MMBench_DEV_EN.tsv").write_text("")
    assert data_state(mmbench, tmp_path).found


def test_the_fixtures_are_complete():
    for task in find_tasks(None, "paper"):
        assert data_state(task, FIXTURES).found, task.name


def test_no_suite_is_imported():
    code = (
        "import sys; from rich.console import Console; from owl2.eval.listing import show_tasks\n"
        "show_tasks(None, Console())\n"
        "assert not {'lm_eval', 'lmms_eval', 'pycocoevalcap', 'matplotlib'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
