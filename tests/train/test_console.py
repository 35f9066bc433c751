"""A run on the terminal: what the panel and the plain lines say."""

import io
import logging
import sys

import pytest
from rich.console import Console

from owl2.train.console import LivePanel, ConsoleLogger, sparkline, size, terminal_view
from owl2.train.validation import Generation, ValidationResult

LINE = {
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
ANSWERS = (
    Generation("a, row 1", "<|image|>what  color\nis it?", "red", "blue"),
    Generation("a, row 2", "is it round?", "yes", "yes"),
)


def terminal():
    return Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)


def shown(panel):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(panel.render())
    return console.export_text()


def test_the_panel_shows_what_there_is_to_watch():
    panel = LivePanel(terminal(), "runs/x")
    panel.begin(0, 4800, [])
    panel.close()
    assert "step 0/4,800" in shown(panel)
    panel.step(21)
    panel.log(LINE | {"loss": 2.0, "step": 10}, 100.0)
    panel.log(LINE | {"gpu_memory_bytes": 61_200_000_000}, 3725.4)
    text = shown(panel)
    for part in (
        "runs/x",
        "step 21/4,800",
        "1:02:05 left",
        "0.4321  smoothed 0.5000  █▁",
        "2.00e-05  gradient norm 0.87",
        "85.3 samples/s  20,576 tokens/s  83.3 images/s",
        "1.2% of the time",
        "process 1.5 GB  GPU at most 61.2 GB",
        "5,120 samples  1,234,567 tokens  5,000 images  left out 3",
    ):
        assert part in text, part
    assert "validation" not in text


def test_the_panel_shows_the_last_look_beside_the_first():
    panel = LivePanel(terminal(), "runs/x")
    panel.look(ValidationResult(0, 2.5, 10, 4, 0, 1.0))
    panel.look(ValidationResult(20, 0.75, 10, 4, 1, 1.0, ANSWERS))
    text = shown(panel)
    assert "loss 0.7500 at step 20, 2.5000 at step 0  (4 samples, 1 left out)" in text
    assert "what color is it?  blue  wanted red" in text
    assert "is it round?  yes" in text and "wanted yes" not in text
    assert "<|image|>" not in text


def test_a_panel_that_goes_on_has_the_curve_from_before():
    panel = LivePanel(terminal(), "runs/x")
    panel.begin(2, 4, [{"loss": 4.0}, {"loss": 2.0}])
    panel.log(LINE | {"loss": 1.0}, 1.0)
    panel.close()
    assert "█▅▁" in shown(panel)


def test_markup_in_an_answer_is_text():
    panel = LivePanel(terminal(), "runs/[x]")
    panel.look(ValidationResult(1, 1.0, 1, 1, 0, 1.0, (Generation("a", "[b]q[/]", "[red]w", "[/x]a"),)))
    assert "[b]q[/]  [/x]a  wanted [red]w" in shown(panel)
    assert "runs/[x]" in shown(panel)


def test_warnings_appear_above_the_panel(monkeypatch):
    """A handler made before the panel holds the real stderr, which is the terminal."""
    console = terminal()
    raw = io.StringIO()
    monkeypatch.setattr(sys, "stderr", raw)
    monkeypatch.setattr(sys, "__stderr__", raw)
    handler = logging.StreamHandler()
    logger = logging.getLogger("tests.panel")
    logger.addHandler(handler)
    panel = LivePanel(console, "runs/x")
    panel.begin(0, 2, [])
    try:
        logger.warning("row 7 is odd")
        assert raw.getvalue() == ""
        assert "row 7 is odd" in console.file.getvalue()
    finally:
        panel.close()
        logger.removeHandler(handler)
    assert handler.stream is raw
    assert sys.stderr is raw


def test_plain_lines_are_few(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("owl2.train.console.time.perf_counter", lambda: clock[0])
    console = Console(file=io.StringIO(), width=60)
    view = terminal_view(console, "runs/x")
    assert isinstance(view, ConsoleLogger)
    view.begin(0, 50, [])
    for step in range(1, 51):
        clock[0] += 0.5
        view.step(step)
        view.log(LINE | {"step": step}, 9.6)
    lines = console.file.getvalue().splitlines()
    assert [int(line.split("/")[0].split()[1]) for line in lines] == [1, 11, 21, 31, 41, 50]
    assert lines[0] == (
        "step      1/50  loss 0.4321 (smoothed 0.5000)  rate 2.00e-05  85.3 samples/s  0:00:10 left"
    )


def test_plain_lines_show_every_look():
    console = Console(file=io.StringIO(), width=60)
    view = ConsoleLogger(console)
    view.begin(0, 50, [])
    view.look(ValidationResult(20, 0.75, 10, 4, 1, 1.0, ANSWERS))
    assert console.file.getvalue().splitlines() == [
        "step     20/50  validation loss 0.7500 (4 samples, 1 left out, 1.0 s)",
        "  what color is it?  answers 'blue', wanted 'red'",
        "  is it round?  answers 'yes', wanted 'yes'",
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
def test_curve(values, expected):
    assert sparkline(values) == expected


def test_a_long_curve_is_made_of_means():
    assert sparkline([0.0, 14.0, 7.0, 7.0, 0.0, 0.0], width=3) == "██▁"
    assert len(sparkline([float(number) for number in range(1000)])) == 40


def test_size():
    assert [size(n) for n in (999, 12_300, 5_600_000, 61_240_000_000)] == [
        "0.999 kB",
        "12.3 kB",
        "5.6 MB",
        "61.2 GB",
    ]
