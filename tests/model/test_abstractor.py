"""Visual abstractor: the position codes equal the formula of Specification §1.2."""

import math

import torch

from owl2.model.abstractor import sincos_1d, sincos_2d
from tests.tiny import make_model


def code(position, width):
    half = width // 2
    angles = [position / 10000 ** (j / half) for j in range(half)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def test_1d_position_embeddings():
    codes = sincos_1d(torch.arange(70), 16)
    expected = torch.tensor([code(p, 16) for p in range(70)])
    torch.testing.assert_close(codes, expected, rtol=0, atol=1e-6)


def test_2d_position_embeddings():
    codes = sincos_2d(3, 16)
    rows = [[0.0] * 16] + [code(c, 8) + code(r, 8) for r in range(3) for c in range(3)]
    torch.testing.assert_close(codes, torch.tensor(rows), rtol=0, atol=1e-6)


def test_output_is_queries_and_vit_eos(tiny):
    abstractor = tiny.model.visual_abstractor
    features = torch.randn(2, 5, 8)
    with torch.no_grad():
        embeddings = abstractor(features)
    assert embeddings.shape == (2, 3, 16)
    assert torch.equal(embeddings[:, -1], abstractor.vit_eos[0].expand(2, -1))
    assert not torch.equal(embeddings[0, :2], embeddings[1, :2])


def test_new_model_has_position_embeddings():
    for layer in make_model().model.visual_abstractor.encoder.layers:
        attention = layer.crossattention.attention
        assert torch.equal(attention.q_pos_embed, sincos_1d(torch.arange(2), 8))
        assert torch.equal(attention.k_pos_embed, sincos_2d(2, 8))
