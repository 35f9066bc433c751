"""Visual abstractor: the position codes against SPEC 1.2's formula, written out."""

import math

import torch

from owl2.model.abstractor import sincos_1d, sincos_2d
from tests.tiny import make_model


def code(position, width):
    half = width // 2
    angles = [position / 10000 ** (j / half) for j in range(half)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def test_the_code_of_a_line():
    codes = sincos_1d(torch.arange(70), 16)
    expected = torch.tensor([code(p, 16) for p in range(70)])
    torch.testing.assert_close(codes, expected, rtol=0, atol=1e-6)


def test_the_code_of_a_grid_is_the_columns_then_the_rows_after_zeros():
    codes = sincos_2d(3, 16)
    rows = [[0.0] * 16] + [code(c, 8) + code(r, 8) for r in range(3) for c in range(3)]
    torch.testing.assert_close(codes, torch.tensor(rows), rtol=0, atol=1e-6)


def test_queries_and_an_end_token(tiny):
    abstractor = tiny.model.visual_abstractor
    features = torch.randn(2, 5, 8)
    with torch.no_grad():
        embeddings = abstractor(features)
    assert embeddings.shape == (2, 3, 16)
    assert torch.equal(embeddings[:, -1], abstractor.vit_eos[0].expand(2, -1))
    assert not torch.equal(embeddings[0, :2], embeddings[1, :2])


def test_a_fresh_model_has_its_codes():
    for layer in make_model().model.visual_abstractor.encoder.layers:
        attention = layer.crossattention.attention
        assert torch.equal(attention.q_pos_embed, sincos_1d(torch.arange(2), 8))
        assert torch.equal(attention.k_pos_embed, sincos_2d(2, 8))
