"""Compiled blocks: what they compute is what eager ones do; how often they are compiled."""

import pytest
import torch
from torch._dynamo.utils import counters

from owl2.data.packing import pack
from owl2.errors import InputError
from owl2.train.adapters import apply_lora
from owl2.train.parallelize import blocks_of, compile_blocks, enable_checkpointing, require_compiler
from owl2.train.recipe import LoraSettings
from owl2.train.run import train
from tests.tiny import VISION_BLOCKS, make_model
from tests.train.runs import assert_same_weights, interrupt_at, quiet, weights
from tests.train.test_packing import samples
from tests.train.tiny import RandomSamples, pad


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    counters.clear()
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit


def batches():
    """Padded and packed, of other lengths and numbers of images, with and without images."""
    source, words = RandomSamples(40), RandomSamples(40, images=False)
    for count in (3, 4, 6):
        yield pad([source.made(number) for number in range(count)])
        yield pad([words.made(number) for number in range(count)])
        yield pack(samples()[: count + 1], 0)


def learned(model):
    """Losses and gradients of a pass over each of the batches."""
    found = []
    for batch in batches():
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
    return found


def prepared(checkpointing=False, lora=False):
    model = make_model(initializer_range=0.4).train()
    if lora:
        apply_lora(model, LoraSettings(r=2, modules_to_save=["abstractor"]), seed=0)
    if checkpointing:
        enable_checkpointing(model, checkpointing == "selective")
    return model


def assert_close(found, expected):
    for (loss, gradients), (wanted, wanted_gradients) in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
        assert gradients.keys() == wanted_gradients.keys()
        # Fused sums round differently; and of its keys' bias, which a softmax does not see, the
        # gradient is nothing but rounding.
        noise = 1e-7 * max(float(one.abs().max()) for one in wanted_gradients.values())
        for name, gradient in gradients.items():
            wanted_gradient = wanted_gradients[name]
            size = float(wanted_gradient.abs().max())
            torch.testing.assert_close(
                gradient, wanted_gradient, rtol=5e-5, atol=5e-5 * size + noise, msg=name
            )


def test_blocks_are_the_layers_of_all_parts():
    assert len(blocks_of(make_model())) == VISION_BLOCKS + 2 + 2


@pytest.mark.slow
def test_other_lengths_meet_the_same_code():
    model, plain = prepared(), prepared()
    names = list(model.state_dict())
    compile_blocks(model, backend="aot_eager")  # faster than inductor, and traces the same
    assert list(model.state_dict()) == names
    assert_close(learned(model), learned(plain))
    assert not counters["graph_break"]
    # ViT, abstractor, and the decoder with a routing and without, padded or packed.
    first = counters["stats"]["unique_graphs"]
    assert 3 <= first <= 10
    learned(model)
    assert counters["stats"]["unique_graphs"] == first


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_compiled_equals_eager(checkpointing, lora):
    model = prepared(checkpointing, lora)
    compile_blocks(model)
    assert_close(learned(model), learned(prepared(checkpointing, lora)))


@pytest.mark.slow
def test_stopped_and_gone_on_with_all_at_once_equals_uninterrupted(recipe, tmp_path, monkeypatch):
    settings = {
        "compile": True,
        "gradient_checkpointing": "selective",
        "dtype": "bfloat16",
        "packing": True,
        "gradient_accumulation_steps": 2,
    }
    whole = train(recipe(**settings, output=str(tmp_path / "whole")), quiet())
    interrupt_at(monkeypatch, 4)
    assert not train(recipe(**settings), quiet()).finished
    result = train(recipe(**settings), quiet())
    assert result.finished
    assert_same_weights(weights(result.model), weights(whole.model))


def test_no_compiler_is_said_before_weights_are_read(recipe, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(InputError, match="there is no C\\+\\+ compiler; install g"):
        require_compiler("cpu")
    with pytest.raises(InputError, match="compile: "):
        train(recipe(compile=True, model="not read"), quiet())
