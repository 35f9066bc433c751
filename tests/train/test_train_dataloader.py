"""The data loader of a run: streams, weights, invalid samples, exact position."""

import io
import json
import tarfile

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from owl2.data.dataloader import MixtureBatchSampler, MixtureDataLoader
from owl2.data.sample import InvalidSample
from owl2.errors import ErrorCode, InputError
from owl2.train.run import train
from owl2.train.train_dataloader import TrainDataLoader
from owl2.train.trainer import run_steps
from tests.errors import raises_input_error
from tests.train.runs import assert_same_weights, quiet, read_jsonl, recorded, train_until, weights
from tests.train.tiny import QUESTION, RandomSamples, collate


@pytest.fixture
def shards(tmp_path):
    """Three shards of eight images with captions; one image of the third is broken."""
    number = 0
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard:03}.tar", "w") as tar:
            for place in range(8):
                data = io.BytesIO()
                Image.new("RGB", (9, 9), (number * 10, 0, 0)).save(data, "PNG")
                broken = (shard, place) == (2, 0)
                content = {"png": b"no" if broken else data.getvalue(), "txt": b"red " * 3}
                for ending, blob in content.items():
                    entry = tarfile.TarInfo(f"{number:05}.{ending}")
                    entry.size = len(blob)
                    tar.addfile(entry, io.BytesIO(blob))
                number += 1
    return str(tmp_path / "{000..002}.tar")


