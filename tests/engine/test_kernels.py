"""The CPU kernels equal torch's operations.

`test_instruction_sets.py` runs this file with the kernels for other CPUs.
"""

import itertools

import pytest
import torch
from torch.nn import functional as F

from owl2.engine.backends import cpu, cpu_products
from owl2.engine.backends.native import ops
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


def rotated(x, cos, sin):
    """(M, heads, d), in the dtype of x."""
    first, second = x.double().chunk(2, 2)
    turned = torch.cat([-second, first], 2)
    return (x.double() * cos.double()[:, None] + turned * sin.double()[:, None]).to(x.dtype)


def expected_attention(query, key, value, cache, tokens):
    """What `ops.attention` returns, in float64; updates the cache (2, R, h, C, d)."""
    d = cache.shape[-1]
    query, key, value = (one.unflatten(1, (-1, d)) for one in (query, key, value))
    query, key = rotated(query, tokens.cos, tokens.sin), rotated(key, tokens.cos, tokens.sin)
    for m, at in enumerate(zip(tokens.rows, tokens.positions, strict=True)):
        cache[0, at[0], :, at[1]], cache[1, at[0], :, at[1]] = key[m], value[m]
    outputs = []
    for m, (row, position) in enumerate(zip(tokens.rows, tokens.positions, strict=True)):
        keys, values = cache[:, row, :, : position + 1].double()
        heads = query[m].double().unflatten(0, (len(keys), -1))  # (h, group, d)
        weights = (heads @ keys.transpose(1, 2) * d**-0.5).softmax(2)
        outputs.append((weights @ values).flatten())
    return torch.stack(outputs)


