"""The collected weights equal those of an eager forward and need less memory."""

import copy
import threading
import weakref

import numpy as np
import pytest
import torch

from owl2 import Engine, Owl2ForConditionalGeneration
from owl2.attention import capture, collect_attention
from owl2.attention.attention_maps import resolve_layers
from owl2.attention.capture import abstractor_attention, decoder_attention
from owl2.checkpoints.hf_quantizer import quantize_model
from owl2.engine.scoring import encode_answer
from owl2.errors import ErrorCode
from owl2.model import vision
from owl2.model.variants import as_no_mam
from tests.engine.conftest import ask, random_image
from tests.errors import raises_input_error
from tests.family import FOLDER, SIBLINGS, load_model, load_processor
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
    sample, begin, end = encode_answer(processor, messages, answer)
    prompt, reply = sample.ids[:begin], sample.ids[begin : end - 1]  # without the end token
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    pixels = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}
    ids = torch.tensor([prompt + reply[:-1]])
    with torch.no_grad():
        weights = model(input_ids=ids, output_attentions=True, **pixels).attentions
    return torch.stack(weights)[:, 0, :, len(prompt) - 1 :].numpy()


@pytest.mark.parametrize("sibling", ["docowl1_5", "docowl2"])
def test_other_connectors_are_refused(sibling):
    with raises_input_error(ErrorCode.UNSUPPORTED, SIBLINGS[sibling]):
        collect_attention(load_model(sibling), load_processor(sibling), ask("what?"), answer=ANSWER)


@pytest.mark.parametrize("number", [0, 1, 2, 6])
def test_weights_equal_an_eager_forward(engine, eager, conversations, number):
    messages = conversations[number]
    maps = collect_attention(engine, engine.processor, messages, answer=ANSWER, layers=[0, -1])
    expected = by_transformers(eager, engine.processor, messages, ANSWER)
    assert maps.attention.shape == expected.shape == (2, 4, len(maps.tokens), expected.shape[-1])
    np.testing.assert_allclose(maps.attention, expected, atol=1e-5)
    np.testing.assert_allclose(maps.mean, expected.mean(0), atol=1e-5)
    assert maps.answer == ANSWER


@pytest.mark.parametrize(("images", "repeats"), [(0, 4), (2, 8)])
def test_weights_of_mplug_owl2_1_equal_an_eager_forward(images, repeats):
    """Its prompts are longer than those of training: scaled rotary embeddings, scaled queries."""
    model, processor = load_model("mplug_owl2_1"), load_processor("mplug_owl2_1")
    folder = FOLDER / "mplug_owl2_1" / "model"
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    eager = Owl2ForConditionalGeneration.from_pretrained(folder, **options).eval()
    messages = ask("Describe the image. " * repeats, *map(random_image, range(images)))
    maps = collect_attention(model, processor, messages, answer=ANSWER, layers=[0, -1])
    prompt = len(maps.prompt_tokens)
    assert model.config.ntk_alpha(prompt) == model.config.ntk_alpha(prompt + len(maps.tokens)) > 1
    assert maps.answer == ANSWER
    expected = by_transformers(eager, processor, messages, ANSWER)
    np.testing.assert_allclose(maps.attention, expected[[0, -1]], atol=1e-5)
    np.testing.assert_allclose(maps.mean, expected.mean(0), atol=1e-5)
    queries = model.config.visual_config.visual_abstractor.num_learnable_queries
    patches = model.config.visual_config.visual_abstractor.grid_size**2
    assert maps.patches.shape == (images, queries, 1 + patches)
    assert not maps.patches[..., 0].any()  # no class token
    assert (maps.patches[..., 1:] > 0).all() and (maps.patches.sum(-1) < 1).all()


def test_weights_without_mam_equal_a_model_without_mam(engine, eager, conversations):
    messages = conversations[2]
    with_mam = collect_attention(engine, engine.processor, messages, answer=ANSWER)
    maps = collect_attention(engine, engine.processor, messages, answer=ANSWER, use_mam=False)
    expected = by_transformers(as_no_mam(eager), engine.processor, messages, ANSWER)
    np.testing.assert_allclose(maps.attention, expected, atol=1e-5)
    assert (with_mam.use_mam, maps.use_mam) == (True, False)
    assert np.abs(maps.attention - with_mam.attention).max() < 1e-6, (
        "untrained MAM weights are copies"
    )


