"""The model in the wrappers of other libraries: peft, torch.compile, quantization."""

import copy
import importlib
import sys

import peft
import pytest
import torch
from peft.utils import constants
from torch import nn

from owl2.checkpoints.peft_targets import TABLES, RegisterOnImport
from owl2.model.modality import TEXT, VISUAL, Routing
from owl2.model.modeling import Owl2ForConditionalGeneration
from tests.model.conftest import make_modalities_differ
from tests.tiny import ONE_LAYER, make_model

CLOSE = {"rtol": 0, "atol": 1e-5}


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def linears(model):
    return {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LORA = {"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM"}


def adapted(model, target_modules):
    torch.manual_seed(11)
    # By default B is zero, so that the adapter would have no effect.
    config = peft.LoraConfig(target_modules=target_modules, init_lora_weights=False, **LORA)
    return peft.get_peft_model(model, config).eval()


def wrapped(model):
    modules = model.base_model.model.named_modules()
    return {n for n, module in modules if isinstance(module, peft.tuners.lora.LoraLayer)}


VISUAL_K_AND_V = [f"self_attn.multiway.1.{name}_proj" for name in "kv"]


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", None),
        (PROJECTIONS, 2 * (1 + 2 + 2 + 1)),
        (None, 2 * (1 + 2)),  # LLaMA's q_proj and v_proj
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


@pytest.mark.parametrize("targets", ["all-linear", PROJECTIONS])
def test_adapter_is_trained_and_saved_without_the_base(tiny, image_inputs, tmp_path, targets):
    base = copy.deepcopy(tiny)
    model = adapted(tiny, targets).train()
    model(**image_inputs, labels=torch.ones_like(image_inputs["input_ids"])).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    model.eval().save_pretrained(tmp_path)
    expected = logits(model, **image_inputs)
    base.save_pretrained(tmp_path / "base")
    owl2_model = Owl2ForConditionalGeneration.from_pretrained(tmp_path, base=tmp_path / "base")
    for again in (peft.PeftModel.from_pretrained(base, tmp_path).eval(), owl2_model):
        torch.testing.assert_close(logits(again, **image_inputs), expected, **CLOSE)
        answer = again.generate(**image_inputs, max_new_tokens=3, do_sample=False)
        assert answer.shape[1] <= image_inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("modality", [TEXT, VISUAL])
def test_tokens_train_the_lora_of_their_modality(tiny, modality):
    attention = adapted(tiny, PROJECTIONS).get_submodule(
        "base_model.model.model.layers.0.self_attn"
    )
    types = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]])
    for name in ("k_proj", "v_proj"):
        states = attention.multiway(name, torch.randn(2, 4, 16), Routing.of(types))
        states[types == modality].sum().backward()
        gradients = [
            {n: p.grad.abs().sum().item() for n, p in linear.named_parameters() if "lora_" in n}
            for linear in attention.multiway.pair(name)
        ]
        assert len(gradients[modality]) == 2 and all(gradients[modality].values())
        assert not any(gradients[1 - modality].values())


@pytest.mark.parametrize("training", [True, False])
def test_every_adapter_has_a_gradient_without_images(tiny, training):
    """DDP requires it; those of images have zeros."""
    ids = torch.tensor([[1, 5, 6, 7], [1, 9, 9, 0]])
    expected = logits(tiny, input_ids=ids)
    model = adapted(tiny, PROJECTIONS).train(training)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    for name, weight in model.named_parameters():
        if "lora_" in name:
            assert weight.grad.any() != (".multiway.1." in name), name
    with torch.no_grad():
        evaluated = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(output.logits, evaluated, **CLOSE)
    assert (evaluated - expected).abs().max() > 1e-2


def test_batch_of_several_adapters(tiny, image_inputs):
    """PEFT's `adapter_names`: each row equals the row alone with its adapter."""
    batch = {
        "input_ids": image_inputs["input_ids"].repeat(3, 1),
        "pixel_values": image_inputs["pixel_values"].repeat(3, 1, 1, 1),
    }
    model = adapted(tiny, PROJECTIONS)
    other = peft.LoraConfig(target_modules=PROJECTIONS, init_lora_weights=False, **LORA)
    model.add_adapter("other", other)
    names = ["default", "__base__", "other"]
    mixed = logits(model, **batch, adapter_names=names)
    for name, found in zip(names, mixed, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                expected = logits(model, **image_inputs)
        else:
            model.set_adapter(name)
            expected = logits(model, **image_inputs)
        torch.testing.assert_close(found, expected[0], **CLOSE)


def test_lora_of_embeddings_with_images(tiny, image_inputs):
    """Its matrices have no row for the image token either."""
    before = logits(tiny, **image_inputs)
    model = adapted(tiny, ["embed_tokens"])
    found = logits(model, **image_inputs)
    assert found.isfinite().all() and (found - before).abs().max() > 1e-3
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, **image_inputs), found, **CLOSE)


def test_default_targets_are_registered_when_peft_is_imported(monkeypatch):
    """After owl2, as in a notebook that imports PEFT in a later cell."""
    before = list(sys.meta_path)
    monkeypatch.delitem(sys.modules, TABLES)
    sys.meta_path.insert(0, RegisterOnImport())
    tables = importlib.import_module(TABLES)
    assert sys.meta_path == before
    for table in (tables, constants):
        targets = table.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        assert targets["mplug_owl2"] == targets["mplug_docowl"] == targets["llama"]
        assert targets["mplug_owl2_1"] == targets["gpt2"]


def test_adapters_of_transformers(tiny, image_inputs, tmp_path):
    base, before = copy.deepcopy(tiny), logits(tiny, **image_inputs)
    tiny.add_adapter(
        peft.LoraConfig(target_modules=PROJECTIONS, init_lora_weights=False, **LORA), "one"
    )
    with_adapter = logits(tiny, **image_inputs)
    assert (with_adapter - before).abs().max() > 1e-2
    tiny.disable_adapters()
    assert torch.equal(logits(tiny, **image_inputs), before)
    tiny.enable_adapters()
    tiny.save_pretrained(tmp_path)
    base.load_adapter(str(tmp_path), "one")
    assert torch.equal(logits(base, **image_inputs), with_adapter)


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
        ),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_prompts_are_trained_with_images(tiny, image_inputs, config):
    ids = image_inputs["input_ids"]
    labels = ids.masked_fill(ids == 40, -100)
    expected = logits(tiny, **image_inputs)
    model = peft.get_peft_model(tiny, copy.deepcopy(config))
    output = model(**image_inputs, labels=labels)
    output.loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad.isfinite().all() and p.grad.any() for p in trained)
    assert output.logits.isfinite().all()
    changed = [copy.deepcopy(image_inputs), copy.deepcopy(image_inputs)]
    changed[1]["pixel_values"][0] = 0
    first, second = (model.generate(**inputs, max_new_tokens=3) for inputs in changed)
    assert first.shape == second.shape == (1, ids.shape[1] + 3)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, **image_inputs), expected, **CLOSE)


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
