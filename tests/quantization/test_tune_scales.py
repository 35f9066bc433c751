"""Training of scales: gradients equal those of the complete model, and predictions improve."""

import copy

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from owl2 import Owl2ForConditionalGeneration
from owl2.checkpoints.hf_quantizer import quantize_model
from owl2.engine.backends.weight_only_quantization import QuantizedLinear
from owl2.processing.processor import Owl2Processor
from owl2.quantization import tune_scales as algorithm
from owl2.quantization.calibrate import first_hidden
from owl2.quantization.calibration_data import PYTHON_REFERENCE, calibration_inputs
from owl2.quantization.command import Calibration, quantize
from owl2.quantization.tune_scales import LayerWeights, tune_scales
from tests.tiny import make_model


@pytest.fixture
def model():
    return make_model(initializer_range=0.3).eval().requires_grad_(False)


@pytest.fixture
def inputs(model):
    """A sample with an image and one without."""
    ids = torch.randint(3, 40, (1, 12), generator=torch.Generator().manual_seed(0))
    text = {"input_ids": ids[:, :6]}
    ids = ids.clone()
    ids[0, 4 : 4 + model.config.num_image_tokens] = model.config.image_token_id
    return [{"input_ids": ids, "pixel_values": torch.ones(1, 3, 8, 8)}, text]


def quantized_layers(model, bits="4bit"):
    """The `LayerWeights` of a copy of the model with 4 bits, or 8."""
    quantized = copy.deepcopy(model)
    quantize_model(quantized, bits)
    layers = []
    for layer, own in zip(model.model.layers, quantized.model.layers, strict=True):
        linears = {n: m for n, m in own.named_modules() if isinstance(m, QuantizedLinear)}
        plain = {
            name: parameter.clone()
            for name, parameter in layer.named_parameters()
            if name.removesuffix(".weight") not in linears
        }
        layers.append(LayerWeights(plain, linears))
    return layers


def loss_of(model, layers, scales, inputs):
    """The KL divergence at text positions, as a function of the scales."""
    weights = {}
    for i, layer in enumerate(layers):
        for name, module in layer.quantized.items():
            values, parts = module.groups(), scales[i, name].split(1, dim=2)
            weight = (values * parts[0] + parts[1]).flatten(1)[:, : module.in_features]
            weights[f"model.layers.{i}.{name}.weight"] = weight
    loss = 0
    for one in inputs:
        is_text = one["input_ids"][0] != model.config.image_token_id
        wanted = model(**one).logits[0, is_text].log_softmax(-1)
        own = functional_call(model, weights, (), one).logits[0, is_text].log_softmax(-1)
        loss = loss + F.kl_div(own, wanted, log_target=True, reduction="batchmean")
    return loss


def tune(model, layers, inputs, steps):
    samples = [first_hidden(model.model, one) for one in inputs]
    targets = []
    for one, (hidden, options) in zip(inputs, samples, strict=True):
        for layer in model.model.layers:
            hidden = layer(hidden, **options)
        targets.append((hidden, one["input_ids"][0] != model.config.image_token_id))
    head = torch.nn.Sequential(model.model.norm, model.lm_head)
    layer = copy.deepcopy(model.model.layers[0])
    tune_scales(layer, layers, samples, targets, head, steps)


def test_the_first_step_follows_the_gradients_of_the_complete_model(model, inputs, monkeypatch):
    monkeypatch.setattr(algorithm, "LEARNING_RATE", 0.1)
    monkeypatch.setattr(algorithm, "WARMUP", 1)
    layers = quantized_layers(model)
    scales = {
        (i, name): module.scale.float().requires_grad_(True)
        for i, layer in enumerate(layers)
        for name, module in layer.quantized.items()
    }
    loss_of(model, layers, scales, inputs).backward()
    tune(model, layers, inputs, steps=1)
    compared = 0
    for (i, name), before in scales.items():
        change = layers[i].quantized[name].scale.float() - before.detach()
        is_clear = before.grad.abs() > 1e-5  # Adam's first step has the same size for all others
        compared += int(is_clear.sum())
        assert torch.equal(change.sign()[is_clear], -before.grad.sign()[is_clear]), (i, name)
        unit = before[..., 0].abs()
        torch.testing.assert_close(
            change[..., 0].abs()[is_clear[..., 0]],
            0.1 * unit[is_clear[..., 0]].detach(),
            rtol=0.1,
            atol=0,
        )
    assert compared > 100


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_changes_are_relative_to_the_scales_before_training(model, inputs, bits, monkeypatch):
    monkeypatch.setattr(algorithm, "LEARNING_RATE", 0.1)
    monkeypatch.setattr(algorithm, "WARMUP", 1)
    layers, before = quantized_layers(model, bits), quantized_layers(model, bits)
    tune(model, layers, inputs, steps=2)  # the second one with half of the rate
    largest = 0.0
    for layer, original in zip(layers, before, strict=True):
        for name, module in layer.quantized.items():
            scales, starts = (
                one.scale[..., 0] if one.bits == 4 else one.scale
                for one in (module, original.quantized[name])
            )
            largest = max(largest, (scales / starts - 1).abs().max().item())
    assert 0.1 < largest < 0.17


def test_divergence_decreases(model, inputs):
    layers = quantized_layers(model)
    losses = []
    for steps in (0, 40):
        if steps:
            tune(model, layers, inputs, steps)
        scales = {
            (i, name): module.scale.float()
            for i, layer in enumerate(layers)
            for name, module in layer.quantized.items()
        }
        losses.append(loss_of(model, layers, scales, inputs).item())
    assert 0 < losses[1] < 0.7 * losses[0]


@torch.no_grad()
def test_epochs_of_the_command(tiny_checkpoint, tmp_path):
    """Training changes scales only, and improves the predictions on the samples."""
    options = {"sources": [PYTHON_REFERENCE], "num_samples": 4, "max_length": 32}
    models = [Owl2ForConditionalGeneration.from_pretrained(tiny_checkpoint)]
    for epochs in (0, 15):
        calibration = Calibration(**options, tune_epochs=epochs)
        folder = tmp_path / str(epochs)
        quantize(tiny_checkpoint, folder, method="gptq", calibration=calibration)
        models.append(Owl2ForConditionalGeneration.from_pretrained(folder))
    original, plain, tuned = models
    processor = Owl2Processor.from_pretrained(tiny_checkpoint)
    samples = list(calibration_inputs([PYTHON_REFERENCE], processor, 4, 32))
    losses = []
    for model in (plain, tuned):
        pairs = [(model(**one).logits[0], original(**one).logits[0]) for one in samples]
        losses.append(sum(algorithm.divergence(*pair).item() for pair in pairs))
    assert losses[1] < 0.8 * losses[0]
    first, second = plain.state_dict(), tuned.state_dict()
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed
    assert all(name.endswith("scale") for name in changed)
    assert not any("multiway.1" in name or "lm_head" in name for name in changed)
