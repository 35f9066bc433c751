"""`owl2 eval --list`: all tasks, and whether their data exists."""

from pathlib import Path

import pytest
from rich.console import Console

from owl2.eval.listing import missing_data, print_tasks
from owl2.eval.samples import InvalidEvalSample
from owl2.eval.task_config import task_configs
from owl2.eval.tasks import find_tasks

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def listing(capsys):
    def run(data):
        print_tasks(data, Console(width=80))
        return capsys.readouterr().out

    return run


def test_all_tasks_are_listed(listing, tmp_path, task):
    out = listing(tmp_path)
    rows = [line for line in out.splitlines() if line.count("│") == 6]
    table = {name: row for row in rows if (name := row.split("│")[2].strip())}
    assert {*task_configs(), "tiny"} == table.keys()
    assert "found" in table["tiny"]
    assert "missing" in table["vqav2"]
    assert "79.4" in table["vqav2"]
    assert "required" in table["mm_vet"]
    assert "required" not in table["vqav2"]
    [line] = [line for line in out.splitlines() if line.startswith("textvqa: ")]
    for needle in (str(tmp_path / "textvqa"), "textvqa.org", "CC BY 4.0"):
        assert needle in line


def test_option_for_the_data_is_named(listing, task):
    assert "--data DIR" in listing(None).splitlines()[-1]


def test_task_without_files_is_read(task, samples):
    assert not missing_data(task, None)
    samples.insert(0, InvalidEvalSample("1", "lost"))
    assert not missing_data(task, None), "the second sample is valid"
    samples[:] = [InvalidEvalSample("1", "lost")]
    assert missing_data(task, None)


def test_all_files_are_required(tmp_path):
    [coco] = find_tasks("coco")
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "dataset_coco.json").write_text("[]")
    assert missing_data(coco, tmp_path).startswith("val2014/COCO_val2014_*.jpg ")
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "COCO_val2014_1.jpg").write_bytes(b"")
    assert not missing_data(coco, tmp_path), "tasks may share images"


def test_one_of_two_alternative_files_is_enough(tmp_path):
    [mmbench] = find_tasks("mmbench")
    assert missing_data(mmbench, tmp_path)
    (tmp_path / "MMBench_DEV_EN.tsv").write_text("")
    assert not missing_data(mmbench, tmp_path)


def test_fixtures_are_complete():
    for task in find_tasks(None, "paper"):
        assert not missing_data(task, FIXTURES), task.name
