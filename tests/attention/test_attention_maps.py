"""Where the decoder looks: the same weights that an eager forward gives, at less memory."""

import copy
import threading
import weakref

import numpy as np
import pytest
import torch

from owl2 import Engine, Owl2ForConditionalGeneration
from owl2.attention import capture, look
from owl2.attention.capture import abstractor_attention, decoder_attention
from owl2.engine.backends.weight_only_quantization import quantize
from owl2.engine.scoring import prompt_and_answer
from owl2.errors import InputError
from owl2.model import vision
from owl2.model.variants import as_no_mam
from tests.engine.conftest import ask, image
from tests.tiny import make_model

ANSWER = "a red circle, 你好"


@pytest.fixture(scope="module")
def engine(tiny_checkpoint):
    return Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def eager(tiny_checkpoint):
    return Owl2ForConditionalGeneration.from_pretrained(
        tiny_checkpoint, attn_implementation="eager", dtype=torch.float32
    ).eval()


def by_transformers(model, processor, messages, answer):
    """(L, h, T, S) by `output_attentions` of one forward over prompt and answer."""
    prompt, reply = prompt_and_answer(processor, messages, answer)
    reply = reply[:-1]  # less the end token
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    pixels = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}
    ids = torch.tensor([prompt + reply[:-1]])
    with torch.no_grad():
        weights = model(input_ids=ids, output_attentions=True, **pixels).attentions
    return torch.stack(weights)[:, 0, :, len(prompt) - 1 :].numpy()


@pytest.mark.parametrize("number", [0, 1, 2, 6])
def test_weights_are_those_of_an_eager_forward(engine, eager, conversations, number):
    messages = conversations[number]
    looks = look(engine, engine.processor, messages, answer=ANSWER, layers=[0, -1])
    expected = by_transformers(eager, engine.processor, messages, ANSWER)
    assert looks.attention.shape == expected.shape == (2, 4, len(looks.tokens), expected.shape[-1])
    np.testing.assert_allclose(looks.attention, expected, atol=1e-5)
    np.testing.assert_allclose(looks.mean, expected.mean(0), atol=1e-5)
    assert looks.answer == ANSWER


def test_without_mam_weights_are_those_of_a_model_that_has_none(engine, eager, conversations):
    messages = conversations[2]
    with_mam = look(engine, engine.processor, messages, answer=ANSWER)
    looks = look(engine, engine.processor, messages, answer=ANSWER, use_mam=False)
    expected = by_transformers(as_no_mam(eager), engine.processor, messages, ANSWER)
    np.testing.assert_allclose(looks.attention, expected, atol=1e-5)
    assert (with_mam.use_mam, looks.use_mam) == (True, False)
    assert np.abs(looks.attention - with_mam.attention).max() < 1e-6, "untrained MAM is a copy"


