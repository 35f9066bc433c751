"""Traced models (`torch.compile`, `torch.export`, static cache) equal the eager model."""

import pytest
import torch
from torch.export import Dim
from transformers import StaticCache

WITH_LABELS = {"labels": torch.tensor([[-100] * 8 + [7, -100, 9, 11, 9]])}


@pytest.fixture
def inputs(image_inputs):
    ids = torch.cat([image_inputs["input_ids"], torch.tensor([[9]])], 1)
    return image_inputs | {"input_ids": ids}


@pytest.fixture
def text_inputs():
    return {"input_ids": torch.tensor([[1, 5, 6, 7, 9]])}


@pytest.mark.parametrize("modality", ["inputs", "text_inputs"])
def test_compiled_without_graph_breaks(tiny, modality, request):
    inputs = request.getfixturevalue(modality)
    expected = tiny(**inputs).logits
    compiled = torch.compile(tiny, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, expected)


def test_gradients_of_a_compiled_model(tiny, inputs):
    """Both projections process all tokens; each still learns from its own tokens only."""
    found = []
    for model in (tiny, torch.compile(tiny, fullgraph=True, backend="aot_eager")):
        tiny.zero_grad()
        loss = model(**inputs, **WITH_LABELS).loss
        loss.backward()
        gradients = {name: p.grad for name, p in tiny.named_parameters() if p.grad is not None}
        found.append((loss, gradients))
    (eager_loss, eager), (loss, compiled) = found
    torch.testing.assert_close(loss, eager_loss)
    assert compiled.keys() == eager.keys()
    for name, gradient in eager.items():
        torch.testing.assert_close(compiled[name], gradient, msg=name)


@pytest.mark.parametrize("modality", ["inputs", "text_inputs"])
def test_exported_with_dynamic_length(tiny, modality, request):
    inputs = request.getfixturevalue(modality)
    shapes = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    rows = torch.cat([inputs["input_ids"]] * 2)
    batch = {"input_ids": rows}
    if "pixel_values" in inputs:
        shapes["pixel_values"] = {0: Dim.DYNAMIC}
        batch["pixel_values"] = torch.cat([inputs["pixel_values"]] * 2)
    options = {"use_cache": False}
    exported = torch.export.export(
        tiny, (), batch | options, dynamic_shapes=shapes | {"use_cache": None}, strict=False
    ).module()
    longer = batch | {"input_ids": torch.cat([rows, rows[:, :2]], 1)[:, : rows.shape[1] + 2]}
    longer["input_ids"][:, -2:] = 7
    for case in (batch, longer):
        torch.testing.assert_close(exported(**case, **options).logits, tiny(**case).logits)


def test_static_cache(tiny, inputs):
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = tiny.generate(**inputs, **options)
    found = tiny.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(found, expected)


def test_compiled_decode_step_with_static_cache(tiny, inputs):
    """Prefill and one step, as `generate` with a static cache compiles them."""
    step = torch.tensor([[3]])
    prompt = tiny(**inputs, use_cache=True)
    expected = tiny(input_ids=step, past_key_values=prompt.past_key_values).logits
    cache = StaticCache(config=tiny.config, max_cache_len=20)
    compiled = torch.compile(tiny, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs, past_key_values=cache).logits, prompt.logits)
    torch.testing.assert_close(compiled(input_ids=step, past_key_values=cache).logits, expected)
