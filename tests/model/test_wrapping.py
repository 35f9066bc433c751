"""The model in the wrappers of other libraries: peft, torch.compile, quantization."""

import copy

import peft
import pytest
import torch
from torch import nn

from owl2.model.modeling import Owl2ForConditionalGeneration
from tests.model.conftest import make_modalities_differ
from tests.tiny import ONE_LAYER, make_model

CLOSE = {"rtol": 0, "atol": 1e-5}


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def linears(model):
    return {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}


def adapted(model, target_modules):
    torch.manual_seed(11)
    # By default B is zero, so that the adapter would have no effect.
    options = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=target_modules, task_type="CAUSAL_LM", **options)
    ).eval()


def wrapped(model):
    modules = model.base_model.model.named_modules()
    return {n for n, module in modules if isinstance(module, peft.tuners.lora.LoraLayer)}


VISUAL_K_AND_V = [f"self_attn.{name}_proj.multiway.1" for name in "kv"]


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", None),
        (VISUAL_K_AND_V, 4),
        (["q_proj", *VISUAL_K_AND_V, "query_key_value", "w1", "visual_fc"], 2 + 4 + 3 + 2 + 1),
    ],
)
def test_lora_wraps_every_requested_linear(tiny, image_inputs, targets, count):
    names = linears(tiny)
    before = logits(tiny, **image_inputs)
    model = adapted(tiny, targets)
    if count is None:
        assert wrapped(model) == names - {"lm_head"}
    else:
        assert len(wrapped(model)) == count
    live = logits(model, **image_inputs)
    assert (live - before).abs().max() > 1e-2
    merged = model.merge_and_unload()
    assert type(merged) is Owl2ForConditionalGeneration
    torch.testing.assert_close(logits(merged, **image_inputs), live, **CLOSE)


def test_adapter_is_trained_and_saved_without_the_base(tiny, image_inputs, tmp_path):
    base = copy.deepcopy(tiny)
    model = adapted(tiny, "all-linear").train()
    model(**image_inputs, labels=torch.ones_like(image_inputs["input_ids"])).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    expected = logits(model, **image_inputs)
    torch.testing.assert_close(logits(again, **image_inputs), expected, **CLOSE)
    answer = again.generate(**image_inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] <= image_inputs["input_ids"].shape[1] + 3


# "eager" traces the same graphs without a minute of C++ compilation.
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(image_inputs, backend):
    torch.compiler.reset()
    tiny = make_model(**ONE_LAYER).eval()
    make_modalities_differ(tiny)
    compiled = torch.compile(copy.deepcopy(tiny), backend=backend)
    for inputs in (image_inputs, {"input_ids": torch.tensor([[1, 5, 6]])}):
        expected = logits(tiny, **inputs)
        torch.testing.assert_close(logits(compiled, **inputs), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize:UserWarning")
def test_quantization_replaces_every_linear(tiny, image_inputs):
    """8-bit weights by torch's dynamic quantization, which runs on any CPU."""
    expected = logits(tiny, **image_inputs)
    quantized = torch.ao.quantization.quantize_dynamic(
        copy.deepcopy(tiny), {nn.Linear}, dtype=torch.qint8
    )
    assert linears(tiny)
    assert not linears(quantized)
    difference = (logits(quantized, **image_inputs) - expected).abs().max()
    assert 0 < difference < 0.1 * expected.abs().max()