@pytest.fixture
def mixed(world, tmp_path, shards):
    """A stream, a file, and a file with two invalid rows."""
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "red"}]
    rows = [
        {"image": str(world / "0.png"), "conversations": turns},
        {"image": "missing.png", "conversations": turns},
        {"conversations": turns},
    ]
    (tmp_path / "bad.json").write_text(json.dumps(rows), encoding="utf-8")
    return [
        {"shards": shards, "count": 10},
        {"file": str(world / "data.json")},
        {"file": str(tmp_path / "bad.json")},
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True, "dataloader_num_workers": 2},
        pytest.param({"packing": True}, marks=pytest.mark.slow),
        pytest.param({"dataloader_num_workers": 2}, marks=pytest.mark.slow),
        pytest.param({"group_by_length": True, "shuffle_buffer": 3}, marks=pytest.mark.slow),
    ],
)
def test_stopped_run_resumes_with_the_next_samples(recipe, tmp_path, mixed, settings):
    settings = settings | {"data": mixed, "on_invalid_sample": "skip", "max_steps": 22}
    uninterrupted = train(recipe(output=str(tmp_path / "uninterrupted"), **settings), quiet())
    skipped = read_jsonl(uninterrupted.output / "skipped.jsonl")
    assert {line["code"] for line in skipped} == {
        ErrorCode.MISSING_IMAGE,
        ErrorCode.IMAGE_COUNT_MISMATCH,
        ErrorCode.BROKEN_IMAGE,
    }
    results = json.loads((uninterrupted.output / "run.json").read_text(encoding="utf-8"))
    assert results["num_skipped"] == len(skipped)
    assert results["samples"] == 22 * 4 - len(skipped)
    stopped = train_until(13, recipe(**settings))
    # As if the run had skipped more samples after the checkpoint and then been killed.
    with (stopped.output / "skipped.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"source": "later"}\n{"sou')
    resumed = train(recipe(**settings), quiet())
    assert_same_weights(weights(uninterrupted.model), weights(resumed.model))
    assert read_jsonl(resumed.output / "skipped.jsonl") == skipped


def test_new_run_removes_the_skipped_samples_of_an_earlier_run(recipe, mixed):
    settings = {"data": mixed, "on_invalid_sample": "skip", "max_steps": 12}
    first = train(recipe(**settings), quiet())
    assert read_jsonl(first.output / "skipped.jsonl")
    train(recipe(overwrite=True), quiet())
    assert not (first.output / "skipped.jsonl").exists()


def test_run_that_stopped_at_an_invalid_row_can_skip_it(recipe, mixed, tmp_path):
    settings = {"data": mixed, "max_steps": 12, "save_steps": 1}
    uninterrupted = train(
        recipe(output=str(tmp_path / "uninterrupted"), on_invalid_sample="skip", **settings),
        quiet(),
    )
    with pytest.raises(InputError) as error:
        train(recipe(**settings), quiet())
    assert "on_invalid_sample=skip" in str(error.value)
    resumed = train(recipe(on_invalid_sample="skip", **settings), quiet())
    assert_same_weights(weights(uninterrupted.model), weights(resumed.model))


def test_changed_file_stops_the_run_also_with_skip(make_loader):
    def changed(samples):
        error = InputError("a.jsonl has changed since: start again", ErrorCode.FILE_CHANGED)
        skipped = [InvalidSample.from_error("a.jsonl", error)]
        return collate(samples)._replace(skipped=skipped)

    loader = make_loader("skip")
    loader.loader.collate = changed
    with raises_input_error(ErrorCode.FILE_CHANGED, "a.jsonl"):
        next(iter(loader))


def test_weighted_sources_have_no_epochs(recipe, mixed, world):
    data = [
        {"shards": mixed[0]["shards"], "weight": 0.5},
        {"file": str(world / "data.json"), "weight": 2.0},
    ]
    console = recorded()
    result = train(recipe(data=data, on_invalid_sample="skip", max_steps=12), console)
    assert "Weighted sources, images of" in console.file.getvalue()
    assert {line["epoch"] for line in read_jsonl(result.output / "log.jsonl")} == {None}


def test_stream_without_count_and_weight_is_refused(recipe, shards):
    with raises_input_error(ErrorCode.MISSING_VALUE, ".tar", "`count`", "`weight`"):
        train(recipe(data=[{"shards": shards}]), quiet())


def test_log_has_the_epochs_of_the_data(recipe):
    result = train(recipe(max_steps=15, logging_steps=3), quiet())  # 24 samples, 4 per step
    epochs = {line["step"]: line["epoch"] for line in read_jsonl(result.output / "log.jsonl")}
    assert epochs == {1: 1 / 6, 3: 0.5, 6: 1.0, 9: 1.5, 12: 2.0, 15: 2.5}


@pytest.mark.parametrize(
    ("epochs", "samples", "steps"), [(1.0, 24, 6), (1.0, 25, 7), (0.5, 24, 3), (1.1, 40, 11)]
)
def test_steps_of_epochs(make_recipe, epochs, samples, steps):
    recipe = make_recipe(epochs=epochs, max_steps=None, batch_size=4)
    assert run_steps(recipe, samples) == steps
    assert run_steps(make_recipe(max_steps=7), samples) == 7


# ------------------------------------------------------------------ position


@pytest.fixture
def make_loader(tmp_path):
    def make(on_invalid_sample="stop", images=True, accelerator=None, **options):
        samples = RandomSamples(10, images)
        loader = MixtureDataLoader(MixtureBatchSampler(samples, 2), collate)
        accelerator = accelerator or Accelerator(cpu=True)
        return TrainDataLoader(loader, accelerator, tmp_path, on_invalid_sample, **options)

    return make


def test_loader_resumes_after_the_saved_batch(make_loader, tmp_path):
    one = make_loader()
    batches = iter(one)
    next(batches), next(batches)
    one.save(tmp_path)
    third = next(batches)
    other = make_loader()
    other.load(tmp_path)
    assert next(iter(other))["input_ids"].tolist() == third["input_ids"].tolist()


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[]",
        "{}",
        '{"world_size": 1, "num_skipped": 0}',
        '{"num_skipped": 0, "loader": null}',
    ],
)
def test_damaged_position_is_refused(make_loader, tmp_path, content):
    if content is not None:
        (tmp_path / "data_state_0.json").write_text(content, encoding="utf-8")
    with raises_input_error(ErrorCode.RESUME_MISMATCH, "data_state_0.json", "overwrite=true"):
        make_loader().load(tmp_path)


