"""What is left of a run for people: the summary, the peaks, the plot."""

import io

import pytest
import torch
from rich.console import Console

from owl2.train.checkpointer import TrainingProgress
from owl2.train.distributed import DistributedContext
from owl2.train.report import peak_memory, plot_loss, summarize_run, summary_table

END = TrainingProgress(
    step=20, samples=640, tokens=64_000, images=600, skipped=2, seconds=80.0, waited=4.0
)


def line(step, loss, norm=1.0):
    smooth = loss * 1.1
    return {"step": step, "loss": loss, "smoothed_loss": smooth} | {
        "learning_rate": 1e-3,
        "grad_norm": norm,
    }


LINES = [line(1, 6.0), line(10, 1.5), line(20, 0.5)]
LOOKS = [
    {"step": step, "loss": loss, "seconds": 2.0} for step, loss in ((0, 6.5), (10, 0.75), (20, 1.0))
]


def in_words(facts, files):
    console = Console(file=io.StringIO(), width=120)
    console.print(summary(facts, files))
    return console.file.getvalue()


def test_what_was_measured():
    facts = measured(END, LINES, LOOKS)
    assert (facts["samples_per_second"], facts["tokens_per_second"]) == (8.0, 800.0)
    assert (facts["data_wait_fraction"], facts["first_loss"], facts["loss"]) == (0.05, 6.0, 0.5)
    assert facts["validation"] == {
        "first": {"step": 0, "loss": 6.5},
        "last": {"step": 20, "loss": 1.0},
        "best": {"step": 10, "loss": 0.75},
    }
    assert facts["validation_seconds"] == 6.0
    assert "validation" not in measured(END, LINES, [])


def test_the_summary_says_what_came_of_it(tmp_path):
    peaks = {"peak_memory_bytes": {"process": 2_000_000_000, "gpu": 61_200_000_000}}
    (tmp_path / "run.json").touch()
    files = {"figures": tmp_path / "run.json", "TensorBoard": tmp_path / "tensorboard"}
    text = in_words(measured(END, LINES, LOOKS) | peaks, files)
    for part in (
        "20 in 0:01:20",
        "6.0000 → 0.5500 (smoothed)",
        "6.5000 → 1.0000; least 0.7500 at step 10",
        "640, 2 left out",
        "64,000, 600",
        "8.0 samples/s, 800 tokens/s",
        "5.0% of the time",
        "process 2 GB, GPU 61.2 GB",
        "run.json",
    ):
        assert part in text, part
    assert "TensorBoard" not in text  # there is none
    assert "validation" not in in_words(measured(END, LINES, []) | peaks, {})


class Three(DistributedContext):
    """The second of three processes: the first holds nothing, the third 7 bytes."""

    def __init__(self):
        super().__init__()
        self.rank, self.size = 1, 3

    def total(self, *numbers):
        assert numbers[0] == numbers[2] == 0
        return [0.0, float(numbers[1]), 7.0]


def test_peaks_of_every_process():
    alone = peak_memory(torch.device("cpu"), DistributedContext())
    assert alone.keys() == {"process"}
    peaks = peak_memory(torch.device("cpu"), Three())
    assert peaks["process_by_rank"] == [0, peaks["process"], 7]
    assert peaks["process"] >= alone["process"] > 10_000_000


def drawn(monkeypatch, tmp_path, lines, looks=()):
    """The figure as it was saved."""
    figure_module = pytest.importorskip("matplotlib.figure")
    kept = []
    save = figure_module.Figure.savefig

    def keep(self, *args, **kwargs):
        kept.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(figure_module.Figure, "savefig", keep)
    assert plot_loss(tmp_path / "loss.png", lines, looks, "runs/x")
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    return kept[0]


def test_the_plot_shows_training_and_validation(monkeypatch, tmp_path):
    figure = drawn(monkeypatch, tmp_path, LINES, LOOKS)
    loss, rate, norm = figure.axes
    curves = {curve.get_label(): curve.get_xydata().tolist() for curve in loss.lines}
    assert curves["training"] == [[1, 6.0], [10, 1.5], [20, 0.5]]
    assert curves["validation"] == [[0, 6.5], [10, 0.75], [20, 1.0]]
    assert loss.get_yscale() == "log" and loss.get_ylim()[0] > 0.1
    assert (rate.get_ylabel(), norm.get_ylabel()) == ("rate", "gradient")
    assert figure.get_suptitle() == "runs/x"


def test_a_loss_that_hardly_falls_is_drawn_from_zero(monkeypatch, tmp_path):
    loss = drawn(monkeypatch, tmp_path, [line(1, 2.0), line(2, 1.5)]).axes[0]
    assert loss.get_yscale() == "linear" and loss.get_ylim()[0] == 0
    assert "validation" not in [curve.get_label() for curve in loss.lines]


@pytest.mark.filterwarnings("error")
def test_batches_without_labels_leave_a_gap(monkeypatch, tmp_path):
    lines = [line(1, 6.0), line(2, 0.0, norm=0.0), line(3, 0.1)]
    loss = drawn(monkeypatch, tmp_path, lines).axes[0]
    assert loss.get_ylim()[0] > 0.01
    drawn(monkeypatch, tmp_path, [line(1, 0.0, norm=0.0)])
