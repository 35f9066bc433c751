"""Vision encoder: images of another size, CLIP's layout, rejected inputs."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from owl2.errors import ErrorCode
from owl2.model import vision
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.model.vision import matmul_attention, resize_positions
from tests.errors import raises_input_error
from tests.model.golden import FOLDER
from tests.tiny import make_model

GOLDEN = FOLDER / "model_mha"  # 56 px, a grid of 4 x 4
POSITIONS = "model.vision_model.embeddings.position_embedding"


def load(path, **options):
    return Owl2ForConditionalGeneration.from_pretrained(path, **options)


def bicubic(stored, grid):
    """The interpolation of Specification §2 with torch, for each patch of the result."""
    old = round((stored.shape[1] - 1) ** 0.5)
    planes = stored[0, 1:].T.reshape(1, -1, old, old)
    resized = F.interpolate(planes, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([stored[:, :1], resized[0].flatten(1).T[None]], dim=1)


def check_size(model, size, grid):
    stored = load(GOLDEN).state_dict()[POSITIONS]
    torch.testing.assert_close(model.state_dict()[POSITIONS], bicubic(stored, grid))
    visual = model.config.visual_config
    assert (model.config.image_size, visual.visual_model.image_size) == (size, size)
    assert visual.visual_abstractor.grid_size == grid
    for name, codes in model.state_dict().items():
        if name.endswith("k_pos_embed"):
            assert codes.shape == (1 + grid**2, 48)
            assert not codes[0].any()
            # The second row of patches starts with the code of the first column and the next row.
            torch.testing.assert_close(codes[1 + grid, :24], codes[1, :24])
            torch.testing.assert_close(codes[1 + grid, 24:], codes[2, :24])
    with torch.no_grad():
        features = model.get_image_features(torch.randn(1, 3, size, size))
    assert features.last_hidden_state.shape == (1, 1 + grid**2, 48)
    assert features.pooler_output.shape == (1, 6, 64)


@pytest.mark.parametrize(("size", "grid"), [(112, 8), (28, 2), (70, 5)])
def test_image_size_argument(size, grid):
    check_size(load(GOLDEN, image_size=size), size, grid)


def test_set_image_size():
    model = load(GOLDEN)
    model.set_image_size(112)
    check_size(model, 112, 8)


def edit_size(path, size):
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["visual_config"]["visual_model"]["image_size"] = size
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("shard_size", ["5GB", "300KB"])
@pytest.mark.parametrize("place", ["directory", "hub"])
def test_image_size_in_an_edited_config(tmp_path, monkeypatch, shard_size, place):
    """The weights are loaded once: the released model has 16 GB."""
    folder = tmp_path / "models--owner--name" / "snapshots" / ("1" * 40)
    load(GOLDEN).save_pretrained(folder, max_shard_size=shard_size)
    edit_size(folder, 112)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("1" * 40, encoding="utf-8")
    calls, from_pretrained = [], PreTrainedModel.from_pretrained.__func__

    def counting(cls, *args, **kwargs):
        calls.append(args)
        return from_pretrained(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counting))
    hub = {"cache_dir": tmp_path} if place == "hub" else {}
    model = load("owner/name" if hub else folder, **hub)
    assert len(calls) == 1
    check_size(model, 112, 8)


def test_config_argument_is_not_modified():
    config = load(GOLDEN).config
    config.visual_config.visual_model.image_size = 112
    before = config.to_dict()
    check_size(load(GOLDEN, config=config), 112, 8)
    assert config.to_dict() == before


def test_argument_overrides_the_config(tmp_path):
    load(GOLDEN).save_pretrained(tmp_path)
    edit_size(tmp_path, 112)
    check_size(load(tmp_path, image_size=28), 28, 2)


def test_resized_model_is_saved_at_its_new_size(tmp_path):
    load(GOLDEN, image_size=112).save_pretrained(tmp_path)
    check_size(load(tmp_path), 112, 8)


def test_positions_keep_their_dtype_and_are_interpolated_in_float32():
    model = load(GOLDEN, image_size=112, dtype=torch.bfloat16)
    positions = model.state_dict()[POSITIONS]
    stored = load(GOLDEN, dtype=torch.bfloat16).state_dict()[POSITIONS].float()
    assert positions.dtype == torch.bfloat16
    assert torch.equal(positions, bicubic(stored, 8).to(torch.bfloat16))


def test_same_size_changes_nothing():
    model, plain = load(GOLDEN, image_size=56), load(GOLDEN)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    positions = plain.state_dict()[POSITIONS]
    assert torch.equal(resize_positions(positions, 4), positions)


def test_frozen_position_embedding_stays_frozen():
    model = make_model()
    model.requires_grad_(False)
    model.set_image_size(16)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("size", [0, -14, 57])
def test_image_size_must_be_a_multiple_of_the_patch_size(size):
    with raises_input_error(ErrorCode.INVALID_VALUE, size):
        load(GOLDEN).set_image_size(size)


@pytest.mark.parametrize("shape", [(1, 1 + 15, 48), (1, 17, 40)], ids=["not square", "width"])
def test_positions_of_another_shape_are_rejected(tmp_path, shape):
    model = load(GOLDEN)
    state = model.state_dict() | {POSITIONS: torch.zeros(shape)}
    model.save_pretrained(tmp_path, state_dict=state)
    with raises_input_error(ErrorCode.SHAPE_MISMATCH, "position_embedding", shape):
        load(tmp_path)


@pytest.mark.parametrize("shape", [(1, 3, 4, 8), (1, 3, 16, 16), (1, 1, 8, 8), (3, 8, 8)])
def test_pixels_of_another_size_are_rejected(tiny, shape):
    with raises_input_error(ErrorCode.SHAPE_MISMATCH, shape, "(N, 3, 8, 8)"):
        tiny.get_image_features(torch.zeros(shape))


def test_images_in_a_batch_are_independent(tiny):
    pixels = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        together = tiny.get_image_features(pixels).pooler_output
        alone = [tiny.get_image_features(image[None]).pooler_output for image in pixels]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_features_without_gradients_equal_those_with_gradients(tiny):
    pixels = torch.randn(2, 3, 8, 8)
    expected = tiny.get_image_features(pixels).pooler_output
    with torch.no_grad():
        assert torch.equal(tiny.get_image_features(pixels).pooler_output, expected)


@pytest.mark.parametrize("scores", [2**24, 3 * 25, 1])  # all heads at a time, three, one
@pytest.mark.parametrize("queries", [5, 3])
def test_matmul_attention_equals_the_fused_kernel(queries, scores, monkeypatch):
    monkeypatch.setattr(vision, "MATMUL_SCORES", scores)
    shapes = ((2, 4, queries, 8), (2, 4, 5, 8), (2, 4, 5, 8))
    query, key, value = (torch.randn(shape) for shape in shapes)
    expected = F.scaled_dot_product_attention(query, key, value, scale=0.3).transpose(1, 2)
    found = matmul_attention(query, key, value, 0.3)
    torch.testing.assert_close(found, expected.flatten(2))


def test_bfloat16_matmul_attention_is_as_accurate_as_the_fused_kernel(monkeypatch, tiny):
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    used = []
    products = vision.matmul_attention
    monkeypatch.setattr(vision, "matmul_attention", lambda *args: used.append(1) or products(*args))
    monkeypatch.setattr("owl2.runtime.cpu_supports_bf16", lambda: True)
    tiny.set_attn_implementation("sdpa")
    errors = []
    with torch.no_grad():
        expected = tiny.get_image_features(pixels).pooler_output
        tiny.to(torch.bfloat16)
        for is_faster in (True, False):
            monkeypatch.setattr(vision, "_matmul_is_faster", lambda _, value=is_faster: value)
            errors.append((tiny.get_image_features(pixels).pooler_output - expected).norm())
    assert len(used) == 3 + 2  # the blocks of both parts, the first time only
    assert errors[0] < 1.2 * errors[1]


@pytest.mark.parametrize("encoder", ["vision_model.encoder", "visual_abstractor.encoder"])
@torch.no_grad()
def test_without_bf16_instructions_layers_are_computed_in_float32(encoder, monkeypatch):
    model = load(GOLDEN, dtype=torch.bfloat16).eval().model
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    arguments = [model.vision_model.embeddings(pixels.bfloat16())]
    if encoder.startswith("visual_abstractor"):
        arguments.insert(0, model.visual_abstractor.query_embeds)
    stack = model.get_submodule(encoder)
    exact = copy.deepcopy(stack).float()(*(argument.float() for argument in arguments))
    errors = []
    for has_bf16 in (False, True):
        monkeypatch.setattr("owl2.runtime.cpu_supports_bf16", lambda has=has_bf16: has)
        result = stack(*arguments)
        assert result.dtype == torch.bfloat16
        errors.append((result.float() - exact).abs().max() / exact.abs().max())
    # The results of the layers are rounded, by at most 2^-9 of a value.
    assert 0 < errors[0] < len(stack.layers) * 2.0**-8
    assert errors[0] < errors[1]
    assert {parameter.dtype for parameter in stack.parameters()} == {torch.bfloat16}
