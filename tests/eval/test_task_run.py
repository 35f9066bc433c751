"""Responses: in the order of the samples, and independent of the batches."""

from dataclasses import replace

import pytest

from owl2.eval.readers import EvalData
from owl2.eval.task_run import TaskRun
from owl2.sharded_jsonl import ShardedJsonl
from owl2.workers import WorkerRank


@pytest.fixture
def generate(engine, task, plain, tmp_path):
    """Generates and collects responses."""

    def run(samples, batch_size, settings="same", task=task):
        run = TaskRun("tiny", task, EvalData((), "{question}"), list(samples), [])
        path = tmp_path / "tiny.jsonl"
        with ShardedJsonl(path, {"settings": settings}, WorkerRank()) as cache:
            run.generate(engine, cache, batch_size, plain)
            run.collect(cache)
        return run

    return run


@pytest.fixture
def batches(engine, monkeypatch):
    """The number of tokens of each prompt, by batch."""
    seen = []
    batch = engine.batch_outputs

    def record(prompts, **options):
        seen.append([len(prompt.ids) for prompt in prompts])
        return batch(prompts, **options)

    monkeypatch.setattr(engine, "batch_outputs", record)
    return seen


def with_image(sample, path):
    image, text = sample.messages[0]["content"]
    content = [{**image, "path": str(path)}, text]
    return replace(sample, messages=[{"role": "user", "content": content}])


def test_batch_size_does_not_change_responses(generate, engine, questions):
    expected = [
        engine.chat(sample.messages, do_sample=False, max_new_tokens=4) for sample in questions
    ]
    assert len(set(expected)) > 5, "otherwise a wrong order could not be detected"
    for batch_size in (1, 3, 16, 100):
        run = generate(questions, batch_size, settings=batch_size)
        assert [response.sample for response in run.responses] == questions
        assert [response.text for response in run.responses] == expected
        assert run.responses[0].prompt == f"USER: <|image|>{questions[0].question} ASSISTANT:"
        assert run.invalid == []
        assert run.seconds > 0


def test_batches_have_similar_lengths(generate, batches, questions):
    generate(questions, 6)
    assert [len(batch) for batch in batches] == [6, 6, 6, 2]
    lengths = [sum(batch) / len(batch) for batch in batches]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1] + 10


def test_cached_responses_are_not_generated_again(generate, batches, questions):
    first = generate(questions[:12], 8)
    batches.clear()
    run = generate(questions, 8)
    assert sum(map(len, batches)) == 8
    assert run.responses[:12] == first.responses
    assert run.seconds > first.seconds, "the time of both runs"
    batches.clear()
    generate(questions, 8)
    assert batches == []
    generate(questions, 8, settings="other")
    assert sum(map(len, batches)) == 20


def test_invalid_samples_do_not_affect_the_others(generate, questions, images, tmp_path):
    (tmp_path / "torn.png").write_bytes((images / "red.png").read_bytes()[:40])
    changed = list(questions)
    changed[7] = with_image(changed[7], tmp_path / "torn.png")
    changed[11] = with_image(changed[11], tmp_path / "missing.png")
    changed[13] = replace(questions[13], messages=[{"role": "nobody", "content": "?"}])
    changed[17] = replace(questions[17], messages=[{"role": "user", "content": "so " * 500}])
    needles = {"tiny#7": "torn.png", "tiny#11": "missing.png", "tiny#13": "nobody"}
    needles["tiny#17"] = "context"
    run = generate(changed, 100)
    assert [item.id for item in run.invalid] == list(needles)
    assert all(needles[item.id] in item.reason for item in run.invalid)
    valid = [sample for sample in changed if sample.id not in needles]
    assert [response.sample for response in run.responses] == valid
    for response in run.responses:
        number = int(response.sample.id.split("#")[1])
        assert (response.text in response.sample.expected) == (number % 2 == 1)


def test_truncated_responses_are_those_without_an_end_token(
    generate, questions, engine, monkeypatch
):
    """The tokens of a text are not always those that were generated."""
    outputs = engine.batch_outputs

    def with_reasons(prompts, **options):
        found = outputs(prompts, **options)
        return [
            replace(one, finish_reason=("stop", "length")[i % 2]) for i, one in enumerate(found)
        ]

    monkeypatch.setattr(engine, "batch_outputs", with_reasons)
    assert generate(questions, 20, settings="reasons").num_truncated == 10


def test_repaired_image_is_evaluated_again(generate, questions, images, tmp_path):
    path = tmp_path / "late.png"
    changed = [with_image(questions[0], path)]
    assert len(generate(changed, 4).invalid) == 1
    path.write_bytes((images / "red.png").read_bytes())
    assert len(generate(changed, 4).responses) == 1


def test_baseline_has_no_images(generate, task, questions):
    run = TaskRun("tiny", task, EvalData((), "{question}"), questions, [])
    run.add_baseline()
    assert run.baseline.name == "tiny_no_image"
    assert [own.name for own in run.passes] == ["tiny", "tiny_no_image"]
    for sample in run.baseline.samples:
        assert [part["type"] for part in sample.messages[0]["content"]] == ["text"]
    text = replace(task, config=task.config.model_copy(update={"lm_eval": "a.yaml"}))
    run = TaskRun("tiny", text, EvalData((), "{question}"), questions, [])
    run.add_baseline()
    assert run.passes == [run]


@pytest.mark.parametrize("rank_options", ["sum", "mean"])
def test_the_most_likely_option_is_the_response(generate, engine, task, questions, rank_options):
    options = ["a", "red", "the color of an orange", "not yellow"]
    config = task.config.model_copy(update={"rank_options": rank_options})
    samples = [replace(one, metadata={"options": options}) for one in questions[:6]]
    missing = with_image(samples[0], "none.png")
    run = generate([*samples, missing], 4, task=replace(task, config=config))
    assert [item.id for item in run.invalid] == [missing.id]
    assert len(run.responses) == len(samples)
    for sample, response in zip(samples, run.responses, strict=True):
        scores = engine.score(sample.messages, options, normalize=rank_options == "mean")
        assert response.sample.metadata["scores"] == pytest.approx(scores)
        assert response.text == options[scores.index(max(scores))]
        assert len(response.image_digests) == 1
