"""LoRA on frozen weights in 16, 8 and 4 bits."""

import re
import shutil

import pytest
import torch

from owl2.checkpoints.adapters import lora_layers
from owl2.engine.backends.weight_only_quantization import QuantizedLinear
from owl2.engine.engine import Engine
from owl2.errors import ErrorCode
from owl2.train.adapters import (
    apply_lora,
    cast_frozen_to_bf16,
    loading_options,
    prepare_for_training,
)
from owl2.train.recipe_sections import LoraSettings
from owl2.train.run import train
from owl2.train.trainer import Owl2Trainer
from tests.errors import raises_input_error
from tests.tiny import make_model
from tests.train.runs import LORA, ask, load_model, quiet
from tests.train.tiny import QUESTION


def test_frozen_linears_in_bfloat16_do_not_change_results(image_batch):
    """With bfloat16 autocast, loss and gradients are bit-identical."""
    results = []
    for is_cast in (False, True):
        model = make_model(tie_word_embeddings=True)
        apply_lora(model, LoraSettings(**LORA), seed=0)
        if is_cast:
            cast_frozen_to_bf16(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**image_batch).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss, grads))
    (loss, grads), (cast_loss, cast_grads) = results
    assert torch.equal(loss, cast_loss)
    assert grads.keys() == cast_grads.keys()
    assert all(torch.equal(grads[name], cast_grads[name]) for name in grads)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["model.layers.0.mlp.up_proj.base_layer.weight"] == torch.bfloat16
    assert dtypes["model.vision_model.encoder.layers.0.mlp.fc1.weight"] == torch.bfloat16
    assert dtypes["model.layers.0.mlp.up_proj.lora_A.default.weight"] == torch.float32
    assert dtypes["model.embed_tokens.weight"] == torch.float32  # tied to the head
    assert dtypes["model.norm.weight"] == torch.float32


@pytest.fixture
def wide(world, tmp_path):
    """A checkpoint with sizes for bitsandbytes' CPU kernels: multiples of 32."""
    folder = tmp_path / "wide"
    shutil.copytree(world / "start", folder)
    vocabulary = load_model(folder).config.vocab_size
    make_model(vocab_size=vocabulary, hidden_size=64, intermediate_size=64).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        ("8bit", "bfloat16"),
        pytest.param("4bit", "bfloat16", marks=pytest.mark.slow),
        ("4bit", "float32"),
    ],
)
def test_lora_on_a_quantized_base(recipe, world, wide, monkeypatch, bits, dtype):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    kind = {"8bit": bitsandbytes.nn.Linear8bitLt, "4bit": bitsandbytes.nn.Linear4bit}[bits]
    settings = recipe(
        model=wide,
        lora=LORA | {"modules_to_save": ["abstractor"]},
        quantize=bits,
        dtype=dtype,
        gradient_checkpointing=True,
    )
    before = load_model(settings.model, **loading_options(settings)).state_dict()
    live = []
    monkeypatch.setattr(Owl2Trainer, "check_finite", lambda self: live.append(self.model))
    result = train(settings, quiet())
    model = live[-1]
    quantized = {name for name, module in model.named_modules() if isinstance(module, kind)}
    assert quantized
    assert all(re.fullmatch(r"model\.layers\.\d\..*base_layer", name) for name in quantized)
    vision = model.model.vision_model.encoder.layers[0].mlp.fc1.weight.dtype
    assert vision == {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert all(layer.lora_B["default"].weight.any() for _, layer in lora_layers(model))
    for name in quantized:
        plain = name.removesuffix(".base_layer") + ".weight"
        assert torch.equal(model.get_submodule(name).weight, before[plain]), name

    # The adapter can be used on the base model and on a quantized one.
    question = ask(QUESTION, world / "1.png")
    for quantize in (None, bits):
        engine = Engine.from_pretrained(result.model, quantize=quantize, dtype="bfloat16")
        assert isinstance(engine.chat(question, max_new_tokens=3), str)
    linears = dict(lora_layers(engine.model))
    # The CPU engine has its own quantization.
    assert all(isinstance(layer.get_base_layer(), QuantizedLinear) for layer in linears.values())
    assert engine.model.model.visual_abstractor.visual_fc.weight.dtype == torch.bfloat16


def test_validation_does_not_change_the_gradients_of_a_quantized_model(recipe, wide, image_batch):
    pytest.importorskip("bitsandbytes")
    settings = recipe(model=wide, lora=LORA, quantize="4bit", dtype="bfloat16")
    model = load_model(wide, **loading_options(settings)).train()
    image = model.config.image_token_id
    ids = image_batch["input_ids"]
    batch = image_batch | {"input_ids": ids.masked_fill(ids == 40, image)}
    prepare_for_training(model, settings)

    def gradients():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    model.train()
    after = gradients()
    assert before
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_sharding_of_quantized_weights_is_refused(recipe):
    settings = recipe(lora=LORA, quantize="4bit")
    with raises_input_error(ErrorCode.CONFLICT, "quantize", "ddp.yaml"):
        prepare_for_training(make_model(), settings, autocast=False)


def test_missing_bitsandbytes_is_reported(recipe, monkeypatch):
    monkeypatch.setattr("owl2.errors.find_spec", lambda name: None)
    with raises_input_error(ErrorCode.MISSING_DEPENDENCY, "owl2-vlm[quant]"):
        loading_options(recipe(lora=LORA, quantize="4bit"))
