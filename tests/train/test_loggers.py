"""TensorBoard and Weights & Biases: all metrics, each step once, also after a stop."""

import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from owl2.errors import ErrorCode
from owl2.train.loggers import grouped_metrics, make_loggers
from owl2.train.run import train
from owl2.train.validation import Generation, ValidationResult
from tests.errors import raises_input_error
from tests.train.runs import held_out_of, quiet, read_jsonl, train_until


def events(directory):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    accumulator = event_accumulator.EventAccumulator(str(directory), size_guidance={"scalars": 0})
    return accumulator.Reload()


def test_tensorboard_has_metrics_validations_and_the_recipe(recipe, world):
    pytest.importorskip("tensorboard")
    result = train(
        recipe(tensorboard=True, validation=held_out_of(world, max_samples=4), max_steps=4), quiet()
    )
    found = events(result.output / "tensorboard")
    lines = read_jsonl(result.output / "log.jsonl")
    names = set(found.Tags()["scalars"])
    assert names == {n for line in lines for n in grouped_metrics(line)} | {"validation/loss"}
    assert {"train/loss", "speed/tokens_per_second", "speed/data_wait_fraction"} < names
    losses = found.Scalars("train/loss")
    assert [event.step for event in losses] == [line["step"] for line in lines]
    assert [event.value for event in losses] == pytest.approx([line["loss"] for line in lines])

    assert [event.step for event in found.Scalars("validation/loss")] == [0, 4]
    [generation] = read_jsonl(result.output / "validation.jsonl")[-1]["generations"]
    last = found.Tensors("generations/0/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert f"reference: {generation['reference']}" in last
    assert f"prediction: {generation['prediction']}" in last
    [image] = found.Images("generations/0")
    assert (image.width, image.height) == (224, 224)
    text = found.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    max_steps: 4\n" in text


def test_tensorboard_of_a_resumed_run_has_each_step_once(recipe):
    pytest.importorskip("tensorboard")
    settings = {"tensorboard": True, "logging_steps": 1}
    stopped = train_until(5, recipe(**settings))
    # As if the run had been killed three steps after its checkpoint.
    [late] = make_loggers(recipe(**settings), stopped.step)
    for step in (6, 7, 8):
        late.log_metrics({"step": step, "loss": 99.0})
    late.close()
    result = train(recipe(**settings), quiet())
    found = events(result.output / "tensorboard").Scalars("train/loss")
    assert [event.step for event in found] == list(range(1, 11))
    assert 99.0 not in [event.value for event in found]


def test_tensorboard_of_a_new_run_has_no_events_of_an_earlier_run(recipe):
    pytest.importorskip("tensorboard")
    settings = {"tensorboard": True, "logging_steps": 1}
    train(recipe(**settings, max_steps=5), quiet())
    result = train(recipe(**settings, max_steps=3, overwrite=True), quiet())
    found = events(result.output / "tensorboard").Scalars("train/loss")
    assert [event.step for event in found] == [1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "package"),
    [({"tensorboard": True}, "owl2-vlm[watch]"), ({"wandb_project": "owls"}, "wandb")],
)
def test_missing_package_is_reported_before_the_model_is_loaded(
    recipe, monkeypatch, tmp_path, settings, package
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("owl2.errors.find_spec", lambda name: None)
    with raises_input_error(ErrorCode.MISSING_DEPENDENCY, package):
        train(recipe(**settings), quiet())
    assert not (tmp_path / "run").exists()


class FakeRun:
    def __init__(self):
        self.logged = []
        self.finished = False

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def finish(self):
        self.finished = True


class WandbError(Exception):
    pass


@pytest.fixture
def wandb(monkeypatch):
    """Replaces the package and records the calls."""
    fake = SimpleNamespace(inits=[], runs=[], __spec__=SimpleNamespace())

    def init(**settings):
        fake.inits.append(settings)
        fake.runs.append(FakeRun())
        return fake.runs[-1]

    fake.init = init
    fake.Error = WandbError
    fake.Image = lambda pixels: ("image", pixels.shape)
    fake.Table = lambda columns, data: {"columns": columns, "data": data}
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_has_metrics_and_generations(recipe, world, wandb):
    settings = recipe(
        wandb_project="owls", validation=held_out_of(world, max_samples=4), max_steps=4
    )
    result = train(settings, quiet())
    [init], [run] = wandb.inits, wandb.runs
    assert (init["project"], init["name"]) == ("owls", "run")
    assert init["config"] == settings.model_dump(mode="json")
    assert run.finished
    lines = read_jsonl(result.output / "log.jsonl")
    metrics = [(step, values) for step, values in run.logged if "train/loss" in values]
    assert metrics == [(line["step"], grouped_metrics(line)) for line in lines]
    validations = [(step, values) for step, values in run.logged if "validation/loss" in values]
    assert [step for step, _ in validations] == [0, 4]
    [row] = validations[-1][1]["validation/generations"]["data"]
    assert row[0] == ("image", (224, 224, 3))
    line = read_jsonl(result.output / "validation.jsonl")[-1]
    assert row[2] == line["generations"][0]["reference"]
    assert [step for step, _ in run.logged] == sorted(step for step, _ in run.logged)


def test_wandb_of_a_resumed_run_has_the_same_id(recipe, wandb):
    settings = {"wandb_project": "owls", "max_steps": 3}
    train_until(2, recipe(**settings))
    train(recipe(**settings), quiet())
    first, second = (settings["id"] for settings in wandb.inits)
    assert first == second and len(first) == 8
    train(recipe(**settings, overwrite=True), quiet())
    assert wandb.inits[-1]["id"] != first


def test_wandb_error_is_reported(recipe, wandb, tmp_path):
    def refuse(**settings):
        raise WandbError("No API key configured.")

    wandb.init = refuse
    with raises_input_error(ErrorCode.NETWORK, "No API key configured.", "WANDB_MODE=offline"):
        train(recipe(wandb_project="owls"), quiet())
    assert not (tmp_path / "run" / "model").exists()


def test_generations_without_and_with_two_images(recipe, tmp_path, wandb):
    Image.new("RGB", (300, 20), "red").save(tmp_path / "wide.png")
    wide = str(tmp_path / "wide.png")
    generations = (Generation("a", "q", "w", "x"), Generation("b", "q", "w", "x", (wide, wide)))
    [logger] = make_loggers(recipe(wandb_project="owls"), 0)
    logger.log_validation(ValidationResult(0, 1.0, 2, 2, 0, 1.0, generations))
    rows = wandb.runs[0].logged[0][1]["validation/generations"]["data"]
    assert [row[0] for row in rows] == [None, ("image", (224, 448, 3))]
