"""The loss of scoring models: golden values of DeQA-Score, and its use by the trainer."""

import copy
import json
from dataclasses import asdict

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from owl2.checkpoints.config_file import read_config
from owl2.checkpoints.weight_names import released_name
from owl2.constants import LEVELS
from owl2.data.open_dataset import open_dataset
from owl2.data.packing import SCORE_FEATURES
from owl2.data.sample import OpinionLabel
from owl2.data.score_labels import level_positions
from owl2.data.validate.statistics import SampleStats
from owl2.data.validate.validator import SampleValidator
from owl2.errors import ErrorCode
from owl2.model.loss import next_token_loss, shift
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.processor import Owl2Processor
from owl2.scoring.scorer import recognize
from owl2.train.distributed import DistributedContext
from owl2.train.recipe import Recipe
from owl2.train.recipe_sections import LossSettings
from owl2.train.run import TrainingRun, train
from owl2.train.score_loss import pair_loss, side_loss
from owl2.train.trainer import Owl2Trainer
from tests.errors import raises_input_error
from tests.model.golden import expand
from tests.scoring.golden import FAMILY, load_cases, read
from tests.scoring.test_golden_training import ZERO_GRADIENT
from tests.tiny import ONE_LAYER
from tests.train.processes import run
from tests.train.runs import assert_same_weights, quiet, read_jsonl, train_until, weights
from tests.train.test_distributed import FIXED_WEIGHTS, SHARDINGS, keep_gradients
from tests.train.tiny import SMALL_RUN, make_world

TEXT = read("deqa_score", "text.json")
PUBLISHED = LossSettings.model_fields.keys() - {"dataset_type", "level_prefix"}  # in config.json


@pytest.fixture(scope="module")
def model():
    path = FAMILY / "deqa_score" / "model"
    return Owl2ForConditionalGeneration.from_pretrained(path, dtype="float32").train()


@pytest.fixture(scope="module")
def cases():
    return load_cases("deqa_score")


@pytest.fixture(scope="module")
def outputs(model, cases):
    """The logits and labels of both sides."""
    return {side: forward(model, cases, side) for side in "AB"}


def forward(model, cases, side):
    case, config = f"pair.{side}", model.config
    ids, mask = cases[f"{case}.input_ids"], cases[f"{case}.attention_mask"]
    pixels = [cases[f"pixels.{image}"] for image in TEXT["pair"][f"item_{side}"]["pictures"]]
    logits = model(
        input_ids=expand(ids, ids, config, fill=config.image_token_id),
        attention_mask=expand(mask, ids, config).long(),
        pixel_values=torch.stack(pixels),
    ).logits
    return logits, expand(cases[f"{case}.labels"], ids, config, fill=-100)


def side(outputs, cases, name, config):
    probabilities = cases[f"pair.{name}.level_probs"]
    logits, labels = outputs[name]
    columns = level_positions(labels, TEXT["level_prefix_ids"]) - 1
    targets = shift(labels)
    return side_loss(logits, targets, columns, probabilities, TEXT["level_ids"], config)


def total(outputs, cases, config):
    sides = [side(outputs, cases, name, config) for name in "AB"]
    mos, stds = (
        tuple(cases[f"pair.{name}.{key}"] for name in "AB") for key in ("gt_scores", "stds")
    )
    return pair_loss(*sides, mos, stds, config)


def test_parts_of_the_loss(outputs, cases):
    for name in "AB":
        found = side(outputs, cases, name, LossSettings())
        for value, key in (
            (found.next_token, "next_token_loss"),
            (found.cross_entropy, "cross_entropy_without_the_level"),
            (found.kl, "kl"),
            (found.outside, "in_level_loss"),
            (found.scores, "predicted_scores"),
            (found.stds, "predicted_stds"),
        ):
            expected = cases[f"pair.{name}.{key}"]
            torch.testing.assert_close(value.reshape(expected.shape), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", list(TEXT["pair"]["variants"]))
def test_variants(outputs, cases, variant):
    case = TEXT["pair"]["variants"][variant]
    loss = total(outputs, cases, LossSettings(**case["options"]))
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)


@pytest.mark.parametrize("variant", list(TEXT["single"]["variants"]))
def test_single_rows(outputs, cases, variant):
    case = TEXT["single"]["variants"][variant]
    config = LossSettings(**case["options"])
    loss = config.weight_next_token * side(outputs, cases, "A", config).next_token
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)


def test_gradients(model, cases):
    config = LossSettings(**{name: getattr(model.config, name) for name in PUBLISHED})
    assert config == LossSettings()
    outputs = {name: forward(model, cases, name) for name in "AB"}
    loss = total(outputs, cases, config)
    torch.testing.assert_close(loss, cases["pair.loss"][0], rtol=0, atol=1e-5)
    loss.backward()
    gradients = {released_name(name): weight.grad for name, weight in model.named_parameters()}
    for key, expected in cases.items():
        name = key.removeprefix("pair.grad.")
        if name != key and not name.endswith(ZERO_GRADIENT):
            error = (gradients[name] - expected).abs().max()
            assert error <= 1e-4 * expected.abs().max(), name


