"""MME of lmms-eval with local data: prompts and scores equal those of `owl2 eval`."""

from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")

import lmms_eval
from datasets import Dataset
from lmms_eval import evaluator
from lmms_eval.tasks import TaskManager

from owl2.engine.engine import Engine
from owl2.eval.adapters.lmms_eval import LmmsEvalModel
from owl2.eval.samples import Response
from owl2.eval.tasks import find_tasks

FIXTURES = Path(__file__).parents[1] / "fixtures"
MME = Path(str(lmms_eval.__file__)).parent / "tasks/mme/mme.yaml"


class ConstantModel(LmmsEvalModel):
    """Yes for some questions, so that the score is between the minimum and the maximum."""

    def generate_until(self, requests):
        return ["Yes" if request.args[3] % 3 else "No" for request in requests]


@pytest.fixture
def questions():
    [task] = find_tasks("mme")
    questions, _ = task.read(task.data(FIXTURES, prompts="plain"))
    pairs = {}
    for question in questions:
        pairs.setdefault((question.category, question.metadata["image"]), []).append(question)
    # lmms-eval skips images with a single question.
    return task, [question for pair in pairs.values() if len(pair) == 2 for question in pair]


@pytest.mark.parametrize("kind", [LmmsEvalModel, ConstantModel])
def test_prompts_and_scores_equal_those_of_owl2_eval(
    questions, kind, tiny_checkpoint, tmp_path, monkeypatch
):
    task, paired = questions
    rows = [
        {
            "image": {"path": question.messages[0]["content"][0]["path"], "bytes": None},
            "question": f"{question.question} Please answer yes or no.",
            "answer": question.expected[0],
            "category": question.category,
            "question_id": f"{question.category}/{question.metadata['image']}",
        }
        for question in paired
    ]
    for row in rows:
        row["image"]["bytes"] = Path(row["image"]["path"]).read_bytes()
    from datasets import Image as ImageColumn

    data = Dataset.from_list(rows).cast_column("image", ImageColumn())
    data.to_parquet(tmp_path / "mme.parquet")
    (tmp_path / "local.yaml").write_text(
        f"include: {MME}\ntask: mme_local\ndataset_path: parquet\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'mme.parquet'}}}}}\n"
    )
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    results = evaluator.simple_evaluate(
        model=kind(engine, batch_size=4),
        tasks=["mme_local"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = sorted(results["samples"]["mme_local"], key=lambda sample: sample["doc_id"])
    texts = [sample["filtered_resps"][0] for sample in samples]
    if kind is LmmsEvalModel:  # equal responses imply equal prompts
        conversations = [question.messages for question in paired]
        own = engine.batch(conversations, max_new_tokens=16)  # as in the task of lmms-eval
        assert texts == [text.strip() for text in own]
    responses = [Response(question, "", text) for question, text in zip(paired, texts, strict=True)]
    scores = task.metric.score(responses).metrics
    found = results["results"]["mme_local"]
    assert scores["perception"] == pytest.approx(found["mme_perception_score,none"])
    assert scores["cognition"] == pytest.approx(found["mme_cognition_score,none"])
    if kind is ConstantModel:
        assert 0 < scores["perception"] < 2000
