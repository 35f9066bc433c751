"""Answers: alone, in batches, sampled; context limits; invalid input."""

import copy
import logging

import pytest
import torch

from owl2.engine.backends.weight_only_quantization import QuantizedLinear
from owl2.engine.engine import MAX_NUM_SEQS, Engine
from owl2.engine.hf_generate import is_on_one_device
from owl2.errors import ErrorCode
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.messages import user_message
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import encode
from owl2.processing.video import load_video
from tests.engine.conftest import ask, model_inputs, random_image
from tests.errors import raises_input_error
from tests.videos import make_gif

TOKENS = 10


def test_batched_answers_equal_those_alone(any_engine, conversations):
    alone = [any_engine.chat(one, max_new_tokens=TOKENS) for one in conversations]
    assert any_engine.batch(conversations, max_new_tokens=TOKENS) == alone
    backwards = any_engine.batch(conversations[::-1], max_new_tokens=TOKENS)
    assert backwards[::-1] == alone
    assert len(set(alone)) > 6, "the answers do not depend on the prompt"


def test_padding_side_does_not_change_answers_of_generate(any_engine, conversations):
    def new_ids(some, **padding):
        inputs = model_inputs(any_engine, some, **padding)
        ids = any_engine.model.generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None
        )
        return ids[:, inputs["input_ids"].shape[1] :].tolist()

    alone = [new_ids([one])[0] for one in conversations]
    for side in ("left", "right"):
        assert new_ids(conversations, padding=True, padding_side=side) == alone
    assert all(len(ids) == TOKENS for ids in alone)


def test_videos_of_all_model_types(any_engine, tmp_path):
    """A video is its frames: in answers alone and in a batch, and in training rows."""
    gif, image = make_gif(tmp_path / "x.gif"), random_image(1)
    cases = [([], 2), ([], 3), ([image], 2)]
    videos = [[user_message("what?", images, [gif], count)] for images, count in cases]
    frames = [[user_message("what?", [*images, *load_video(gif, n)])] for images, n in cases]
    alone = [any_engine.chat(one, max_new_tokens=TOKENS) for one in videos]
    assert alone == [any_engine.chat(one, max_new_tokens=TOKENS) for one in frames]
    assert any_engine.batch(videos, max_new_tokens=TOKENS) == alone
    answer = {"role": "assistant", "content": "yes"}
    row, expected = (
        any_engine.processor.for_training([*one, answer]) for one in (videos[1], frames[1])
    )
    assert row.keys() == expected.keys()
    assert all(torch.equal(row[key], expected[key]) for key in row)
    first, *_, last = row["pixel_values"]
    assert first.mean() < last.mean() - 1  # the frames become lighter
    with torch.no_grad():
        assert any_engine.model(**row).loss.isfinite()


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_quantized_models_of_all_types(any_engine, conversations, quantize):
    folder = any_engine.model.name_or_path
    engine = Engine.from_pretrained(folder, "cpu", "float32", quantize=quantize)
    linears = [one for one in engine.model.modules() if isinstance(one, QuantizedLinear)]
    layer = engine.model.model.layers[0]
    assert len(linears) >= 4 * len(engine.model.model.layers)
    assert not any(type(module) is torch.nn.Linear for module in layer.modules())
    some = conversations[:4]
    alone = [engine.chat(one, max_new_tokens=TOKENS) for one in some]
    assert engine.batch(some, max_new_tokens=TOKENS) == alone
    ids = model_inputs(any_engine, some[1])
    with torch.no_grad():
        expected, logits = (one.model(**ids).logits for one in (any_engine, engine))
    correlation = torch.corrcoef(torch.stack([expected.flatten(), logits.flatten()]))[0, 1]
    assert correlation > (0.99 if quantize == "8bit" else 0.8)