@pytest.mark.parametrize(
    ("change", "saved"), [({"world_size": 2}, "([10], 2)"), ({"sizes": [11]}, "([11], 1)")]
)
def test_position_in_other_processes_or_data_is_refused(make_loader, tmp_path, change, saved):
    make_loader().save(tmp_path)
    state = json.loads((tmp_path / "data_state_0.json").read_text(encoding="utf-8"))
    assert change.keys() <= state.keys()
    (tmp_path / "data_state_0.json").write_text(json.dumps(state | change))
    with raises_input_error(ErrorCode.RESUME_MISMATCH, saved, "([10], 1)"):
        make_loader().load(tmp_path)


@pytest.mark.parametrize(
    ("num_rows", "max_steps", "num_skipped"),
    [(200, 50, 100), (6, 50, 8), (200, 3, 12)],
    ids=["at the start", "epoch", "run"],
)
def test_run_without_valid_samples_stops(recipe, tmp_path, num_rows, max_steps, num_skipped):
    rows = [{"image": f"{n}.png", "caption": "red"} for n in range(num_rows)]
    (tmp_path / "missing.json").write_text(json.dumps(rows), encoding="utf-8")
    settings = {
        "data": [{"file": str(tmp_path / "missing.json")}],
        "on_invalid_sample": "skip",
        "max_steps": max_steps,
    }
    with raises_input_error(ErrorCode.EMPTY_DATASET, f"{num_skipped} samples", "skipped.jsonl"):
        train(recipe(**settings), quiet())


def test_resumed_run_may_start_with_invalid_samples(make_loader, tmp_path):
    one = make_loader("skip")
    next(iter(one))
    one.update_counts()
    one.save(tmp_path)
    other = make_loader("skip")
    other.load(tmp_path)
    invalid = [InvalidSample("row 1", "no answer", ErrorCode.NO_LABELS)] * 20
    other.loader.collate = lambda samples: collate(samples)._replace(num_samples=0, skipped=invalid)
    next(iter(other))
    other.update_counts()
    assert other.counts.num_skipped == 20


def test_batches_are_counted(make_loader):
    one = make_loader()
    batches = iter(one)
    received = [next(batches) for _ in range(3)]
    assert one.counts.samples == 0  # until the processes add their counts
    one.update_counts()
    tokens = sum(int(batch["attention_mask"].sum()) for batch in received)
    assert one.counts == (6, tokens, 6, 0)


class TwoProcesses(Accelerator):
    """This process and a second one, whose batches have no images."""

    num_processes = 2

    def reduce(self, tensor, reduction="mean", scale=1.0):
        assert reduction == "sum"
        return tensor * torch.tensor([2, 2, 1, 2])


@pytest.mark.parametrize("accelerator", [Accelerator, TwoProcesses])
def test_data_without_images_are_refused_if_nothing_else_is_trained(make_loader, accelerator):
    run_size = 4 * accelerator(cpu=True).num_processes
    settings = {"accelerator": accelerator(cpu=True), "run_size": run_size, "needs_images": True}
    one = make_loader(images=False, **settings)
    batches = iter(one)
    next(batches)
    one.update_counts()
    next(batches)
    with raises_input_error(ErrorCode.MISSING_IMAGE, f"{run_size} samples"):
        one.update_counts()


@pytest.mark.parametrize("accelerator", [Accelerator, TwoProcesses])
def test_an_image_of_any_process_is_enough(make_loader, accelerator):
    settings = {"accelerator": accelerator(cpu=True), "run_size": 6, "needs_images": True}
    one = make_loader(**settings)
    batches = iter(one)
    next(batches)
    one.update_counts()
    one.loader.dataset.images = False
    for _ in range(4):
        next(batches)
        one.update_counts()
    assert one.counts.images == 2
