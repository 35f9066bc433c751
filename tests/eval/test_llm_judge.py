"""Runs are judged, whatever the judge does."""

import json
import re
import time
from pathlib import Path

import pytest

from owl2.errors import InputError
from owl2.eval.llm_judge import Journal, judge_rows, judge_run
from owl2.eval.metrics.llm_judge import MM_VET, MMHAL, RUBRICS, read_rating, read_score
from owl2.eval.openai_client import Endpoint
from owl2.eval.samples import Answer, Question
from tests.eval.stub import completion, serving


def quick(server, **limits):
    return Endpoint(server.url, "judge-1", **{"wait": 0.01, "timeout": 5.0, **limits})


def row(number, answer="an answer"):
    facts = {"reference": f"reference {number}", "capabilities": ["ocr"]}
    return {
        "id": f"v1_{number}",
        "question": f"question {number}?",
        "kind": "",
        "prompt": "USER: … ASSISTANT:",
        "facts": facts,
        "answer": answer,
        "score": None,
    }


def by_number(scores):
    """A judge that knows the questions apart."""

    def step(body):
        number = int(re.search(r"question (\d+)\?", body["messages"][0]["content"])[1])
        outcome = scores[number]
        return outcome if isinstance(outcome, tuple) else completion(f"Score: {outcome}")

    return step


def judge(rows, server, folder, **limits):
    journal = Journal(folder / "mm_vet.jsonl")
    return judge_rows(
        rows, RUBRICS["mm_vet"], quick(server, **limits), journal, "mm_vet", lambda line: None
    )


# ------------------------------------------------------------------ what is asked and read


def test_the_judge_gets_question_reference_and_answer_but_no_braces_are_filled_in_answers():
    asked = RUBRICS["mm_vet"].ask("What?", {"reference": "a <AND> b"}, "say {reference}")
    assert "Question: What?\nReference: a <AND> b\nAnswer: say {reference}" in asked
    facts = {"reference": "No dog.", "content": "cat, sofa"}
    asked = RUBRICS["mmhal"].ask("Which dog?", facts, " ")
    assert "cat, sofa" in asked and "Answer to judge: (no answer)" in asked


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 0.5", 0.5),
        ("**Score:** 1", 1.0),
        ("0.3", 0.3),
        ("The score is 0.0.", 0.0),
        ("Wrong.\nscore: 0.0\nScore: 0", 0.0),
        ("Score: 7", None),
        ("Score: -0.5", None),
        ("Score: 0.2 or score: 0.4", None),
        ("Score: 1.2.3", None),
        ("Score: 1/1", 1.0),
        ("Score: 1/10", None),
        ("Score: 0,5", None),
        ("Score: 10", None),
        ("perfect", None),
        ("", None),
    ],
)
def test_scores_are_read_or_refused(reply, score):
    assert read_score(reply) == score


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("It invents a dog.\nRating: 2", 2.0),
        ("Rating: 6/6", 6.0),
        ("Rating: 3/5", None),
        ("On the rating scale from 0 to 6 this is\n**Rating: 0**", 0.0),
        ("4", 4.0),
        ("Rating: 2.5", None),
        ("Rating: 7", None),
        ("Rating: 2 … or rather Rating: 3", None),
        ("Rating: N", None),
    ],
)
def test_ratings_are_read_or_refused(reply, rating):
    assert read_rating(reply) == rating


# ------------------------------------------------------------------ metrics


def judged(figures, **facts):
    return [
        Answer(Question(str(n), "?", [], (), facts={"judged": figure, **facts}), "", "")
        for n, figure in enumerate(figures)
    ]


def test_mm_vet_is_the_mean_and_a_figure_a_capability():
    answers = judged([1.0, 0.5], capabilities=["ocr"]) + judged([0.0], capabilities=["ocr", "math"])
    scores = MM_VET.score(answers)
    assert scores.metrics == {"judged": 1.0, "score": 0.5, "ocr": 0.5, "math": 0.0}
    assert scores.each == [1.0, 0.5, 0.0]


def test_mmhal_is_the_mean_rating_and_the_share_below_three():
    scores = MMHAL.score(judged([6.0, 3.0, 2.0, 0.0]))
    assert scores.metrics == {"judged": 1.0, "score": 2.75, "hallucination_rate": 0.5}
    assert scores.each == [1.0, 0.5, pytest.approx(1 / 3), 0.0]


