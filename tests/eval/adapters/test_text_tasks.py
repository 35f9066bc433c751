"""The text benchmarks through lm-eval, with the files of the fixtures."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from owl2.engine.engine import Engine
from owl2.errors import ErrorCode
from owl2.eval.adapters.lm_eval_model import LmEvalModel
from owl2.eval.adapters.text_tasks import run_lm_eval
from owl2.eval.tasks import find_tasks
from tests.errors import raises_input_error

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ("bbh", "agieval", "arc_c", "arc_e", "boolq", "triviaqa", "hellaswag")


@pytest.fixture(scope="module")
def engine(tiny_checkpoint):
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    engine.model.config.max_position_embeddings = 2048  # prompts of MMLU are long
    return engine


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Responses of 256 tokens, the default of lm-eval, would take most of the time."""
    monkeypatch.setattr(LmEvalModel, "max_gen_toks", 8)


def run(name, engine, batch_size=4, data=FIXTURES):
    [task] = find_tasks(name)
    source = task.data(data)
    questions, _ = task.read(source)
    return task, source, questions, run_lm_eval(task, source, questions, engine, batch_size)


def test_mmlu_prompt_has_five_examples(engine):
    task, source, questions, answers = run("mmlu", engine)
    assert [answer.sample.id for answer in answers] == [question.id for question in questions]
    prompt = answers[0].prompt
    assert prompt.startswith(
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Which number is 0?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer: A\n\nWhich number is 1?"
    )
    assert prompt.endswith("fin?\nA. a foot\nB. a tail, of a fish\nC. a wing\nD. an eye\nAnswer:")
    assert prompt.count("Answer:") == 6
    assert {path.name for path in source.files} >= {"anatomy_dev.csv", "astronomy_test.csv"}
    for answer in answers:
        assert answer.text in "ABCD"
        assert answer.sample.metadata["scores"] == {
            "acc": float(answer.text == answer.sample.expected[0])
        }
    right = [answer.text == answer.sample.expected[0] for answer in answers]
    assert task.metric.score(answers).metrics == {"acc": sum(right) / len(right)}


@pytest.mark.parametrize("name", NAMES)
def test_published_files_get_scores(name, engine):
    task, _, questions, answers = run(name, engine)
    assert [answer.sample.id for answer in answers] == [question.id for question in questions]
    scores = task.metric.score(answers)
    assert task.metric.main in scores.metrics
    assert all(answer.prompt for answer in answers)
    for answer in answers:
        metadata = answer.sample.metadata
        options = metadata.get("choices") or metadata.get("endings")
        if options is None or name in ("bbh", "triviaqa"):  # generated answers
            continue
        options = options["text"] if isinstance(options, dict) else options
        assert any(answer.text in option for option in options), (answer.text, options)


def test_response_is_the_most_likely_option(engine):
    """As `LmEvalModel` scores the prompts."""
    _, _, _, [first, second] = run("boolq", engine)
    pairs = [(answer.prompt, word) for answer in (first, second) for word in (" no", " yes")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    found = [score for score, _ in LmEvalModel(engine, batch_size=1).loglikelihood(requests)]
    assert first.text == ("yes" if found[1] > found[0] else "no")
    assert second.text == ("yes" if found[3] > found[2] else "no")
    assert first.prompt == "Owls are birds that fly at night.\nQuestion: can owls fly?\nAnswer:"


def test_batch_size_does_not_change_responses(engine):
    for name in ("mmlu", "agieval"):
        *_, together = run(name, engine, batch_size=8)
        *_, alone = run(name, engine, batch_size=1)
        assert together == alone


def test_missing_few_shot_examples(engine, tmp_path):
    (tmp_path / "test").mkdir()
    test = FIXTURES / "mmlu/test/anatomy_test.csv"
    (tmp_path / "test/anatomy_test.csv").write_bytes(test.read_bytes())
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "dev/*_dev.csv"):
        run("mmlu", engine, data=tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/anatomy_dev.csv").write_text("Which?,a,b,c,d,A\n")
    with raises_input_error(ErrorCode.INVALID_VALUE, "1 few-shot examples; 5"):
        run("mmlu", engine, data=tmp_path)


def test_file_of_another_benchmark(engine, tmp_path):
    (tmp_path / "bbh").mkdir()
    (tmp_path / "bbh/cooking.json").write_text('{"examples": [{"input": "a", "target": "b"}]}')
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "bbh/*.json"):
        run("bbh", engine, data=tmp_path)


def test_bfloat16_logits_do_not_tie_options(tiny_checkpoint):
    """In bfloat16, log-probabilities around -20 are multiples of 1/8."""
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="bfloat16")
    found = []
    likelihoods = LmEvalModel.loglikelihood

    def spy(self, requests, disable_tqdm=False):
        found.extend(likelihoods(self, requests, disable_tqdm))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LmEvalModel, "loglikelihood", spy)
        run("boolq", engine)
    assert any(float(torch.tensor(score).bfloat16()) != score for score, _ in found)
