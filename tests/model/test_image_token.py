"""The image token: a fixed id, added tokens, labels, and the scores of `generate`."""

import copy
import json

import pytest
import torch
from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.neftune import neftune_post_forward_hook

from owl2.errors import ErrorCode
from owl2.model.configuration import Owl2Config
from owl2.model.loss import shift
from owl2.model.modeling import Owl2ForConditionalGeneration
from tests.errors import raises_input_error
from tests.model.conftest import make_modalities_differ
from tests.tiny import make_config, make_model

IMAGE = [40] * 3
CLOSE = {"rtol": 0, "atol": 1e-5}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def resized(model, size):
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(size, mean_resizing=False)
    return larger


# ------------------------------------------------------------------ configuration


def test_image_token_id_is_written_only_if_it_is_not_the_vocabulary_size(tmp_path):
    for settings, expected, written in (
        ({}, 40, None),
        ({"image_token_id": 40}, 40, None),
        ({"image_token_id": 38}, 38, 38),
        ({"vocab_size": 32003, "image_token_id": 32000}, 32000, 32000),  # also the default's id
    ):
        make_config(**settings).save_pretrained(tmp_path)
        content = json.loads((tmp_path / "config.json").read_text())
        assert content.get("image_token_id") == written
        assert AutoConfig.from_pretrained(tmp_path).image_token_id == expected
    with raises_input_error(ErrorCode.INVALID_CONFIG, "image_token_id", -1):
        make_config(image_token_id=-1)


def test_checkpoint_resized_by_an_earlier_version_keeps_its_id(tmp_path):
    """Its image token is the first id after the resized vocabulary."""
    config = make_config(vocab_size=43).to_diff_dict()
    assert "image_token_id" not in config
    assert Owl2Config(**config).image_token_id == 43


# ------------------------------------------------------------------ added tokens


@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_are_text(image_inputs, tmp_path, tied):
    """41 to 43 are new tokens, 40 is still the image token, and no old logit changes."""
    model = make_model(tie_word_embeddings=tied).eval()
    make_modalities_differ(model)
    larger = resized(model, 44)
    assert larger.config.image_token_id == 40
    expected = logits(model, **image_inputs)
    torch.testing.assert_close(logits(larger, **image_inputs)[..., :40], expected, **CLOSE)
    with torch.no_grad():
        larger.get_input_embeddings().weight[41:44] = model.get_input_embeddings().weight[5:8]
    ids = image_inputs["input_ids"]
    new = torch.where((ids > 4) & (ids < 8), ids + 36, ids)
    got = logits(larger, **image_inputs | {"input_ids": new})[..., :40]
    torch.testing.assert_close(got, expected, **CLOSE)
    larger.save_pretrained(tmp_path)
    again = Owl2ForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.image_token_id == 40
    torch.testing.assert_close(logits(again, **image_inputs)[..., :40], expected, **CLOSE)
    with raises_input_error(ErrorCode.INVALID_VALUE, 44):
        larger(torch.tensor([[1, 44, 5]]))


def test_image_token_with_a_row_is_never_generated(tiny, image_inputs):
    """Neither greedily nor by sampling, beams or assisted decoding."""
    larger = resized(tiny, 44)
    with torch.no_grad():
        larger.lm_head.weight[:] = 0
        larger.lm_head.weight[41] = 1e-3  # a tie with the image token
        larger.lm_head.weight[40] = 1e3
        larger.lm_head.weight[42] = -1e3
    own = image_inputs["input_ids"].shape[1]
    for options in ({}, {"do_sample": True, "top_k": 1}, {"num_beams": 2}):
        answer = larger.generate(**image_inputs, **GREEDY | options)
        assert (answer[:, own:] != 40).all()


# ------------------------------------------------------------------ labels


@pytest.mark.parametrize("return_logits", [True, False])
@pytest.mark.parametrize("size", [40, 44])
def test_image_tokens_are_no_labels(tiny, image_inputs, return_logits, size):
    model = tiny if size == 40 else resized(tiny, size)
    ids = image_inputs["input_ids"]
    explicit = ids.masked_fill(ids == 40, -100)
    losses = [
        model(**image_inputs, **labels, return_logits=return_logits).loss
        for labels in (
            {"labels": explicit},
            {"labels": ids.clone()},
            {"shift_labels": shift(ids)},
        )
    ]
    assert losses[0].isfinite() and losses[0] == losses[1] == losses[2]


# ------------------------------------------------------------------ scores