def test_what_nobody_has_judged_counts_neither_way():
    scores = MMHAL.score(judged([6.0, None]))
    assert scores.metrics == {"judged": 0.5, "score": 6.0, "hallucination_rate": 0.0}
    assert scores.each == [1.0, None]
    assert MMHAL.score(judged([None])).metrics == {"judged": 0.0}
    assert MM_VET.score(judged([None], capabilities=["ocr"])).metrics == {"judged": 0.0}


# ------------------------------------------------------------------ a judge that misbehaves


def test_all_that_is_told_is_kept_and_all_that_fails_is_named(tmp_path):
    trouble = {3: (500, "broken", 0.0), 5: completion("no idea"), 7: (400, "too long", 0.0)}
    rows = [row(number) for number in range(9)]
    with serving(by_number({n: n / 10 for n in range(9)} | trouble)) as server:
        result = judge(rows, server, tmp_path, attempts=2)
        assert (result.judged, result.new) == (6, 6)
        assert result.failed.keys() == {"v1_3", "v1_5", "v1_7"}
        assert "500: broken (2 attempts)" in result.failed["v1_3"]
        assert "'no idea'" in result.failed["v1_5"]
        assert rows[4]["judgement"]["value"] == 0.4 and rows[3]["judgement"] is None
        # The next call asks for those alone.
        server.asked.clear()
        server.script = [by_number({3: 0.3, 5: 0.5, 7: 0.7})]
        result = judge(rows, server, tmp_path)
        assert (result.judged, result.new, result.failed) == (9, 3, {})
        assert len(server.asked) == 3
    assert [row["judgement"]["value"] for row in rows] == [n / 10 for n in range(9)]


def test_another_answer_or_another_judge_is_judged_anew(tmp_path):
    with serving(completion("Score: 0.5")) as server:
        judge([row(1)], server, tmp_path)
        judge([row(1)], server, tmp_path)
        assert len(server.asked) == 1
        judge([row(1, answer="another")], server, tmp_path)
        assert len(server.asked) == 2
        journal = Journal(tmp_path / "mm_vet.jsonl")
        other = Endpoint(server.url, "judge-2", wait=0.01)
        judge_rows([row(1)], RUBRICS["mm_vet"], other, journal, "mm_vet", lambda line: None)
        assert len(server.asked) == 3


def test_any_text_can_be_judged(run):
    half = row(0, answer="half \ud83e")
    (run / "answers" / "mm_vet.jsonl").write_text(json.dumps(half) + "\n")
    with serving(completion("Score: 1")) as server:
        for _ in range(2):
            done = judge_run(run, server.url, "j", lambda line: None, endpoint=quick(server))
        assert len(server.asked) == 1
    assert done["mm_vet"].judged == 1
    [line] = (run / "answers" / "mm_vet.jsonl").read_text().splitlines()
    assert json.loads(line)["answer"] == half["answer"]


def test_half_a_line_of_a_killed_run_is_judged_again(tmp_path):
    rows = [row(1), row(2)]
    with serving(by_number({1: 0.1, 2: 0.2})) as server:
        judge(rows, server, tmp_path)
        path = tmp_path / "mm_vet.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
        assert judge(rows, server, tmp_path).judged == 2
        assert len(server.asked) == 3
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 2


def test_a_server_that_is_away_is_not_asked_to_the_end(tmp_path):
    said = []
    rows = [row(number) for number in range(60)]
    with serving(completion("1")) as server:
        gone = quick(server, attempts=1)
    journal = Journal(tmp_path / "mm_vet.jsonl")
    result = judge_rows(rows, RUBRICS["mm_vet"], gone, journal, "mm_vet", said.append)
    assert result.judged == 0 and len(result.failed) == 60
    assert "not asked" in result.failed["v1_59"]
    assert len(said) < 30 and said[-1] == "mm_vet: 0 of 60 answers are judged"


def test_a_refused_key_ends_it_and_keeps_what_was_told(tmp_path):
    rows = [row(number) for number in range(30)]
    scores = {n: 0.5 if n < 3 else (401, "no credit", 0.1) for n in range(30)}
    with serving(by_number(scores)) as server:
        with pytest.raises(InputError, match="401: no credit"):
            judge(rows, server, tmp_path)
        assert len(server.asked) < 30
    assert len(Journal(tmp_path / "mm_vet.jsonl").known) == 3


