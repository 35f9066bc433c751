"""The Trainer: gradients, schedule, frozen weights, values that are not finite."""

import hashlib
import math

import pytest
import torch

from owl2.errors import ErrorCode
from owl2.train.trainable import apply_stage
from owl2.train.trainer import Owl2Trainer
from tests.errors import raises_input_error
from tests.tiny import make_model
from tests.train.runs import trainable_names
from tests.train.tiny import RandomSamples, collate


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
    """Keeps the gradients of the last step, before clipping."""

    def _get_grad_norm(self, model, grad_norm=None):
        self.kept = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return super()._get_grad_norm(model, grad_norm)


def first_gradients(recipe, tmp_path):
    model = make_model()
    apply_stage(model, recipe.stage)
    trainer = Gradients(model, recipe, RandomSamples(8), collate, tmp_path / "checkpoints")
    trainer.train()
    return trainer.kept


def test_accumulated_gradients_equal_those_of_the_full_batch(make_recipe, tmp_path):
    """Micro-batches are weighted by their number of labels."""
    settings = {"batch_size": 8, "max_steps": 1, "max_grad_norm": 1e9}
    full = first_gradients(make_recipe(**settings), tmp_path)
    accumulated = first_gradients(make_recipe(**settings, gradient_accumulation_steps=4), tmp_path)
    assert full.keys() == accumulated.keys()
    for name, gradient in full.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    # The micro-batches differ in their number of labels.
    samples = [RandomSamples(8).sample_of(number) for number in range(8)]
    assert len({int((sample["labels"] != -100).sum()) for sample in samples}) > 2


@pytest.mark.parametrize("stage", [1, 2])
def test_checkpointing_in_a_recipe_gives_the_same_gradients(make_recipe, tmp_path, stage):
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
    apply_stage(model, stage)
    before = hashes(model)
    make_trainer(recipe, tmp_path, model).train()
    after = hashes(model)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == trainable_names(model)  # all of these and no others


@pytest.mark.parametrize("warmup_steps", [4, 1 / 6])
def test_schedule_is_warm_up_then_cosine_for_each_group(make_recipe, tmp_path, warmup_steps):
    peak, minimum, warmup, steps = 1e-2, 1e-4, 4, 24
    settings = {"learning_rate": peak, "min_lr": minimum, "warmup_steps": warmup_steps}
    recipe = make_recipe(**settings, max_steps=steps)
    trainer = make_trainer(recipe, tmp_path)
    trainer.create_optimizer_and_scheduler(num_training_steps=steps)
    scales = [group["lr_scale"] for group in trainer.optimizer.param_groups]
    assert len(set(scales)) > 3
    rates = []
    for _ in range(steps + 1):
        rates.append(trainer.lr_scheduler.get_last_lr())
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    at = {0: 0.0, 1: peak / warmup, warmup: peak, 14: (peak + minimum) / 2, steps: minimum}
    at[9] = minimum + (peak - minimum) * (1 + math.cos(math.pi / 4)) / 2
    for step, rate in at.items():
        expected = [rate * scale for scale in scales]
        assert rates[step] == pytest.approx(expected, rel=1e-9, abs=1e-15), step


def test_loss_that_is_not_finite_stops_the_run_before_the_update(make_recipe, tmp_path):
    recipe = make_recipe(save_steps=1, max_steps=8)
    model = make_model()
    trainer = make_trainer(recipe, tmp_path, model)
    trainer.train_loader.loader.collate = collate_with_nan(number=3)
    with raises_input_error(ErrorCode.NON_FINITE, "step 3", "nan"):
        trainer.train()
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["checkpoint-1", "checkpoint-2"]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def collate_with_nan(number):
    """A collate function whose batch of this number has a NaN pixel."""
    count = 0

    def collate_and_count(samples):
        nonlocal count
        count += 1
        batch = collate(samples)
        if count == number:
            batch.inputs["pixel_values"][0, 0, 0, 0] = math.nan
        return batch

    return collate_and_count


def test_gradient_that_is_not_finite_stops_the_run(make_recipe, tmp_path):
    model = make_model()
    trainer = make_trainer(make_recipe(), tmp_path, model)
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    with raises_input_error(ErrorCode.NON_FINITE, "step 1", "norm"):
        trainer.train()


