"""The running count, on a terminal and in a log file."""

import io

from rich.console import Console

from owl2.eval import progress
from owl2.eval.progress import Watch


def test_a_log_file_gets_a_line_now_and_then(plain, monkeypatch):
    with Watch(plain, "task", 40) as watch:
        for _ in range(39):
            watch.add(1, 1)
        assert plain.file.getvalue() == ""
        watch.add(1, 0)
    assert plain.file.getvalue() == "task     40/40  97.5% right  0:00:00 left\n"
    assert (watch.done, watch.right) == (40, 39)

    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    with Watch(plain, "next", 4) as watch:
        watch.add(2, 1)
    assert "next      2/4  50.0% right" in plain.file.getvalue()


def test_time_left(plain, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with Watch(plain, "task", 100) as watch:
        now[0] += 30
        watch.add(25, 20)
        assert watch.seconds == 30
    assert "80.0% right  0:01:30 left" in plain.file.getvalue()


def test_a_terminal_gets_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Watch(console, "task", 4) as watch:
        watch.add(3, 3)
        watch.add(1, 0)
    text = console.file.getvalue()
    assert "4/4" in text
    assert "75.0% right" in text
    assert "━" in text
