"""Metrics of a run: rates between log lines, totals over processes and sessions, log files."""

import json
from types import SimpleNamespace

import pytest
import torch

from owl2.data.json_dataset import JsonDataset
from owl2.errors import ErrorCode
from owl2.processing.processor import Owl2Processor
from owl2.train import metrics
from owl2.train.checkpointer import TrainingProgress
from owl2.train.distributed import DistributedContext
from owl2.train.metrics import JsonlLog, MetricsCallback
from owl2.train.run import train
from owl2.train.train_dataloader import DataCounts
from owl2.train.validation import ValidationResult
from tests.errors import raises_input_error
from tests.train.runs import quiet, read_jsonl, train_until


def arguments(device="cpu"):
    return SimpleNamespace(
        device=torch.device(device),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        world_size=1,
    )


class TwoProcesses(DistributedContext):
    """The main process of two; the other one waited 3 s longer for data."""

    def __init__(self):
        super().__init__()
        self.world_size = 2

    def all_reduce_sum(self, *values):
        return [2 * value + 3 for value in values]


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def make_callback(tmp_path):
    def make(data, start=None, context=None):
        context = context or DistributedContext()
        return MetricsCallback(tmp_path, start or TrainingProgress(), data, context)

    return make


def data_of(counts=(), wait_seconds=0.0, epoch_size=24):
    return SimpleNamespace(
        counts=DataCounts(*counts), wait_seconds=wait_seconds, epoch_size=epoch_size
    )


def state(step):
    return SimpleNamespace(global_step=step, max_steps=100)


def log(callback, step, args=None):
    """The line that the callback has written."""
    logs = {"loss": 1.0, "learning_rate": 1e-3, "grad_norm": 2.0, "epoch": 0.0}
    callback.on_log(args or arguments(), state(step), None, logs)
    return callback.log.lines[-1]


def test_rates_are_measured_since_the_previous_line(clock, make_callback):
    data = data_of()
    callback = make_callback(data)
    callback.on_train_begin(arguments(), state(0), None)
    clock[0], data.counts, data.wait_seconds = 102.0, DataCounts(20, 400, 10, 0), 0.5
    first = log(callback, 10)
    clock[0], data.counts, data.wait_seconds = 106.0, DataCounts(30, 900, 12, 1), 1.5
    second = log(callback, 20)
    assert [first["step"], second["step"]] == [10, 20]
    assert (first["samples_per_second"], first["tokens_per_second"]) == (10.0, 200.0)
    assert (first["images_per_second"], first["data_wait_fraction"]) == (5.0, 0.25)
    assert (second["samples_per_second"], second["tokens_per_second"]) == (2.5, 125.0)
    assert (second["images_per_second"], second["data_wait_fraction"]) == (0.5, 0.25)
    totals = [second[key] for key in ("samples", "tokens", "images", "num_skipped", "seconds")]
    assert totals == [30, 900, 12, 1, 6.0]
    assert second["process_memory_bytes"] > 10_000_000
    assert (first["epoch"], second["epoch"]) == (40 / 24, 80 / 24)


def test_validation_time_does_not_reduce_rates(clock, make_callback):
    data = data_of()
    callback = make_callback(data)
    callback.on_train_begin(arguments(), state(0), None)
    clock[0], data.counts = 110.0, DataCounts(20, 400, 10, 0)
    validation = ValidationResult(10, 1.0, 1, 1, 0, 8.0)
    callback.on_evaluate(arguments(), state(10), None, metrics=validation)
    log(callback, 10)
    clock[0], data.counts = 112.0, DataCounts(40, 800, 20, 0)
    log(callback, 20)
    assert [line["samples_per_second"] for line in callback.log.lines] == [10.0, 10.0]
    assert callback.log.lines[-1]["seconds"] == 12.0  # the total includes it
    assert [line["step"] for line in callback.validation_log.lines] == [10]