def test_stage_1_refuses_data_without_images(make_recipe, tmp_path):
    trainer = make_trainer(make_recipe(stage=1), tmp_path, samples=RandomSamples(8, images=False))
    with raises_input_error(ErrorCode.MISSING_IMAGE, "16 samples"):  # the run has no more
        trainer.train()


class AlternatingSamples(RandomSamples):
    """Every second sample has an image."""

    def sample_of(self, index, epoch=0):
        self.images = index % 2 == 0
        return super().sample_of(index, epoch)


def test_stage_1_has_gradients_of_0_in_a_batch_without_images(make_recipe, tmp_path):
    """As with several processes, whose batches without images have a blank one."""
    trained = []
    for always in (False, True):
        torch.manual_seed(0)
        model = make_model()
        model.model.run_all_branches = always
        recipe = make_recipe(stage=1, batch_size=1, max_steps=8)
        trainer = make_trainer(recipe, tmp_path / str(always), model, AlternatingSamples(8))
        assert trainer.train().global_step == 8
        trained.append(model.state_dict())
    for name, weight in trained[0].items():
        torch.testing.assert_close(weight, trained[1][name], rtol=0, atol=0, msg=name)


def test_stage_2_accepts_a_batch_without_images(make_recipe, tmp_path):
    trainer = make_trainer(make_recipe(), tmp_path, samples=RandomSamples(8, images=False))
    assert trainer.train().global_step == 4


def test_indivisible_batch_is_refused(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.world_size", 3)
    with raises_input_error(ErrorCode.CONFLICT, "batch_size (4)"):
        make_trainer(make_recipe(), tmp_path)


def test_warm_up_longer_than_the_run_is_refused(make_recipe, tmp_path):
    recipe = make_recipe(max_steps=None, epochs=1.0, warmup_steps=8)
    with raises_input_error(ErrorCode.CONFLICT, "warmup_steps (8)"):
        make_trainer(recipe, tmp_path).train()


@pytest.mark.parametrize("tied", [False, True])
def test_resumed_equals_uninterrupted(make_recipe, tmp_path, caplog, tied):
    recipe = make_recipe(save_steps=2)
    uninterrupted = make_model(tie_word_embeddings=tied)
    make_trainer(recipe, tmp_path, uninterrupted).train()
    resumed = make_model(seed=1, tie_word_embeddings=tied)
    make_trainer(recipe, tmp_path, resumed).train(str(tmp_path / "checkpoints" / "checkpoint-2"))
    assert hashes(uninterrupted) == hashes(resumed)
    assert "missing keys" not in caplog.text


def test_checkpoint_of_another_model_is_refused(make_recipe, tmp_path):
    recipe = make_recipe(save_steps=2)
    make_trainer(recipe, tmp_path, make_model(use_mam=False)).train()
    trainer = make_trainer(recipe, tmp_path)
    with raises_input_error(ErrorCode.RESUME_MISMATCH, "overwrite=true"):
        trainer.train(str(tmp_path / "checkpoints" / "checkpoint-2"))


def test_bfloat16_computation_keeps_float32_weights(make_recipe, tmp_path):
    model = make_model()
    trainer = make_trainer(make_recipe(dtype="bfloat16"), tmp_path, model)
    seen = set()
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _i, out: seen.add(out.dtype))
    trainer.train()
    assert torch.bfloat16 in seen
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_trainer_prints_nothing(make_recipe, tmp_path, capsys):
    make_trainer(make_recipe(), tmp_path).train()
    captured = capsys.readouterr()
    assert captured.out == ""


@pytest.mark.parametrize("checkpointing", [False, "selective", True])
def test_autocast_does_not_cache_weights_with_checkpointing(make_recipe, tmp_path, checkpointing):
    """The 16-bit copies would live until the end of the forward pass."""
    recipe = make_recipe(
        dtype="bfloat16", gradient_checkpointing=checkpointing, batch_size=2, max_steps=1
    )
    trainer = make_trainer(recipe, tmp_path)
    cached: list[bool] = []
    layer = trainer.model.model.layers[0].mlp.gate_proj

    layer.register_forward_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))
    trainer.train()
    assert cached
    assert all(is_cached == (not checkpointing) for is_cached in cached)