def test_what_mam_learned_makes_a_difference(engine, conversations):
    model = copy.deepcopy(engine.model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.multiway[1].weight.neg_()
    messages = conversations[2]
    changed, plain = (
        look(model, engine.processor, messages, answer=ANSWER, use_mam=use) for use in (True, False)
    )
    expected = look(engine, engine.processor, messages, answer=ANSWER)
    np.testing.assert_allclose(plain.mean, expected.mean, atol=1e-5)
    assert np.abs(changed.mean - plain.mean).max() > 0.01


def test_rows_and_shares_sum_to_one(engine, conversations):
    looks = look(engine, engine.processor, conversations[2], answer=ANSWER)
    for weights in (looks.attention, looks.mean):
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert looks.shares.shape == (2, len(looks.tokens), len(looks.spans))
    np.testing.assert_allclose(looks.shares.sum(-1), 1, atol=1e-5)
    first = looks.attention[0].mean(0)
    for number, span in enumerate(looks.spans):
        own = first[:, span.start : span.end].sum(1)
        np.testing.assert_allclose(looks.shares[0, :, number], own, atol=1e-5)


def test_nothing_looks_ahead(engine, conversations):
    looks = look(engine, engine.processor, conversations[2], answer=ANSWER)
    prompt, count = len(looks.prompt_tokens), len(looks.tokens)
    for token in range(count):
        assert not looks.mean[:, token, prompt + token :].any()
        assert looks.mean[:, token, prompt + token - 1].min() > 0


def test_spans_and_texts(engine):
    messages = ask("what is this?", image(1), image(2, size=(20, 8)))
    looks = look(engine, engine.processor, messages, answer=ANSWER)
    assert [(span.kind, span.image) for span in looks.spans] == [
        ("text", None),
        ("image", 0),
        ("image", 1),
        ("text", None),
        ("answer", None),
    ]
    assert [span.end - span.start for span in looks.spans[1:3]] == [3, 3]
    edges = [span.start for span in looks.spans] + [looks.spans[-1].end]
    assert edges == sorted(edges) and edges[0] == 0 and edges[-1] == looks.mean.shape[-1]
    assert edges[-1] == len(looks.prompt_tokens) + len(looks.tokens) - 1
    assert "".join(looks.prompt_tokens) == "<s>USER: what is this? ASSISTANT:"
    assert "".join(looks.tokens) == " " + ANSWER
    assert looks.sizes == ((10, 12), (20, 8))


def test_the_models_own_answer(engine, conversations):
    messages = conversations[1]
    expected = engine.chat(messages, max_new_tokens=7, do_sample=False)
    looks = look(engine, engine.processor, messages, max_new_tokens=7)
    assert looks.answer == expected
    again = look(engine, engine.processor, messages, use_mam=False, max_new_tokens=7)
    assert again.answer == expected, "the same words are compared"


def test_a_model_or_an_engine_from_any_thread(engine, conversations):
    expected = look(engine, engine.processor, conversations[1], answer=ANSWER)
    found = []

    def run():
        found.append(look(engine, engine.processor, conversations[1], answer=ANSWER))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    answer = engine.chat(conversations[2], max_new_tokens=5)
    for thread in threads:
        thread.join()
    found.append(look(engine.model, engine.processor, conversations[1], answer=ANSWER))
    assert len(found) == 4
    for looks in found:
        np.testing.assert_allclose(looks.mean, expected.mean, atol=1e-5)
    assert answer == engine.chat(conversations[2], max_new_tokens=5)


def test_nothing_is_left_on_the_model(engine, conversations):
    look(engine, engine.processor, conversations[2], answer=ANSWER)
    assert not any(module._forward_hooks for module in engine.model.modules())
    assert engine.model.config._attn_implementation == "sdpa"


def test_layers_maps_are_never_there_at_once(engine, conversations, monkeypatch):
    """At 8 B and long answers a map is a hundred MB, and there are 32."""
    alive, most = [], []
    compute = capture._weights

    def watched(*given, **options):
        weights = compute(*given, **options)
        alive.append(weakref.ref(weights))
        most.append(sum(reference() is not None for reference in alive))
        return weights

    monkeypatch.setattr(capture, "_weights", watched)
    vocabulary = engine.model.config.vocab_size
    model = make_model(vocab_size=vocabulary, num_hidden_layers=6, max_position_embeddings=128)
    look(model, engine.processor, ask("what is this?"), answer=ANSWER, layers=[])
    assert len(most) == 6 and max(most) <= 2


def test_no_layers_chosen_leaves_the_mean(engine, conversations):
    looks = look(engine, engine.processor, conversations[1], answer=ANSWER, layers=[])
    assert looks.attention.shape == (0, *looks.mean.shape)
    assert looks.of_layer(None) is looks.mean
    with pytest.raises(InputError, match=r"Layer 1 was not kept; there are none"):
        looks.of_layer(1)


def test_patches_are_the_abstractors_weights_rolled_out(engine, monkeypatch):
    """One layer by hand: half of each query is what it attends to in the image."""
    model = copy.deepcopy(engine.model)
    del model.model.visual_abstractor.encoder.layers[1:]
    messages = ask("what is this?", image(1))
    looks = look(model, engine.processor, messages, answer=ANSWER)
    pixels = engine.processor.image_processor([image(1)])["pixel_values"]
    attention = model.model.visual_abstractor.encoder.layers[0].crossattention.attention
    attention.config._attn_implementation = "eager"
    seen = []
    plain = vision.eager_attention_forward

    def watch(*given, **options):
        output, weights = plain(*given, **options)
        seen.append(weights)
        return output, weights

    monkeypatch.setattr(vision, "eager_attention_forward", watch)
    with torch.no_grad():
        model.get_image_features(pixels)
    expected = seen[-1].mean(1)[..., 2:].numpy() / 2  # two learnable queries
    np.testing.assert_allclose(looks.patches, expected, atol=1e-6)


def test_rolled_out_rows_sum_to_less_than_one(engine):
    looks = look(engine, engine.processor, ask("what?", image(1), image(2)), answer=ANSWER)
    assert looks.patches.shape == (2, 2, 5)
    assert (looks.patches > 0).all() and (looks.patches.sum(-1) < 1).all()
    assert np.abs(looks.patches[0] - looks.patches[1]).max() > 1e-4


def test_abstractor_weights_sum_to_one(engine):
    taken = []
    pixels = engine.processor.image_processor([image(1), image(2)])["pixel_values"]
    with torch.no_grad(), abstractor_attention(engine.model, taken.append):
        engine.model.get_image_features(pixels)
    assert [tuple(weights.shape) for weights in taken] == [(2, 2, 2, 7)] * 2
    assert all(torch.allclose(weights.sum(-1), torch.ones(())) for weights in taken)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": [2]}, "There is no layer 2: this model's go from 0 to 1"),
        ({"answer": " "}, "is empty"),
        ({"answer": "red " * 100}, "the model's context is 128"),
    ],
)
def test_what_a_user_got_wrong(engine, conversations, options, said):
    with pytest.raises(InputError, match=said):
        look(engine, engine.processor, conversations[1], **options)


def test_a_model_without_mam_has_none_to_leave_out(engine, conversations):
    model = as_no_mam(engine.model)
    assert not look(model, engine.processor, conversations[1], answer=ANSWER).use_mam
    with pytest.raises(InputError, match="no MAM"):
        look(model, engine.processor, conversations[1], answer=ANSWER, use_mam=False)


def test_quantized_models_too(engine, conversations):
    model = copy.deepcopy(engine.model)
    quantize(model, "8bit")
    looks = look(model, engine.processor, conversations[2], answer=ANSWER, use_mam=False)
    np.testing.assert_allclose(looks.mean.sum(-1), 1, atol=1e-5)


def test_bfloat16(engine, conversations):
    model = copy.deepcopy(engine.model).to(torch.bfloat16)
    looks = look(model, engine.processor, conversations[2], answer=ANSWER)
    assert looks.mean.dtype == np.float32
    np.testing.assert_allclose(looks.mean.sum(-1), 1, atol=1e-5)


def test_what_other_threads_compute_is_not_recorded(engine):
    taken = []
    ids = torch.tensor([[1, 5, 6]])
    pixels = engine.processor.image_processor([image(1)])["pixel_values"]

    def compute():
        with torch.no_grad():
            engine.model(input_ids=ids, use_cache=True)
            engine.model.get_image_features(pixels)

    with (
        decoder_attention(engine.model, lambda *given: taken.append(given)),
        abstractor_attention(engine.model, taken.append),
    ):
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
        assert not taken
        compute()
    assert len(taken) == 4
