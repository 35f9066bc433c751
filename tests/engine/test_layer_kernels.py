"""The CPU kernels of attention and of whole decoder layers equal torch's operations.

`test_instruction_sets.py` runs this file with the kernels for other CPUs.
"""

import itertools

import pytest
import torch
from torch.nn import functional as F

from owl2.engine.backends import cpu
from owl2.engine.backends.native import ops
from owl2.engine.backends.weight_only_quantization import QuantizedLinear
from tests.engine.kernels import DTYPES, assert_near, exact_product

pytestmark = pytest.mark.usefixtures("three_threads")


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
    bound = 2e-2 if dtype == torch.bfloat16 else {16: 1e-4, 8: 1e-2}[activation_bits]
    assert_layers([bits] * 2, dtype, activation_bits, count, bound)


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("count", [5, 100])
@torch.no_grad()
def test_layers_of_different_kinds(activation_bits, count):
    """Each layer needs its tokens in another form."""
    kinds = None, [8] * 7, [4] * 7, None
    bound = {16: 1e-4, 8: 2e-2}[activation_bits]
    assert_layers(kinds, torch.float32, activation_bits, count, bound)


def assert_layers(kinds, dtype, activation_bits, count, bound):
    """`ops.decoder_layers` of layers with these bits equals the operations one by one."""
    torch.manual_seed(0)
    layers = [Layer(dtype, bits, activation_bits, count) for bits in kinds]
    hidden = torch.randn(count, Layer.WIDTH).to(dtype)
    tokens = token_positions([1] * count, range(3, count + 3), Layer.HEAD_WIDTH, dtype)
    caches = torch.randn(len(layers), 2, 2, 1, count + 3, Layer.HEAD_WIDTH).to(dtype)
    own_caches, expected = caches.clone(), hidden
    for layer, cache in zip(layers, caches, strict=True):
        expected = layer.expected(expected, cache, tokens)
    arguments = [
        layer.arguments(cache, tokens) for layer, cache in zip(layers, own_caches, strict=True)
    ]
    array = (ops.Layer * len(arguments))(*arguments)
    ops.decoder_layers(hidden, array, tokens.slots(own_caches[0]), activation_bits)
    for ours, theirs in ((hidden, expected), (own_caches, caches)):
        error = (ours.double() - theirs.double()).abs().max() / theirs.abs().max()
        assert error < bound
