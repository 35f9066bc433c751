"""Batches of conversations, of which some are invalid."""

import threading

import pytest

from owl2.engine.offline import output_all
from owl2.engine.output import CompletionChunk
from owl2.errors import ErrorCode, InputError
from owl2.processing.messages import user_message
from tests.engine.conftest import random_image

OPTIONS = {"do_sample": False, "max_new_tokens": 4}


@pytest.fixture
def conversations():
    return [[user_message("what?", [random_image(number)])] for number in range(7)]


def test_invalid_conversations_do_not_affect_the_others(shared_engine, conversations):
    expected = [shared_engine.chat(messages, **OPTIONS) for messages in conversations]
    conversations[2] = [user_message("what?", ["missing.png"])]
    conversations[6] = [user_message("")]
    answers = list(output_all(shared_engine, conversations, 3, **OPTIONS))
    assert [answers[index].text for index in (0, 1, 3, 4, 5)] == [*expected[:2], *expected[3:6]]
    assert [answers[index].code for index in (2, 6)] == [
        ErrorCode.MISSING_IMAGE,
        ErrorCode.EMPTY_MESSAGE,
    ]


def test_error_in_a_batch_is_that_of_one_conversation(shared_engine, conversations, monkeypatch):
    batch, broken = shared_engine.batch_outputs, shared_engine.encode(conversations[4])

    def fail(prompts, **options):
        if any(prompt.image_digests == broken.image_digests for prompt in prompts):
            raise InputError("The logits are not finite.", ErrorCode.NON_FINITE)
        return batch(prompts, **options)

    monkeypatch.setattr(shared_engine, "batch_outputs", fail)
    answers = list(output_all(shared_engine, conversations, 4, **OPTIONS))
    assert [index for index, one in enumerate(answers) if isinstance(one, InputError)] == [4]


def test_next_batch_is_encoded_while_the_model_computes(shared_engine, conversations, monkeypatch):
    encode, encoded = shared_engine.encode, threading.Semaphore(0)
    counts, new = [], iter((4, 2, 0))  # prompts that are encoded until the end of each batch

    def count(messages):
        prompt = encode(messages)
        encoded.release()
        return prompt

    def batch(prompts, **options):
        counts.append(len(prompts))
        assert all(encoded.acquire(timeout=30) for _ in range(next(new)))
        return [CompletionChunk(0, "", (), 1, "stop") for _ in prompts]

    monkeypatch.setattr(shared_engine, "encode", count)
    monkeypatch.setattr(shared_engine, "batch_outputs", batch)
    assert len(list(output_all(shared_engine, conversations[:6], 2))) == 6
    assert counts == [2, 2, 2]
