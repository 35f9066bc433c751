"""Looks at held-out samples: an exact loss, answers, and a run that does not notice them."""

import json
from contextlib import suppress

import pytest
import torch

from owl2.data.json_dataset import JsonDataset
from owl2.data.sample import InvalidSample
from owl2.errors import InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.processor import Owl2Processor
from owl2.train.distributed import DistributedContext
from owl2.train.parallelize import enable_checkpointing
from owl2.train.run import train
from owl2.train.validation import ValidationDataset, ValidationResult, Validator, _batches_of
from tests.train.runs import assert_same_weights, interrupt_at, quiet, weights


class Shares(DistributedContext):
    """A process of several that are not there: keeps what it would have exchanged."""

    def __init__(self, rank, size):
        super().__init__()
        self.rank, self.size = rank, size
        self.told = []

    def total(self, *numbers):
        self.told.append(numbers)
        return list(numbers)


class Stream:
    """As `Shards`: no length and no places."""

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


def look(start, held_out, team=None, **settings):
    model, processor = start
    settings = {"batch_size": 4} | settings
    return Validator(held_out, processor, team or DistributedContext(), **settings).look(model, 7)


def one_by_one(start, samples):
    """The loss over all labelled tokens, a sample at a time and without our code."""
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
def test_the_loss_is_the_mean_over_all_labelled_tokens(start, samples, batch_size):
    expected, tokens = one_by_one(start, samples)
    seen = look(start, ValidationDataset([(samples, None)], start[1]), batch_size=batch_size)
    assert seen.loss == pytest.approx(expected, rel=1e-5)
    assert (seen.step, seen.tokens, seen.samples, seen.skipped) == (7, tokens, len(samples), 0)


def test_workers_change_nothing(start, samples):
    held_out = ValidationDataset([(samples, None)], start[1], max_samples=9)
    assert look(start, held_out, workers=1).loss == look(start, held_out).loss


