"""Runs on several sources: streams, weights, samples that cannot be used; where they stand."""

import io
import json
import tarfile

import pytest
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from owl2.data.dataloader import MixtureDataLoader
from owl2.data.sample import InvalidSample
from owl2.errors import ErrorCode, InputError
from owl2.train.run import train
from owl2.train.train_dataloader import TrainDataLoader, run_steps
from tests.train.runs import assert_same_weights, interrupt_at, quiet, weights
from tests.train.tiny import QUESTION, RandomSamples, collate


@pytest.fixture
def shards(tmp_path):
    """Three shards of eight images with captions; the third's first has no image that opens."""
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
    """A stream, a file, and a file with two rows that cannot be used."""
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "red"}]
    rows = [
        {"image": str(world / "0.png"), "conversations": turns},
        {"image": "gone.png", "conversations": turns},
        {"conversations": turns},
    ]
    (tmp_path / "bad.json").write_text(json.dumps(rows), encoding="utf-8")
    return [
        {"shards": shards, "count": 10},
        {"file": str(world / "data.json")},
        {"file": str(tmp_path / "bad.json")},
    ]


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True, "dataloader_num_workers": 2},
        pytest.param({"packing": True}, marks=pytest.mark.slow),
        pytest.param({"dataloader_num_workers": 2}, marks=pytest.mark.slow),
        pytest.param({"group_by_length": True, "shuffle_buffer": 3}, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_with_the_next_samples(
    recipe, tmp_path, monkeypatch, mixed, settings
):
    settings = settings | {"data": mixed, "on_invalid_sample": "skip", "max_steps": 22}
    whole = train(recipe(output=str(tmp_path / "whole"), **settings), quiet())
    skipped = read_lines(whole.output / "skipped.jsonl")
    assert {line["code"] for line in skipped} == {
        ErrorCode.MISSING_IMAGE,
        ErrorCode.IMAGE_COUNT_MISMATCH,
        ErrorCode.BROKEN_IMAGE,
    }
    facts = json.loads((whole.output / "run.json").read_text(encoding="utf-8"))
    assert facts["num_skipped"] == len(skipped)
    assert facts["samples"] == 22 * 4 - len(skipped)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 13)
        stopped = train(recipe(**settings), quiet())
    # As if it had been killed after its state was saved, and had left out more by then.
    with (stopped.output / "skipped.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"source": "later"}\n{"sou')
    resumed = train(recipe(**settings), quiet())
    assert_same_weights(weights(whole.model), weights(resumed.model))
    assert read_lines(resumed.output / "skipped.jsonl") == skipped


def test_what_an_earlier_run_left_out_is_forgotten(recipe, mixed):
    settings = {"data": mixed, "on_invalid_sample": "skip", "max_steps": 12}
    first = train(recipe(**settings), quiet())
    assert read_lines(first.output / "skipped.jsonl")
    train(recipe(overwrite=True), quiet())
    assert not (first.output / "skipped.jsonl").exists()


def test_a_run_that_stopped_at_a_bad_row_goes_on_without_it(recipe, mixed, monkeypatch, tmp_path):
    settings = {"data": mixed, "max_steps": 12, "save_steps": 1}
    whole = train(
        recipe(output=str(tmp_path / "whole"), on_invalid_sample="skip", **settings), quiet()
    )
    with pytest.raises(InputError, match="on_invalid_sample=skip leaves such samples out"):
        train(recipe(**settings), quiet())
    resumed = train(recipe(on_invalid_sample="skip", **settings), quiet())
    assert_same_weights(weights(whole.model), weights(resumed.model))


def test_a_file_that_is_lost_stops_the_run_also_with_skip(feed):
    one = feed()
    one.on_invalid_sample = "skip"
    with pytest.raises(InputError, match=r"a\.jsonl has changed since"):
        one._leave_out(
            [
                InvalidSample.from_error(
                    "a.jsonl",
                    InputError("a.jsonl has changed since: start again", ErrorCode.FILE_CHANGED),
                )
            ]
        )


def test_weights_have_no_epochs(recipe, mixed, world):
    data = [
        {"shards": mixed[0]["shards"], "weight": 0.5},
        {"file": str(world / "data.json"), "weight": 2.0},
    ]
    console = quiet()
    result = train(recipe(data=data, on_invalid_sample="skip", max_steps=12), console)
    assert "Samples by weight, images at" in console.file.getvalue()
    assert {line["epoch"] for line in read_lines(result.output / "log.jsonl")} == {0.0}


def test_a_stream_without_a_number_of_samples_is_refused(recipe, shards):
    with pytest.raises(InputError, match=r"001?.*\.tar is a stream.*`count`.*`weight`"):
        train(recipe(data=[{"shards": shards}]), quiet())


def test_the_log_tells_the_datas_epochs(recipe):
    result = train(recipe(max_steps=15, logging_steps=3), quiet())  # 24 samples, 4 a step
    epochs = {line["step"]: line["epoch"] for line in read_lines(result.output / "log.jsonl")}
    assert epochs == {1: 1 / 6, 3: 0.5, 6: 1.0, 9: 1.5, 12: 2.0, 15: 2.5}


@pytest.mark.parametrize(
    ("epochs", "samples", "steps"), [(1.0, 24, 6), (1.0, 25, 7), (0.5, 24, 3), (1.1, 40, 11)]
)
def test_steps_of_epochs(make_recipe, epochs, samples, steps):
    recipe = make_recipe(epochs=epochs, max_steps=None, batch_size=4)
    assert run_steps(recipe, samples) == steps
    assert run_steps(make_recipe(max_steps=7), samples) == 7


# ------------------------------------------------------------------ the state


@pytest.fixture
def feed(tmp_path):
    def make():
        data = RandomSamples(10)
        return TrainDataLoader(
            MixtureDataLoader(data, data.mixture, collate, 2), Accelerator(cpu=True), tmp_path
        )

    return make


def test_a_feed_goes_on_after_what_was_taken(feed, tmp_path):
    one = feed()
    batches = iter(one)
    next(batches), next(batches)
    one.save(tmp_path)
    third = next(batches)
    other = feed()
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
def test_a_damaged_state_is_refused(feed, tmp_path, content):
    if content is not None:
        (tmp_path / "data_state_0.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"data_state_0\.json cannot be read.*overwrite=true"):
        feed().load(tmp_path)


def test_a_state_of_other_processes_is_refused(feed, tmp_path):
    one = feed()
    one.world = 2
    one.save(tmp_path)
    with pytest.raises(InputError, match="of a run on 2 processes, this one has 1"):
        feed().load(tmp_path)


def test_a_state_of_other_data_is_refused(feed, tmp_path):
    feed().save(tmp_path)
    state = json.loads((tmp_path / "data_state_0.json").read_text(encoding="utf-8"))
    assert state["sizes"] == [10]
    (tmp_path / "data_state_0.json").write_text(json.dumps(state | {"sizes": [11]}))
    with pytest.raises(InputError, match=r"sources with \[11\] samples, now they have \[10\]"):
        feed().load(tmp_path)


def test_a_run_of_nothing_but_bad_samples_ends(recipe, tmp_path):
    rows = [{"image": f"{n}.png", "caption": "red"} for n in range(200)]
    (tmp_path / "gone.json").write_text(json.dumps(rows), encoding="utf-8")
    settings = {
        "data": [{"file": str(tmp_path / "gone.json")}],
        "on_invalid_sample": "skip",
        "max_steps": 50,
    }
    with pytest.raises(InputError, match=r"the first 100 samples were all left out.*skipped"):
        train(recipe(**settings), quiet())


def test_what_was_in_the_batches_is_counted(feed):
    one = feed()
    batches = iter(one)
    taken = [next(batches) for _ in range(3)]
    assert one.seen.samples == 0  # until all processes add theirs
    one.share_counts()
    tokens = sum(int(batch["attention_mask"].sum()) for batch in taken)
    assert one.seen == (6, tokens, 6, 0)


def test_dropout_goes_on_with_the_chance_that_comes_next(recipe, tmp_path, monkeypatch):
    """Which neither the batches nor the workers draw from."""
    settings = {"lora": {"r": 2, "lora_dropout": 0.3}, "packing": True, "dataloader_num_workers": 2}
    whole = train(recipe(output=str(tmp_path / "whole"), **settings), quiet())
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        assert train(recipe(**settings), quiet()).step == 5
    resumed = train(recipe(**settings), quiet())
    one, other = (
        load_file(result.model / "adapter_model.safetensors") for result in (whole, resumed)
    )
    assert_same_weights(one, other)
    assert any(tensor.any() for name, tensor in one.items() if "lora_B" in name)