def test_answer_without_a_level():
    labels = torch.tensor([[-100, 1, 2, 3], [-100, 1, 9, 3]])
    assert level_positions(labels[:1], [1, 2]).tolist() == [3]
    with raises_input_error(ErrorCode.NO_LABELS):
        level_positions(labels, [1, 2])


# ------------------------------------------------------------------ the loss in the trainer

PREFIX = "The quality of the image is"
ANSWERS = ("", " It is sharp.", " It is blurred and too dark.")


@pytest.fixture(scope="module")
def scored_world(tmp_path_factory):
    """Like the fixture `world`, with opinion scores and answers of different lengths."""
    folder = tmp_path_factory.mktemp("scored")
    texts = [
        f"USER: \nwhat is this ASSISTANT: {PREFIX} {level}.{a}" for level in LEVELS for a in ANSWERS
    ]
    rows = []
    for number in range(12):
        level = number % len(LEVELS)
        weights = [1.0 + (index == level) for index in range(len(LEVELS))]
        opinion = OpinionLabel(
            tuple(w / sum(weights) for w in weights), 80.0 - 13 * level + number, 5.0 + level
        )
        answer = f"{PREFIX} {LEVELS[level]}.{ANSWERS[number % len(ANSWERS)]}"
        rows.append({"answer": answer} | asdict(opinion))
    rows += [{"answer": "It is sharp.", "task_type": "description"} for _ in range(4)]
    make_world(folder, rows, texts=texts, vocab_size=480, **ONE_LAYER)
    rows = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    for name, part in {"scored": rows[:12], "described": rows[12:]}.items():
        (folder / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
    return folder


@pytest.fixture
def scored_recipe(scored_world, tmp_path):
    """Recipes of runs in `tmp_path` with the loss of scoring models."""

    def make(output="run", **settings):
        data = [{"file": str(scored_world / f"{name}.json")} for name in ("scored", "described")]
        own = {"model": str(scored_world / "start"), "data": data, "output": str(tmp_path / output)}
        return Recipe(**SMALL_RUN | own | {"max_steps": 8, "loss": {}} | settings)

    return make


class KeptSteps(Owl2Trainer):
    """Keeps the batches and gradients of the first step."""

    def get_batch_samples(self, *args):
        self.batches, counts = super().get_batch_samples(*args)
        return self.batches, counts

    def _get_grad_norm(self, model, grad_norm=None):
        self.kept = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.loss = float(self.step_loss)
        return super()._get_grad_norm(model, grad_norm)


def first_step(recipe, monkeypatch):
    """The trainer after one step, and the model before it."""
    monkeypatch.setattr("owl2.train.run.Owl2Trainer", KeptSteps)
    run = TrainingRun(recipe, DistributedContext(), quiet())
    before = copy.deepcopy(run.model)
    kept = []
    monkeypatch.setattr(run, "_finish", lambda trainer, *_: kept.append(trainer))
    run.train()
    return kept[0], before.train()


def expected_loss(model, batches, settings, level_ids):
    """The loss of all micro-batches of a step as one batch, by `side_loss` and `pair_loss`."""
    firsts, seconds, described = [], [], []
    for batch in batches:
        labels = batch["labels"]
        inputs = {k: v for k, v in batch.items() if k not in (*SCORE_FEATURES, "labels")}
        logits = model(**inputs).logits
        scored = len(batch["level_probs"])
        half = scored // 2 if settings.dataset_type == "pair" else scored
        for row in range(len(labels)):
            kept = int((batch["attention_mask"][row]).sum())
            one = {"logits": logits[row, :kept], "targets": shift(labels)[row, :kept]}
            if row < scored:
                one |= {name: batch[name][row] for name in SCORE_FEATURES}
            (firsts if row < half else seconds if row < scored else described).append(one)

    def stack(rows, name, value=0):
        return pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)

    def side(rows):
        at = torch.stack([row["level_positions"] for row in rows]) - 1
        probabilities = torch.stack([row["level_probs"] for row in rows])
        logits, targets = stack(rows, "logits"), stack(rows, "targets", -100)
        return side_loss(logits, targets, at, probabilities, level_ids, settings)

    loss = 0
    if described:
        loss = settings.weight_desp * next_token_loss(
            stack(described, "logits"), stack(described, "targets", -100)
        )
    if not seconds:
        return loss + settings.weight_next_token * side(firsts).next_token
    values = (
        [torch.stack([r[k] for r in rows]) for rows in (firsts, seconds)]
        for k in ("gt_scores", "stds")
    )
    return loss + pair_loss(side(firsts), side(seconds), *values, settings)


