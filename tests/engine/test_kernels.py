"""The CPU kernels equal torch's operations.

`test_instruction_sets.py` runs this file with the kernels for other CPUs.
"""

import pytest
import torch
from torch.nn import functional as F

from owl2.engine.backends import cpu, cpu_products
from owl2.engine.backends.native import ops
from owl2.engine.backends.weight_only_quantization import QuantizedLinear
from tests.engine.kernels import DTYPES, assert_near, exact_product, random

pytestmark = pytest.mark.usefixtures("three_threads")


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 16, 72, 73, 80, 81, 120, 300])
@pytest.mark.parametrize(("rows", "width"), [(64, 32), (129, 96), (3, 1024), (50, 352)])
def test_linear(dtype, tokens, rows, width):
    x, weight = random(tokens, width, dtype=dtype), random(rows, width, dtype=dtype)
    bias = random(rows, dtype=dtype)
    assert ops.supports(weight)
    expected = F.linear(x.double(), weight.double())
    assert_near(ops.linear(x, weight), expected, dtype)
    assert_near(ops.linear(x, weight, bias), expected + bias.double(), dtype)


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(64, 32), (129, 96), (3, 1024), (50, 352)])
def test_a_product_does_not_depend_on_the_other_tokens(dtype, rows, width):
    torch.manual_seed(0)
    x, weight = torch.randn(23, width).to(dtype), torch.randn(rows, width).to(dtype)
    together = ops.linear(x, weight)
    for count in (1, 2, 3, 4, 5, 22):
        assert torch.equal(ops.linear(x[:count], weight), together[:count])
        assert torch.equal(ops.linear(x[-count:].contiguous(), weight), together[-count:])


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(64, 32), (129, 96), (50, 4096)])
def test_a_product_of_many_tokens_does_not_depend_on_the_others(dtype, rows, width):
    x, weight = random(320, width, dtype=dtype), random(rows, width, dtype=dtype)
    together = ops.linear(x, weight)
    for start, count in ((0, 80), (80, 160), (16, 96)):
        alone = ops.linear(x[start : start + count].contiguous(), weight)
        assert torch.equal(alone, together[start : start + count])


@pytest.mark.parametrize("has_amx", [True, False])
def test_many_tokens_are_multiplied_by_torch_where_it_is_faster(has_amx, monkeypatch):
    monkeypatch.setattr(ops, "cpu_supports_amx", lambda: has_amx)
    for instructions in ("AVX2", "AVX-512 with VNNI", "AVX-512 with VNNI and BF16"):
        kernels = ops.kernels()._replace(instructions=instructions)
        monkeypatch.setattr(ops, "kernels", lambda kernels=kernels: kernels)
        has_bf16 = instructions.endswith("BF16")
        assert ops.is_fast(73, torch.bfloat16) == (has_bf16 and not has_amx)
        assert ops.is_fast(72, torch.bfloat16)
        assert not ops.is_fast(73, torch.float32)


FORMATS = pytest.mark.parametrize("bits", [8, 4])


def quantized_linear(rows, width, bits, dtype=torch.float32):
    linear = torch.nn.Linear(width, rows)
    with torch.no_grad():
        linear.weight.copy_(random(rows, width))
    return QuantizedLinear(linear.to(dtype), bits)


@DTYPES
@pytest.mark.parametrize("activation_bits", [16, 8])
@FORMATS
@pytest.mark.parametrize(("rows", "width"), [(64, 64), (129, 192), (3, 1088), (40, 96)])
def test_quantized_linear(dtype, bits, activation_bits, rows, width):
    quantized = quantized_linear(rows, width, bits, dtype)
    quantized.activation_bits = activation_bits
    x = random(270, width, dtype=dtype)
    ours = quantized(x)
    assert ours.dtype == dtype
    exact = exact_product(x, quantized, activation_bits)
    # Without a fused multiply-add, a value between two integers can be rounded to the other one.
    bound = max({16: 2e-5, 8: 1e-3}[activation_bits], 8e-3 if dtype == torch.bfloat16 else 0)
    assert (ours.double() - exact).abs().max() < bound * exact.abs().max()
    plain = F.linear(x.double(), quantized.dequantize(torch.float64), quantized.bias.double())
    bound = {16: max(bound, 1e-4), 8: 2e-2}[activation_bits]
    assert (ours.double() - plain).abs().max() < bound * plain.abs().max()
    # Alone or in a batch, the result of a token is the same.
    for count in (1, 2, 3, 8, 15, 65, 257):
        assert torch.equal(quantized(x[:count]), ours[:count])


@FORMATS
def test_a_bias_of_another_dtype_is_converted(bits):
    quantized = quantized_linear(40, 64, bits)
    x = random(3, 64, dtype=torch.bfloat16)
    expected = F.linear(x.float(), quantized.dequantize(torch.float32), quantized.bias)
    assert_near(quantized(x), expected, torch.bfloat16)


