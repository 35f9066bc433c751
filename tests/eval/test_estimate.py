"""`owl2 eval --plan`: tokens are counted, time is extrapolated from a trial, nothing is written."""

from dataclasses import replace

import pytest

from owl2.eval import estimate
from owl2.eval.estimate import show_plan
from owl2.eval.evaluate import Settings
from owl2.eval.model_args import Subject


@pytest.fixture
def settings(tiny_checkpoint, task, tmp_path):
    subject = Subject(str(tiny_checkpoint), device="cpu")
    return Settings(subject, tmp_path / "out", task.name, batch_size=4)


def test_tokens_are_those_of_all_prompts(settings, plain, engine, questions):
    [cost] = show_plan(settings, plain)
    ids = [
        engine.processor.apply_chat_template(
            question.messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"][0]
        for question in questions
    ]
    # Words on both sides of an image are tokenised apart, and here at once.
    assert cost.prompt_tokens == pytest.approx(sum(map(len, ids)), rel=0.05)
    assert (cost.questions, cost.images, cost.new_tokens) == (20, 20, 80)
    assert not settings.output.exists()
    text = plain.file.getvalue()
    assert "made" in text
    assert "4 questions at a time on cpu" in text


def test_time_is_that_of_the_last_trial_batch_for_all(settings, plain, monkeypatch):
    now, batches = [0.0], []

    def answer(engine, asked, decoding):
        batches.append(len(asked))
        now[0] += 100.0 if len(batches) == 1 else 2.0  # the first one warms up
        return ["" for _ in asked]

    monkeypatch.setattr(estimate.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(estimate, "answer_or_reason", answer)
    [cost] = show_plan(settings, plain)
    assert batches == [4, 4]
    assert cost.seconds == pytest.approx(20 * 2.0 / 4)
    assert "0:00:10" in plain.file.getvalue()
    batches.clear()
    [cost] = show_plan(replace(settings, blind=True), plain)
    assert (cost.questions, cost.images) == (40, 20)
    assert cost.seconds == pytest.approx(40 * 2.0 / 4)
