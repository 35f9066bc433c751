"""The whole model: what goes in, what comes out, what is refused; cached and padded alike."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.utils import is_flash_attn_2_available

from owl2.errors import InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from tests.tiny import make_model

IMAGE = [40] * 3
CLOSE = {"rtol": 0, "atol": 1e-5}


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_the_order_of_images_matters(tiny, image_inputs):
    pixels = image_inputs.pop("pixel_values")
    before = logits(tiny, **image_inputs, pixel_values=pixels)
    other = logits(tiny, **image_inputs, pixel_values=torch.stack([pixels[0], -pixels[1]]))
    swapped = logits(tiny, **image_inputs, pixel_values=pixels.flip(0))
    second = 7  # where the second image starts
    torch.testing.assert_close(other[:, :second], before[:, :second], **CLOSE)
    assert (other[:, second:] - before[:, second:]).abs().max() > 1e-3
    assert (swapped[:, 2:] - before[:, 2:]).abs().amax(2).min() > 1e-4


def test_images_are_handed_out_row_by_row(tiny):
    ids = torch.tensor([[1, *IMAGE, 5, *IMAGE, 6], [1, 2, 3, 4, 5, *IMAGE, 6]])
    pixels = torch.randn(3, 3, 8, 8)
    together = logits(tiny, input_ids=ids, pixel_values=pixels)
    alone = [
        logits(tiny, input_ids=ids[:1], pixel_values=pixels[:2]),
        logits(tiny, input_ids=ids[1:], pixel_values=pixels[2:]),
    ]
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)


@pytest.mark.parametrize(
    ("places", "images", "said"),
    [
        (1, 0, ["3 image tokens", "1 images of 3", "0 images"]),
        (2, 1, ["6 image tokens", "2 images of 3", "1 images"]),
        (1, 2, ["3 image tokens", "1 images of 3", "2 images"]),
        (0, 1, ["0 image tokens", "1 images"]),
    ],
)
@pytest.mark.parametrize("call", ["forward", "generate", "beams"])
def test_a_wrong_count_raises_with_both_counts(tiny, places, images, said, call):
    inputs = {"input_ids": torch.tensor([[1, 5, *IMAGE * places, 6]])}
    if images:
        inputs["pixel_values"] = torch.zeros(images, 3, 8, 8)
    calls = {
        "forward": lambda: tiny(**inputs),
        "generate": lambda: tiny.generate(**inputs, max_new_tokens=2),
        "beams": lambda: tiny.generate(**inputs, max_new_tokens=2, num_beams=2),
    }
    if call == "beams" and not images:
        said = ["image tokens", "images of 3", "0 images"]  # counted after they are repeated
    with pytest.raises(InputError) as error:
        calls[call]()
    assert all(part in str(error.value) for part in said), error.value


def test_an_incomplete_image_raises(tiny):
    ids = torch.tensor([[1, 40, 40, 6, 7, 8], [1, 40, 40, 40, 40, 8]])
    with pytest.raises(InputError, match="row 0 of input_ids holds 2 image tokens"):
        tiny(input_ids=ids, pixel_values=torch.zeros(2, 3, 8, 8))
    with pytest.raises(InputError, match=r"6 image tokens.*1 images"):
        tiny(input_ids=ids, pixel_values=torch.zeros(1, 3, 8, 8))


def test_ids_or_embeddings_but_not_both_and_not_neither(tiny, image_inputs):
    embeds = torch.zeros(1, 4, 16)
    for inputs in ({}, {"input_ids": torch.ones(1, 4).long(), "inputs_embeds": embeds}):
        with pytest.raises(InputError, match="either input_ids or inputs_embeds"):
            tiny(**inputs)
    with pytest.raises(InputError, match="which say where the images go"):
        tiny(inputs_embeds=embeds, pixel_values=image_inputs["pixel_values"])


def embed(model, input_ids, pixel_values):
    """The mixed sequence put together by hand."""
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


def test_a_mixed_sequence_put_together_by_the_model(tiny, image_inputs):
    """What `embed` gives goes on as the ids themselves would."""
    ids, pixels = image_inputs.values()
    with torch.no_grad():
        images = tiny.get_image_features(pixels).pooler_output
        embeds = tiny.model.embed(ids, images)
        words = tiny.model.embed(ids.clamp(max=39))
    assert torch.equal(embeds, embed(tiny, ids, pixels))
    assert torch.equal(words, tiny.get_input_embeddings()(ids.clamp(max=39)))
    for wrong in (None, images[:1]):
        with pytest.raises(InputError, match=f"6 image tokens.*{0 if wrong is None else 1} pict"):
            tiny.model.embed(ids, wrong)
    with pytest.raises(InputError, match="hold 41"):
        tiny.model.embed(torch.tensor([[1, 41]]))


def test_types_beside_ids_change_nothing(tiny, image_inputs):
    types = (image_inputs["input_ids"] == 40).long()
    expected = logits(tiny, **image_inputs)
    assert torch.equal(logits(tiny, **image_inputs, mm_token_type_ids=types), expected)


def test_a_second_call_equals_the_first(tiny, image_inputs):
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
@pytest.mark.parametrize("use_mam", [True, False])
def test_cached_logits_equal_uncached(kind, attention, use_mam, tiny, image_inputs):
    if not use_mam:
        tiny = make_model(use_mam=False).eval()
    tiny.set_attn_implementation(attention)
    new = torch.tensor([[3, 17, 4, 22]])
    whole = torch.cat([image_inputs["input_ids"], new], dim=1)
    expected = logits(tiny, input_ids=whole, pixel_values=image_inputs["pixel_values"])
    length = image_inputs["input_ids"].shape[1]
    cache = make_cache(kind, tiny, whole.shape[1])
    prefill = logits(tiny, **image_inputs, past_key_values=cache)
    torch.testing.assert_close(prefill, expected[:, :length], **CLOSE)
    for step in range(new.shape[1]):
        got = logits(tiny, input_ids=new[:, step : step + 1], past_key_values=cache)
        torch.testing.assert_close(got[:, 0], expected[:, length + step], **CLOSE)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_prompt_in_chunks_equals_the_whole(kind, tiny, image_inputs):
    """Chunks cut between the images as ids, and anywhere as embeddings."""
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
def test_only_the_logits_that_are_wanted(tiny, image_inputs, keep):
    whole = logits(tiny, **image_inputs)
    places = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
    got = logits(tiny, **image_inputs, logits_to_keep=keep)
    torch.testing.assert_close(got, whole[:, places], **CLOSE)


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
def test_padding_on_either_side_changes_no_logits(tiny, side, attention):
    tiny.set_attn_implementation(attention)
    batch, alone = padded_batch(side)
    together = logits(tiny, **batch)
    for row, inputs in enumerate(alone):
        real = together[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(real, logits(tiny, **inputs)[0], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_answer(tiny, side):
    batch, alone = padded_batch(side)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    together = tiny.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, inputs in enumerate(alone):
        answer = tiny.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(together[row], answer), row
    assert len({tuple(row) for row in together.tolist()}) > 1  # not all the same anyway


def test_the_parts_attention_can_be_chosen_and_agrees(tiny, image_inputs):
    results = {}
    for attention in ("eager", "sdpa"):
        tiny.set_attn_implementation(attention)
        visual = tiny.config.visual_config
        for config in (tiny.config, visual.visual_model, visual.visual_abstractor):
            assert config._attn_implementation == attention
        results[attention] = logits(tiny, **image_inputs)
    torch.testing.assert_close(results["eager"], results["sdpa"], **CLOSE)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash attention is installed")
def test_flash_attention_is_optional(tmp_path):
    """Where the package is missing, asking for it says so; all these tests import without it."""
    make_model().save_pretrained(tmp_path)
    with pytest.raises((ImportError, ValueError), match=r"(?i)flash.*install"):
        Owl2ForConditionalGeneration.from_pretrained(
            tmp_path, attn_implementation="flash_attention_2"
        )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_on_a_cpu(tiny, image_inputs, attention):
    expected = logits(tiny, **image_inputs)
    tiny.to(torch.bfloat16).set_attn_implementation(attention)
    got = logits(tiny, **image_inputs)  # with pixels in float32, as the processor gives them
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_image_is_as_many_embeddings_as_the_config_says(tiny):
    features = tiny.get_image_features(torch.randn(2, 3, 8, 8))
    assert features.pooler_output.shape == (2, tiny.config.num_image_tokens, 16)
    assert features.last_hidden_state.shape == (2, 5, 8)
