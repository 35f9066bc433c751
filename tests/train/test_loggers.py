"""TensorBoard and Weights & Biases: all figures, once each, also after a stop."""

import json
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from owl2.errors import InputError
from owl2.train import loggers
from owl2.train.loggers import _grouped, make_loggers
from owl2.train.run import train
from owl2.train.validation import Generation, ValidationResult
from tests.train.runs import interrupt_at, quiet


def events(directory):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    found = event_accumulator.EventAccumulator(str(directory), size_guidance={"scalars": 0})
    return found.Reload()


def read(path):
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def held_out(world):
    data = [{"file": str(world / "data.json")}]
    return {"data": data, "eval_steps": 4, "max_samples": 4, "num_generations": 1}


def test_tensorboard_has_the_figures_the_looks_and_the_recipe(recipe, world):
    pytest.importorskip("tensorboard")
    result = train(recipe(tensorboard=True, validation=held_out(world), max_steps=4), quiet())
    found = events(result.output / "tensorboard")
    lines = read(result.output / "log.jsonl")
    names = set(found.Tags()["scalars"])
    assert names == {name for line in lines for name in _grouped(line)} | {"validation/loss"}
    assert {"train/loss", "speed/tokens_per_second", "speed/data_wait_fraction"} < names
    losses = found.Scalars("train/loss")
    assert [event.step for event in losses] == [line["step"] for line in lines]
    assert [event.value for event in losses] == pytest.approx([line["loss"] for line in lines])

    looks = read(result.output / "validation.jsonl")
    assert [event.step for event in found.Scalars("validation/loss")] == [0, 4]
    [answer] = looks[-1]["generations"]
    last = found.Tensors("answers/0/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert f"wanted: {generation['reference']}" in last and f"answer: {answer['answer']}" in last
    [image] = found.Images("answers/0")
    assert (image.width, image.height) == (224, 224)
    text = found.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    max_steps: 4\n" in text


def test_tensorboard_of_a_resumed_run_has_every_step_once(recipe, monkeypatch):
    pytest.importorskip("tensorboard")
    settings = {"tensorboard": True, "logging_steps": 1}
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        stopped = train(recipe(**settings), quiet())
    # As if the run had been killed three steps after its saved state.
    [late] = make_loggers(recipe(**settings), stopped.step)
    for step in (6, 7, 8):
        late.log({"step": step, "loss": 99.0}, 1.0)
    late.close()
    result = train(recipe(**settings), quiet())
    found = events(result.output / "tensorboard").Scalars("train/loss")
    assert [event.step for event in found] == list(range(1, 11))
    assert 99.0 not in [event.value for event in found]


def test_tensorboard_of_a_new_run_has_nothing_of_the_one_before(recipe):
    pytest.importorskip("tensorboard")
    train(recipe(tensorboard=True, max_steps=6, logging_steps=1), quiet())
    result = train(recipe(tensorboard=True, max_steps=3, logging_steps=1, overwrite=True), quiet())
    found = events(result.output / "tensorboard").Scalars("train/loss")
    assert [event.step for event in found] == [1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensorboard": True}, r"tensorboard: .*pip install 'owl2-vlm\[watch\]'"),
        ({"wandb_project": "owls"}, "wandb: .*pip install wandb"),
    ],
)
def test_a_tool_that_is_not_installed_is_missed_before_any_work(
    recipe, monkeypatch, tmp_path, settings, message
):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=message):
        train(recipe(model=str(tmp_path / "nowhere"), **settings), quiet())
    assert not (tmp_path / "run").exists()


class StubRun:
    def __init__(self):
        self.logged = []
        self.finished = False

    def log(self, figures, step):
        self.logged.append((step, figures))

    def finish(self):
        self.finished = True


class WandbError(Exception):
    pass


@pytest.fixture
def wandb(monkeypatch):
    """In the place of the package: keeps what it is called with."""
    stub = SimpleNamespace(inits=[], runs=[], __spec__=SimpleNamespace())

    def init(**settings):
        stub.inits.append(settings)
        stub.runs.append(StubRun())
        return stub.runs[-1]

    stub.init = init
    stub.Error = WandbError
    stub.Image = lambda pixels: ("image", pixels.shape)
    stub.Table = lambda columns, data: {"columns": columns, "data": data}
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def test_wandb_has_the_figures_and_the_answers(recipe, world, wandb):
    given = recipe(wandb_project="owls", validation=held_out(world), max_steps=4)
    result = train(given, quiet())
    [settings], [run] = wandb.inits, wandb.runs
    assert (settings["project"], settings["name"]) == ("owls", "run")
    assert settings["config"] == given.model_dump(mode="json")
    assert run.finished
    lines = read(result.output / "log.jsonl")
    figures = [(step, found) for step, found in run.logged if "train/loss" in found]
    assert figures == [(line["step"], _grouped(line)) for line in lines]
    looks = [(step, found) for step, found in run.logged if "validation/loss" in found]
    assert [step for step, _ in looks] == [0, 4]
    [row] = looks[-1][1]["validation/answers"]["data"]
    assert row[0] == ("image", (224, 224, 3))
    assert row[2] == read(result.output / "validation.jsonl")[-1]["generations"][0]["wanted"]
    assert [step for step, _ in run.logged] == sorted(step for step, _ in run.logged)


def test_wandb_of_a_resumed_run_goes_on_in_the_same_record(recipe, monkeypatch, wandb):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        train(recipe(wandb_project="owls"), quiet())
    train(recipe(wandb_project="owls"), quiet())
    first, second = (settings["id"] for settings in wandb.inits)
    assert first == second and len(first) == 8
    train(recipe(wandb_project="owls", max_steps=3, overwrite=True), quiet())
    assert wandb.inits[-1]["id"] != first


def test_wandb_without_an_account(recipe, wandb, tmp_path):
    def refuse(**settings):
        raise WandbError("No API key configured.")

    wandb.init = refuse
    with pytest.raises(InputError, match=r"wandb: No API key configured\. With WANDB_MODE=offline"):
        train(recipe(wandb_project="owls"), quiet())
    assert not (tmp_path / "run" / "model").exists()


def test_an_answer_without_and_with_two_images(recipe, tmp_path, wandb):
    Image.new("RGB", (300, 20), "red").save(tmp_path / "wide.png")
    wide = str(tmp_path / "wide.png")
    answers = (Generation("a", "q", "w", "x"), Generation("b", "q", "w", "x", (wide, wide)))
    [view] = make_loggers(recipe(wandb_project="owls"), 0)
    view.look(ValidationResult(0, 1.0, 2, 2, 0, 1.0, answers))
    rows = wandb.runs[0].logged[0][1]["validation/answers"]["data"]
    assert [row[0] for row in rows] == [None, ("image", (224, 448, 3))]
