"""`owl2 eval --estimate`: tokens are counted, and the time is extrapolated from a trial."""

from dataclasses import replace

import pytest

from owl2.engine.load_model import ModelArgs
from owl2.eval import estimate as module
from owl2.eval import task_run
from owl2.eval.estimate import estimate
from owl2.eval.evaluate import EvalConfig


@pytest.fixture
def config(tiny_checkpoint, task, tmp_path):
    model_args = ModelArgs(str(tiny_checkpoint), device="cpu")
    return EvalConfig(model_args, tmp_path / "out", task.name, batch_size=4)


def test_tokens_of_all_prompts_are_counted(config, plain, engine, questions):
    [found] = estimate(config, plain)
    ids = [
        engine.processor.apply_chat_template(
            sample.messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"][0]
        for sample in questions
    ]
    # The processor tokenizes the texts before and after an image separately.
    assert found.prompt_tokens == pytest.approx(sum(map(len, ids)), rel=0.05)
    assert (found.questions, found.images, found.new_tokens) == (20, 20, 80)
    assert not config.output.exists()
    text = plain.file.getvalue()
    assert "tiny" in text
    assert "batches of 4 on cpu" in text


def test_time_is_that_of_a_trial_after_a_warm_up(config, plain, monkeypatch):
    now, counts = [0.0], []

    def answer(engine, conversations, batch_size, **options):
        conversations = list(conversations)
        counts.append(len(conversations))
        now[0] += 100.0 if len(counts) == 1 else 4.0  # the first batch is a warm-up
        return ["" for _ in conversations]

    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(task_run, "answer_all", answer)
    [found] = estimate(config, plain)
    assert counts == [4, 8]
    assert found.seconds == pytest.approx(20 * 4.0 / 8)
    assert "0:00:10" in plain.file.getvalue()
    counts.clear()
    [found] = estimate(replace(config, no_image_baseline=True), plain)
    assert (found.questions, found.images) == (40, 20)
    assert found.seconds == pytest.approx(40 * 4.0 / 8)
