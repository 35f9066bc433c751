"""The progress of a run on the terminal: the live panel and the lines."""

import io
import logging
import sys

import pytest
from rich.console import Console

from owl2.train.console import ConsoleLogger, LivePanel, sparkline
from owl2.train.validation import Generation, ValidationResult

METRICS = {
    "step": 20,
    "epoch": 0.1,
    "loss": 0.4321,
    "smoothed_loss": 0.5,
    "learning_rate": 2e-5,
    "grad_norm": 0.87,
    "samples": 5120,
    "tokens": 1_234_567,
    "images": 5000,
    "num_skipped": 3,
    "seconds": 60.0,
    "samples_per_second": 85.3,
    "tokens_per_second": 20_576.1,
    "images_per_second": 83.3,
    "data_wait_fraction": 0.012,
    "process_memory_bytes": 1_500_000_000,
}
GENERATIONS = (
    Generation("a, row 1", "<|image|>what  color\nis it?", "red", "blue"),
    Generation("a, row 2", "is it round?", "yes", "yes"),
)


def terminal():
    return Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)


def rendered(panel):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(panel.render())
    return console.export_text()


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("owl2.train.console.time.perf_counter", lambda: now[0])
    return now


def test_panel_shows_metrics(clock):
    panel = LivePanel(terminal(), "runs/x")
    panel.begin(0, 4800)
    panel.close()
    assert "step 0/4,800" in rendered(panel)
    clock[0] = 21.0
    panel.log_step(21)
    panel.log_metrics(METRICS | {"loss": 2.0, "step": 10})
    panel.log_metrics(METRICS | {"gpu_memory_bytes": 61_200_000_000})
    text = rendered(panel)
    for part in (
        "runs/x",
        "step 21/4,800",
        "1:19:39 left",
        "0.4321  smoothed 0.5000  █▁",
        "2.00e-05  gradient norm 0.87",
        "85.3 samples/s  20,576 tokens/s  83.3 images/s",
        "1.2% of the time",
        "process 1.5 GB  GPU peak 61.2 GB",
        "5,120 samples  1,234,567 tokens  5,000 images  3 skipped",
    ):
        assert part in text, part
    assert "validation" not in text


def test_panel_shows_the_last_and_the_first_validation():
    panel = LivePanel(terminal(), "runs/x")
    panel.log_validation(ValidationResult(0, 2.5, 10, 4, 0, 1.0))
    panel.log_validation(ValidationResult(20, 0.75, 10, 4, 1, 1.0, GENERATIONS))
    text = rendered(panel)
    assert "loss 0.7500 at step 20, 2.5000 at step 0  (4 samples, 1 skipped)" in text
    assert "what color is it?  blue  reference red" in text
    assert "is it round?  yes" in text and "reference yes" not in text
    assert "<|image|>" not in text


def test_panel_of_a_resumed_run_shows_earlier_losses():
    panel = LivePanel(terminal(), "runs/x", [{"loss": 4.0}, {"loss": 2.0}])
    panel.begin(2, 4)
    panel.log_metrics(METRICS | {"loss": 1.0})
    panel.close()
    assert "█▅▁" in rendered(panel)


def test_panel_does_not_interpret_markup():
    panel = LivePanel(terminal(), "runs/[x]")
    generation = Generation("a", "[b]q[/]", "[red]w", "[/x]a")
    panel.log_validation(ValidationResult(1, 1.0, 1, 1, 0, 1.0, (generation,)))
    assert "[b]q[/]  [/x]a  reference [red]w" in rendered(panel)
    assert "runs/[x]" in rendered(panel)


def test_warnings_appear_above_the_panel(monkeypatch):
    """A handler created before the panel writes to the original stderr, which is the terminal."""
    console = terminal()
    raw = io.StringIO()
    monkeypatch.setattr(sys, "stderr", raw)
    monkeypatch.setattr(sys, "__stderr__", raw)
    handler = logging.StreamHandler()
    logger = logging.getLogger("tests.panel")
    logger.addHandler(handler)
    panel = LivePanel(console, "runs/x")
    panel.begin(0, 2)
    try:
        logger.warning("row 7 is invalid")
        assert raw.getvalue() == ""
        assert "row 7 is invalid" in console.file.getvalue()
    finally:
        panel.close()
        logger.removeHandler(handler)
    assert handler.stream is raw
    assert sys.stderr is raw


def test_lines_are_at_least_five_seconds_apart(clock):
    console = Console(file=io.StringIO(), width=60)
    logger = ConsoleLogger(console)
    logger.begin(0, 50)
    for number in range(1, 51):
        clock[0] += 0.5
        logger.log_step(number)
        logger.log_metrics(METRICS | {"step": number})
    lines = console.file.getvalue().splitlines()
    assert [int(line.split("/")[0].split()[1]) for line in lines] == [1, 11, 21, 31, 41, 50]
    assert lines[1] == (
        "step     11/50  loss 0.4321 (smoothed 0.5000)  lr 2.00e-05  85.3 samples/s  0:00:20 left"
    )


def test_lines_show_every_validation():
    console = Console(file=io.StringIO(), width=60)
    logger = ConsoleLogger(console)
    logger.begin(0, 50)
    logger.log_validation(ValidationResult(20, 0.75, 10, 4, 1, 1.0, GENERATIONS))
    assert console.file.getvalue().splitlines() == [
        "step     20/50  validation loss 0.7500 (4 samples, 1 skipped, 1.0 s)",
        "  what color is it?  prediction 'blue', reference 'red'",
        "  is it round?  prediction 'yes', reference 'yes'",
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ""),
        ([3.0], "▁"),
        ([2.0, 2.0], "▁▁"),
        ([0.0, 7.0, 3.0], "▁█▄"),
        ([100.0, 1.0, 10.0], "█▁▅"),
    ],
)
def test_sparkline(values, expected):
    assert sparkline(values) == expected


def test_long_sparkline_shows_means():
    assert sparkline([0.0, 14.0, 7.0, 7.0, 0.0, 0.0], width=3) == "██▁"
    assert len(sparkline([float(number) for number in range(1000)])) == 40