def test_each_answer_ends_at_its_end_token(engine, conversations):
    full = [engine.chat(one, max_new_tokens=TOKENS) for one in conversations]
    tokenizer = engine.processor.tokenizer
    # With frequent tokens as end tokens, the answers have different lengths.
    third = [encode(tokenizer, text)[2] for text in full]
    engine.model.generation_config.eos_token_id = third[:3]
    engine = Engine(engine.model, engine.processor)
    alone = [engine.chat(one, max_new_tokens=TOKENS) for one in conversations]
    assert engine.batch(conversations, max_new_tokens=TOKENS) == alone
    assert len({len(text) for text in alone}) > 3
    # An incomplete character is decoded as U+FFFD.
    cut = [text.rstrip("\ufffd") for text in alone]
    assert all(text.startswith(part) for text, part in zip(full, cut, strict=True))
    assert sum(map(len, alone)) < sum(map(len, full))


def test_attention_implementations_agree(tiny_checkpoint, shared_engine, conversations):
    options = {"device": "cpu", "dtype": "float32", "attn_implementation": "eager"}
    eager = Engine.from_pretrained(tiny_checkpoint, **options)
    assert eager.model.config._attn_implementation == "eager"
    some = conversations[:6]
    assert eager.batch(some, max_new_tokens=5) == shared_engine.batch(some, max_new_tokens=5)


def test_added_tokens_are_text_of_the_prompt(tiny_checkpoint, shared_engine, conversations):
    """Answers are those of `generate`; without an embedding, an added token is an error."""
    processor = Owl2Processor.from_pretrained(tiny_checkpoint)
    image_token_id = processor.image_token_id
    processor.tokenizer.add_tokens(["<|box|>", "<|point|>"])
    engine = Engine(copy.deepcopy(shared_engine.model), processor)
    question = ask("what is <|box|>?", random_image(1))
    with raises_input_error(ErrorCode.INVALID_VALUE, image_token_id + 1, image_token_id - 1):
        engine.chat(question)
    assert engine.chat(conversations[3]) == shared_engine.chat(conversations[3])
    engine.model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    engine.model.lm_head.weight.data[image_token_id] *= 100  # it is never generated
    engine = Engine(engine.model, processor)
    inputs = processor.apply_chat_template(
        question, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert image_token_id + 1 in inputs["input_ids"]
    expected = engine.model.generate(**inputs, max_new_tokens=TOKENS)[0]
    assert image_token_id not in expected[inputs["input_ids"].shape[1] :]
    text = processor.decode(expected[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert engine.chat(question, max_new_tokens=TOKENS) == text.strip()


def test_an_empty_batch(shared_engine):
    assert shared_engine.batch([]) == []


# ------------------------------------------------------------------ sampling


def test_a_seed_makes_sampling_reproducible(shared_engine, conversations):
    question = conversations[1]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    options = {"max_new_tokens": TOKENS, "temperature": 1.5, "seed": 11}
    answer = shared_engine.chat(question, **options)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    assert shared_engine.chat(question, **options) == answer
    assert "".join(shared_engine.stream(question, **options)) == answer
    seeds = {shared_engine.chat(question, **(options | {"seed": seed})) for seed in range(4)}
    assert len(seeds) > 1


def test_sampling_without_a_seed_uses_the_global_generator(shared_engine, conversations):
    def sample():
        torch.manual_seed(3)
        return shared_engine.chat(conversations[0], max_new_tokens=TOKENS, do_sample=True)

    assert sample() == sample()


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_p": 1e-6},
        {"temperature": 1e-4},
        {"temperature": 1e-300},
        {"temperature": 0},
    ],
)
def test_extreme_sampling_options_are_greedy(shared_engine, conversations, options):
    greedy = shared_engine.chat(conversations[2], max_new_tokens=TOKENS)
    assert shared_engine.chat(conversations[2], max_new_tokens=TOKENS, **options) == greedy


def test_generation_config_has_the_defaults(engine, conversations):
    greedy = engine.chat(conversations[0], max_new_tokens=TOKENS)
    settings = engine.model.generation_config
    settings.do_sample, settings.temperature, settings.max_new_tokens = True, 3.0, TOKENS
    sampled = engine.chat(conversations[0], seed=1)
    assert sampled != greedy
    assert engine.chat(conversations[0], seed=1, max_new_tokens=TOKENS, temperature=3.0) == sampled
    assert engine.chat(conversations[0], do_sample=False) == greedy
    settings.top_k = 1
    assert engine.chat(conversations[0], seed=1) == greedy
    assert engine.chat(conversations[0], seed=1, top_k=0) == sampled


def test_a_generation_config_causes_no_warnings(engine, conversations, caplog):
    settings = engine.model.generation_config
    settings.max_length, settings.do_sample, settings.top_p, settings.temperature = 64, True, 0.9, 2
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        engine.chat(conversations[0], max_new_tokens=3, seed=1)
        settings.max_length, settings.max_new_tokens = None, 7
        engine.chat(conversations[0], max_new_tokens=3, do_sample=False)
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-1]),
        ("top_p", [0, 1.5]),
        ("top_k", [-1]),
        ("min_p", [2]),
        ("max_new_tokens", [0]),
        ("seed", [-1, 2**32]),
        ("n", [0, MAX_NUM_SEQS + 1]),
        ("top_logprobs", [-1, 21]),
        ("stop", [[""], ["a", ""], [3]]),
    ],
)
def test_options_out_of_range(shared_engine, conversations, name, values):
    for value in values:
        with raises_input_error(ErrorCode.INVALID_VALUE, f"{name} is"):
            shared_engine.complete(conversations[0], **{name: value})


