"""Additional tasks in lmms-eval, from published files to scores."""

import argparse
import json
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("lmms_eval")

from owl2.engine.engine import Engine
from owl2.errors import ErrorCode
from owl2.eval.adapters import additional_tasks
from owl2.eval.adapters.lmms_eval import LmmsEvalModel
from owl2.eval.adapters.paper_tasks import DATA, PaperTask
from owl2.eval.tasks import find_tasks
from tests.errors import raises_input_error

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def engine(tiny_checkpoint):
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    engine.model.config.max_position_embeddings = 512  # for eight frames and a prompt
    return engine


def test_additional_tasks_in_the_evaluator_of_lmms_eval(engine, monkeypatch, tmp_path):
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv(DATA, str(FIXTURES))
    # easy_vqa, which takes seconds to read, has a test of the command line.
    names = sorted({path.stem for path in additional_tasks().glob("*.yaml")} - {"easy_vqa"})
    results = evaluator.simple_evaluate(
        model=LmmsEvalModel(engine, batch_size=4),
        tasks=names,
        task_manager=TaskManager(include_path=str(additional_tasks()), include_defaults=False),
        limit=3,
        bootstrap_iters=0,
        log_samples=True,
        cli_args=argparse.Namespace(
            output_path=str(tmp_path), process_with_media=False, reasoning_tags=None
        ),
    )
    assert sorted(results["results"]) == names
    for name in names:
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        if name == "mmhal":
            continue
        [task] = find_tasks(name)
        questions, _ = task.read(task.data(FIXTURES))
        texts = engine.batch(
            [question.messages for question in questions[:3]],
            max_new_tokens=task.config.max_new_tokens,
            do_sample=False,
        )
        assert [sample["filtered_resps"][0] for sample in samples] == texts
        assert 0 <= results["results"][name]["accuracy,none"] <= 1

    [file] = tmp_path.rglob("mmhal_answers.json")
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert results["results"]["mmhal"]["answers,none"] == len(rows) > 0
    template = json.loads((FIXTURES / "mmhal/response_template.json").read_text(encoding="utf-8"))
    assert rows[0]["question"] in {row["question"] for row in template}
    assert rows[0].keys() <= template[0].keys()


def test_correct_response_scores_one(monkeypatch):
    monkeypatch.setenv(DATA, str(FIXTURES))
    task = PaperTask({"task": "msvd_qa", "metric_list": METRICS})
    document = task.dataset["test"][0]
    assert task.process_results(document, [f" {document['expected'][0]}. "]) == {"accuracy": 1.0}
    assert task.process_results(document, ["something else"]) == {"accuracy": 0.0}
    frames = task.doc_to_visual(document)
    assert len(frames) == 8
    assert all(isinstance(frame, Image.Image) for frame in frames)
    assert task.doc_to_text(document).endswith("using a single word or phrase.")
    assert task.doc_to_target(document) == document["expected"][0]


def test_missing_data_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv(DATA, str(tmp_path))
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "msvd_qa/test_qa.json"):
        PaperTask({"task": "msvd_qa", "metric_list": METRICS})


METRICS = [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}]