@pytest.mark.parametrize(
    "options",
    [
        {"bad_words_ids": [[40], [5, 40], [7]]},
        {"sequence_bias": [[[40], 5.0], [[6, 40], 2.0], [[8], 1.0]]},
        {"suppress_tokens": [40, 9]},
        {"guidance_scale": 1.5},
        {"guidance_scale": 1.5, "repetition_penalty": 1.3, "bad_words_ids": [[40]]},
        {"do_sample": True, "top_k": 50, "typical_p": 0.9, "eta_cutoff": 0.1},
        {"renormalize_logits": True, "remove_invalid_values": True, "repetition_penalty": 1.2},
        {"num_beams": 2, "no_repeat_ngram_size": 2},
    ],
)
@pytest.mark.parametrize("size", [40, 44])
def test_processors_accept_prompts_and_options_with_the_image_token(
    tiny, image_inputs, options, size
):
    model = tiny if size == 40 else resized(tiny, size)
    output = model.generate(
        **image_inputs, **GREEDY | options, output_scores=True, return_dict_in_generate=True
    )
    assert output.scores[0].shape[-1] == size
    new = output.sequences[:, image_inputs["input_ids"].shape[1] :]
    assert new.shape[1] == 8 and (new != 40).all()


def test_candidates_do_not_change_answers_about_images(tiny):
    """Prompt lookup, which has no image tokens as candidates; owl2 and LLaMA as assistants."""
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[1, 5, *IMAGE, 6, 7, 5, *IMAGE, 6, 7, 5]])
    llama = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    assistants = [make_model(seed=1).eval(), LlamaForCausalLM(llama).eval()]
    for inputs in (
        {"input_ids": ids, "pixel_values": pixels},
        {"input_ids": ids, "pixel_values": pixels, "mm_token_type_ids": (ids == 40).long()},
        {"input_ids": ids[ids != 40][None]},
    ):
        expected = tiny.generate(**inputs, **GREEDY)
        candidates = [{"assistant_model": assistant} for assistant in assistants]
        for options in ({"prompt_lookup_num_tokens": 3}, *candidates):
            assert torch.equal(tiny.generate(**inputs, **GREEDY, **options), expected)


# ------------------------------------------------------------------ embeddings


@pytest.mark.parametrize("size", [40, 44])
def test_embeddings_of_the_ids_with_pixel_values_equal_ids(tiny, image_inputs, size):
    model = tiny if size == 40 else resized(tiny, size)
    ids, pixels = image_inputs.values()
    embeddings = model.get_input_embeddings()(ids)
    got = logits(model, inputs_embeds=embeddings, pixel_values=pixels)
    torch.testing.assert_close(got, logits(model, **image_inputs), **CLOSE)
    answer = model.generate(**image_inputs, **GREEDY)[:, ids.shape[1] :]
    mask = model.model.get_placeholder_mask(None, embeddings, pixels)
    assert torch.equal(mask[..., 0], ids == 40)
    own = {"inputs_embeds": embeddings, "pixel_values": pixels}
    assert torch.equal(model.generate(**own, **GREEDY), answer)
    with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, "6 image tokens", "1 images"):
        model(inputs_embeds=embeddings, pixel_values=pixels[:1])
    for types in (None, (ids == 40).long()):
        with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, "6 image tokens", "pixel_values"):
            model.generate(inputs_embeds=embeddings, mm_token_type_ids=types, **GREEDY)


@pytest.mark.parametrize("size", [40, 44])
def test_noise_on_embeddings_does_not_hide_images(tiny, image_inputs, size):
    """NEFTune's hook, as TRL's `neftune_noise_alpha` registers it."""
    model = tiny if size == 40 else resized(tiny, size)
    ids, pixels = image_inputs.values()
    expected = logits(model, **image_inputs)
    embed = model.get_input_embeddings()
    embed.register_forward_hook(neftune_post_forward_hook)
    model.train()
    for alpha, low, high in ((1e-6, 0, 1e-4), (5.0, 1e-3, 100)):
        embed.neftune_noise_alpha = alpha
        for inputs in ({"input_ids": ids}, {"inputs_embeds": embed(ids)}):
            difference = (logits(model, **inputs, pixel_values=pixels) - expected).abs().max()
            assert low <= difference < high


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
def test_prompt_tuning_with_images(tiny, image_inputs, kind):
    """Virtual tokens precede the prompt, which is computed from embeddings."""
    ids = image_inputs["input_ids"]
    expected = logits(tiny, **image_inputs)
    peft = get_peft_model(tiny, kind(task_type="CAUSAL_LM", num_virtual_tokens=2))
    inputs = image_inputs | {"attention_mask": torch.ones_like(ids)}
    output = peft(**inputs, labels=ids.clone())
    assert output.logits.shape == (1, ids.shape[1] + 2, 40)
    assert (output.logits[:, 2:] - expected).abs().max() > 1e-3
    output.loss.backward()
    gradients = [own.grad for own in peft.parameters() if own.requires_grad]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    answer = peft.generate(**inputs, **GREEDY)
    steps = answer[:, : ids.shape[1]]
    for _ in range(GREEDY["max_new_tokens"]):
        rows = {"input_ids": steps, "attention_mask": torch.ones_like(steps)}
        own = logits(peft, **image_inputs | rows)
        steps = torch.cat([steps, own[:, -1:].argmax(-1)], 1)
    assert torch.equal(answer, steps)
