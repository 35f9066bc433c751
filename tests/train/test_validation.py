"""Validation on held-out samples: exact loss, generations, no effect on training."""

import json
from contextlib import suppress

import pytest
import torch

from owl2.data.json_dataset import JsonDataset
from owl2.data.sample import InvalidSample
from owl2.errors import ErrorCode, InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.processor import Owl2Processor
from owl2.train.distributed import DistributedContext
from owl2.train.parallelize import enable_checkpointing
from owl2.train.run import train
from owl2.train.validation import ValidationDataset, ValidationResult, Validator, batches_of
from tests.errors import raises_input_error
from tests.train.runs import (
    assert_same_weights,
    held_out_of,
    quiet,
    read_jsonl,
    recorded,
    train_until,
    weights,
)


class OneOfSeveral(DistributedContext):
    """One process of several, without the others: records the values to be reduced."""

    def __init__(self, rank, size):
        super().__init__()
        self.rank, self.world_size = rank, size
        self.reduced = []

    def all_reduce_sum(self, *values):
        self.reduced.append(values)
        return list(values)


class Stream:
    """Like `TarDataset`: no length and no random access."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        yield from self.samples


@pytest.fixture
def start(world):
    model = Owl2ForConditionalGeneration.from_pretrained(world / "start").train()
    return model, Owl2Processor.from_pretrained(world / "start")


@pytest.fixture
def samples(world):
    return list(JsonDataset(world / "data.json"))


def evaluate(start, dataset, context=None, **settings):
    model, processor = start
    settings = {"batch_size": 4} | settings
    context = context or DistributedContext()
    return Validator(dataset, processor, context, **settings).evaluate(model, 7)


def one_by_one(start, samples):
    """The mean loss over all labels, computed separately for each sample."""
    model, processor = start
    total, tokens = 0.0, 0
    model.eval()
    for sample in samples:
        batch = processor.for_training(sample.messages)
        with torch.no_grad():
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        labels = batch["labels"][0, 1:]
        chosen = logits[0, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        total -= float(chosen[labels != -100].sum())
        tokens += int((labels != -100).sum())
    model.train()
    return total / tokens, tokens


@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_loss_is_the_mean_over_all_labels(start, samples, batch_size):
    expected, tokens = one_by_one(start, samples)
    result = evaluate(start, ValidationDataset([(samples, None)], start[1]), batch_size=batch_size)
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert (result.step, result.tokens, result.samples, result.num_skipped) == (
        7,
        tokens,
        len(samples),
        0,
    )


def test_workers_do_not_change_the_loss(start, samples):
    held_out = ValidationDataset([(samples, None)], start[1], max_samples=9)
    assert evaluate(start, held_out, num_workers=1).loss == evaluate(start, held_out).loss


@pytest.mark.parametrize(("count", "processes"), [(24, 2), (5, 2), (1, 3), (6, 4)])
def test_processes_share_the_samples(start, samples, count, processes):
    held_out = ValidationDataset([(samples, None)], start[1], max_samples=count)
    shares = [batches_of(count, 2, rank, processes) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(n for share in shares for batch in share for n in batch) == list(range(count))

    full = evaluate(start, held_out)
    sums = []
    for rank in range(processes):
        context = OneOfSeveral(rank, processes)
        # Without the values of the others an empty share is an error.
        with suppress(InputError):
            evaluate(start, held_out, context, batch_size=2)
        sums.append(next(values for values in context.reduced if len(values) == 4))
    loss, tokens, used, skipped = (sum(values) for values in zip(*sums, strict=True))
    assert loss / tokens == pytest.approx(full.loss, rel=1e-5)
    assert (tokens, used, skipped) == (full.tokens, count, 0)


def test_model_and_random_state_are_unchanged(start, samples):
    model, processor = start
    model.config.use_cache = False
    enable_checkpointing(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    evaluate(
        start, ValidationDataset([(samples, None)], processor), num_generations=2, num_workers=1
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_weights(model.state_dict(), before)
    assert model.training and not model.config.use_cache
    assert model.model.layers[0].gradient_checkpointing
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("num_generations", [0, 1])
def test_validation_disables_dropout_gradients_and_checkpointing(start, samples, num_generations):
    model, processor = start
    enable_checkpointing(model)
    modes = set()
    model.model.layers[0].register_forward_hook(
        lambda layer, *_: modes.add((layer.training, torch.is_grad_enabled()))
    )
    evaluate(
        start,
        ValidationDataset([(samples, None)], processor, max_samples=2),
        num_generations=num_generations,
    )
    assert modes == {(False, False)}


def test_sources_are_taken_in_turn(start, samples):
    held_out = ValidationDataset(
        [(samples[:2], None), (samples[10:20], 4), (samples[20:], None)], start[1]
    )
    first = [held_out.sample(number).source for number in range(len(held_out))]
    expected = [samples[n].source for n in (0, 10, 20, 1, 11, 21, 12, 22, 13, 23)]
    assert first == expected
    assert len(ValidationDataset([(samples, 5)], start[1], max_samples=3)) == 3


def test_first_samples_of_a_stream_are_used(start, samples):
    held_out = ValidationDataset([(Stream(samples), None)], start[1], max_samples=5)
    assert evaluate(start, held_out).samples == 5
    assert len(ValidationDataset([(Stream(samples), 7)], start[1])) == 7
    with raises_input_error(ErrorCode.MISSING_VALUE, "`max_samples`", "`count`"):
        ValidationDataset([(Stream(samples), None)], start[1])


def test_empty_dataset_is_refused(start):
    with raises_input_error(ErrorCode.EMPTY_DATASET, "`data`"):
        ValidationDataset([([], None)], start[1])


def test_loss_that_is_not_finite_is_refused(start, samples):
    model, processor = start
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with raises_input_error(ErrorCode.NON_FINITE, "step 7", "nan"):
        evaluate(start, ValidationDataset([(samples, None)], processor))


def test_dataset_of_invalid_samples_is_refused(start, samples):
    invalid = [InvalidSample(sample.source, "it is broken") for sample in samples[:3]]
    with raises_input_error(ErrorCode.EMPTY_DATASET, "3 held-out"):
        evaluate(start, ValidationDataset([(invalid, None)], start[1]), skip_invalid=True)


def test_generations_equal_the_answers_of_chat(start, samples):
    from owl2.engine.engine import Engine

    model, processor = start
    held_out = ValidationDataset([(samples, None)], processor)
    generations = evaluate(start, held_out, num_generations=3).generations
    assert [generation.source for generation in generations] == [
        samples[n].source for n in (0, 8, 16)
    ]
    engine = Engine(model, processor)
    for generation, sample in zip(generations, (samples[0], samples[8], samples[16]), strict=True):
        answer = engine.chat(sample.messages[:1], max_new_tokens=64, do_sample=False)
        assert generation.prediction == answer
        assert generation.reference == sample.messages[1]["content"]
        assert "what is this" in generation.prompt
        assert len(generation.images) == 1


def test_line_of_the_log():
    line = ValidationResult(3, 0.5, 6, 2, 0, 1.0).line()
    assert json.loads(json.dumps(line)) == line | {"generations": []}


# ------------------------------------------------------------------ in a run


def test_validation_does_not_change_the_weights(recipe, world, tmp_path):
    held_out = held_out_of(world, eval_steps=3, max_samples=8)
    settings = {"augment": "crop_flip", "gradient_checkpointing": True, "save_steps": 4}
    plain = train(recipe(output=str(tmp_path / "plain"), **settings), quiet())
    console = recorded()
    validated = train(recipe(validation=held_out, **settings), console)
    assert_same_weights(weights(plain.model), weights(validated.model))

    lines = read_jsonl(validated.output / "validation.jsonl")
    assert [line["step"] for line in lines] == [0, 3, 6, 9, 10]
    assert {"loss", "tokens", "samples", "num_skipped", "seconds"} < lines[0].keys()
    assert [set(generation) for generation in lines[0]["generations"]] == [
        {"source", "prompt", "reference", "prediction"}
    ]
    results = json.loads((validated.output / "run.json").read_text(encoding="utf-8"))
    assert results["validation"]["last"] == {"step": 10, "loss": lines[-1]["loss"]}
    best = min(lines, key=lambda line: line["loss"])
    assert results["validation"]["best"]["step"] == best["step"]
    text = console.file.getvalue()
    assert "step      3/10  validation loss" in text
    assert "reference 'red'" in text
    assert "validation loss" in text.split("Summary")[1]


def test_stage_1_on_captions_is_validated_with_the_image_alone(recipe, world, tmp_path):
    captions = tmp_path / "captions.jsonl"
    rows = [{"image": f"{number}.png", "caption": "a red square"} for number in range(8)]
    captions.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = [{"file": str(captions), "images": str(world)}]
    validation = {"data": data, "eval_steps": 2, "num_generations": 1}
    result = train(
        recipe(stage=1, data=data, validation=validation, warmup_steps=0, max_steps=2), quiet()
    )
    (generation,) = read_jsonl(result.output / "validation.jsonl")[-1]["generations"]
    assert generation["prompt"] == "<|image|>"
    assert generation["reference"] == "a red square"


def test_validation_uses_the_dtype_of_training(recipe, world, monkeypatch):
    evaluate, dtypes = Validator.evaluate, set()

    def record(self, model, step):
        layer = model.model.layers[0].mlp
        hook = layer.register_forward_hook(lambda _m, _i, out: dtypes.add(out.dtype))
        found = evaluate(self, model, step)
        hook.remove()
        return found

    monkeypatch.setattr(Validator, "evaluate", record)
    held_out = held_out_of(world, max_samples=2, num_generations=0)
    train(recipe(validation=held_out, dtype="bfloat16", max_steps=3), quiet())
    assert dtypes == {torch.bfloat16}


def test_resumed_run_has_the_same_validations(recipe, world, tmp_path):
    held_out = held_out_of(world, eval_steps=4, max_samples=4)
    uninterrupted = train(
        recipe(output=str(tmp_path / "uninterrupted"), validation=held_out), quiet()
    )
    stopped = train_until(6, recipe(validation=held_out))
    assert not stopped.finished
    # As if a validation after the checkpoint had been written before a kill.
    with (stopped.output / "validation.jsonl").open("a") as file:
        file.write(json.dumps({"step": 8, "loss": 99.0}) + '\n{"step": 9, "lo')
    resumed = train(recipe(validation=held_out), quiet())
    logs = [
        [
            {key: value for key, value in line.items() if key != "seconds"}
            for line in read_jsonl(result.output / "validation.jsonl")
        ]
        for result in (uninterrupted, resumed)
    ]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[1]] == [0, 4, 8, 10]


def test_invalid_held_out_sample_is_reported_or_skipped(recipe, tmp_path):
    turns = [{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": "b"}]
    text = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [{"conversations": text}, {"image": "missing.png", "conversations": turns}]
    (tmp_path / "bad.json").write_text(json.dumps(rows), encoding="utf-8")
    held_out = {"data": [{"file": str(tmp_path / "bad.json")}], "eval_steps": 3}
    with raises_input_error(ErrorCode.MISSING_IMAGE, "bad.json, row 2", "missing.png"):
        train(recipe(validation=held_out), quiet())
    result = train(recipe(validation=held_out, on_invalid_sample="skip", overwrite=True), quiet())
    line = read_jsonl(result.output / "validation.jsonl")[0]
    assert (line["samples"], line["num_skipped"], len(line["generations"])) == (1, 1, 1)