def test_ctrl_c_leaves_no_attempts_to_wait_for(tmp_path):
    class Stopped(Exception):
        pass

    def say(line):
        raise Stopped

    rows = [row(0), row(1)]
    scores = {0: (400, "never", 0.3), 1: (500, "busy", 0.0)}
    with serving(by_number(scores)) as server:
        patient = quick(server, wait=0.6)
        journal = Journal(tmp_path / "mm_vet.jsonl")
        with pytest.raises(Stopped):  # while the second one waits for its next attempt
            judge_rows(rows, RUBRICS["mm_vet"], patient, journal, "mm_vet", say)
        time.sleep(1.2)
        assert len(server.asked) == 2


# ------------------------------------------------------------------ a run


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "answers").mkdir()
    lines = "".join(json.dumps(row(number)) + "\n" for number in range(4))
    (tmp_path / "answers" / "mm_vet.jsonl").write_text(lines)
    tasks = {"mm_vet": {"metrics": {"judged": 0.0}, "n": 4}, "mme": {"metrics": {"perception": 9}}}
    (tmp_path / "results.json").write_text(json.dumps({"model": "m", "tasks": tasks}))
    return tmp_path


def test_a_runs_results_and_answers_have_the_scores(run):
    with serving(by_number({0: 0.0, 1: 1.0, 2: 0.5, 3: (400, "no", 0.0)})) as server:
        done = judge_run(run, server.url, "judge-1", lambda line: None, endpoint=quick(server))
        url = server.url
    assert done["mm_vet"].judged == 3
    tasks = json.loads((run / "results.json").read_text())["tasks"]
    assert tasks["mme"] == {"metrics": {"perception": 9}}
    assert tasks["mm_vet"]["metrics"] == {"judged": 0.75, "score": 0.5, "ocr": 0.5}
    assert tasks["mm_vet"]["n"] == 4
    told = tasks["mm_vet"]["judge"]
    assert (told["model"], told["url"], told["judged"]) == ("judge-1", url, 3)
    [missing] = told["not_judged"]
    assert missing["id"] == "v1_3" and "400" in missing["reason"]
    rows = [json.loads(line) for line in (run / "answers/mm_vet.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == [0.0, 1.0, 0.5, None]
    assert rows[1]["judgement"]["reply"] == "Score: 1.0"


def test_kinds_and_blind_answers_are_judged_with_the_rest(tmp_path):
    facts = {"reference": "no dog", "content": "cat"}
    rows = [{**row(n), "facts": facts, "kind": kind} for n, kind in enumerate(["a", "a", "b"])]
    (tmp_path / "answers").mkdir()
    lines = "".join(json.dumps(one) + "\n" for one in rows)
    for file in ("mmhal", "mmhal_blind"):
        (tmp_path / "answers" / f"{file}.jsonl").write_text(lines)
        lines = lines.replace("an answer", "a guess")
    kinds = {"a": {"n": 2, "judged": 0.0}, "b": {"n": 1, "judged": 0.0}}
    results = {"tasks": {"mmhal": {"metrics": {"judged": 0.0}, "by_answer_kind": kinds}}}
    (tmp_path / "results.json").write_text(json.dumps(results))

    def step(body):
        text = body["messages"][0]["content"]
        number = int(re.search(r"question (\d)", text)[1])
        return completion(f"Rating: {number if 'a guess' in text else number + 3}")

    with serving(step) as server:
        done = judge_run(tmp_path, server.url, "j", lambda line: None, endpoint=quick(server))
    assert done["mmhal"].judged == 6
    entry = json.loads((tmp_path / "results.json").read_text())["tasks"]["mmhal"]
    assert entry["metrics"]["score"] == 4.0 and entry["metrics"]["hallucination_rate"] == 0.0
    blind = entry["metrics"]["score_blind"], entry["metrics"]["hallucination_rate_blind"]
    assert blind == (1.0, 1.0)
    assert entry["by_answer_kind"]["a"]["score"] == 3.5 and entry["by_answer_kind"]["a"]["n"] == 2
    assert entry["by_answer_kind"]["b"]["score_blind"] == 2.0


def test_what_is_no_run_or_has_nothing_to_judge_is_said(run, tmp_path):
    with pytest.raises(InputError, match="give the folder that"):
        judge_run(tmp_path / "nowhere", "http://localhost:1/v1", "judge-1")
    (run / "results.json").write_text('{"tasks": {"mme": {}}}')
    with pytest.raises(InputError, match="no task that a judge scores"):
        judge_run(run, "http://localhost:1/v1", "judge-1")
