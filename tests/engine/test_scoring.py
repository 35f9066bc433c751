"""Scores of given answers equal teacher-forced log-probabilities, in any batch."""

import pytest
import torch

from owl2.engine.scoring import encode_answer
from owl2.errors import ErrorCode
from tests.engine.conftest import ask, random_image
from tests.errors import raises_input_error

CHOICES = ["red", "a blue circle", "你好", "no", "green and green and green", "yes, red"]


def by_forward(engine, messages, choice):
    """Log-probabilities of the labels of the last turn, by one plain forward."""
    conversation = [*messages, {"role": "assistant", "content": choice}]
    batch = engine.processor.for_training(conversation)
    labels = batch.pop("labels")[0]
    with torch.no_grad():
        logits = engine.model(**batch).logits[0, :-1].float()
    labeled = (labels[1:] != -100).nonzero()[:, 0].tolist()
    last = [n for n in labeled if all(m in labeled for m in range(n, labeled[-1] + 1))]
    rows = logits.log_softmax(-1)
    return torch.tensor([rows[n, labels[n + 1]] for n in last])


@pytest.mark.parametrize("number", [0, 1, 2, 5, 6])
def test_scores_are_those_of_the_training_labels(shared_engine, conversations, number):
    messages = conversations[number]
    expected = [by_forward(shared_engine, messages, choice) for choice in CHOICES]
    scores = shared_engine.score(messages, CHOICES)
    assert scores == pytest.approx([float(row.sum()) for row in expected], abs=1e-5, rel=1e-6)
    means = shared_engine.score(messages, CHOICES, normalize=True)
    assert means == pytest.approx([float(row.mean()) for row in expected], abs=1e-5, rel=1e-6)
    open_ended = shared_engine.score(messages, CHOICES, include_end=False)
    assert open_ended == pytest.approx(
        [float(row[:-1].sum()) for row in expected], abs=1e-5, rel=1e-6
    )


def test_scores_do_not_depend_on_the_batch(shared_engine, conversations):
    messages = conversations[2]
    scores = shared_engine.score(messages, CHOICES)
    alone = [shared_engine.score(messages, [choice])[0] for choice in CHOICES]
    assert scores == pytest.approx(alone, abs=1e-5, rel=1e-6)
    for size in (1, 2, 4):
        assert shared_engine.score(messages, CHOICES, batch_size=size) == pytest.approx(
            alone, abs=1e-5
        )
    assert shared_engine.score(messages, CHOICES[::-1])[::-1] == pytest.approx(
        alone, abs=1e-5, rel=1e-6
    )


def test_the_prompt_is_computed_once(engine, conversations):
    engine.score(conversations[1], CHOICES, batch_size=2)
    stats = engine.stats()
    assert (stats.num_prefills, stats.num_encoded_images) == (1, 2)


def test_the_answer_is_that_of_for_training(shared_engine, conversations):
    for messages in conversations:
        sample, begin, end = encode_answer(shared_engine.processor, messages, "a red circle")
        answer = sample.ids[begin:end]
        turn = {"role": "assistant", "content": "a red circle"}
        batch = shared_engine.processor.for_training([*messages, turn])
        assert sample.ids[:end] == batch["input_ids"][0].tolist()
        labels = batch["labels"][0].tolist()
        assert labels[-len(answer) :] == answer
        assert labels[-len(answer) - 1] == -100


def test_scores_depend_on_the_image(shared_engine):
    first, second = (shared_engine.score(ask("what?", random_image(n)), ["red"]) for n in (1, 2))
    assert first != pytest.approx(second, abs=1e-3)


@pytest.mark.parametrize(
    ("choices", "code", "needle"),
    [
        ([], ErrorCode.INVALID_VALUE, "choices"),
        ("red", ErrorCode.INVALID_VALUE, "choices"),
        (["red", " "], ErrorCode.EMPTY_MESSAGE, ""),
        (["red", "no " * 120], ErrorCode.TOO_LONG, "choice 2"),
    ],
)
def test_invalid_choices(shared_engine, conversations, choices, code, needle):
    with raises_input_error(code, needle):
        shared_engine.score(conversations[0], choices)
