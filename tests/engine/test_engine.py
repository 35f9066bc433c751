"""Answers: one by one, in batches, sampled; limits; what is refused (USERS 2, 5, 15)."""

import logging
import re

import pytest
import torch

from owl2.engine.engine import Engine
from owl2.engine.model_runner import FastDecoder
from owl2.errors import InputError
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from tests.engine.conftest import ask, image

TOKENS = 10


def test_batches_answer_as_one_by_one(shared_engine, conversations):
    alone = [shared_engine.chat(one, max_new_tokens=TOKENS) for one in conversations]
    assert shared_engine.batch(conversations, max_new_tokens=TOKENS) == alone
    backwards = shared_engine.batch(conversations[::-1], max_new_tokens=TOKENS)
    assert backwards[::-1] == alone
    assert len(set(alone)) > 6, "answers that do not depend on the prompt show nothing"


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_takes_padding_on_either_side(shared_engine, conversations, side):
    model, processor = shared_engine.model, shared_engine.processor

    def new_ids(some, **padding):
        inputs = processor.apply_chat_template(
            some,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **padding,
        )
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        return ids[:, inputs["input_ids"].shape[1] :].tolist()

    alone = [new_ids([one])[0] for one in conversations]
    assert new_ids(conversations, padding=True, padding_side=side) == alone
    assert all(len(ids) == TOKENS for ids in alone)


def test_answers_end_at_an_end_token_each(engine, conversations):
    whole = [engine.chat(one, max_new_tokens=TOKENS) for one in conversations]
    encode = engine.processor.tokenizer.encode_exact
    # Any frequent token will do; answers then end in different places, some at once.
    third = [encode(text)[2] for text in whole]
    engine.model.generation_config.eos_token_id = third[:3]
    engine = Engine(engine.model, engine.processor)
    alone = [engine.chat(one, max_new_tokens=TOKENS) for one in conversations]
    assert engine.batch(conversations, max_new_tokens=TOKENS) == alone
    assert len({len(text) for text in alone}) > 3
    # A character cut in the middle of its bytes reads as U+FFFD.
    cut = [text.rstrip("\ufffd") for text in alone]
    assert all(full.startswith(part) for full, part in zip(whole, cut, strict=True))
    assert sum(map(len, alone)) < sum(map(len, whole))


def test_a_second_call_gives_the_same(shared_engine, conversations):
    first = [shared_engine.chat(one, max_new_tokens=6) for one in conversations[:4]]
    shared_engine.chat(conversations[5], max_new_tokens=6, seed=1, temperature=2.0)
    assert [shared_engine.chat(one, max_new_tokens=6) for one in conversations[:4]] == first


def test_attention_implementations_agree(tiny_checkpoint, shared_engine, conversations):
    options = {"device": "cpu", "dtype": "float32", "attn_implementation": "eager"}
    eager = Engine.from_pretrained(tiny_checkpoint, **options)
    assert eager.model.config._attn_implementation == "eager"
    some = conversations[:6]
    assert eager.batch(some, max_new_tokens=5) == shared_engine.batch(some, max_new_tokens=5)


def test_no_conversations_no_answers(shared_engine):
    assert shared_engine.batch([]) == []


# ------------------------------------------------------------------ sampling


def test_a_seed_makes_sampling_repeatable(shared_engine, conversations):
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


def test_sampling_without_a_seed_follows_torch(shared_engine, conversations):
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
def test_limits_of_sampling_are_greedy(shared_engine, conversations, options):
    greedy = shared_engine.chat(conversations[2], max_new_tokens=TOKENS)
    assert shared_engine.chat(conversations[2], max_new_tokens=TOKENS, **options) == greedy


def test_the_checkpoints_settings_are_the_defaults(engine, conversations):
    greedy = engine.chat(conversations[0], max_new_tokens=TOKENS)
    settings = engine.model.generation_config
    settings.do_sample, settings.temperature, settings.max_new_tokens = True, 3.0, TOKENS
    wild = engine.chat(conversations[0], seed=1)
    assert wild != greedy
    assert engine.chat(conversations[0], seed=1, max_new_tokens=TOKENS, temperature=3.0) == wild
    assert engine.chat(conversations[0], do_sample=False) == greedy
    settings.top_k = 1
    assert engine.chat(conversations[0], seed=1) == greedy
    assert engine.chat(conversations[0], seed=1, top_k=0) == wild