@FORMATS
@pytest.mark.parametrize("width", [1, 64, 130])
def test_one_row_is_dequantized(bits, width):
    quantized = quantized_linear(1, width, bits)
    shifted = quantized.dequantize(torch.float32) - random(1, width)
    assert shifted.abs().max() < random(1, width).abs().max() / 5


@DTYPES
@FORMATS
def test_dequantize(dtype, bits):
    quantized = quantized_linear(10, 192, bits)
    ours = quantized.dequantize(dtype, use_kernels=True)
    assert torch.equal(ours, quantized.dequantize(dtype))


@FORMATS
@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_without_kernels_the_weight_is_dequantized(bits, tokens, monkeypatch):
    quantized = quantized_linear(10, 96, bits)
    x = random(2, tokens, 96)
    native = quantized(x)
    monkeypatch.setattr("owl2.engine.backends.weight_only_quantization.available", lambda: False)
    assert native.shape == (2, tokens, 10)
    torch.testing.assert_close(native, quantized(x), atol=1e-3, rtol=0)


def test_many_tokens_do_not_dequantize_the_weight(monkeypatch):
    quantized = quantized_linear(64, 64, 4)
    monkeypatch.setattr(QuantizedLinear, "dequantize", None)
    assert quantized(random(1000, 64)).shape == (1000, 64)


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_make_their_token_nan(value, activation_bits):
    quantized = quantized_linear(8, 128, 4)
    quantized.activation_bits = activation_bits
    x = random(3, 128)
    x[1, 70] = value
    assert quantized(x).isnan().all(1).tolist() == [False, True, False]


def test_a_token_of_zeros_and_one_with_an_outlier():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 8, bias=False)
    quantized = QuantizedLinear(linear, 8)
    assert not quantized(torch.zeros(1, 64)).any()
    x = random(1, 64)
    x[0, 3] = 1000.0
    expected = F.linear(x, quantized.dequantize(torch.float32))
    ours = quantized(x)
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("has_bf16", [True, False])
def test_many_tokens_in_bf16_are_multiplied_in_float32_without_such_instructions(
    has_bf16, monkeypatch
):
    monkeypatch.setattr("owl2.runtime.cpu_supports_bf16", lambda: has_bf16)
    monkeypatch.setattr(ops, "is_fast", lambda count, dtype: count <= ops.MAX_TOKENS)
    blocks = []
    multiply = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: blocks.append(args) or multiply(*args))
    module = torch.nn.Linear(96, cpu_products.WEIGHT_ROWS + 40, dtype=torch.bfloat16)
    x = random(ops.MAX_TOKENS + 1, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        ours = cpu.linear(module, x)
    converted = [args for args in blocks if args[1].dtype == torch.float32]
    assert [len(args[1]) for args in converted] == (
        [] if has_bf16 else [cpu_products.WEIGHT_ROWS, 40]
    )
    exact = multiply(x.double(), module.weight.double(), module.bias.double())
    assert ours.dtype == torch.bfloat16
    rounding = 2.0**-8  # half of the distance of two bfloat16 values is at most 2^-9 of a value
    assert (ours.double() - exact).abs().max() < rounding * exact.abs().max()
    few = cpu.linear(module, x[:8].contiguous())
    assert (few.double() - exact[:8]).abs().max() < rounding * exact.abs().max()


@pytest.mark.parametrize("is_fast", [True, False])
def test_kernels_multiply_for_the_modules_of_a_model_if_they_are_faster(is_fast, monkeypatch):
    monkeypatch.setattr("owl2.runtime.cpu_supports_bf16", lambda: True)
    monkeypatch.setattr(ops, "is_fast", lambda count, dtype: is_fast)
    calls, multiply = [], ops.linear
    monkeypatch.setattr(ops, "linear", lambda *args: calls.append(args) or multiply(*args))
    modules = [torch.nn.Linear(96, 64), torch.nn.Linear(64, 33, bias=False), torch.nn.Linear(33, 5)]
    model = torch.nn.Sequential(*modules).to(torch.bfloat16)
    x = random(3, 40, 96, dtype=torch.bfloat16)
    expected = model(x)
    with torch.no_grad(), cpu_products.cpu_products(x):
        ours = model(x)
    assert len(calls) == (2 if is_fast else 0)  # 33 is not a multiple of 32
    assert_near(ours, expected, torch.bfloat16)
    with cpu_products.cpu_products(x):
        model(x).sum().backward()
    assert modules[0].weight.grad is not None


@DTYPES
def test_rms_norm(dtype):
    x, weight = random(5, 96, dtype=dtype), random(96, dtype=dtype)
    assert_near(ops.rms_norm(x, weight, 1e-5), F.rms_norm(x, (96,), weight, 1e-5), dtype)


@DTYPES
@pytest.mark.parametrize("size", [1, 15, 16, 1000])
def test_swiglu(dtype, size):
    gate, up = 30 * random(size, dtype=dtype), random(2, size, dtype=dtype)[1]
    gate[1:2] = -200  # e^200 is infinite in float32
    expected = F.silu(gate.double()) * up.double()
    assert_near(ops.swiglu(gate, up), expected, dtype)
