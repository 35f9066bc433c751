"""GPTQ of single weights: errors on the calibration inputs, exact weights, padding."""

import pytest
import torch

from owl2.engine.backends.weight_only_quantization import GROUP, QuantizedLinear
from owl2.quantization import gptq as algorithm
from owl2.quantization.calibrated_weights import round_linear
from owl2.quantization.gptq import LIMITS, InputStatistics, gptq


def correlated_inputs(width, tokens=400, seed=0):
    """Inputs (T, K) as in a language model: correlated, with one much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(width // 4, width, generator=generator)
    inputs = torch.randn(tokens, width // 4, generator=generator) @ factors
    inputs += 0.3 * torch.randn(tokens, width, generator=generator)
    inputs[:, 5] *= 10
    return inputs


def statistics_of(inputs, original=None):
    statistics = InputStatistics.empty(inputs.shape[1])
    statistics.add(inputs, inputs if original is None else original)
    return statistics


def output_error(weight, rounded, inputs):
    """The relative error of the output."""
    return ((inputs @ (rounded - weight).T).norm() / (inputs @ weight.T).norm()).item()


def rounded_to_nearest(weight, bits):
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return QuantizedLinear(linear, bits).dequantize(torch.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [64, 192, 100])
def test_the_output_error_is_a_fraction_of_that_of_rounding(bits, width):
    inputs, weight = correlated_inputs(width), 0.1 * torch.randn(24, width)
    _, rounded = round_linear(weight, statistics_of(inputs), bits)
    assert rounded.shape == weight.shape
    plain = output_error(weight, rounded_to_nearest(weight, bits), inputs)
    assert 0 < output_error(weight, rounded, inputs) < 0.6 * plain


def test_further_rounds_do_not_increase_the_error(monkeypatch):
    inputs, weight = correlated_inputs(128), torch.randn(16, 128)
    errors = []
    for rounds in range(4):
        monkeypatch.setattr(algorithm, "ROUNDS", rounds)
        monkeypatch.setattr(algorithm, "DAMPING", 1e-6)  # part of what the rounds minimize
        _, rounded = round_linear(weight, statistics_of(inputs), 4)
        errors.append(output_error(weight, rounded, inputs))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < errors[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_can_be_represented_do_not_change(bits):
    low, high = LIMITS[bits]
    values = torch.randint(low, high + 1, (8, 128)).float()
    values[:, ::GROUP], values[:, 1::GROUP] = low, high
    if bits == 8:
        scale = 0.01 + torch.rand(8)
        weight = values * scale[:, None]
    else:
        scale = torch.stack([0.01 + torch.rand(8, 2), torch.randn(8, 2)], -1).bfloat16()
        weight = values.unflatten(1, (-1, GROUP)) * scale[..., :1] + scale[..., 1:]
        weight = weight.flatten(1)
    found, found_scale = gptq(weight, statistics_of(correlated_inputs(128)), bits)
    assert torch.equal(found, values)
    torch.testing.assert_close(found_scale, scale, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 0.75])
def test_groups_of_equal_weights(bits, value):
    weight = torch.full((8, 128), value)
    _, rounded = round_linear(weight, statistics_of(correlated_inputs(128)), bits)
    torch.testing.assert_close(rounded, weight, rtol=5e-3, atol=1e-6)
    torch.testing.assert_close(rounded_to_nearest(weight, bits), weight, rtol=5e-3, atol=1e-6)


def test_without_tokens_the_error_of_the_weight_is_minimized():
    weight = torch.randn(8, 128)
    _, rounded = round_linear(weight, InputStatistics.empty(128), 4)
    error = (rounded - weight).norm()
    assert 0 < error <= (rounded_to_nearest(weight, 4) - weight).norm()


def test_inputs_that_are_always_zero_keep_their_weights_close():
    inputs, weight = correlated_inputs(128), torch.randn(8, 128)
    inputs[:, 40:60] = 0
    _, rounded = round_linear(weight, statistics_of(inputs), 4)
    errors = rounded - weight, rounded_to_nearest(weight, 4) - weight
    ours, nearest = (error[:, 40:60].norm() for error in errors)
    assert ours < 2 * nearest


def test_the_error_of_earlier_layers_is_corrected(monkeypatch):
    original, weight = correlated_inputs(128), torch.randn(8, 128)
    inputs = original + 0.1 * original.roll(1, dims=1)  # a systematic error
    errors = []
    for share in (0.0, 1.0):
        monkeypatch.setattr(algorithm, "PROPAGATION", share)
        _, rounded = round_linear(weight, statistics_of(inputs, original), 8)
        errors.append((inputs @ rounded.T - original @ weight.T).norm().item())
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [64, 100])
def test_the_packed_weight_is_that_of_a_quantized_linear(bits, width):
    weight = torch.randn(8, width)
    packed, rounded = round_linear(weight, statistics_of(correlated_inputs(width)), bits)
    module = QuantizedLinear(torch.nn.Linear(width, 8, bias=False), bits)
    for own, stored in zip((module.weight, module.scale), packed, strict=True):
        assert (own.shape, own.dtype) == (stored.shape, stored.dtype)
    module.weight, module.scale = packed
    torch.testing.assert_close(module.dequantize(torch.float32), rounded, rtol=1e-6, atol=1e-7)
    x = torch.randn(3, width)
    expected = x @ rounded.T
    assert (module(x) - expected).abs().max() < 2e-4 * expected.abs().max() + 1e-3