def test_sampling_options_of_a_greedy_answer(shared_engine, conversations):
    with raises_input_error(ErrorCode.CONFLICT, "do_sample"):
        shared_engine.chat(conversations[0], do_sample=False, top_k=3)


def test_unknown_options(shared_engine, conversations):
    with pytest.raises(TypeError, match="temprature"):
        shared_engine.chat(conversations[0], temprature=1)


# ------------------------------------------------------------------ the context


def test_a_prompt_beyond_the_context(shared_engine):
    question = ask("no " * 200, random_image(1))
    inputs = shared_engine.processor.apply_chat_template(
        question, add_generation_prompt=True, tokenize=True
    )
    length = len(inputs[0])
    excess = length + 1 - shared_engine.context_length
    with raises_input_error(ErrorCode.TOO_LONG, f"{length} tokens", f"{excess} too many"):
        shared_engine.chat(question)
    with raises_input_error(ErrorCode.TOO_LONG, "Conversation 1"):
        shared_engine.batch([ask("no"), question])


def test_the_context_limits_the_answers(engine, conversations, batch_sizes):
    prompts = engine.processor.apply_chat_template(
        conversations[:2], add_generation_prompt=True, tokenize=True
    )
    lengths = [len(ids) for ids in prompts]
    full = [engine.chat(one, max_new_tokens=20) for one in conversations[:2]]
    engine.model.config.max_position_embeddings = max(lengths) + 3
    batch_sizes.clear()
    cut = engine.chat(conversations[1], max_new_tokens=20)
    assert len(batch_sizes) == 2  # the first of three tokens comes with the prompt
    assert full[1].startswith(cut)
    completion = engine.complete(conversations[1], max_new_tokens=20)
    assert completion.num_prompt_tokens == lengths[1]
    [output] = completion.outputs()
    assert (output.text, output.finish_reason, output.num_tokens) == (cut, "length", 3)
    # In a batch, each prompt has its own limit.
    alone = [engine.chat(one, max_new_tokens=20) for one in conversations[:2]]
    assert engine.batch(conversations[:2], max_new_tokens=20) == alone
    assert len(alone[0]) > len(cut)


# ------------------------------------------------------------------ invalid input


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_question(shared_engine, text):
    with raises_input_error(ErrorCode.EMPTY_MESSAGE):
        shared_engine.chat(ask(text))
    with raises_input_error(ErrorCode.EMPTY_MESSAGE, "Conversation 1"):
        shared_engine.batch([ask("what?"), ask(text)])


