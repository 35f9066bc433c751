"""The Trainer: gradients, schedule, what is frozen, what is refused."""

import hashlib
import math

import pytest
import torch

from owl2.errors import InputError
from owl2.train.parallelize import enable_checkpointing
from owl2.train.trainable import apply_stage
from owl2.train.trainer import Owl2Trainer
from tests.tiny import make_model
from tests.train.tiny import RandomSamples, collate, pad


def make_trainer(recipe, tmp_path, model=None, samples=None):
    model = model or make_model()
    apply_stage(model, recipe.stage)
    return Owl2Trainer(
        model, recipe, samples or RandomSamples(32), collate, tmp_path / "checkpoints"
    )


def hashes(model):
    return {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
    }


class Gradients(Owl2Trainer):
    """Keeps the gradients of the first step, as the optimizer would get them but for clipping."""

    def _get_grad_norm(self, model, grad_norm=None):
        self.kept = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return super()._get_grad_norm(model, grad_norm)


def first_gradients(recipe, tmp_path):
    model = make_model()
    apply_stage(model, recipe.stage)
    trainer = Gradients(model, recipe, RandomSamples(8), collate, tmp_path / "checkpoints")
    trainer.train()
    return trainer.kept


def test_accumulated_gradients_are_those_of_the_whole_batch(make_recipe, tmp_path):
    """Pieces with different numbers of labels weigh by their labels, not by their number."""
    settings = {"batch_size": 8, "max_steps": 1, "max_grad_norm": 1e9}
    whole = first_gradients(make_recipe(**settings), tmp_path)
    pieces = first_gradients(make_recipe(**settings, gradient_accumulation_steps=4), tmp_path)
    assert whole.keys() == pieces.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    # The pieces do differ in labels, or this would show nothing.
    samples = [RandomSamples(8).made(number) for number in range(8)]
    assert len({int((sample["labels"] != -100).sum()) for sample in samples}) > 2


@pytest.mark.parametrize("stage", [1, 2])
def test_a_recipe_with_checkpointing_has_the_same_gradients(make_recipe, tmp_path, stage):
    settings = {"stage": stage, "max_steps": 1}
    plain = first_gradients(make_recipe(**settings), tmp_path)
    recomputed = first_gradients(make_recipe(**settings, gradient_checkpointing=True), tmp_path)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize("use_mam", [True, False])
@pytest.mark.parametrize("stage", [1, 2])
def test_frozen_tensors_stay_bit_identical(make_recipe, tmp_path, stage, use_mam):
    recipe = make_recipe(stage=stage, weight_decay=0.05)
    model = make_model(use_mam=use_mam)
    trained = apply_stage(model, stage)
    before = hashes(model)
    make_trainer(recipe, tmp_path, model).train()
    after = hashes(model)
    changed = {name for name in before if before[name] != after[name]}
    buffers = before.keys() - set(trained.trainable) - set(trained.frozen)
    assert changed == set(trained.trainable)  # so no frozen one, and no trained one left out
    assert not changed & buffers


def test_the_loss_goes_down(make_recipe, tmp_path):
    recipe = make_recipe(max_steps=60, batch_size=8, learning_rate=2e-2)
    trainer = make_trainer(recipe, tmp_path, samples=SameEveryEpoch(8))
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] / 3


class SameEveryEpoch(RandomSamples):
    def made(self, index, epoch=0):
        return super().made(index)


@pytest.mark.parametrize("stage", [1, 2])
def test_checkpointed_gradients_equal_plain_ones(stage):
    batch = pad([RandomSamples(4).made(number) for number in range(4)])
    results = []
    for checkpointed in (False, True):
        model = make_model().train()
        apply_stage(model, stage)
        if checkpointed:
            enable_checkpointing(model)
        counter = CountForwards(model)
        model(**batch, use_cache=False).loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        # All three parts compute twice, or this would compare plain with plain.
        assert set(counter.counts.values()) == {2 if checkpointed else 1}
    plain, recomputed = results
    assert plain.keys() == recomputed.keys()
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], rtol=0, atol=1e-7, msg=name)


class CountForwards:
    """How often the MLP of one layer of each part runs."""

    def __init__(self, model):
        owl2 = model.model
        self.counts = {}
        for name, module in {
            "vision": owl2.vision_model.encoder.layers[0].mlp,
            "abstractor": owl2.visual_abstractor.encoder.layers[0].crossattention.output.mlp,
            "decoder": owl2.layers[0].mlp,
        }.items():
            self.counts[name] = 0
            module.register_forward_pre_hook(self.counting(name))

    def counting(self, name):
        def count(*_):
            self.counts[name] += 1

        return count


