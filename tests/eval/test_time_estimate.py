"""`owl2 eval --estimate`: the tokens of all prompts, and the time of a trial."""

from dataclasses import replace

import pytest

from owl2.engine.output import CompletionChunk
from owl2.eval import response_records, task_run
from owl2.eval.evaluate import estimate


def test_estimate_counts_the_tokens_of_all_prompts(config, plain, engine, questions):
    config = replace(config, batch_size=4)
    [found] = estimate(config, plain).values()
    ids = [
        engine.processor.apply_chat_template(
            sample.messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"][0]
        for sample in questions
    ]
    # The processor tokenizes the texts before and after an image separately.
    assert found["prompt tokens"] == pytest.approx(sum(map(len, ids)), rel=0.05)
    assert [*found.values()][:2] == [20, 20]
    assert found["new tokens (max)"] == 80
    assert not config.output.exists()
    text = plain.file.getvalue()
    assert "tiny" in text
    assert "batches of 4 on cpu" in text


def test_estimated_time_is_that_of_a_trial_after_a_warm_up(config, plain, monkeypatch):
    config = replace(config, batch_size=4)
    now, counts = [0.0], []

    def answer(engine, conversations, batch_size, **options):
        conversations = list(conversations)
        counts.append(len(conversations))
        now[0] += 100.0 if len(counts) == 1 else 4.0  # the first batch is a warm-up
        return [CompletionChunk(0, "", (), 1, "stop") for _ in conversations]

    monkeypatch.setattr(task_run.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(response_records, "output_all", answer)
    [found] = estimate(config, plain).values()
    assert counts == [4, 8]
    assert found["time"] == pytest.approx(20 * 4.0 / 8)
    assert "0:00:10" in plain.file.getvalue()
    counts.clear()
    [found] = estimate(replace(config, no_image_baseline=True), plain).values()
    assert [*found.values()][:2] == [40, 20]
    assert found["time"] == pytest.approx(40 * 4.0 / 8)
