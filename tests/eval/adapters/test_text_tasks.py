"""The text benchmarks through lm-eval, of fixtures; and its model beside a plain one."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from owl2.engine.engine import Engine
from owl2.errors import InputError
from owl2.eval.adapters.lm_eval_model import Owl2Text
from owl2.eval.adapters.text_tasks import run_text
from owl2.eval.readers import MissingData
from owl2.eval.tasks import find_tasks

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ("bbh", "agieval", "arc_c", "arc_e", "boolq", "triviaqa", "hellaswag")


@pytest.fixture(scope="module")
def engine(tiny_checkpoint):
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    engine.model.config.max_position_embeddings = 2048  # MMLU's prompts are long
    return engine


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Answers of 256 tokens, lm-eval's own number, would take most of the time here."""
    monkeypatch.setattr(Owl2Text, "max_gen_toks", 8)


def run(name, engine, batch_size=4, data=FIXTURES):
    [task] = find_tasks(name)
    source = task.source(data)
    questions, _ = task.read(source)
    return task, source, questions, run_text(task, source, questions, engine, batch_size)


def test_five_examples_and_four_letters(engine):
    task, source, questions, answers = run("mmlu", engine)
    assert [answer.question.id for answer in answers] == [question.id for question in questions]
    prompt = answers[0].prompt
    assert prompt.startswith(
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Which number is 0?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer: A\n\nWhich number is 1?"
    )
    assert prompt.endswith("fin?\nA. a foot\nB. a tail, of a fish\nC. a wing\nD. an eye\nAnswer:")
    assert prompt.count("Answer:") == 6
    assert {path.name for path in source.read} >= {"anatomy_dev.csv", "astronomy_test.csv"}
    for answer in answers:
        assert answer.text in "ABCD"
        assert answer.question.facts["scores"] == {
            "acc": float(answer.text == answer.question.expected[0])
        }
    right = [answer.text == answer.question.expected[0] for answer in answers]
    assert task.metric.score(answers).metrics == {"acc": sum(right) / len(right)}


@pytest.mark.parametrize("name", NAMES)
def test_from_the_published_files_to_scores(name, engine):
    task, _, questions, answers = run(name, engine)
    assert [answer.question.id for answer in answers] == [question.id for question in questions]
    scores = task.metric.score(answers)
    assert task.metric.main in scores.metrics
    assert all(answer.prompt for answer in answers)
    written = name in ("bbh", "triviaqa")
    for answer in answers:
        facts = answer.question.facts
        if written or ("choices" not in facts and "endings" not in facts):
            continue
        options = facts.get("choices", facts.get("endings"))
        options = options["text"] if isinstance(options, dict) else options
        assert any(answer.text in option for option in options), (answer.text, options)


def test_right_is_what_the_model_finds_likeliest(engine):
    """Against `Owl2Text` over the bare prompts: no score is lm-eval's alone to say."""
    _, _, _, [first, second] = run("boolq", engine)
    pairs = [(answer.prompt, word) for answer in (first, second) for word in (" no", " yes")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    found = [score for score, _ in Owl2Text(engine, batch_size=1).loglikelihood(requests)]
    assert first.text == ("yes" if found[1] > found[0] else "no")
    assert second.text == ("yes" if found[3] > found[2] else "no")
    assert first.prompt == "Owls are birds that fly at night.\nQuestion: can owls fly?\nAnswer:"


def test_the_batch_size_changes_nothing(engine):
    for name in ("mmlu", "agieval"):
        *_, together = run(name, engine, batch_size=8)
        *_, alone = run(name, engine, batch_size=1)
        assert together == alone


def test_examples_that_are_not_there(engine, tmp_path):
    (tmp_path / "test").mkdir()
    test = FIXTURES / "mmlu/test/anatomy_test.csv"
    (tmp_path / "test/anatomy_test.csv").write_bytes(test.read_bytes())
    with pytest.raises(MissingData, match=r"dev/\*_dev.csv"):
        run("mmlu", engine, data=tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/anatomy_dev.csv").write_text("Which?,a,b,c,d,A\n")
    with pytest.raises(InputError, match="1 examples; 5 are to be shown"):
        run("mmlu", engine, data=tmp_path)


def test_a_file_that_is_none_of_the_benchmark(engine, tmp_path):
    (tmp_path / "cooking.json").write_text('{"examples": [{"input": "a", "target": "b"}]}')
    with pytest.raises(InputError, match="lm-eval has no task 'cooking'"):
        run("bbh", engine, data=tmp_path)


def test_bfloat16_logits_do_not_make_options_equal(tiny_checkpoint):
    """As numbers of bfloat16, log-probabilities around -20 are multiples of 1/8."""
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="bfloat16")
    found = []
    likelihoods = Owl2Text.loglikelihood

    def spy(self, requests, disable_tqdm=False):
        found.extend(likelihoods(self, requests, disable_tqdm))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Owl2Text, "loglikelihood", spy)
        run("boolq", engine)
    assert any(float(torch.tensor(score).bfloat16()) != score for score, _ in found)
