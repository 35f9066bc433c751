"""Progress on a terminal and in a log file."""

import io

import pytest
from rich.console import Console

from owl2 import progress
from owl2.progress import ProgressReporter


@pytest.fixture
def log():
    """A console that is not a terminal."""
    return Console(file=io.StringIO(), width=80)


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, as a list of one number that a test changes."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_log_has_one_line_every_few_seconds_and_one_at_the_end(log, clock):
    with ProgressReporter(log, "task", total=40, unit="questions") as reporter:
        for seconds in [*[0.0] * 20, progress.LINE_SECONDS, *[0.0] * 18]:
            clock[0] += seconds
            reporter.advance()
        assert log.file.getvalue().splitlines() == ["task     21/40  4.2 questions/s  0:00:05 left"]
        reporter.advance()
    assert log.file.getvalue().splitlines()[1].startswith("task     40/40  ")
    assert reporter.completed == 40


def test_rate_and_remaining_time_exclude_items_of_an_earlier_run(log, clock):
    with ProgressReporter(log, "task", total=110, completed=10, unit="questions") as reporter:
        clock[0] += 30
        reporter.advance(25)
    first, second = log.file.getvalue().splitlines()
    assert "10/110" in first
    assert "35/110  0.8 questions/s  0:01:30 left" in second


def test_nothing_remains_to_be_done(log):
    with ProgressReporter(log, "task", total=10, completed=10):
        pass
    assert "10/10" in log.file.getvalue()


def test_unknown_total_and_status(log, clock):
    with ProgressReporter(log, "reading") as reporter:
        clock[0] += 5
        reporter.advance(1000, status="3 errors")
        clock[0] += 5
        reporter.advance(1000)
    assert log.file.getvalue().splitlines() == [
        "reading   1000  3 errors",
        "reading   2000  200.0 items/s",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_shown_before_the_delay(clock, terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with ProgressReporter(console, "index", total=4, delay=10) as reporter:
        clock[0] += 9
        reporter.advance(2)
        assert console.file.getvalue() == ""
        clock[0] += 9
        reporter.advance(2)
    assert "4/4" in console.file.getvalue()


def test_terminal_has_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with ProgressReporter(console, "task", total=4, unit="questions") as reporter:
        reporter.advance(3)
        reporter.advance(1)
    text = console.file.getvalue()
    assert "4/4" in text
    assert "questions/s" in text
    assert "━" in text
