"""The CPU kernels equal torch's operations; their compilation."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

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


@DTYPES
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
@pytest.mark.parametrize(("rows", "width"), [(64, 64), (129, 192), (3, 1024)])
def test_quantized_linear(dtype, bits, tokens, rows, width):
    linear = torch.nn.Linear(width, rows)
    torch.nn.init.normal_(linear.weight)
    quantized = QuantizedLinear(linear.to(dtype), bits)
    x = random(tokens, width, dtype=dtype)
    expected = F.linear(x.double(), quantized.dequantize(torch.float64), linear.bias.double())
    bound = {torch.float32: 2e-4, torch.bfloat16: 1e-2}[
        dtype
    ]  # a single token is quantized to 16 bits
    ours = ops.linear(x, quantized.weight, quantized.bias, quantized.scale, bits)
    assert ours.dtype == dtype
    assert (ours.double() - expected).abs().max() < bound * expected.abs().max()
    dequantized = ops.dequantize(quantized.weight, quantized.scale, bits, width, dtype)
    assert_near(dequantized, quantized.dequantize(torch.float64), dtype)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_widths_that_need_padding(bits, tokens, monkeypatch):
    quantized = QuantizedLinear(torch.nn.Linear(96, 10), bits)
    x = random(2, tokens, 96)
    native = quantized(x)
    monkeypatch.setattr("owl2.engine.backends.weight_only_quantization.available", lambda: False)
    assert native.shape == (2, tokens, 10)
    torch.testing.assert_close(native, quantized(x), atol=1e-3, rtol=0)


def test_a_token_of_zeros_and_one_with_an_outlier():
    linear = torch.nn.Linear(64, 8, bias=False)
    quantized = QuantizedLinear(linear, 8)
    assert not ops.linear(torch.zeros(1, 64), quantized.weight, None, quantized.scale, 8).any()
    x = random(1, 64)
    x[0, 3] = 1000.0
    expected = F.linear(x, quantized.dequantize(torch.float32))
    ours = ops.linear(x, quantized.weight, None, quantized.scale, 8)
    assert (ours - expected).abs().max() < 2e-4 * expected.abs().max()


@DTYPES
def test_rms_norm(dtype):
    x, weight = random(5, 96, dtype=dtype), random(96, dtype=dtype)
    assert_near(ops.rms_norm(x, weight, 1e-5), F.rms_norm(x, (96,), weight, 1e-5), dtype)


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", build.FLAGS[1:])  # without -O3, which takes many seconds
    for function in (build.library, build.available):
        function.cache_clear()
    yield tmp_path / "owl2"
    for function in (build.library, build.available):
        function.cache_clear()


def test_the_library_is_compiled_once(empty_cache, capfd, monkeypatch):
    assert build.available()
    assert "compiling the CPU kernels" in capfd.readouterr().err
    [library] = empty_cache.glob("kernels-*.so")
    build.library.cache_clear()
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


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["haswell", "x86-64-v2"])  # vectors of 8 and of 4 values
def test_processors_without_special_instructions(processor, tmp_path):
    code = f"""
import sys, pytest
from owl2.engine.backends.native import build
build.FLAGS = tuple("-march={processor}" if f == "-march=native" else f for f in build.FLAGS)
tests = ["tests/engine/test_native.py", "tests/engine/test_model_runner.py"]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]))
"""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=280)
    assert [*tmp_path.glob("owl2/kernels-*.so")]
