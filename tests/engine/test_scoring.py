"""Scores of given answers: teacher-forced log-probabilities, whatever the batch (USERS 18)."""

import pytest
import torch

from owl2.engine.scoring import prompt_and_answer
from owl2.errors import InputError
from tests.engine.conftest import ask, image

CHOICES = ["red", "a blue circle", "你好", "no", "green and green and green", "yes, red"]


def by_hand(engine, messages, choice):
    """Log-probabilities of what training labels in the last turn, by one plain forward."""
    conversation = [*messages, {"role": "assistant", "content": choice}]
    batch = engine.processor.for_training(conversation)
    labels = batch.pop("labels")[0]
    with torch.no_grad():
        logits = engine.model(**batch).logits[0, :-1].float()
    labelled = (labels[1:] != -100).nonzero()[:, 0].tolist()
    last = [n for n in labelled if all(m in labelled for m in range(n, labelled[-1] + 1))]
    rows = logits.log_softmax(-1)
    return torch.tensor([rows[n, labels[n + 1]] for n in last])


@pytest.mark.parametrize("number", [0, 1, 2, 5, 6])
def test_scores_are_what_training_would_see(shared_engine, conversations, number):
    messages = conversations[number]
    expected = [by_hand(shared_engine, messages, choice) for choice in CHOICES]
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


def test_images_are_computed_once(engine, conversations):
    calls = []
    engine.model.model.vision_model.register_forward_hook(lambda *_: calls.append(1))
    engine.score(conversations[2], CHOICES, batch_size=2)
    assert len(calls) == 1


def test_the_answer_is_what_for_training_labels(shared_engine, conversations):
    for messages in conversations:
        prompt, answer = prompt_and_answer(shared_engine.processor, messages, "a red circle")
        turn = {"role": "assistant", "content": "a red circle"}
        batch = shared_engine.processor.for_training([*messages, turn])
        assert prompt + answer == batch["input_ids"][0].tolist()
        labels = batch["labels"][0].tolist()
        assert labels[-len(answer) :] == answer
        assert labels[-len(answer) - 1] == -100


def test_the_image_matters(shared_engine):
    first, second = (shared_engine.score(ask("what?", image(n)), ["red"]) for n in (1, 2))
    assert first != pytest.approx(second, abs=1e-3)


def test_refused(shared_engine, broken, conversations):
    for choices in ([], "red"):
        with pytest.raises(InputError, match="list"):
            shared_engine.score(conversations[0], choices)
    with pytest.raises(InputError, match="empty"):
        shared_engine.score(conversations[0], ["red", " "])
    with pytest.raises(InputError, match=r"choice 2 .* more than the context"):
        shared_engine.score(conversations[0], ["red", "no " * 120])
    with pytest.raises(InputError, match="not finite"):
        broken.score(conversations[0], ["red"])
