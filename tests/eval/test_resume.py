"""An evaluation that stopped resumes from the responses that it wrote."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from owl2.engine.engine import Engine
from owl2.errors import ErrorCode, InputError
from owl2.eval.evaluate import evaluate
from owl2.sharded_jsonl import ShardedJsonl
from tests.eval.reading import files, rows


@pytest.fixture
def batches(monkeypatch):
    """The sizes of all batches; the one with the number `stop_at` is interrupted."""
    batch, state = Engine.batch_outputs, SimpleNamespace(sizes=[], stop_at=None)

    def record(self, conversations, **options):
        state.sizes.append(len(conversations))
        if len(state.sizes) == state.stop_at:
            raise KeyboardInterrupt
        return batch(self, conversations, **options)

    monkeypatch.setattr(Engine, "batch_outputs", record)
    return state


def test_stopped_evaluation_is_resumed(baseline, plain, batches):
    complete = evaluate(baseline, plain)
    before = {name: (baseline.output / name).read_bytes() for name in files(baseline.output)}
    batches.sizes.clear()
    batches.stop_at = 6  # the second batch of the baseline
    with pytest.raises(KeyboardInterrupt):
        evaluate(baseline, plain)
    assert len(rows(baseline.responses / "tiny.part-0.jsonl")) == 1 + 20
    assert len(rows(baseline.responses / "tiny_no_image.part-0.jsonl")) == 1 + 6
    assert before == {name: (baseline.output / name).read_bytes() for name in before}
    assert "Stopped" in plain.file.getvalue()

    batches.sizes.clear()
    again = evaluate(baseline, plain)
    assert sum(batches.sizes) == 14, "only the rest of the baseline"
    assert again["tasks"]["tiny"]["metrics"] == complete["tasks"]["tiny"]["metrics"]
    for name in ("responses/tiny.jsonl", "responses/tiny_no_image.jsonl"):
        assert (baseline.output / name).read_bytes() == before[name]
    assert files(baseline.output) == set(before)


def test_responses_of_a_skipped_baseline_remain(baseline, plain, batches, monkeypatch):
    append, calls = ShardedJsonl.append, []
    part = baseline.responses / "tiny_no_image.part-0.jsonl"

    def fail_once(self, records):
        calls.append(self.path)
        if self.path == part and calls.count(part) == 2:
            raise InputError("The disk is full.", ErrorCode.WRITE_FAILED)
        append(self, records)

    monkeypatch.setattr(ShardedJsonl, "append", fail_once)
    assert evaluate(baseline, plain)["skipped"].keys() == {"tiny_no_image"}
    assert len(rows(part)) == 1 + 6
    batches.sizes.clear()
    assert evaluate(baseline, plain)["skipped"] == {}
    assert sum(batches.sizes) == 20 + 14, "the task, and the rest of the baseline"


def test_responses_with_other_settings_are_not_used(config, plain, batches):
    batches.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, plain)
    assert len(rows(config.responses / "tiny.part-0.jsonl")) == 1 + 6
    batches.sizes.clear()
    batches.stop_at = None
    evaluate(replace(config, model_args=replace(config.model_args, image_policy="pad")), plain)
    assert sum(batches.sizes) == 20
