"""`owl2 quantize` for unusual checkpoints and settings."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from owl2.checkpoints.config_file import read_config
from owl2.checkpoints.hf_quantizer import Owl2QuantizationConfig, quantize_model
from owl2.engine.backends.native import ops
from owl2.engine.backends.weight_only_quantization import set_activation_bits
from owl2.engine.model_runner import ModelRunner, NewTokens
from owl2.errors import ErrorCode
from owl2.memory import MEMORY
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.quantization.calibrated_weights import _FirstLayer
from owl2.quantization.quantize_checkpoint import quantize_checkpoint
from tests.adapters import make_adapter
from tests.errors import raises_input_error
from tests.tiny import KERNELS, make_model

EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"


def load(folder, **options):
    return Owl2ForConditionalGeneration.from_pretrained(folder, **options)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.weight",  # quantized
        "model.vision_model.encoder.layers.0.mlp.fc1.weight",
    ],
)
def test_weights_that_are_not_contiguous(tiny_checkpoint, tmp_path, name):
    """Pickles keep the strides of a tensor."""
    source = shutil.copytree(tiny_checkpoint, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    weights[name] = weights[name].T.contiguous().T
    torch.save(weights, source / "pytorch_model.bin")
    written = load_file(quantize_checkpoint(source, tmp_path / "out") / "model.safetensors")
    expected = load_file(quantize_checkpoint(tiny_checkpoint, tmp_path / "b") / "model.safetensors")
    assert torch.equal(written[name], expected[name])


def test_values_that_are_not_finite(tiny_checkpoint, tmp_path):
    source = shutil.copytree(tiny_checkpoint, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][1, 2] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with raises_input_error(ErrorCode.NON_FINITE, "model.layers.0.mlp.up_proj.weight"):
        quantize_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tied_head_that_is_not_quantized(tmp_path):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    config = Owl2QuantizationConfig(4, modules={HEAD: 16})
    model = load(quantize_checkpoint(tmp_path / "tied", tmp_path / "out", config))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "modules", [{EMBEDDINGS: 4, HEAD: 4}, {EMBEDDINGS: 8, HEAD: 4}, {EMBEDDINGS: 8, HEAD: 16}]
)
def test_embeddings_are_16_bits_or_those_of_the_head(modules):
    with raises_input_error(ErrorCode.INVALID_CONFIG, EMBEDDINGS):
        Owl2QuantizationConfig(4, modules=modules)


def test_embeddings_that_are_not_tied_are_not_those_of_the_head(tiny_checkpoint, tmp_path):
    config = Owl2QuantizationConfig(4, modules={EMBEDDINGS: 8, HEAD: 8})
    with raises_input_error(ErrorCode.UNSUPPORTED):
        quantize_checkpoint(tiny_checkpoint, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [["owl2"], {"quant_method": "owl2", "modules": "lm_head"}])
def test_settings_of_another_type(run_cli, tiny_checkpoint, tmp_path, value):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    content = json.loads((folder / "config.json").read_text()) | {"quantization_config": value}
    (folder / "config.json").write_text(json.dumps(content))
    with raises_input_error(ErrorCode.INVALID_CONFIG, "quantization_config"):
        load(folder)
    assert run_cli("info", folder).exit_code == 2


def test_calibration_needs_memory_for_one_layer(tmp_path, monkeypatch):
    model = make_model(num_hidden_layers=12)
    model.save_pretrained(tmp_path)
    size = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr("owl2.memory.memory_limits", lambda: {MEMORY: size // 2})
    with raises_input_error(ErrorCode.OUT_OF_MEMORY):
        load(tmp_path, dtype=torch.float32)
    config = read_config(tmp_path)
    config.num_hidden_layers = 1
    first = _FirstLayer.from_pretrained(tmp_path, config=config, dtype=torch.float32)
    assert len(first.model.layers) == 1


def test_an_adapter_fits_a_saved_model_that_was_quantized_while_loading(tiny_checkpoint, tmp_path):
    adapter = make_adapter(tiny_checkpoint, tmp_path / "adapter", 1, r=2)
    model = load(tiny_checkpoint, quantization_config=Owl2QuantizationConfig(4))
    model.save_pretrained(tmp_path / "saved")
    assert load(adapter, base=tmp_path / "saved").provenance.fingerprint is not None


def test_the_kernels_use_the_activation_bits_of_a_partly_quantized_layer(monkeypatch):
    model = make_model(**KERNELS | {"intermediate_size": 128}, initializer_range=0.3).eval()
    modules = {"model.layers.0.mlp.down_proj": 16}
    quantize_model(model, Owl2QuantizationConfig(8, modules=modules))
    results = {}
    for bits in (8, 16):
        set_activation_bits(model, bits)
        for limit in (ops.MAX_TOKENS, 0):  # in one call, and operation by operation
            monkeypatch.setattr(ops, "MAX_TOKENS", limit)
            results[bits, limit > 0] = ModelRunner(model).forward([NewTokens(0, 0, [5, 6, 7])])
        monkeypatch.undo()
    torch.testing.assert_close(results[8, True], results[8, False], rtol=1e-3, atol=1e-3)
    error = (results[16, True] - results[8, True]).abs().max()
    assert error > 10 * (results[8, True] - results[8, False]).abs().max()