@pytest.mark.parametrize(("count", "processes"), [(24, 2), (5, 2), (1, 3), (6, 4)])
def test_processes_share_the_samples_and_keep_in_step(start, samples, count, processes):
    held_out = ValidationDataset([(samples, None)], start[1], max_samples=count)
    shares = [_batches_of(count, 2, rank, processes) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(n for share in shares for batch in share for n in batch) == list(range(count))

    whole = look(start, held_out)
    told = []
    for rank in range(processes):
        team = Shares(rank, processes)
        # Nobody adds the others' numbers here, and a share of nothing alone would be an error.
        with suppress(InputError):
            look(start, held_out, team, batch_size=2)
        told.append(next(numbers for numbers in team.told if len(numbers) == 4))
    loss, tokens, seen, skipped = (sum(numbers) for numbers in zip(*told, strict=True))
    assert loss / tokens == pytest.approx(whole.loss, rel=1e-5)
    assert (tokens, seen, skipped) == (whole.tokens, count, 0)


def test_the_model_and_chance_are_as_before(start, samples):
    model, processor = start
    model.config.use_cache = False
    enable_checkpointing(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chance = torch.get_rng_state()
    look(start, ValidationDataset([(samples, None)], processor), answers=2, workers=1)
    assert torch.equal(torch.get_rng_state(), chance)
    assert_same_weights(model.state_dict(), before)
    assert model.training and not model.config.use_cache
    assert model.model.layers[0].gradient_checkpointing
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("answers", [0, 1])
def test_a_look_is_without_dropout_gradients_and_checkpointing(start, samples, answers):
    model, processor = start
    enable_checkpointing(model)
    how = set()
    model.model.layers[0].register_forward_hook(
        lambda layer, *_: how.add((layer.training, torch.is_grad_enabled()))
    )
    look(start, ValidationDataset([(samples, None)], processor, max_samples=2), answers=answers)
    assert how == {(False, False)}


def test_sources_take_turns(start, samples):
    held_out = ValidationDataset(
        [(samples[:2], None), (samples[10:20], 4), (samples[20:], None)], start[1]
    )
    first = [held_out.sample(number).source for number in range(len(held_out))]
    expected = [samples[n].source for n in (0, 10, 20, 1, 11, 21, 12, 22, 13, 23)]
    assert first == expected
    assert len(ValidationDataset([(samples, 5)], start[1], max_samples=3)) == 3


def test_a_weight_has_no_meaning(recipe, world):
    source = {"file": str(world / "data.json"), "weight": 2.0}
    with pytest.raises(ValueError, match="take turns"):
        recipe(validation={"data": [source]})


def test_of_a_stream_the_first_are_held(start, samples):
    held_out = ValidationDataset([(Stream(samples), None)], start[1], max_samples=5)
    assert look(start, held_out).samples == 5
    assert len(ValidationDataset([(Stream(samples), 7)], start[1])) == 7
    with pytest.raises(InputError, match="set `samples`"):
        ValidationDataset([(Stream(samples), None)], start[1])


def test_nothing_to_look_at(start):
    with pytest.raises(InputError, match="no samples"):
        ValidationDataset([([], None)], start[1])


def test_a_loss_that_is_not_finite(start, samples):
    model, processor = start
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(InputError, match="validation after step 7: the loss is nan"):
        look(start, ValidationDataset([(samples, None)], processor))


def test_no_sample_that_can_be_used(start, samples):
    bad = [InvalidSample(sample.source, "it is broken") for sample in samples[:3]]
    with pytest.raises(InputError, match="none of the 3 held-out samples can be used"):
        look(start, ValidationDataset([(bad, None)], start[1]), skip_invalid=True)


def test_answers_are_those_of_chat(start, samples):
    from owl2.engine.engine import Engine

    model, processor = start
    held_out = ValidationDataset([(samples, None)], processor)
    answers = look(start, held_out, answers=3).answers
    assert [answer.source for answer in answers] == [samples[n].source for n in (0, 8, 16)]
    engine = Engine(model, processor)
    for answer, sample in zip(answers, (samples[0], samples[8], samples[16]), strict=True):
        assert answer.answer == engine.chat(sample.messages[:1], max_new_tokens=64, do_sample=False)
        assert answer.wanted == sample.messages[1]["content"]
        assert "what is this" in answer.question
        assert len(answer.images) == 1


def test_what_the_line_holds():
    line = ValidationResult(3, 0.5, 6, 2, 0, 1.0).line()
    assert json.loads(json.dumps(line)) == line | {"answers": []}


# ------------------------------------------------------------------ in a run


def test_a_run_with_looks_ends_with_the_weights_of_one_without(recipe, world, tmp_path):
    held_out = {
        "data": [{"file": str(world / "data.json")}],
        "eval_steps": 3,
        "max_samples": 8,
        "num_generations": 1,
    }
    settings = {"augment": "crop_flip", "gradient_checkpointing": True, "save_steps": 4}
    plain = train(recipe(output=str(tmp_path / "plain"), **settings), quiet())
    console = quiet()
    watched = train(recipe(validation=held_out, **settings), console)
    assert_same_weights(weights(plain.model), weights(watched.model))

    lines = [json.loads(line) for line in (watched.output / "validation.jsonl").open()]
    assert [line["step"] for line in lines] == [0, 3, 6, 9, 10]
    assert {"loss", "tokens", "samples", "num_skipped", "seconds"} < lines[0].keys()
    assert [set(answer) for answer in lines[0]["generations"]] == [
        {"source", "question", "wanted", "answer"}
    ]
    facts = json.loads((watched.output / "run.json").read_text(encoding="utf-8"))
    assert facts["validation"]["last"] == {"step": 10, "loss": lines[-1]["loss"]}
    best = min(lines, key=lambda line: line["loss"])
    assert facts["validation"]["best"]["step"] == best["step"]
    shown = console.file.getvalue()
    assert "step      3/10  validation loss" in shown
    assert "wanted 'red'" in shown
    assert "validation loss" in shown.split("Summary")[1]


def test_a_look_computes_in_the_precision_of_training(recipe, world, monkeypatch):
    sums, dtypes = Validator._sums, set()

    def looking(self, model):
        hook = model.model.layers[0].mlp.register_forward_hook(
            lambda _m, _i, out: dtypes.add(out.dtype)
        )
        found = sums(self, model)
        hook.remove()
        return found

    monkeypatch.setattr(Validator, "_sums", looking)
    held_out = {
        "data": [{"file": str(world / "data.json")}],
        "max_samples": 2,
        "num_generations": 0,
    }
    train(recipe(validation=held_out, dtype="bfloat16", max_steps=3), quiet())
    assert dtypes == {torch.bfloat16}


def test_a_resumed_run_looks_where_it_would_have_looked(recipe, world, monkeypatch, tmp_path):
    held_out = {
        "data": [{"file": str(world / "data.json")}],
        "eval_steps": 4,
        "max_samples": 4,
        "num_generations": 1,
    }
    whole = train(recipe(output=str(tmp_path / "whole"), validation=held_out), quiet())
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        stopped = train(recipe(validation=held_out), quiet())
    assert not stopped.finished
    # As if a look after the saved state had been written before a kill.
    with (stopped.output / "validation.jsonl").open("a") as file:
        file.write(json.dumps({"step": 8, "loss": 99.0}) + '\n{"step": 9, "lo')
    resumed = train(recipe(validation=held_out), quiet())
    kept = [
        [
            {key: value for key, value in json.loads(line).items() if key != "seconds"}
            for line in (result.output / "validation.jsonl").open()
        ]
        for result in (whole, resumed)
    ]
    assert kept[0] == kept[1]
    assert [line["step"] for line in kept[1]] == [0, 4, 8, 10]


def test_held_out_samples_that_cannot_be_used(recipe, tmp_path):
    turns = [{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": "b"}]
    text = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [{"conversations": text}, {"image": "gone.png", "conversations": turns}]
    (tmp_path / "bad.json").write_text(json.dumps(rows), encoding="utf-8")
    held_out = {"data": [{"file": str(tmp_path / "bad.json")}], "eval_steps": 3}
    with pytest.raises(InputError, match=r"validation: .*bad\.json, row 2: .*gone\.png"):
        train(recipe(validation=held_out), quiet())
    result = train(recipe(validation=held_out, on_invalid_sample="skip", overwrite=True), quiet())
    [line, *_] = [json.loads(line) for line in (result.output / "validation.jsonl").open()]
    assert (line["samples"], line["num_skipped"], len(line["generations"])) == (1, 1, 1)
