"""What a run counts and measures: its log's figures, over processes, sessions and looks."""

import json
from types import SimpleNamespace

import pytest
import torch

from owl2.data.json_dataset import JsonDataset
from owl2.errors import InputError
from owl2.processing.processor import Owl2Processor
from owl2.train import metrics
from owl2.train.checkpointer import TrainingProgress
from owl2.train.distributed import DistributedContext
from owl2.train.jsonl_logger import RunLog
from owl2.train.metrics import Watch
from owl2.train.run import train
from owl2.train.train_dataloader import DataCounts
from owl2.train.validation import ValidationResult
from tests.train.runs import interrupt_at, quiet

ARGS = SimpleNamespace(device=torch.device("cpu"))
LOGS = {"loss": 1.0, "learning_rate": 1e-3, "grad_norm": 2.0}


class TwoTeam(DistributedContext):
    """The first of two processes; the other waited for 3 s more."""

    def __init__(self):
        super().__init__()
        self.size = 2

    def total(self, *numbers):
        return [2 * number + 3 for number in numbers]


class Told:
    """A view that keeps what it is told."""

    def __init__(self):
        self.told = []

    def __getattr__(self, name):
        return lambda *args: self.told.append((name, *args))


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return now


def make_watch(seen, waited, start=None, team=None, views=()):
    return Watch(
        RunLog(None, 0), views, start or TrainingProgress(), lambda: seen[0], lambda: waited[0],
        team or DistributedContext(),
    )  # fmt: skip


def state(step, steps=100):
    return SimpleNamespace(global_step=step, max_steps=steps, epoch=0.5)


def test_figures_are_of_the_time_since_the_line_before(clock):
    seen, waited, view = [DataCounts()], [0.0], Told()
    watch = make_watch(seen, waited, views=[view])
    watch.on_train_begin(ARGS, state(0), None)
    clock[0], seen[0], waited[0] = 102.0, DataCounts(20, 400, 10, 0), 0.5
    watch.on_log(ARGS, state(10), None, LOGS)
    clock[0], seen[0], waited[0] = 106.0, DataCounts(30, 900, 12, 1), 1.5
    watch.on_log(ARGS, state(20), None, LOGS)
    first, second = watch.log.lines
    assert (first["samples_per_second"], first["tokens_per_second"]) == (10.0, 200.0)
    assert (first["images_per_second"], first["data_wait_fraction"]) == (5.0, 0.25)
    assert (second["samples_per_second"], second["tokens_per_second"]) == (2.5, 125.0)
    assert (second["images_per_second"], second["data_wait_fraction"]) == (0.5, 0.25)
    assert [second[key] for key in ("samples", "tokens", "images", "num_skipped", "seconds")] == [
        30, 900, 12, 1, 6.0,
    ]  # fmt: skip
    assert second["process_memory_bytes"] > 10_000_000
    assert view.told[0] == ("begin", 0, 100, watch.log.lines)
    assert view.told[-1] == ("log", second, pytest.approx(6.0 / 20 * 80))


def test_looks_do_not_slow_the_figures_down(clock):
    seen, view = [DataCounts()], Told()
    watch = make_watch(seen, [0.0], views=[view])
    watch.on_train_begin(ARGS, state(0), None)
    clock[0], seen[0] = 110.0, DataCounts(20, 400, 10, 0)
    look = ValidationResult(10, 1.0, 1, 1, 0, 8.0)
    watch.looked(look)
    watch.on_log(ARGS, state(10), None, LOGS)
    clock[0], seen[0] = 112.0, DataCounts(40, 800, 20, 0)
    watch.on_log(ARGS, state(20), None, LOGS)
    assert [line["samples_per_second"] for line in watch.log.lines] == [10.0, 10.0]
    assert watch.log.lines[-1]["seconds"] == 12.0  # all of the time
    assert ("look", look) in view.told


def test_a_position_is_of_all_sessions_and_processes(clock):
    before = TrainingProgress(
        step=5, samples=50, tokens=500, images=40, skipped=1, seconds=9.0, waited=2.0
    )
    watch = make_watch([DataCounts(10, 100, 8, 2)], [1.0], before, TwoTeam())
    watch.on_train_begin(ARGS, state(5), None)
    clock[0] += 3.0
    assert watch.position(6) == TrainingProgress(
        step=6, samples=60, tokens=600, images=48, skipped=3, seconds=12.0, waited=2.0 + 5.0 / 2
    )


def test_views_are_closed_whatever_happens():
    view, broken = Told(), Told()
    broken.close = lambda: 1 / 0
    watch = make_watch([DataCounts()], [0.0], views=[view, broken])
    with pytest.raises(ZeroDivisionError), watch:
        pass
    assert view.told == [("close",)]


def test_an_epoch_of_nothing_is_refused():
    control = SimpleNamespace(should_training_stop=False)
    with pytest.raises(InputError, match=r"after 6 steps there was nothing to learn"):
        make_watch([DataCounts(skipped=9)], [0.0]).on_epoch_end(ARGS, state(6), control)
    make_watch([DataCounts(samples=1)], [0.0]).on_epoch_end(ARGS, state(6), control)


def test_on_a_gpu_its_memory_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 + device.index)
    held = metrics.memory_held(torch.device("cuda", 1))
    assert held["gpu_memory_bytes"] == 8 and held["process_memory_bytes"] > 10_000_000


# ------------------------------------------------------------------ in a run


def test_counts_of_a_run_are_those_of_its_samples(recipe, world):
    """Two epochs without cutting: each row twice; padding is not counted."""
    result = train(recipe(max_steps=12, augment="none"), quiet())
    facts = json.loads((result.output / "run.json").read_text(encoding="utf-8"))
    processor = Owl2Processor.from_pretrained(world / "start")
    lengths = [
        processor.for_training(sample.messages)["input_ids"].shape[1]
        for sample in JsonDataset(world / "data.json")
    ]
    assert len(set(lengths)) > 1
    assert facts["tokens"] == 2 * sum(lengths)
    assert facts["images"] == facts["samples"] == 2 * len(lengths)
    assert 0 < facts["data_wait_fraction"] < 1
    assert facts["tokens_per_second"] == pytest.approx(facts["tokens"] / facts["seconds"])


def test_the_last_step_has_a_line(recipe):
    result = train(recipe(max_steps=5, logging_steps=3), quiet())
    lines = [json.loads(line) for line in (result.output / "log.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 3, 5]


def test_counts_go_on_after_a_stop(recipe, monkeypatch, tmp_path):
    whole = train(recipe(output=str(tmp_path / "whole")), quiet())
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        train(recipe(), quiet())
    resumed = train(recipe(), quiet())
    counted = [
        {
            line["step"]: [line[key] for key in ("samples", "tokens", "images", "num_skipped")]
            for line in map(json.loads, (result.output / "log.jsonl").open())
        }
        for result in (whole, resumed)
    ]
    assert counted[0].items() <= counted[1].items()  # which has a line where it was stopped, too