@pytest.mark.parametrize("text", ["", " ", "<|image|>"])
def test_an_image_alone_is_a_prompt(shared_engine, text):
    images = [random_image(1), random_image(2)]
    question = ask(text, images[0])
    if text == "<|image|>":
        question = [user_message(text, images[:1])]
    answer = shared_engine.chat(question, max_new_tokens=TOKENS)
    inputs = model_inputs(shared_engine, question)
    assert inputs["pixel_values"].shape[0] == 1
    ids = shared_engine.model.generate(**inputs, max_new_tokens=TOKENS)
    new_ids = ids[0, inputs["input_ids"].shape[1] :]
    assert answer == shared_engine.processor.decode(new_ids, skip_special_tokens=True).strip()
    turns = [*question, {"role": "assistant", "content": answer}, *ask("", images[1])]
    assert shared_engine.batch([question, turns], max_new_tokens=TOKENS)[0] == answer
    assert shared_engine.score(question, ["red"])[0] < 0


def test_images_precede_the_text(shared_engine):
    image = random_image(1)
    first, last = ask("what is it?", image), ask("what is it?", image)
    last[0]["content"].sort(key=lambda part: part["type"] == "image")
    assert [part["type"] for part in last[0]["content"]] == ["text", "image"]
    kept = [last[0] | {"interleave_images": True}]
    scores = [shared_engine.score(messages, ["red"]) for messages in (first, last, kept)]
    assert scores[0] == scores[1] != scores[2]
    answers = shared_engine.batch([first, last], max_new_tokens=TOKENS)
    assert answers[0] == answers[1] == shared_engine.chat(last, max_new_tokens=TOKENS)


def test_a_missing_image(shared_engine, tmp_path):
    with raises_input_error(ErrorCode.MISSING_IMAGE, "nowhere.png"):
        shared_engine.chat(ask("what?", str(tmp_path / "nowhere.png")))
    with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH):
        shared_engine.chat(ask("what is <|image|> <|image|>?", random_image(1)))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 1}])
def test_logits_that_are_not_finite(nan_engine, conversations, options):
    with raises_input_error(ErrorCode.NON_FINITE, "token 1 of the answer", "float32"):
        nan_engine.chat(conversations[1], **options)
    with raises_input_error(ErrorCode.NON_FINITE):
        list(nan_engine.stream(conversations[1], **options))
    completion = nan_engine.complete(conversations[1], n=2, top_logprobs=2, **options)
    with raises_input_error(ErrorCode.NON_FINITE):
        next(completion)
    assert list(completion) == []
    with raises_input_error(ErrorCode.NON_FINITE):
        nan_engine.score(conversations[1], ["red"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_become_infinite_later(engine, conversations, value, batch_sizes, step_hooks):
    def spoil(num_running):
        if len(batch_sizes) == 2:
            with torch.no_grad():  # one of the two logits is +infinity
                engine.model.lm_head.weight[7:9, 0] = torch.tensor([value, -value])

    step_hooks.append(spoil)
    with raises_input_error(ErrorCode.NON_FINITE, "token 3 of the answer"):
        engine.chat(conversations[0], max_new_tokens=6, temperature=1.0)


def test_model_and_processor_must_fit(shared_engine):
    tokenizer = shared_engine.processor.tokenizer
    for processor, what in (
        (Owl2Processor(Owl2ImageProcessor(8), tokenizer), "tokens per image"),
        (Owl2Processor(Owl2ImageProcessor(16), tokenizer, num_image_tokens=3), "image size"),
    ):
        with raises_input_error(ErrorCode.CONFLICT, what):
            Engine(shared_engine.model, processor)


def test_models_on_several_devices_use_transformers_generate(
    shared_engine, conversations, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr("owl2.engine.hf_generate.is_on_one_device", lambda model: False)
        engine = Engine(shared_engine.model, shared_engine.processor)
    assert engine.core is None
    assert is_on_one_device(shared_engine.model)
    options = {"max_new_tokens": TOKENS}
    expected = shared_engine.batch(conversations, **options)
    assert engine.batch(conversations, **options) == expected
    assert "".join(engine.stream(conversations[2], **options)) == expected[2]
    question = ask("what?", random_image(1))
    assert engine.score(question, ["red"]) == pytest.approx(
        shared_engine.score(question, ["red"]), rel=1e-6
    )
    for call in (
        lambda: engine.complete(conversations[0], top_logprobs=1),
        lambda: engine.submit(engine.encode(conversations[0]), engine.sampling_params(), print),
        engine.stats,
    ):
        with raises_input_error(ErrorCode.UNSUPPORTED):
            call()
