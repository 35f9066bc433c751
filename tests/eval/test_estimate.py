"""`owl2 eval --estimate`: tokens are counted, and the time is extrapolated from a trial."""

from dataclasses import replace

import pytest

from owl2.eval import estimate as module
from owl2.eval.estimate import estimate
from owl2.eval.evaluate import EvalConfig
from owl2.eval.model_args import EvalModelArgs


@pytest.fixture
def config(tiny_checkpoint, task, tmp_path):
    model_args = EvalModelArgs(str(tiny_checkpoint), device="cpu")
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


def test_time_is_extrapolated_from_the_last_trial_batch(config, plain, monkeypatch):
    now, batches = [0.0], []

    def answer(engine, conversations, **options):
        batches.append(len(conversations))
        now[0] += 100.0 if len(batches) == 1 else 2.0  # the first one is a warm-up
        return ["" for _ in conversations]

    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module, "batch_or_errors", answer)
    [found] = estimate(config, plain)
    assert batches == [4, 4]
    assert found.seconds == pytest.approx(20 * 2.0 / 4)
    assert "0:00:10" in plain.file.getvalue()
    batches.clear()
    [found] = estimate(replace(config, no_image_baseline=True), plain)
    assert (found.questions, found.images) == (40, 20)
    assert found.seconds == pytest.approx(40 * 2.0 / 4)
