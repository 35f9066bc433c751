"""The running count, on a terminal and in a log file."""

import io

from rich.console import Console

from owl2.eval import progress
from owl2.eval.progress import Watch


def test_a_log_file_gets_a_line_now_and_then(plain, monkeypatch):
    with Watch(plain, "task") as watch:
        watch.begin(40, 0)
        for _ in range(39):
            watch.add(1)
        assert plain.file.getvalue() == ""
        watch.add(1)
    [line] = plain.file.getvalue().splitlines()
    assert line.startswith("task     40/40  ")
    assert line.endswith(" questions/s  0:00:00 left")
    assert watch.done == 40

    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    with Watch(plain, "next") as watch:
        watch.begin(4, 0)
        watch.add(2)
    assert "next      2/4  " in plain.file.getvalue()


def test_time_left(plain, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    with Watch(plain, "task") as watch:
        watch.begin(110, 10)
        now[0] += 30
        watch.add(25)
    text = plain.file.getvalue()
    assert "10/110  answered earlier; going on" in text
    assert "35/110  0.8 questions/s  0:01:30 left" in text, "earlier answers took no time now"


def test_nothing_left_to_do(plain):
    with Watch(plain, "task") as watch:
        watch.begin(10, 10)
    assert "10/10  answered earlier" in plain.file.getvalue()


def test_a_terminal_gets_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Watch(console, "task") as watch:
        watch.begin(4, 0)
        watch.add(3)
        watch.add(1)
    text = console.file.getvalue()
    assert "4/4" in text
    assert "questions/s" in text
    assert "━" in text
