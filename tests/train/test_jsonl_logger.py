"""Files of a line a step, and how a resumed run goes on with them."""

import json

import pytest

from owl2.errors import InputError
from owl2.train.metrics import JsonlLog


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_after_the_state_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 3, "é": "ü"}\n{"step": 5}\n{"step": 7, "lo')
    lines = Lines(path, 3)
    lines.add({"step": 4})
    assert read(path) == lines.lines == [{"step": 1}, {"step": 3, "é": "ü"}, {"step": 4}]
    lines.close()


def test_a_run_from_the_start_has_no_old_lines(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    for _ in range(2):
        lines = Lines(path, 0)
        lines.add({"step": 1})
        lines.close()
    assert read(path) == [{"step": 1}]


def test_a_log_that_is_none(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\nnothing\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"log\.jsonl:2 .*overwrite=true"):
        Lines(path, 2)


def test_without_a_path_nothing_is_written():
    lines = Lines(None, 5)
    lines.add({"step": 6})
    lines.close()
    assert lines.lines == [{"step": 6}]


def test_the_smoothed_loss_goes_on_where_it_was(tmp_path):
    losses = [8.0, 2.0, 5.0, 1.0, 4.0]
    whole = RunLog(tmp_path / "whole", 0)
    for step, loss in enumerate(losses, start=1):
        whole.add({"step": step, "loss": loss})
    assert [line["smoothed_loss"] for line in whole.lines[:3]] == pytest.approx([8.0, 5.0, 5.0])
    resumed = RunLog(tmp_path / "whole", 3)
    for step in (4, 5):
        resumed.add({"step": step, "loss": losses[step - 1]})
    assert resumed.lines == whole.lines
    whole.close()
    resumed.close()
