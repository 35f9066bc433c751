"""`generate`: beams, several answers, embeddings, types, caches."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    DynamicCache,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from owl2.errors import ErrorCode
from owl2.model.generation import CHUNKS_WITH_IMAGES
from tests.errors import raises_input_error
from tests.model.conftest import make_modalities_differ
from tests.model.golden import inputs_of, load_cases, load_model
from tests.tiny import make_model

IMAGE = [40] * 3
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def model():
    """A tiny model whose answers change from token to token."""
    model = make_model(seed=5).eval()
    make_modalities_differ(model)
    return model


def two_prompts():
    """Two prompts with two images each; all four images are different."""
    ids = torch.tensor([[1, *IMAGE, 5, *IMAGE, 6], [1, 9, *IMAGE, *IMAGE, 8]])
    pixels = 3 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def one_by_one(inputs):
    for row in range(2):
        yield {
            "input_ids": inputs["input_ids"][row : row + 1],
            "pixel_values": inputs["pixel_values"][2 * row : 2 * row + 2],
            "attention_mask": inputs["attention_mask"][row : row + 1],
        }


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "use_cache": False},
    ],
)
def test_beams_of_several_prompts_equal_one_by_one(model, options):
    inputs = two_prompts()
    together = model.generate(**inputs, **GREEDY, **options)
    alone = [model.generate(**single, **GREEDY, **options) for single in one_by_one(inputs)]
    assert torch.equal(together, torch.cat(alone))
    # Other images give other answers.
    inputs["pixel_values"] = -inputs["pixel_values"]
    assert not torch.equal(model.generate(**inputs, **GREEDY, **options), together)


def test_several_answers_use_the_images_of_their_prompt(model):
    """Sampling draws differently for a batch, so the first step's scores are compared."""
    inputs = two_prompts()
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 1}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    scores = model.generate(**inputs, **options).logits[0]
    with torch.no_grad():
        expected = [model(**single).logits[:, -1] for single in one_by_one(inputs)]
    torch.testing.assert_close(
        scores, torch.cat(expected).repeat_interleave(3, dim=0), rtol=0, atol=1e-5
    )


def test_answers_without_a_cache_are_equal(model):
    inputs = two_prompts()
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=False), expected)
    assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), expected)


def test_token_types_do_not_change_answers(model):
    ids = torch.tensor([[1, 5, *IMAGE]])
    inputs = {"input_ids": ids, "pixel_values": two_prompts()["pixel_values"][:1]}
    expected = model.generate(**inputs, **GREEDY)
    types = (ids == 40).long()
    assert torch.equal(model.generate(**inputs, mm_token_type_ids=types, **GREEDY), expected)


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_from_embeddings(model, beams):
    inputs = two_prompts()
    ids = inputs["input_ids"]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids.clamp(max=39))
        images = model.get_image_features(inputs["pixel_values"]).pooler_output
        embeds[ids == 40] = images.flatten(0, 1)
    expected = model.generate(**inputs, **GREEDY, num_beams=beams)[:, ids.shape[1] :]
    answer = model.generate(
        inputs_embeds=embeds,
        mm_token_type_ids=(ids == 40).long(),
        attention_mask=inputs["attention_mask"],
        **GREEDY,
        num_beams=beams,
    )
    assert torch.equal(answer, expected)


def test_continuing_from_a_cache(model):
    """A second turn with a new image: all ids, the complete mask, and only the new image."""
    inputs = two_prompts()
    first = next(one_by_one(inputs))
    cache = DynamicCache(config=model.config)
    answered = model.generate(**first, past_key_values=cache, **GREEDY)
    ids = torch.cat([answered, torch.tensor([[1, *IMAGE, 4]])], dim=1)
    new = inputs["pixel_values"][3:]
    images = torch.cat([first["pixel_values"], new])
    mask = torch.ones_like(ids)
    expected = model.generate(ids, pixel_values=images, attention_mask=mask, **GREEDY)
    continued = model.generate(
        ids, pixel_values=new, attention_mask=mask, past_key_values=cache, **GREEDY
    )
    assert torch.equal(continued, expected)


def test_end_token_ends_an_answer():
    """The golden answer ends with </s> after 5 tokens, also with a higher limit."""
    model, cases = load_model("model_mha"), load_cases("model_mha")
    inputs = inputs_of(cases, "generate_text", model.config)
    assert model.generate(**inputs, max_new_tokens=200)[0, -1] == 2
    longer = model.generate(**inputs, max_new_tokens=24, eos_token_id=None)
    assert longer.shape[1] == inputs["input_ids"].shape[1] + 24


PROCESSORS = {
    "repetition_penalty": lambda value, ids: RepetitionPenaltyLogitsProcessor(value),
    "encoder_repetition_penalty": EncoderRepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram_size": lambda value, ids: NoRepeatNGramLogitsProcessor(value),
    "encoder_no_repeat_ngram_size": EncoderNoRepeatNGramLogitsProcessor,
}


def greedy_by_hand(model, inputs, make, steps):
    """One row at a time, with a logits processor that receives the text tokens only."""
    rows = []
    for single in one_by_one(inputs):
        ids = single["input_ids"]
        prompt = ids[ids != 40][None]
        processor = make(prompt)
        for _ in range(steps):
            with torch.no_grad():
                scores = model(ids, pixel_values=single["pixel_values"]).logits[:, -1]
            chosen = processor(ids[ids != 40][None], scores).argmax(-1, keepdim=True)
            ids = torch.cat([ids, chosen], dim=1)
        rows.append(ids)
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("repetition_penalty", 3.0),
        ("encoder_repetition_penalty", 0.3),
        ("no_repeat_ngram_size", 1),
        ("encoder_no_repeat_ngram_size", 1),
    ],
)
def test_processors_indexed_by_prompt_ids_use_its_text(model, option, value):
    inputs = two_prompts()
    expected = greedy_by_hand(model, inputs, lambda ids: PROCESSORS[option](value, ids), 8)
    answers = model.generate(**inputs, **GREEDY, **{option: value})
    assert torch.equal(answers, expected)


def test_penalty_changes_the_answer(model):
    """Otherwise the previous test would compare equal answers."""
    plain = model.generate(**two_prompts(), **GREEDY)
    assert not torch.equal(model.generate(**two_prompts(), **GREEDY, repetition_penalty=3.0), plain)


@pytest.mark.parametrize("size", [1, 4, 100])
def test_prefill_in_chunks(model, size):
    """Chunks of 4 positions split the images of both prompts."""
    inputs = two_prompts()
    options = GREEDY | {"prefill_chunk_size": size}
    if Version(transformers.__version__) < CHUNKS_WITH_IMAGES:
        with raises_input_error(ErrorCode.UNSUPPORTED, "5.23"):
            model.generate(**inputs, **options)
    else:
        assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **GREEDY))


def test_embeddings_of_images_in_place_of_pixels(model):
    inputs = two_prompts()
    expected = model(**inputs).logits
    encoded = {"image": model.get_image_features(inputs.pop("pixel_values"))}
    torch.testing.assert_close(model(**inputs, mm_encoder_outputs=encoded).logits, expected)
    encoded["image"].pooler_output = encoded["image"].pooler_output[:1]
    with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, "12", "3"):
        model(**inputs, mm_encoder_outputs=encoded)
