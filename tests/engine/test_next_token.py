"""Logits of the next token: prompts in a batch, with a shared prefix, from several threads."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from owl2 import Engine
from owl2.engine.backends import cpu_products
from owl2.engine.running_batch import RunningBatch
from owl2.errors import ErrorCode
from owl2.processing.messages import user_message
from tests.engine.conftest import caching_engine, random_image
from tests.errors import raises_input_error

IDS = range(260, 300)


def prompts_of(engine, questions, count):
    """`count` prompts with images at different places and texts of different lengths."""
    anchor = random_image(99)
    return [
        engine.encode(
            [user_message(question, [anchor, random_image(index)][-question.count("<|image|>") :])]
        )
        for index in range(count)
        for question in questions
    ]


QUESTIONS = [
    ["what is this? <|image|> a red"],
    ["<|image|> what", "<|image|> what is this circle?"],
    ["<|image|> a <|image|> what is"],  # all start with the same image
    ["<|image|> a <|image|> what is", "<|image|>blue", "is this what <|image|>"],
]


@pytest.mark.parametrize("questions", QUESTIONS, ids=["text", "image", "two images", "mixed"])
@pytest.mark.parametrize("caches", [False, True])
def test_batched_equals_alone_and_the_model(engine, shared_engine, questions, caches):
    engine = caching_engine(shared_engine) if caches else engine
    prompts = prompts_of(engine, questions, 4)
    batched = engine.next_token_logits(prompts, IDS)
    alone = torch.cat([engine.next_token_logits([prompt], IDS) for prompt in prompts])
    torch.testing.assert_close(batched, alone, rtol=0, atol=1e-4)
    for row, prompt in zip(batched, prompts, strict=True):
        with torch.no_grad():
            logits = engine.model(
                input_ids=torch.tensor([prompt.ids]), pixel_values=prompt.pixel_values
            ).logits[0, -1]
        torch.testing.assert_close(row, logits[list(IDS)], rtol=0, atol=1e-4)
    assert engine.stats().prefix_cache_bytes == 0


def test_prompts_of_several_threads_are_computed_together(engine, monkeypatch):
    prompts = prompts_of(engine, QUESTIONS[0], 6)
    expected = engine.next_token_logits(prompts, IDS)
    sizes, compute = [], RunningBatch.next_token_logits

    def record(self, states):
        sizes.append(len(states))
        return compute(self, states)

    monkeypatch.setattr(RunningBatch, "next_token_logits", record)
    with ThreadPoolExecutor(6) as pool:
        rows = list(pool.map(lambda one: engine.next_token_logits([one], IDS), prompts))
    torch.testing.assert_close(torch.cat(rows), expected, rtol=0, atol=1e-4)
    assert sum(sizes) == 6


def test_images_are_encoded_once(engine):
    before = engine.stats().num_encoded_images
    prompt = prompts_of(engine, QUESTIONS[2], 1)[0]
    engine.next_token_logits([prompt] * 3, IDS)
    assert engine.stats().num_encoded_images - before == 2


def test_logits_while_answers_are_generated(engine):
    prompts = prompts_of(engine, QUESTIONS[0], 2)
    expected = engine.next_token_logits(prompts, IDS)
    options = {"max_new_tokens": 20, "do_sample": False}
    answer = engine.chat(prompts[0], **options)
    with ThreadPoolExecutor(2) as pool:
        chat = pool.submit(engine.chat, prompts[0], **options)
        logits = pool.submit(engine.next_token_logits, prompts, IDS)
        assert chat.result() == answer
        torch.testing.assert_close(logits.result(), expected, rtol=0, atol=1e-4)


def test_errors(engine, nan_engine, monkeypatch):
    [prompt] = prompts_of(engine, QUESTIONS[0], 1)
    with raises_input_error(ErrorCode.NON_FINITE, "float32"):
        nan_engine.next_token_logits([prompt], [5])

    def fail(*_):
        raise MemoryError("not enough")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(RunningBatch, "next_token_logits", fail)
        engine.next_token_logits([prompt] * 2, IDS)
    assert engine.next_token_logits([prompt], IDS).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_without_such_instructions_16_bits_are_multiplied_in_float32(engine, monkeypatch, dtype):
    prompts = prompts_of(engine, QUESTIONS[3], 3)
    exact = engine.next_token_logits(prompts, IDS)
    model = copy.deepcopy(engine.model).to(dtype)
    own = Engine(model, engine.processor)
    errors, products, multiply = {}, [], cpu_products.linear_in_float32

    def record(hidden, weight, *bias):
        products.append(weight)
        return multiply(hidden, weight, *bias)

    monkeypatch.setattr(cpu_products, "linear_in_float32", record)
    for native in (True, False):
        monkeypatch.setattr("owl2.runtime.cpu_supports_bf16", lambda native=native: native)
        monkeypatch.setattr("owl2.runtime.cpu_supports_fp16", lambda native=native: native)
        errors[native] = (own.next_token_logits(prompts, IDS) - exact).abs().max()
        assert bool(products) != native
    used = {id(weight) for weight in products}
    attention = model.model.layers[0].self_attn
    assert {id(attention.q_proj.weight), id(attention.o_proj.weight)} <= used
    assert 0 < errors[False] < 1.5 * errors[True]
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