def test_the_schedule_is_warm_up_then_cosine_for_each_group(make_recipe, tmp_path):
    peak, least, warmup, steps = 1e-2, 1e-4, 4, 24
    recipe = make_recipe(learning_rate=peak, min_lr=least, warmup_steps=warmup, max_steps=steps)
    trainer = make_trainer(recipe, tmp_path)
    trainer.create_optimizer_and_scheduler(num_training_steps=steps)
    scales = [group["lr_scale"] for group in trainer.optimizer.param_groups]
    assert len(set(scales)) > 3
    rates = []
    for _ in range(steps + 1):
        rates.append(trainer.lr_scheduler.get_last_lr())
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    at = {0: 0.0, 1: peak / warmup, warmup: peak, 14: (peak + least) / 2, steps: least}
    at[9] = least + (peak - least) * (1 + math.cos(math.pi / 4)) / 2
    for step, rate in at.items():
        expected = [rate * scale for scale in scales]
        assert rates[step] == pytest.approx(expected, rel=1e-9, abs=1e-15), step


def test_a_loss_that_is_not_finite_stops_the_run_before_any_harm(make_recipe, tmp_path):
    recipe = make_recipe(save_steps=1, max_steps=8)
    model = make_model()
    trainer = make_trainer(recipe, tmp_path, model)
    trainer.train_loader.loader.collate = spoil(batch=3)
    with pytest.raises(InputError, match="step 3: the loss is nan"):
        trainer.train()
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["checkpoint-1", "checkpoint-2"]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def spoil(batch):
    """A collate whose n-th batch has pixels that are not numbers."""
    count = 0

    def collate_and_spoil(samples):
        nonlocal count
        count += 1
        made = collate(samples)
        if count == batch:
            made.batch["pixel_values"][0, 0, 0, 0] = math.nan
        return made

    return collate_and_spoil


def test_a_gradient_that_is_not_finite_stops_the_run(make_recipe, tmp_path):
    model = make_model()
    trainer = make_trainer(make_recipe(), tmp_path, model)
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(InputError, match=r"step 1: .* gradient's norm (nan|inf)"):
        trainer.train()


def test_stage_1_refuses_a_batch_without_images(make_recipe, tmp_path):
    trainer = make_trainer(make_recipe(stage=1), tmp_path, samples=RandomSamples(8, images=False))
    with pytest.raises(InputError, match="without any image"):
        trainer.train()


def test_stage_2_takes_a_batch_without_images(make_recipe, tmp_path):
    trainer = make_trainer(make_recipe(), tmp_path, samples=RandomSamples(8, images=False))
    assert trainer.train().global_step == 4


def test_a_batch_that_cannot_be_shared_out_is_refused(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.world_size", 3)
    with pytest.raises(InputError, match="multiple of devices"):
        make_trainer(make_recipe(), tmp_path)


def test_a_warm_up_longer_than_the_epochs_is_refused(make_recipe, tmp_path):
    recipe = make_recipe(max_steps=None, epochs=1.0, warmup_steps=8)
    with pytest.raises(InputError, match=r"warmup_steps \(8\) must be fewer .* \(8\)"):
        make_trainer(recipe, tmp_path).train()


@pytest.mark.parametrize("tied", [False, True])
def test_going_on_equals_not_having_stopped(make_recipe, tmp_path, caplog, tied):
    recipe = make_recipe(save_steps=2)
    whole = make_model(tie_word_embeddings=tied)
    make_trainer(recipe, tmp_path, whole).train()
    resumed = make_model(seed=1, tie_word_embeddings=tied)
    make_trainer(recipe, tmp_path, resumed).train(str(tmp_path / "checkpoints" / "checkpoint-2"))
    assert hashes(whole) == hashes(resumed)
    assert "missing keys" not in caplog.text


def test_a_state_of_another_model_is_refused(make_recipe, tmp_path):
    recipe = make_recipe(save_steps=2)
    make_trainer(recipe, tmp_path, make_model(use_mam=False)).train()
    trainer = make_trainer(recipe, tmp_path)
    with pytest.raises(InputError, match="the state of another model"):
        trainer.train(str(tmp_path / "checkpoints" / "checkpoint-2"))


def test_bfloat16_computes_in_it_and_keeps_float32_weights(make_recipe, tmp_path):
    model = make_model()
    trainer = make_trainer(make_recipe(dtype="bfloat16"), tmp_path, model)
    seen = set()
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _i, out: seen.add(out.dtype))
    trainer.train()
    assert torch.bfloat16 in seen
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_trainer_prints_nothing_of_its_own(make_recipe, tmp_path, capsys):
    make_trainer(make_recipe(), tmp_path).train()
    captured = capsys.readouterr()
    assert captured.out == ""


@pytest.mark.parametrize("checkpointing", [False, "selective", True])
def test_copies_of_weights_are_not_kept_beside_checkpoints(make_recipe, tmp_path, checkpointing):
    """Autocast's 16-bit copies would stay until the forward pass is over."""
    recipe = make_recipe(
        dtype="bfloat16", gradient_checkpointing=checkpointing, batch_size=2, max_steps=1
    )
    trainer = make_trainer(recipe, tmp_path)
    keeps: list[bool] = []
    layer = trainer.model.model.layers[0].mlp.gate_proj

    layer.register_forward_hook(lambda *_: keeps.append(torch.is_autocast_cache_enabled()))
    trainer.train()
    assert keeps
    assert all(kept == (not checkpointing) for kept in keeps)
