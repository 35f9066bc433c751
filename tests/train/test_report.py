"""The report of a run: results, summary, peak memory and plot."""

import io

import pytest
import torch
from rich.console import Console

from owl2.train.checkpointer import TrainingProgress
from owl2.train.distributed import DistributedContext
from owl2.train.report import peak_memory, plot_loss, summarize_run, summary_table

END = TrainingProgress(
    step=20,
    samples=640,
    tokens=64_000,
    images=600,
    num_skipped=2,
    seconds=80.0,
    data_wait_seconds=4.0,
)


def line(step, loss, norm=1.0):
    smooth = loss * 1.1
    return {"step": step, "loss": loss, "smoothed_loss": smooth} | {
        "learning_rate": 1e-3,
        "grad_norm": norm,
    }


LINES = [line(1, 6.0), line(10, 1.5), line(20, 0.5)]
VALIDATIONS = [
    {"step": step, "loss": loss, "seconds": 2.0} for step, loss in ((0, 6.5), (10, 0.75), (20, 1.0))
]


def printed(results, files):
    console = Console(file=io.StringIO(), width=120)
    console.print(summary_table(results, files))
    return console.file.getvalue()


def test_results_of_a_run():
    results = summarize_run(END, LINES, VALIDATIONS)
    assert (results["samples_per_second"], results["tokens_per_second"]) == (8.0, 800.0)
    assert (results["data_wait_fraction"], results["first_loss"], results["loss"]) == (
        0.05,
        6.0,
        0.5,
    )
    assert results["validation"] == {
        "first": {"step": 0, "loss": 6.5},
        "last": {"step": 20, "loss": 1.0},
        "best": {"step": 10, "loss": 0.75},
    }
    assert results["validation_seconds"] == 6.0
    assert "validation" not in summarize_run(END, LINES, [])


def test_summary_shows_the_results_and_existing_files(tmp_path):
    peaks = {"peak_memory_bytes": {"process": 2_000_000_000, "gpu": 61_200_000_000}}
    (tmp_path / "run.json").touch()
    files = {"results": tmp_path / "run.json", "TensorBoard": tmp_path / "tensorboard"}
    text = printed(summarize_run(END, LINES, VALIDATIONS) | peaks, files)
    for part in (
        "20 in 0:01:20",
        "6.0000 → 0.5500 (smoothed)",
        "6.5000 → 1.0000; lowest 0.7500 at step 10",
        "640, 2 skipped",
        "64,000, 600",
        "8.0 samples/s, 800 tokens/s",
        "5.0% of the time",
        "process 2.0 GB, GPU 61.2 GB",
        "run.json",
    ):
        assert part in text, part
    assert "TensorBoard" not in text
    assert "validation" not in printed(summarize_run(END, LINES, []) | peaks, {})


class ThreeProcesses(DistributedContext):
    """The second of three processes; the first one uses 0 bytes, the third 7."""

    def __init__(self):
        super().__init__()
        self.rank, self.world_size = 1, 3

    def all_reduce_sum(self, *values):
        assert values[0] == values[2] == 0
        return [0.0, float(values[1]), 7.0]


def test_peak_memory_of_each_process():
    alone = peak_memory(torch.device("cpu"), DistributedContext())
    assert alone.keys() == {"process"}
    peaks = peak_memory(torch.device("cpu"), ThreeProcesses())
    assert peaks["process_by_rank"] == [0, peaks["process"], 7]
    assert peaks["process"] >= alone["process"] > 10_000_000


def saved_figure(monkeypatch, tmp_path, lines, validations=()):
    """The figure that `plot_loss` saves."""
    figure_module = pytest.importorskip("matplotlib.figure")
    kept = []
    save = figure_module.Figure.savefig

    def keep(self, *args, **kwargs):
        kept.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(figure_module.Figure, "savefig", keep)
    assert plot_loss(tmp_path / "loss.png", lines, validations, "runs/x")
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    return kept[0]


def test_plot_shows_training_and_validation_losses(monkeypatch, tmp_path):
    figure = saved_figure(monkeypatch, tmp_path, LINES, VALIDATIONS)
    loss, rate, norm = figure.axes
    curves = {curve.get_label(): curve.get_xydata().tolist() for curve in loss.lines}
    assert curves["training"] == [[1, 6.0], [10, 1.5], [20, 0.5]]
    assert curves["validation"] == [[0, 6.5], [10, 0.75], [20, 1.0]]
    assert loss.get_yscale() == "log" and loss.get_ylim()[0] > 0.1
    assert (rate.get_ylabel(), norm.get_ylabel()) == ("learning rate", "gradient norm")
    assert figure.get_suptitle() == "runs/x"


def test_axis_of_a_nearly_constant_loss_starts_at_zero(monkeypatch, tmp_path):
    loss = saved_figure(monkeypatch, tmp_path, [line(1, 2.0), line(2, 1.5)]).axes[0]
    assert loss.get_yscale() == "linear" and loss.get_ylim()[0] == 0
    assert "validation" not in [curve.get_label() for curve in loss.lines]


@pytest.mark.filterwarnings("error")
def test_batches_without_labels_leave_a_gap_in_the_plot(monkeypatch, tmp_path):
    lines = [line(1, 6.0), line(2, 0.0, norm=0.0), line(3, 0.1)]
    loss = saved_figure(monkeypatch, tmp_path, lines).axes[0]
    assert loss.get_ylim()[0] > 0.01
    saved_figure(monkeypatch, tmp_path, [line(1, 0.0, norm=0.0)])