def test_a_checkpoint_with_settings_draws_no_warnings(engine, conversations, caplog):
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
    ("options", "named"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"do_sample": False, "top_k": 3}, "do_sample"),
    ],
)
def test_options_out_of_range(shared_engine, conversations, options, named):
    with pytest.raises(InputError, match=named):
        shared_engine.chat(conversations[0], **options)


def test_unknown_options(shared_engine, conversations):
    with pytest.raises(TypeError, match="temprature"):
        shared_engine.chat(conversations[0], temprature=1)


# ------------------------------------------------------------------ the context


def test_a_prompt_beyond_the_context_says_by_how_much(shared_engine):
    question = ask("no " * 200, image(1))
    with pytest.raises(InputError) as error:
        shared_engine.chat(question)
    inputs = shared_engine.processor.apply_chat_template(
        question, add_generation_prompt=True, tokenize=True
    )
    length = len(inputs[0])
    assert f"{length} tokens" in str(error.value)
    assert f"{length + 1 - shared_engine.context} too many" in str(error.value)
    with pytest.raises(InputError, match="conversation 1"):
        shared_engine.batch([ask("no"), question])


def test_answers_are_cut_to_what_the_context_holds(engine, conversations, steps):
    prompts = engine.processor.apply_chat_template(
        conversations[:2], add_generation_prompt=True, tokenize=True
    )
    lengths = [len(ids) for ids in prompts]
    whole = [engine.chat(one, max_new_tokens=20) for one in conversations[:2]]
    engine.model.config.max_position_embeddings = max(lengths) + 3
    del steps[:]
    cut = engine.chat(conversations[1], max_new_tokens=20)
    assert len(steps) == 2  # the first of three tokens comes with the prompt
    assert whole[1].startswith(cut)
    # In a batch, the shorter prompt has its own, larger, room.
    alone = [engine.chat(one, max_new_tokens=20) for one in conversations[:2]]
    assert engine.batch(conversations[:2], max_new_tokens=20) == alone
    assert len(alone[0]) > len(cut)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("text", ["", "  \n", "<|image|>"])
def test_an_empty_question(shared_engine, text):
    with pytest.raises(InputError, match="empty"):
        shared_engine.chat(ask(text, *[image(1)] * text.count("<|image|>")))
    with pytest.raises(InputError, match=r"Conversation 1: .*empty"):
        shared_engine.batch([ask("what?"), ask(" ", image(1))])


def test_a_missing_image(shared_engine, tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.png"):
        shared_engine.chat(ask("what?", str(tmp_path / "nowhere.png")))
    with pytest.raises(InputError, match=re.escape("2 <|image|> placeholders, but 1 image")):
        shared_engine.chat(ask("what is <|image|>?", image(1)))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 1}])
def test_logits_that_are_not_finite(broken, conversations, options):
    with pytest.raises(InputError, match=r"not finite .* token 1 of the answer.*float32"):
        broken.chat(conversations[1], **options)
    with pytest.raises(InputError, match="not finite"):
        list(broken.stream(conversations[1], **options))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_become_infinite_later(engine, conversations, value, monkeypatch, steps):
    step = FastDecoder.step

    def spoilt(self, tokens, positions):
        logits = step(self, tokens, positions)
        return logits.index_fill(-1, torch.tensor(7), value) if len(steps) == 2 else logits

    monkeypatch.setattr(FastDecoder, "step", spoilt)
    with pytest.raises(InputError, match="token 3 of the answer"):
        engine.chat(conversations[0], max_new_tokens=6, temperature=1.0)


def test_model_and_processor_must_fit(shared_engine):
    tokenizer = shared_engine.processor.tokenizer
    for processor, what in (
        (Owl2Processor(Owl2ImageProcessor(8), tokenizer), "tokens an image"),
        (Owl2Processor(Owl2ImageProcessor(16), tokenizer, num_image_tokens=3), "image size"),
    ):
        with pytest.raises(InputError, match=what):
            Engine(shared_engine.model, processor)