def test_progress_includes_earlier_sessions_and_other_processes(clock, make_callback):
    before = TrainingProgress(5, 50, 500, 40, 1, seconds=9.0, data_wait_seconds=2.0)
    data = data_of((10, 100, 8, 2), wait_seconds=1.0)
    callback = make_callback(data, before, TwoProcesses())
    callback.on_train_begin(arguments(), state(5), None)
    clock[0] += 3.0
    assert callback.progress(6) == TrainingProgress(
        6, 60, 600, 48, 3, seconds=12.0, data_wait_seconds=2.0 + 5.0 / 2
    )


def test_gpu_memory_is_logged_on_a_gpu(monkeypatch, make_callback):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 + device.index)
    line = log(make_callback(data_of()), 1, arguments("cuda:1"))
    assert line["gpu_memory_bytes"] == 8 and line["process_memory_bytes"] > 10_000_000


def test_smoothed_loss_continues_in_a_resumed_run(tmp_path, make_callback):
    losses = [8.0, 2.0, 5.0, 1.0, 4.0]

    def log_losses(callback, first):
        for step, loss in enumerate(losses[first:], start=first + 1):
            logs = {"loss": loss, "learning_rate": 1e-3, "grad_norm": 2.0}
            callback.on_log(arguments(), state(step), None, logs)
        return [line["smoothed_loss"] for line in callback.log.lines]

    uninterrupted = log_losses(make_callback(data_of()), 0)
    assert uninterrupted[:3] == pytest.approx([8.0, 5.0, 5.0])
    resumed = make_callback(data_of(), TrainingProgress(step=3))
    assert log_losses(resumed, 3) == uninterrupted


# ------------------------------------------------------------------ log files


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 3, "é": "ü"}\n{"step": 5}\n{"step": 7, "lo')
    lines = JsonlLog(path, 3)
    lines.add({"step": 4})
    assert read_jsonl(path) == lines.lines == [{"step": 1}, {"step": 3, "é": "ü"}, {"step": 4}]


def test_new_run_replaces_an_old_log(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    for _ in range(2):
        lines = JsonlLog(path, 0)
        lines.add({"step": 1})
    assert read_jsonl(path) == [{"step": 1}]


def test_damaged_log_is_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\nnothing\n{"step": 2}\n')
    with raises_input_error(ErrorCode.INVALID_FORMAT, "log.jsonl, line 2", "overwrite=true"):
        JsonlLog(path, 2)


def test_log_without_a_path_is_kept_in_memory():
    lines = JsonlLog(None, 5)
    lines.add({"step": 6})
    assert lines.lines == [{"step": 6}]


# ------------------------------------------------------------------ in a run


def test_totals_of_a_run_are_those_of_its_samples(recipe, world):
    """Two epochs without truncation: each row counts twice, and padding does not count."""
    result = train(recipe(max_steps=12, augment="none"), quiet())
    results = json.loads((result.output / "run.json").read_text(encoding="utf-8"))
    processor = Owl2Processor.from_pretrained(world / "start")
    lengths = [
        processor.for_training(sample.messages)["input_ids"].shape[1]
        for sample in JsonDataset(world / "data.json")
    ]
    assert len(set(lengths)) > 1
    assert results["tokens"] == 2 * sum(lengths)
    assert results["images"] == results["samples"] == 2 * len(lengths)
    assert 0 < results["data_wait_fraction"] < 1
    assert results["tokens_per_second"] == pytest.approx(results["tokens"] / results["seconds"])


def test_last_step_is_logged(recipe):
    result = train(recipe(max_steps=5, logging_steps=3), quiet())
    assert [line["step"] for line in read_jsonl(result.output / "log.jsonl")] == [1, 3, 5]


def test_totals_continue_after_a_stop(recipe, uninterrupted):
    train_until(6, recipe())
    resumed = train(recipe(), quiet())
    totals = [
        {
            line["step"]: [line[key] for key in ("samples", "tokens", "images", "num_skipped")]
            for line in read_jsonl(result.output / "log.jsonl")
        }
        for result in (uninterrupted, resumed)
    ]
    assert totals[0].items() <= totals[1].items()  # the resumed run also logs the stop