def test_trained_mam_changes_the_weights(engine, conversations):
    model = copy.deepcopy(engine.model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.multiway[1].k_proj.weight.neg_()
    messages = conversations[2]
    changed, plain = (
        collect_attention(model, engine.processor, messages, answer=ANSWER, use_mam=use)
        for use in (True, False)
    )
    expected = collect_attention(engine, engine.processor, messages, answer=ANSWER)
    np.testing.assert_allclose(plain.mean, expected.mean, atol=1e-5)
    assert np.abs(changed.mean - plain.mean).max() > 0.01


def test_rows_and_shares_sum_to_one(engine, conversations):
    maps = collect_attention(engine, engine.processor, conversations[2], answer=ANSWER)
    for weights in (maps.attention, maps.mean):
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert maps.shares.shape == (2, len(maps.tokens), len(maps.spans))
    np.testing.assert_allclose(maps.shares.sum(-1), 1, atol=1e-5)
    first = maps.attention[0].mean(0)
    for number, span in enumerate(maps.spans):
        own = first[:, span.start : span.end].sum(1)
        np.testing.assert_allclose(maps.shares[0, :, number], own, atol=1e-5)


def test_attention_is_causal(engine, conversations):
    maps = collect_attention(engine, engine.processor, conversations[2], answer=ANSWER)
    prompt, count = len(maps.prompt_tokens), len(maps.tokens)
    for token in range(count):
        assert not maps.mean[:, token, prompt + token :].any()
        assert maps.mean[:, token, prompt + token - 1].min() > 0


def test_spans_and_token_texts(engine):
    messages = ask("what is this?", random_image(1), random_image(2, size=(20, 8)))
    maps = collect_attention(engine, engine.processor, messages, answer=ANSWER)
    assert [(span.kind, span.image) for span in maps.spans] == [
        ("text", None),
        ("image", 0),
        ("image", 1),
        ("text", None),
        ("answer", None),
    ]
    assert [span.end - span.start for span in maps.spans[1:3]] == [3, 3]
    edges = [span.start for span in maps.spans] + [maps.spans[-1].end]
    assert edges == sorted(edges) and edges[0] == 0 and edges[-1] == maps.mean.shape[-1]
    assert edges[-1] == len(maps.prompt_tokens) + len(maps.tokens) - 1
    assert "".join(maps.prompt_tokens) == "<s>USER: what is this? ASSISTANT:"
    assert "".join(maps.tokens) == " " + ANSWER
    assert maps.sizes == ((10, 12), (20, 8))


def test_default_answer_is_the_greedy_answer(engine, conversations):
    messages = conversations[1]
    expected = engine.chat(messages, max_new_tokens=7, do_sample=False)
    maps = collect_attention(engine, engine.processor, messages, max_new_tokens=7)
    assert maps.answer == expected
    again = collect_attention(engine, engine.processor, messages, use_mam=False, max_new_tokens=7)
    assert again.answer == expected, "both compare the same tokens"


def test_concurrent_requests_with_an_engine_or_a_model(engine, conversations):
    expected = collect_attention(engine, engine.processor, conversations[1], answer=ANSWER)
    results = []

    def run():
        results.append(collect_attention(engine, engine.processor, conversations[1], answer=ANSWER))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    answer = engine.chat(conversations[2], max_new_tokens=5)
    for thread in threads:
        thread.join()
    results.append(
        collect_attention(engine.model, engine.processor, conversations[1], answer=ANSWER)
    )
    assert len(results) == 4
    for maps in results:
        np.testing.assert_allclose(maps.mean, expected.mean, atol=1e-5)
    assert answer == engine.chat(conversations[2], max_new_tokens=5)


def test_memory_contains_at_most_two_layers(engine, conversations, monkeypatch):
    """One layer of a 7B model and a long answer takes 100 MB; there are 32 layers."""
    alive, most = [], []
    compute = capture.attention_weights

    def record(*args, **options):
        weights = compute(*args, **options)
        alive.append(weakref.ref(weights))
        most.append(sum(reference() is not None for reference in alive))
        return weights

    monkeypatch.setattr(capture, "attention_weights", record)
    vocab_size = engine.model.config.vocab_size
    model = make_model(vocab_size=vocab_size, num_hidden_layers=6, max_position_embeddings=128)
    collect_attention(model, engine.processor, ask("what is this?"), answer=ANSWER, layers=[])
    assert len(most) == 6 and max(most) <= 2


def test_empty_layer_selection_returns_the_mean(engine, conversations):
    maps = collect_attention(engine, engine.processor, conversations[1], answer=ANSWER, layers=[])
    assert maps.attention.shape == (0, *maps.mean.shape)
    assert maps.for_layer(None) is maps.mean
    with raises_input_error(ErrorCode.INVALID_VALUE, 1, []):
        maps.for_layer(1)


def test_patches_are_the_rollout_of_the_abstractor(engine, monkeypatch):
    """One layer: half of each query comes from the patches that it attends to."""
    model = copy.deepcopy(engine.model)
    del model.model.visual_abstractor.encoder.layers[1:]
    messages = ask("what is this?", random_image(1))
    maps = collect_attention(model, engine.processor, messages, answer=ANSWER)
    pixels = engine.processor.image_processor([random_image(1)])["pixel_values"]
    attention = model.model.visual_abstractor.encoder.layers[0].crossattention.attention
    attention.config._attn_implementation = "eager"
    recorded = []
    eager_attention_forward = vision.eager_attention_forward

    def record(*args, **options):
        output, weights = eager_attention_forward(*args, **options)
        recorded.append(weights)
        return output, weights

    monkeypatch.setattr(vision, "eager_attention_forward", record)
    with torch.no_grad():
        model.get_image_features(pixels)
    expected = recorded[-1].mean(1)[..., 2:].numpy() / 2  # two learnable queries
    np.testing.assert_allclose(maps.patches, expected, atol=1e-6)


def test_rollout_rows_sum_to_less_than_one(engine):
    maps = collect_attention(
        engine, engine.processor, ask("what?", random_image(1), random_image(2)), answer=ANSWER
    )
    assert maps.patches.shape == (2, 2, 5)
    assert (maps.patches > 0).all() and (maps.patches.sum(-1) < 1).all()
    assert np.abs(maps.patches[0] - maps.patches[1]).max() > 1e-4


def test_abstractor_weights_sum_to_one(engine):
    captured = []
    pixels = engine.processor.image_processor([random_image(1), random_image(2)])["pixel_values"]
    with torch.no_grad(), abstractor_attention(engine.model, captured.append):
        engine.model.get_image_features(pixels)
    assert [tuple(weights.shape) for weights in captured] == [(2, 2, 2, 7)] * 2
    assert all(torch.allclose(weights.sum(-1), torch.ones(())) for weights in captured)


@pytest.mark.parametrize(
    ("options", "code", "needle"),
    [
        ({"layers": [2]}, ErrorCode.INVALID_VALUE, "2"),
        ({"answer": " "}, ErrorCode.EMPTY_MESSAGE, ""),
        ({"answer": "red " * 100}, ErrorCode.TOO_LONG, "128"),
    ],
)
def test_user_errors(engine, conversations, options, code, needle):
    with raises_input_error(code, needle):
        collect_attention(engine, engine.processor, conversations[1], **options)


def test_use_mam_false_needs_a_model_with_mam(engine, conversations):
    model = as_no_mam(engine.model)
    assert not collect_attention(model, engine.processor, conversations[1], answer=ANSWER).use_mam
    with raises_input_error(ErrorCode.UNSUPPORTED):
        collect_attention(model, engine.processor, conversations[1], answer=ANSWER, use_mam=False)


def to_8bit(model):
    quantize_model(model, "8bit")


@pytest.mark.parametrize("convert", [to_8bit, torch.nn.Module.bfloat16])
def test_rows_of_a_converted_model_sum_to_one(engine, conversations, convert):
    model = copy.deepcopy(engine.model)
    convert(model)
    for use_mam in (True, False):
        maps = collect_attention(
            model, engine.processor, conversations[2], answer=ANSWER, use_mam=use_mam
        )
        assert maps.mean.dtype == np.float32
        np.testing.assert_allclose(maps.mean.sum(-1), 1, atol=1e-5)


def test_other_threads_are_not_captured(engine):
    captured = []
    ids = torch.tensor([[1, 5, 6]])
    pixels = engine.processor.image_processor([random_image(1)])["pixel_values"]

    def compute():
        with torch.no_grad():
            engine.model(input_ids=ids, use_cache=True)
            engine.model.get_image_features(pixels)

    with (
        decoder_attention(engine.model, lambda *args: captured.append(args)),
        abstractor_attention(engine.model, captured.append),
    ):
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
        assert not captured
        compute()
    assert len(captured) == 4
    compute()
    assert len(captured) == 4, "nothing is captured after the block"


def test_default_layers_are_those_of_the_paper():
    assert resolve_layers(None, 32) == (0, 15, 31)
    assert resolve_layers(None, 1) == (0,)
    assert resolve_layers([-1, 0], 3) == (2, 0)


def test_each_image_is_read_once(engine, tmp_path):
    class CountingPath:
        num_reads = 0

        def __fspath__(self):
            self.num_reads += 1
            return str(tmp_path / "image.png")

    random_image(1).save(tmp_path / "image.png")
    path = CountingPath()
    maps = collect_attention(engine, engine.processor, ask("what?", path), answer=ANSWER)
    assert (maps.sizes, path.num_reads) == ((random_image(1).size,), 1)