def token_positions(rows, positions, width, dtype):
    rows, positions = torch.tensor(rows), torch.tensor(positions)
    angles = positions[:, None] * 1000.0 ** -torch.linspace(0, 1, width // 2)
    angles = torch.cat([angles, angles], 1)
    return cpu.TokenPositions(rows, positions, angles.cos().to(dtype), angles.sin().to(dtype))


@DTYPES
@pytest.mark.parametrize(("kv_heads", "group", "width"), [(2, 1, 32), (1, 3, 64), (2, 2, 160)])
def test_attention(dtype, kv_heads, group, width):
    torch.manual_seed(0)
    # Of three sequences: the first token, whole vectors of scores, and several tokens of one row.
    tokens = token_positions([0, 2, 1, 1, 1, 3], [0, 15, 31, 32, 33, 69], width, dtype)
    cache = torch.randn(2, 4, kv_heads, 70, width).to(dtype)
    query = torch.randn(6, kv_heads * group * width).to(dtype)
    key, value = torch.randn(2, 6, kv_heads * width).to(dtype)
    own = cache.clone()
    expected = expected_attention(query, key, value, cache, tokens)
    heads = kv_heads * group
    ours = ops.attention(tokens.slots(own), key, value, query, heads, width**-0.5)
    assert_near(ours, expected, dtype)
    assert_near(own, cache, dtype)


@DTYPES
def test_attention_of_prompts_does_not_depend_on_chunks_of_several_tokens(dtype, monkeypatch):
    torch.manual_seed(0)
    heads, width, length = 4, 64, 43
    cache = torch.randn(2, 2, 2, 50, width).to(dtype)
    query = torch.randn(2 * length, heads * width).to(dtype)
    key, value = torch.randn(2, 2 * length, 2 * width).to(dtype)
    rows = [0] * length + [1] * length
    positions = [*range(length), *range(5, 5 + length)]

    def attend(own, start, stop):
        tokens = token_positions(rows[start:stop], positions[start:stop], width, dtype)
        given = [tensor[start:stop].clone() for tensor in (key, value, query)]
        return ops.attention(tokens.slots(own), *given, heads, width**-0.5)

    own, tokens = cache.clone(), token_positions(rows, positions, width, dtype)
    whole = attend(own, 0, 2 * length)
    assert_near(whole, expected_attention(query, key, value, cache.clone(), tokens), dtype)
    edges = [0, 2, 9, 14, length, length + 3, 2 * length]
    in_parts = cache.clone()
    parts = [attend(in_parts, *edge) for edge in itertools.pairwise(edges)]
    assert torch.cat(parts).equal(whole)
    assert in_parts.equal(own)
    with_one_thread = cache.clone()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert attend(with_one_thread, 0, 2 * length).equal(whole)


@DTYPES
@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_does_not_reach_earlier_tokens(dtype, threads, bad, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    width, length = 64, 33
    tokens = token_positions([0] * length, range(length), width, dtype)
    query, key, value = torch.randn(3, length, width).to(dtype)
    for at in range(length):
        cache = torch.randn(2, 1, 1, 50, width).to(dtype)
        cache[1, 0, 0, length:] = bad  # of other sequences
        own = value.clone()
        own[at] = bad
        out = ops.attention(tokens.slots(cache), key, own, query.clone(), 1, width**-0.5)
        assert out[:at].isfinite().all()
        assert not out[at:].isfinite().any()


class Layer:
    """A decoder layer with random weights, and LoRA of the gate for every other token."""

    WIDTH, INNER, HEADS, HEAD_WIDTH = 192, 320, 2, 64  # one key-value head

    def __init__(self, dtype, bits, activation_bits, count):
        attended = self.HEADS * self.HEAD_WIDTH
        shapes = [(attended, self.WIDTH), *[(self.HEAD_WIDTH, self.WIDTH)] * 2]
        shapes += [(self.WIDTH, attended), *[(self.INNER, self.WIDTH)] * 2]
        shapes.append((self.WIDTH, self.INNER))
        linears = [torch.nn.Linear(k, n, bias=n == self.INNER).to(dtype) for n, k in shapes]
        if bits:
            linears = [QuantizedLinear(*pair) for pair in zip(linears, bits, strict=True)]
        self.linears, self.activation_bits = linears, activation_bits
        self.gate = linears[4]
        self.norms = (1 + torch.randn(2, self.WIDTH) / 4).to(dtype)
        self.down = (torch.randn(3, self.WIDTH) / 16).to(dtype)
        self.up = torch.randn(self.INNER, 3).to(dtype)
        self.adapted = torch.arange(0, count, 2)

    def arguments(self, cache, tokens):
        slots = tokens.slots(cache)
        norms = [norm.data_ptr() for norm in self.norms]
        scaling = self.HEAD_WIDTH**-0.5
        numbers = self.WIDTH, self.HEADS, 1e-5, 1e-5, scaling
        pointers = [*norms, slots.keys, slots.values]
        return ops.Layer(*map(self.matrix, self.linears), *pointers, *numbers)

    def matrix(self, linear):
        loras = ()
        if linear is self.gate:
            loras = (ops.lora(self.down, self.up, 0.5, self.adapted),)
        if isinstance(linear, QuantizedLinear):
            options = linear.scale, linear.bits, loras, linear.out_features
        else:
            options = None, 0, loras
        return ops.matrix(linear.weight, linear.bias, *options)

    def product(self, x, linear):
        if isinstance(linear, QuantizedLinear):
            y = exact_product(x, linear, self.activation_bits)
        else:
            y = F.linear(x.float(), linear.weight.float())
            y = y if linear.bias is None else y + linear.bias.float()
        y = y.to(x.dtype)
        if linear is self.gate:
            added = x[self.adapted].float() @ self.down.float().T @ self.up.float().T
            y[self.adapted] += (0.5 * added).to(x.dtype)
        return y

    def expected(self, hidden, cache, tokens):
        """What `ops.decoder_layers` computes for hidden (M, D); updates the cache."""
        first, second = self.norms
        x = F.rms_norm(hidden, first.shape, first, 1e-5)
        query, key, value = (self.product(x, linear) for linear in self.linears[:3])
        attended = expected_attention(query, key, value, cache, tokens).to(hidden.dtype)
        hidden = hidden + self.product(attended, self.linears[3])
        x = F.rms_norm(hidden, second.shape, second, 1e-5)
        gate, up = (self.product(x, linear) for linear in self.linears[4:6])
        return hidden + self.product(F.silu(gate) * up, self.linears[6])


@DTYPES
@pytest.mark.parametrize(
    ("bits", "activation_bits"),
    [
        (None, 16),
        ([8] * 7, 16),
        ([4] * 7, 16),
        ([8] * 7, 8),
        ([4] * 7, 8),
        ([8, 4, 8, 4, 8, 4, 8], 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 5, 72, 100])
@torch.no_grad()
def test_decoder_layers(dtype, bits, activation_bits, count):
    torch.manual_seed(0)
    layers = [Layer(dtype, bits, activation_bits, count) for _ in range(2)]
    hidden = torch.randn(count, Layer.WIDTH).to(dtype)
    tokens = token_positions([1] * count, range(3, count + 3), Layer.HEAD_WIDTH, dtype)
    caches = torch.randn(2, 2, 2, 1, count + 3, Layer.HEAD_WIDTH).to(dtype)
    own_caches, expected = caches.clone(), hidden
    for layer, cache in zip(layers, caches, strict=True):
        expected = layer.expected(expected, cache, tokens)
    arguments = [
        layer.arguments(cache, tokens) for layer, cache in zip(layers, own_caches, strict=True)
    ]
    array = (ops.Layer * len(arguments))(*arguments)
    ops.decoder_layers(hidden, array, tokens.slots(own_caches[0]), activation_bits)
    bound = 2e-2 if dtype == torch.bfloat16 else {16: 1e-4, 8: 1e-2}[activation_bits]
    for ours, theirs in ((hidden, expected), (own_caches, caches)):
        error = (ours.double() - theirs.double()).abs().max() / theirs.abs().max()
        assert error < bound


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("count", [5, 100])
@torch.no_grad()
def test_layers_of_different_kinds(activation_bits, count):
    """Each layer needs its tokens in another form."""
    torch.manual_seed(0)
    kinds = None, [8] * 7, [4] * 7, None
    layers = [Layer(torch.float32, bits, activation_bits, count) for bits in kinds]
    hidden = torch.randn(count, Layer.WIDTH)
    tokens = token_positions([1] * count, range(3, count + 3), Layer.HEAD_WIDTH, torch.float32)
    caches = torch.randn(len(kinds), 2, 2, 1, count + 3, Layer.HEAD_WIDTH)
    own_caches, expected = caches.clone(), hidden
    for layer, cache in zip(layers, caches, strict=True):
        expected = layer.expected(expected, cache, tokens)
    arguments = [
        layer.arguments(cache, tokens) for layer, cache in zip(layers, own_caches, strict=True)
    ]
    array = (ops.Layer * len(arguments))(*arguments)
    ops.decoder_layers(hidden, array, tokens.slots(own_caches[0]), activation_bits)
    error = (hidden - expected).abs().max() / expected.abs().max()
    assert error < {16: 1e-4, 8: 2e-2}[activation_bits]
