"""The complete model: inputs, outputs, errors, caches and padding."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.utils import is_flash_attn_2_available

from owl2.errors import ErrorCode
from owl2.model.modeling import Owl2ForConditionalGeneration
from tests.errors import raises_input_error
from tests.model.conftest import make_modalities_differ
from tests.tiny import MEMBERS, PARTIAL_MAM, make_model

IMAGE = [40] * 3
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(params=MEMBERS)
def tiny(request):
    """A model of each type, whose visual weights differ from its text weights."""
    model = make_model(member=request.param).eval()
    make_modalities_differ(model)
    return model


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_order_of_images_matters(tiny, image_inputs):
    pixels = image_inputs.pop("pixel_values")
    before = logits(tiny, **image_inputs, pixel_values=pixels)
    other = logits(tiny, **image_inputs, pixel_values=torch.stack([pixels[0], -pixels[1]]))
    swapped = logits(tiny, **image_inputs, pixel_values=pixels.flip(0))
    second = 7  # where the second image starts
    torch.testing.assert_close(other[:, :second], before[:, :second], **CLOSE)
    assert (other[:, second:] - before[:, second:]).abs().max() > 1e-3
    assert (swapped[:, 2:] - before[:, 2:]).abs().amax(2).min() > 1e-4


def test_images_are_assigned_row_by_row(tiny):
    ids = torch.tensor([[1, *IMAGE, 5, *IMAGE, 6], [1, 2, 3, 4, 5, *IMAGE, 6]])
    pixels = torch.randn(3, 3, 8, 8)
    together = logits(tiny, input_ids=ids, pixel_values=pixels)
    alone = [
        logits(tiny, input_ids=ids[:1], pixel_values=pixels[:2]),
        logits(tiny, input_ids=ids[1:], pixel_values=pixels[2:]),
    ]
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)


@pytest.mark.parametrize(
    ("placeholders", "images", "counts"),
    [
        (1, 0, ["3 image tokens", "1 images of 3", "0 images"]),
        (2, 1, ["6 image tokens", "2 images of 3", "1 images"]),
        (1, 2, ["3 image tokens", "1 images of 3", "2 images"]),
        (0, 1, ["0 image tokens", "1 images"]),
    ],
)
@pytest.mark.parametrize("call", ["forward", "generate", "beams"])
def test_wrong_image_count_raises_with_both_counts(tiny, placeholders, images, counts, call):
    inputs = {"input_ids": torch.tensor([[1, 5, *IMAGE * placeholders, 6]])}
    if images:
        inputs["pixel_values"] = torch.zeros(images, 3, 8, 8)
    calls = {
        "forward": lambda: tiny(**inputs),
        "generate": lambda: tiny.generate(**inputs, max_new_tokens=2),
        "beams": lambda: tiny.generate(**inputs, max_new_tokens=2, num_beams=2),
    }
    if call == "beams" and not images:
        counts = ["image tokens", "images of 3", "0 images"]  # counted after they are repeated
    with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, *counts):
        calls[call]()


def test_incomplete_image_raises(tiny):
    ids = torch.tensor([[1, 40, 40, 6, 7, 8], [1, 40, 40, 40, 40, 8]])
    with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, "row 0", "2 image tokens"):
        tiny(input_ids=ids, pixel_values=torch.zeros(2, 3, 8, 8))
    with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, "6 image tokens", "1 images"):
        tiny(input_ids=ids, pixel_values=torch.zeros(1, 3, 8, 8))


def test_exactly_one_of_ids_and_embeddings_is_required(tiny, image_inputs):
    embeds = torch.zeros(1, 4, 16)
    for inputs in ({}, {"input_ids": torch.ones(1, 4).long(), "inputs_embeds": embeds}):
        with raises_input_error(ErrorCode.INVALID_VALUE, "inputs_embeds"):
            tiny(**inputs)
    with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, "0 image tokens", "2 images"):
        tiny(inputs_embeds=embeds, pixel_values=image_inputs["pixel_values"])


def embed(model, input_ids, pixel_values):
    """The embeddings of text and images, computed in the test."""
    with torch.no_grad():
        images = model.get_image_features(pixel_values).pooler_output.flatten(0, 1)
        embeds = model.get_input_embeddings()(input_ids.clamp(max=39))
        embeds[input_ids == 40] = images
    return embeds


def test_embeddings_with_types_equal_ids(tiny, image_inputs):
    embeds = embed(tiny, **image_inputs)
    types = (image_inputs["input_ids"] == 40).long()
    expected = logits(tiny, **image_inputs)
    got = logits(tiny, inputs_embeds=embeds, mm_token_type_ids=types)
    torch.testing.assert_close(got, expected, **CLOSE)
    as_text = logits(tiny, inputs_embeds=embeds)
    assert not torch.allclose(as_text, expected, atol=1e-3)


def test_embed_equals_embeddings_by_hand(tiny, image_inputs):
    """`embed` gives the embeddings that `forward` computes from the ids."""
    ids, pixels = image_inputs.values()
    with torch.no_grad():
        images = tiny.get_image_features(pixels).pooler_output
        embeds = tiny.model.embed(ids, images)
        text = tiny.model.embed(ids.clamp(max=39))
    assert torch.equal(embeds, embed(tiny, ids, pixels))
    assert torch.equal(text, tiny.get_input_embeddings()(ids.clamp(max=39)))
    for wrong in (None, images[:1]):
        count = 0 if wrong is None else 1
        with raises_input_error(
            ErrorCode.IMAGE_COUNT_MISMATCH, "6 image tokens", f"{count} images"
        ):
            tiny.model.embed(ids, wrong)
    with raises_input_error(ErrorCode.INVALID_VALUE, 41):
        tiny.model.embed(torch.tensor([[1, 41]]))


def test_explicit_token_types_do_not_change_logits(tiny, image_inputs):
    types = (image_inputs["input_ids"] == 40).long()
    expected = logits(tiny, **image_inputs)
    assert torch.equal(logits(tiny, **image_inputs, mm_token_type_ids=types), expected)


def test_second_call_equals_the_first(tiny, image_inputs):
    first = logits(tiny, **image_inputs)
    answer = tiny.generate(**image_inputs, max_new_tokens=5, do_sample=False)
    logits(tiny, input_ids=torch.tensor([[1, 2]]))
    assert torch.equal(logits(tiny, **image_inputs), first)
    again = tiny.generate(**image_inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(again, answer)


def make_cache(kind, model, length):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=length)
    return DynamicCache(config=model.config)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("settings", [{}, {"use_mam": False}, *PARTIAL_MAM], ids=str)
def test_cached_logits_equal_uncached(kind, attention, settings, image_inputs):
    tiny = make_model(**settings).eval()
    make_modalities_differ(tiny)
    tiny.set_attn_implementation(attention)
    new = torch.tensor([[3, 17, 4, 22]])
    full = torch.cat([image_inputs["input_ids"], new], dim=1)
    expected = logits(tiny, input_ids=full, pixel_values=image_inputs["pixel_values"])
    length = image_inputs["input_ids"].shape[1]
    cache = make_cache(kind, tiny, full.shape[1])
    prefill = logits(tiny, **image_inputs, past_key_values=cache)
    torch.testing.assert_close(prefill, expected[:, :length], **CLOSE)
    for step in range(new.shape[1]):
        got = logits(tiny, input_ids=new[:, step : step + 1], past_key_values=cache)
        torch.testing.assert_close(got[:, 0], expected[:, length + step], **CLOSE)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chunked_prefill_equals_full_prefill(kind, tiny, image_inputs):
    """Ids are cut between images, embeddings anywhere."""
    expected = logits(tiny, **image_inputs)
    ids, pixels = image_inputs.values()
    cache = make_cache(kind, tiny, ids.shape[1])
    chunks = [
        logits(tiny, input_ids=part, pixel_values=pixels[i : i + 1], past_key_values=cache)
        for i, part in enumerate(ids.split([6, ids.shape[1] - 6], dim=1))
    ]
    torch.testing.assert_close(torch.cat(chunks, dim=1), expected, **CLOSE)
    cache = make_cache(kind, tiny, ids.shape[1])
    parts = zip(embed(tiny, ids, pixels).split(4, 1), (ids == 40).long().split(4, 1), strict=True)
    chunks = [
        logits(tiny, inputs_embeds=embeds, mm_token_type_ids=types, past_key_values=cache)
        for embeds, types in parts
    ]
    torch.testing.assert_close(torch.cat(chunks, dim=1), expected, **CLOSE)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 5])])
def test_logits_to_keep(tiny, image_inputs, keep):
    every = logits(tiny, **image_inputs)
    kept = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
    got = logits(tiny, **image_inputs, logits_to_keep=keep)
    torch.testing.assert_close(got, every[:, kept], **CLOSE)


def padded_batch(side):
    """Four prompts with 0, 1, 2 and 1 images, of different lengths."""
    rows = [[1, 5, 6], [1, *IMAGE, 7], [1, *IMAGE, *IMAGE, 8, 9, 10], [*IMAGE, 11, 12]]
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(row)) for row in rows]
    pairs = list(zip(rows, pads, strict=True))
    left = side == "left"
    ids = torch.tensor([pad + row if left else row + pad for row, pad in pairs])
    ones = [[1] * len(row) for row in rows]
    marks = zip(ones, pads, strict=True)
    mask = torch.tensor([pad + one if left else one + pad for one, pad in marks])
    pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    alone = [
        {"input_ids": torch.tensor([row]), "pixel_values": pixels[start:stop]}
        for row, (start, stop) in zip(rows, [(0, 0), (0, 1), (1, 3), (3, 4)], strict=True)
    ]
    del alone[0]["pixel_values"]
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}, alone


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_change_logits(tiny, side, attention):
    tiny.set_attn_implementation(attention)
    batch, alone = padded_batch(side)
    together = logits(tiny, **batch)
    for row, inputs in enumerate(alone):
        real = together[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(real, logits(tiny, **inputs)[0], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_change_answers(tiny, side):
    batch, alone = padded_batch(side)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    together = tiny.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, inputs in enumerate(alone):
        answer = tiny.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(together[row], answer), row
    assert len({tuple(row) for row in together.tolist()}) > 1  # the answers are not all equal


def test_attention_implementation_applies_to_all_parts(tiny, image_inputs):
    results = {}
    for attention in ("eager", "sdpa"):
        tiny.set_attn_implementation(attention)
        visual = tiny.config.visual_config
        for config in (tiny.config, *visual.parts.values()):
            assert config._attn_implementation == attention
        results[attention] = logits(tiny, **image_inputs)
    torch.testing.assert_close(results["eager"], results["sdpa"], **CLOSE)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash attention is installed")
def test_flash_attention_is_optional(tmp_path):
    """Without the package, requesting flash attention raises an error that names it."""
    make_model().save_pretrained(tmp_path)
    with pytest.raises((ImportError, ValueError), match=r"(?i)flash.*install"):
        Owl2ForConditionalGeneration.from_pretrained(
            tmp_path, attn_implementation="flash_attention_2"
        )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_on_cpu(tiny, image_inputs, attention):
    expected = logits(tiny, **image_inputs)
    tiny.to(torch.bfloat16).set_attn_implementation(attention)
    got = logits(tiny, **image_inputs)  # with pixels in float32, as the processor gives them
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_image_features_have_num_image_tokens_embeddings(tiny):
    features = tiny.get_image_features(torch.randn(2, 3, 8, 8))
    assert features.pooler_output.shape == (2, tiny.config.num_image_tokens, 16)
    num_tokens = 4 + tiny.config.visual_config.visual_model.use_cls_token
    assert features.last_hidden_state.shape == (2, num_tokens, 8)
