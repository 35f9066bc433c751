"""QLoRA on a quantized checkpoint: training, the saved adapter, and the planned memory."""

import copy

import pytest
import torch
from torch import nn

from owl2.checkpoints.hf_quantizer import Owl2QuantizationConfig
from owl2.engine.backends.weight_only_quantization import QuantizedLinear
from owl2.engine.engine import Engine
from owl2.errors import ErrorCode
from owl2.quantization.quantize_checkpoint import quantize_checkpoint
from owl2.train.adapters import apply_lora, loading_options, merge, prepare_for_training
from owl2.train.recipe_sections import LoraSettings
from owl2.train.run import train
from owl2.train.trainer import Owl2Trainer
from tests.errors import raises_input_error
from tests.train.runs import LORA, ask, load_model, quiet
from tests.train.tiny import QUESTION


@pytest.fixture(scope="module")
def quantized(world, tmp_path_factory):
    """The start checkpoint of `world` with 4-bit weights."""
    return str(quantize_checkpoint(world / "start", tmp_path_factory.mktemp("quantized") / "4bit"))


def dequantized(model):
    """The same model with plain Linears."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, QuantizedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = nn.Parameter(module.dequantize(torch.float32), requires_grad=False)
            plain.set_submodule(name, linear)
    return plain


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_dequantized_model(
    world, tmp_path, image_batch, bits, checkpointing
):
    config = Owl2QuantizationConfig(bits)
    model = load_model(quantize_checkpoint(world / "start", tmp_path / "out", config))
    settings = LoraSettings(r=2, modules_to_save=["abstractor"])
    models = [model, dequantized(model)]
    is_image = image_batch["input_ids"] == 40
    ids = image_batch["input_ids"].masked_fill(is_image, model.config.image_token_id)
    gradients = []
    for one in models:
        apply_lora(one, settings, seed=0)
        for name, parameter in one.named_parameters():
            if "lora_B" in name:  # zeros by default
                torch.manual_seed(len(name))
                nn.init.normal_(parameter, std=0.1)
        one.train()
        if checkpointing:
            one.gradient_checkpointing_enable({"use_reentrant": False})
        one(**image_batch | {"input_ids": ids}).loss.backward()
        gradients.append({n: p.grad for n, p in one.named_parameters() if p.grad is not None})
    ours, expected = gradients
    assert ours.keys() == expected.keys()
    assert any("visual_abstractor" in name for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_on_a_quantized_checkpoint(recipe, world, quantized, monkeypatch, dtype):
    settings = recipe(model=quantized, lora=LORA, dtype=dtype)
    before = load_model(quantized).state_dict()
    live = []
    monkeypatch.setattr(Owl2Trainer, "check_finite", lambda self: live.append(self.model))
    result = train(settings, quiet())
    layers = [m for m in live[-1].modules() if isinstance(m, QuantizedLinear)]
    assert layers
    state = {n.replace(".base_layer", ""): t for n, t in live[-1].state_dict().items()}
    assert all(torch.equal(state[n], t) for n, t in before.items() if t.dtype == torch.uint8)
    # The adapter fits the quantized checkpoint, and the one that was quantized.
    question = ask(QUESTION, world / "1.png")
    for base in (None, world / "start"):
        engine = Engine.from_pretrained(result.model, base=base, dtype="float32")
        lora = {n: p for n, p in engine.model.named_parameters() if "lora_" in n}
        trained = dict(live[-1].named_parameters())
        assert lora
        assert all(torch.equal(parameter, trained[name]) for name, parameter in lora.items())
        assert isinstance(engine.chat(question, max_new_tokens=3), str)
    with raises_input_error(ErrorCode.UNSUPPORTED, "--base"):
        merge(result.model, result.output / "merged")
    assert merge(result.model, result.output / "merged", base=str(world / "start")).is_dir()


@pytest.mark.parametrize("change", [{"lora": None}, {"lora": LORA, "quantize": "4bit"}])
def test_settings_that_do_not_fit_a_quantized_checkpoint(recipe, quantized, change):
    with raises_input_error(ErrorCode.CONFLICT, quantized):
        loading_options(recipe(model=quantized, **change))


def test_sharding_of_a_quantized_checkpoint_is_refused(recipe, quantized):
    with raises_input_error(ErrorCode.CONFLICT, "ddp.yaml"):
        prepare_for_training(
            load_model(quantized), recipe(model=quantized, lora=LORA), autocast=False
        )
