"""Compiled blocks compute the same as eager ones; requirements of compilation and attention."""

import pytest
import torch
from torch._dynamo.utils import counters

from owl2.data.packing import pack
from owl2.errors import ErrorCode
from owl2.train import parallelize
from owl2.train.adapters import apply_lora
from owl2.train.parallelize import (
    blocks_of,
    compile_blocks,
    enable_checkpointing,
    require_attention,
    require_compiler,
)
from owl2.train.recipe_sections import LoraSettings
from owl2.train.run import batch_layout, train
from owl2.train.trainer import Owl2Trainer
from tests.errors import raises_input_error
from tests.tiny import VISION_BLOCKS, make_model
from tests.train.runs import assert_same_weights, quiet, train_until, weights
from tests.train.test_packing import samples
from tests.train.tiny import RandomSamples, pad


@pytest.fixture(autouse=True)
def reset_compiler():
    torch._dynamo.reset()
    counters.clear()
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit


def batches():
    """Padded and packed batches of different lengths and image counts."""
    images, text = RandomSamples(40), RandomSamples(40, images=False)
    for count in (3, 4, 6):
        yield pad([images.sample_of(number) for number in range(count)])
        yield pad([text.sample_of(number) for number in range(count)])
        yield pack(samples()[: count + 1], 0)


def train_on_batches(model):
    """The loss and the gradients of each batch."""
    results = []
    for batch in batches():
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    return results


def prepared(checkpointing=False, lora=False):
    model = make_model(initializer_range=0.4).train()
    if lora:
        apply_lora(model, LoraSettings(r=2, modules_to_save=["abstractor"]), seed=0)
    if checkpointing:
        enable_checkpointing(model, checkpointing == "selective")
    return model


def assert_close(found, expected):
    for (loss, gradients), (expected_loss, expected_gradients) in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        assert gradients.keys() == expected_gradients.keys()
        # Fused sums round differently. The gradient of a key bias, which does not affect the
        # softmax, is rounding only.
        noise = 1e-7 * max(float(one.abs().max()) for one in expected_gradients.values())
        for name, gradient in gradients.items():
            other = expected_gradients[name]
            allowed = 5e-5 * float(other.abs().max()) + noise
            torch.testing.assert_close(gradient, other, rtol=5e-5, atol=allowed, msg=name)


def test_blocks_are_the_layers_of_all_three_parts():
    assert len(blocks_of(make_model())) == VISION_BLOCKS + 2 + 2


@pytest.mark.slow
def test_other_lengths_use_the_same_compiled_code():
    model, plain = prepared(), prepared()
    names = list(model.state_dict())
    compile_blocks(model, backend="aot_eager")  # faster than inductor, with the same traces
    assert list(model.state_dict()) == names
    assert_close(train_on_batches(model), train_on_batches(plain))
    assert not counters["graph_break"]
    # ViT, abstractor, and the decoder with and without routing, padded or packed.
    first = counters["stats"]["unique_graphs"]
    assert 3 <= first <= 10
    train_on_batches(model)
    assert counters["stats"]["unique_graphs"] == first


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_compiled_equals_eager(checkpointing, lora):
    model = prepared(checkpointing, lora)
    compile_blocks(model)
    assert_close(train_on_batches(model), train_on_batches(prepared(checkpointing, lora)))


@pytest.mark.slow
def test_resumed_run_with_all_features_equals_uninterrupted_run(recipe, tmp_path):
    settings = {
        "compile": True,
        "gradient_checkpointing": "selective",
        "dtype": "bfloat16",
        "packing": True,
        "gradient_accumulation_steps": 2,
    }
    uninterrupted = train(recipe(**settings, output=str(tmp_path / "uninterrupted")), quiet())
    assert not train_until(4, recipe(**settings)).finished
    result = train(recipe(**settings), quiet())
    assert result.finished
    assert_same_weights(weights(result.model), weights(uninterrupted.model))


def test_missing_compiler_is_reported_before_weights_are_loaded(recipe, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with raises_input_error(ErrorCode.MISSING_DEPENDENCY, "g++"):
        require_compiler("cpu")
    with raises_input_error(ErrorCode.MISSING_DEPENDENCY, "compile=false"):
        train(recipe(compile=True), quiet())


# ------------------------------------------------------------------ attention


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_attention_for_gpus_is_refused_on_a_cpu(recipe, monkeypatch, name):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with raises_input_error(ErrorCode.UNSUPPORTED, name, "attn_implementation=sdpa"):
        train(recipe(attn_implementation=name), quiet())


def test_flash_attention_needs_its_package_and_bfloat16(make_recipe, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    flash = {"attn_implementation": "flash_attention_2"}
    with monkeypatch.context() as patch:
        patch.setattr(parallelize, "is_flash_attn_2_available", lambda: False)
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with raises_input_error(ErrorCode.MISSING_DEPENDENCY, "pip install flash-attn"):
            require_attention(make_recipe(**flash))
    monkeypatch.setattr(parallelize, "is_flash_attn_2_available", lambda: True)
    require_attention(make_recipe(**flash, dtype="bfloat16"))
    with raises_input_error(ErrorCode.CONFLICT, "dtype=bfloat16"):
        require_attention(make_recipe(**flash, dtype="float32"))


@pytest.mark.parametrize("name", [None, "eager", "sdpa"])
def test_default_attention_runs_everywhere(make_recipe, name):
    require_attention(make_recipe(attn_implementation=name))


def test_model_uses_the_attention_of_the_recipe(recipe, monkeypatch):
    used = []
    training_step = Owl2Trainer.training_step

    def record(self, model, *args, **kwargs):
        used.append(model.config._attn_implementation)
        return training_step(self, model, *args, **kwargs)

    monkeypatch.setattr(Owl2Trainer, "training_step", record)
    train(recipe(attn_implementation="eager", max_steps=1, warmup_steps=0), quiet())
    assert used == ["eager"]


def test_layout_of_packed_batches(make_recipe):
    assert batch_layout(make_recipe()) == "padded"
    assert batch_layout(make_recipe(packing=True)) == "packed"
    flash = make_recipe(max_length=70, packing=True, attn_implementation="flash_attention_2")
    assert batch_layout(flash) == "one row"
