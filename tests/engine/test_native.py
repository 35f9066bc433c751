"""The CPU kernels equal torch's operations; their compilation and the choice of a variant."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from owl2.engine.backends import cpu, float32_products
from owl2.engine.backends.native import build, ops
from owl2.engine.backends.weight_only_quantization import QuantizedLinear

pytestmark = pytest.mark.usefixtures("three_threads")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", ops.DTYPES)


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_near(ours, theirs, dtype):
    assert ours.dtype == dtype
    error = (ours.double() - theirs.double()).abs().max() / theirs.abs().max()
    assert error < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 16, 32])
@pytest.mark.parametrize(("rows", "width"), [(64, 32), (129, 96), (3, 1024), (50, 352)])
def test_linear(dtype, tokens, rows, width):
    x, weight = random(tokens, width, dtype=dtype), random(rows, width, dtype=dtype)
    bias = random(rows, dtype=dtype)
    assert ops.supports(weight)
    expected = F.linear(x.double(), weight.double())
    assert_near(ops.linear(x, weight), expected, dtype)
    assert_near(ops.linear(x, weight, bias), expected + bias.double(), dtype)


FORMATS = pytest.mark.parametrize("bits", [8, 4])


def quantized_linear(rows, width, bits, dtype=torch.float32):
    linear = torch.nn.Linear(width, rows)
    with torch.no_grad():
        linear.weight.copy_(random(rows, width))
    return QuantizedLinear(linear.to(dtype), bits)


def exact_product(x, quantized, activation_bits):
    """What the kernels compute, except for rounding in float: integers times integers."""
    limit = 127 if activation_bits == 8 else 32767
    groups = F.pad(x, (0, quantized.padding)).float().unflatten(1, (-1, 64))
    maxima = groups.abs().amax(2, keepdim=True)
    integers = (groups.double() * (limit / maxima.clamp(min=1e-30)).double()).round()
    tokens = (integers * (maxima / limit).double()).flatten(1)[:, : x.shape[1]]
    y = F.linear(tokens, quantized.dequantize(torch.float64))
    return y if quantized.bias is None else y + quantized.bias.double()


@DTYPES
@pytest.mark.parametrize("activation_bits", [16, 8])
@FORMATS
@pytest.mark.parametrize(("rows", "width"), [(64, 64), (129, 192), (3, 1088), (40, 96)])
def test_quantized_linear(dtype, bits, activation_bits, rows, width):
    quantized = quantized_linear(rows, width, bits, dtype)
    quantized.activation_bits = activation_bits
    x = random(21, width, dtype=dtype)
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
    for count in (1, 2, 3, 8, 15):
        assert torch.equal(quantized(x[:count]), ours[:count])


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
    blocks = []
    multiply = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: blocks.append(args) or multiply(*args))
    module = torch.nn.Linear(96, float32_products.WEIGHT_ROWS + 40, dtype=torch.bfloat16)
    x = random(ops.MAX_TOKENS + 1, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        ours = cpu.linear(module, x)
    converted = [args for args in blocks if args[1].dtype == torch.float32]
    assert [len(args[1]) for args in converted] == (
        [] if has_bf16 else [float32_products.WEIGHT_ROWS, 40]
    )
    exact = multiply(x.double(), module.weight.double(), module.bias.double())
    assert ours.dtype == torch.bfloat16
    rounding = 2.0**-8  # half of the distance of two bfloat16 values is at most 2^-9 of a value
    assert (ours.double() - exact).abs().max() < rounding * exact.abs().max()
    few = cpu.linear(module, x[:8].contiguous())
    assert (few.double() - exact[:8]).abs().max() < rounding * exact.abs().max()


@DTYPES
def test_rms_norm(dtype):
    x, weight = random(5, 96, dtype=dtype), random(96, dtype=dtype)
    assert_near(ops.rms_norm(x, weight, 1e-5), F.rms_norm(x, (96,), weight, 1e-5), dtype)


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # -O3 takes many seconds.
    monkeypatch.setattr(build, "FLAGS", build.FLAGS[1:])
    for function in (build.kernels, build.available):
        function.cache_clear()
    yield tmp_path / "owl2"
    for function in (build.kernels, build.available):
        function.cache_clear()


def test_the_library_is_compiled_once(empty_cache, capfd, monkeypatch):
    assert build.available()
    assert "compiling the CPU kernels" in capfd.readouterr().err
    [library] = empty_cache.glob("kernels-*.so")
    build.kernels.cache_clear()
    monkeypatch.setattr(build, "compile_into", None)  # not called by the second start
    build.library()
    assert capfd.readouterr().err == ""
    assert [*empty_cache.iterdir()] == [library]


def test_without_a_compiler_a_message_is_printed_once(empty_cache, capfd, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not build.available()
    assert not build.available()
    message = capfd.readouterr().err
    assert message.count("\n") == 1
    assert "no-such-compiler" in message


def test_a_compiler_that_fails(empty_cache, monkeypatch, tmp_path):
    failing = tmp_path / "broken"
    failing.write_text('#!/bin/sh\necho "line 1: no" >&2\nexit 1\n')
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(build.BuildError, match="line 1: no"):
        build.library()
    assert not list(empty_cache.glob("kernels-*"))


def test_a_cache_that_cannot_be_written(empty_cache, monkeypatch):
    (empty_cache.parent / "owl2").write_text("a file, not a directory")
    with pytest.raises(build.BuildError, match="owl2"):
        build.library()


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("", "x86-64-v4-bf16"),
        ("avx512_bf16", "x86-64-v4-vnni"),
        ("avx512_vnni", "x86-64-v4"),
        ("avx512f", "x86-64-v3-vnni"),
        ("avx512f avx_vnni", "x86-64-v3"),
        ("avx512f avx_vnni fma", "x86-64-v2"),
        ("avx512f avx_vnni fma ssse3", None),
    ],
)
def test_the_variant_is_the_best_that_the_cpu_supports(missing, expected, monkeypatch, tmp_path):
    known = build.VARIANTS["x86_64"]
    flags = {flag for _, required in known.values() for flag in required.split()}
    monkeypatch.setattr(build, "machine_variants", lambda: known)
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset(flags - set(missing.split())))
    monkeypatch.setattr(build, "LIBRARIES", tmp_path)
    assert build.packaged_variant() is None  # not in a wheel
    for name in known:
        (tmp_path / f"{name}.so").touch()
    found = build.packaged_variant()
    assert (found and found.stem) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "-march=haswell",
        "-march=x86-64-v2",
        # The layouts of other CPUs, without their instructions: AVX-512, and bytes with VNNI.
        "-march=x86-64-v3 -DOWL2_PORTABLE=16 -DOWL2_BYTE_DOT=0",
        "-march=x86-64-v3 -DOWL2_PORTABLE=16 -DOWL2_BYTE_DOT=1",
        "-march=x86-64-v3 -DOWL2_PORTABLE=8 -DOWL2_BYTE_DOT=1",
        "-march=x86-64-v3 -DOWL2_PORTABLE=4 -DOWL2_BYTE_DOT=1",
    ],
)
def test_processors_without_special_instructions(flags, tmp_path):
    code = f"""
import sys, pytest
from owl2.engine.backends.native import build
build.NATIVE = tuple("{flags}".split())
tests = ["tests/engine/test_native.py", "tests/engine/test_model_runner.py"]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]))
"""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=280)
    assert [*tmp_path.glob("owl2/kernels-*.so")]