@pytest.mark.parametrize(
    ("loss", "accumulation"),
    [
        ({"dataset_type": "single"}, 4),
        ({"dataset_type": "single", "softkl_loss": False, "weight_next_token": 1.0}, 1),
        ({"dataset_type": "pair", "weight_next_token": 0.5}, 1),
        ({"dataset_type": "pair", "use_fix_std": False, "detach_pred_std": False}, 4),
    ],
)
def test_gradients_of_a_step_are_those_of_the_functions(
    scored_recipe, monkeypatch, loss, accumulation
):
    recipe = scored_recipe(
        loss=loss,
        batch_size=16,
        max_steps=1,
        warmup_steps=0,
        max_grad_norm=1e9,
        gradient_accumulation_steps=accumulation,
    )
    trainer, model = first_step(recipe, monkeypatch)
    assert len(trainer.batches) == accumulation
    total = expected_loss(model, trainer.batches, recipe.loss, trainer.score_loss.level_ids)
    assert trainer.loss == pytest.approx(total.item(), rel=1e-5)
    total.backward()
    checked = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = trainer.kept[name]
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
            checked += int(gradient.abs().max() > 1e-6)
    assert checked > 20


def test_interrupted_and_resumed_pairs_equal_uninterrupted_ones(scored_recipe):
    settings = {"gradient_accumulation_steps": 2, "lora": {"r": 2, "lora_dropout": 0.1}}
    whole = train(scored_recipe("whole", **settings), quiet())
    assert not train_until(3, scored_recipe(**settings)).finished
    resumed = train(scored_recipe(**settings), quiet())
    assert_same_weights(weights(whole.model), weights(resumed.model))
    logs = [read_jsonl(result.output / "log.jsonl")[-1] for result in (whole, resumed)]
    assert logs[0]["loss"] == logs[1]["loss"]
    assert [log["samples"] for log in logs] == [32, 32]  # a pair is one sample


def test_settings_are_written_to_the_trained_model(scored_recipe):
    recipe = scored_recipe(
        max_steps=2, warmup_steps=0, image_policy="pad", loss={"dataset_type": "single"}
    )
    result = train(recipe, quiet())
    config = read_config(result.model)
    assert (config.softkl_loss, config.weight_next_token) == (True, 0.05)
    assert len(config.level_ids) == len(LEVELS) and config.image_aspect_ratio == "pad"
    processor = Owl2Processor.from_pretrained(result.model)
    assert processor.image_processor.image_policy == "pad"
    assert recognize(result.model)[1].name == "deqa-score"


def test_rows_without_scores_stop_or_are_skipped(scored_recipe, scored_world):
    data = [{"file": str(scored_world / "scored.json")}, {"file": str(scored_world / "plain.json")}]
    rows = json.loads((scored_world / "scored.json").read_text(encoding="utf-8"))
    for row in rows:
        del row["level_probs"]
    (scored_world / "plain.json").write_text(json.dumps(rows), encoding="utf-8")
    with raises_input_error(ErrorCode.MISSING_VALUE, "plain.json", "level_probs"):
        train(scored_recipe(data=data), quiet())
    recipe = scored_recipe(data=data)
    processor = Owl2Processor.from_pretrained(recipe.model, **recipe.processor_options())
    validator = SampleValidator(processor, score_labels=recipe.score_labels(processor))
    results = [validator.validate(open_dataset(**entry)[0]) for entry in data]
    assert isinstance(results[0], SampleStats)
    assert results[1].code is ErrorCode.MISSING_VALUE
    result = train(scored_recipe("skipping", data=data, on_invalid_sample="skip"), quiet())
    last = read_jsonl(result.output / "log.jsonl")[-1]
    assert last["samples"] > 0 and last["num_skipped"] > 0


@pytest.mark.parametrize("sharding", ["DDP", pytest.param("FSDP2", marks=pytest.mark.slow)])
def test_two_processes_give_the_gradients_of_one(scored_recipe, tmp_path, sharding):
    settings = FIXED_WEIGHTS | {"batch_size": 4, "save_steps": None, "warmup_steps": 0}
    results = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        recipe = scored_recipe(f"run{count}", **settings)
        environment = SHARDINGS[sharding] if count > 1 else None
        run(folder, keep_gradients, folder, recipe, count=count, environment=environment)
        results[count] = torch.load(folder / f"0 of {count}.pt")
    for expected, found in zip(results[1], results[2], strict=True):
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-6, atol=1e-6)
        for name, gradient in found["gradients"].items():
            single = expected["gradients"][name]
            torch.testing.assert_close(gradient, single, rtol=1e-5, atol=1e-6, msg=name)
