"""Responses are judged, even if the endpoint fails."""

import asyncio
import json
import re
from pathlib import Path

import pytest

from owl2.errors import ErrorCode
from owl2.eval import judge as judge_module
from owl2.eval.judge import judge_rows, judge_run
from owl2.eval.metrics.llm_judge import MM_VET, MMHAL, RUBRICS
from owl2.eval.openai_client import ChatEndpoint
from owl2.eval.samples import EvalSample, Response
from tests.errors import raises_input_error
from tests.eval.stub import completion, serving


def quick(server, **limits):
    return ChatEndpoint(server.url, "judge-1", **{"backoff": 0.01, "timeout": 5.0, **limits})


def row(number, response="an answer"):
    metadata = {"reference": f"reference {number}", "capabilities": ["ocr"]}
    return {
        "id": f"v1_{number}",
        "question": f"question {number}?",
        "category": "",
        "prompt": "USER: … ASSISTANT:",
        "metadata": metadata,
        "response": response,
        "score": None,
    }


def by_number(scores):
    """A judge whose reply depends on the question."""

    def step(body):
        number = int(re.search(r"question (\d+)\?", body["messages"][0]["content"])[1])
        outcome = scores[number]
        return outcome if isinstance(outcome, tuple) else completion(f"Score: {outcome}")

    return step


@pytest.fixture
def judge(tmp_path, plain):
    """Judges rows of MM-Vet with an endpoint or a server."""

    def run(rows, endpoint):
        endpoint = endpoint if isinstance(endpoint, ChatEndpoint) else quick(endpoint)
        path = tmp_path / "mm_vet.jsonl"
        return judge_rows(rows, RUBRICS["mm_vet"], endpoint, path, plain)

    return run


@pytest.fixture(autouse=True)
def without_report(monkeypatch):
    """The results of these tests are too small for a report."""
    monkeypatch.setattr(judge_module, "write_report", lambda run: None)


# ------------------------------------------------------------------ prompts and replies


def test_prompt_has_question_reference_and_response():
    prompt = RUBRICS["mm_vet"].format("What?", {"reference": "a<AND>b <OR> c"}, "say {reference}")
    assert "Question: What?\nReference: a <AND> b <OR> c\nAnswer: say {reference}" in prompt
    metadata = {"reference": "No dog.", "content": "cat, sofa"}
    prompt = RUBRICS["mmhal"].format("Which dog?", metadata, " ")
    assert "cat, sofa" in prompt
    assert "Answer to judge: (no answer)" in prompt


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
def test_scores_are_parsed(reply, score):
    assert RUBRICS["mm_vet"].parse(reply) == score


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
def test_ratings_are_parsed(reply, rating):
    assert RUBRICS["mmhal"].parse(reply) == rating


# ------------------------------------------------------------------ metrics


def judged(scores, **metadata):
    return [
        Response(
            EvalSample(str(n), "?", [], (), metadata={"judge_score": score, **metadata}), "", ""
        )
        for n, score in enumerate(scores)
    ]


def test_mm_vet_has_a_score_per_capability():
    answers = judged([1.0, 0.5], capabilities=["ocr"]) + judged([0.0], capabilities=["ocr", "math"])
    scores = MM_VET.score(answers)
    assert scores.metrics == {"judged": 1.0, "score": 0.5, "ocr": 0.5, "math": 0.0}
    assert scores.per_sample == [1.0, 0.5, 0.0]


def test_mmhal_has_the_mean_rating_and_the_hallucination_rate():
    scores = MMHAL.score(judged([6.0, 3.0, 2.0, 0.0]))
    assert scores.metrics == {"judged": 1.0, "score": 2.75, "hallucination_rate": 0.5}
    assert scores.per_sample == [1.0, 0.5, pytest.approx(1 / 3), 0.0]


def test_responses_without_a_judgement_do_not_count():
    scores = MMHAL.score(judged([6.0, None]))
    assert scores.metrics == {"judged": 0.5, "score": 6.0, "hallucination_rate": 0.0}
    assert scores.per_sample == [1.0, None]
    assert MMHAL.score(judged([None])).metrics == {"judged": 0.0}
    assert MM_VET.score(judged([None], capabilities=["ocr"])).metrics == {"judged": 0.0}


# ------------------------------------------------------------------ failures


def test_failed_requests_are_listed_and_tried_again_later(judge):
    trouble = {3: (500, "broken", 0.0), 5: completion("no idea"), 7: (400, "too long", 0.0)}
    rows = [row(number) for number in range(9)]
    with serving(by_number({n: n / 10 for n in range(9)} | trouble)) as server:
        result = judge(rows, quick(server, attempts=2))
        assert (result.judged, result.new) == (6, 6)
        assert result.failed.keys() == {"v1_3", "v1_5", "v1_7"}
        assert "500: broken (2 attempts)" in result.failed["v1_3"]
        assert "'no idea'" in result.failed["v1_5"]
        assert rows[4]["judgement"]["value"] == 0.4
        assert rows[3]["judgement"] is None
        server.asked.clear()
        server.script = [by_number({3: 0.3, 5: 0.5, 7: 0.7})]
        result = judge(rows, server)
        assert (result.judged, result.new, result.failed) == (9, 3, {})
        assert len(server.asked) == 3
    assert [row["judgement"]["value"] for row in rows] == [n / 10 for n in range(9)]


def test_other_responses_and_other_judges_need_new_judgements(judge):
    with serving(completion("Score: 0.5")) as server:
        judge([row(1)], server)
        judge([row(1)], server)
        assert len(server.asked) == 1
        judge([row(1, response="another")], server)
        assert len(server.asked) == 2
        judge([row(1)], ChatEndpoint(server.url, "judge-2", backoff=0.01))
        assert len(server.asked) == 3


def test_any_text_can_be_judged(run, plain):
    half = row(0, response="half \ud83e")
    (run / "responses" / "mm_vet.jsonl").write_text(json.dumps(half) + "\n")
    with serving(completion("Score: 1")) as server:
        for _ in range(2):
            done = judge_run(run, quick(server), plain)
        assert len(server.asked) == 1
    assert done["mm_vet"].judged == 1
    [line] = (run / "responses" / "mm_vet.jsonl").read_text().splitlines()
    assert json.loads(line)["response"] == "half \\ud83e"  # half of a surrogate pair as text


def test_torn_line_is_judged_again(judge, tmp_path):
    rows = [row(1), row(2)]
    with serving(by_number({1: 0.1, 2: 0.2})) as server:
        judge(rows, server)
        path = tmp_path / "mm_vet.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
        assert judge(rows, server).judged == 2
        assert len(server.asked) == 3
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 2


def test_unreachable_server_cancels_the_remaining_requests(judge, plain):
    with serving(completion("1")) as server:
        closed = quick(server, attempts=1)
    result = judge([row(number) for number in range(60)], closed)
    assert result.judged == 0
    assert len(result.failed) == 60
    assert "cancelled" in result.failed["v1_59"]
    lines = plain.file.getvalue().splitlines()
    assert len(lines) < 30
    assert "0 of 60" in lines[-1]


def test_rejected_key_keeps_earlier_judgements(judge, tmp_path):
    rows = [row(number) for number in range(30)]
    scores = {n: 0.5 if n < 3 else (401, "no credit", 0.1) for n in range(30)}
    with serving(by_number(scores)) as server:
        with raises_input_error(ErrorCode.NETWORK, "401: no credit"):
            judge(rows, server)
        assert len(server.asked) < 30
    assert len((tmp_path / "mm_vet.jsonl").read_text().splitlines()) == 3


def test_interrupt_stops_further_attempts(judge, plain, monkeypatch):
    class Stopped(Exception):
        pass

    def out(line):
        raise Stopped

    monkeypatch.setattr(plain, "out", out)
    scores = {0: (400, "never", 0.3), 1: (500, "busy", 0.0)}
    with serving(by_number(scores)) as server:
        with pytest.raises(Stopped):  # while the second request waits for its next attempt
            judge([row(0), row(1)], quick(server, backoff=0.6))
        assert not server.another_request(1.2)
        assert len(server.asked) == 2


# ------------------------------------------------------------------ a run


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "responses").mkdir()
    lines = "".join(json.dumps(row(number)) + "\n" for number in range(4))
    (tmp_path / "responses" / "mm_vet.jsonl").write_text(lines)
    tasks = {"mm_vet": {"metrics": {"judged": 0.0}, "n": 4}, "mme": {"metrics": {"perception": 9}}}
    (tmp_path / "results.json").write_text(json.dumps({"model": "m", "tasks": tasks}))
    return tmp_path


def test_results_and_responses_of_a_run_get_the_scores(run, plain):
    with serving(by_number({0: 0.0, 1: 1.0, 2: 0.5, 3: (400, "no", 0.0)})) as server:
        done = judge_run(run, quick(server), plain)
        url = server.url
    assert done["mm_vet"].judged == 3
    tasks = json.loads((run / "results.json").read_text())["tasks"]
    assert tasks["mme"] == {"metrics": {"perception": 9}}
    assert tasks["mm_vet"]["metrics"] == {"judged": 0.75, "score": 0.5, "ocr": 0.5}
    assert tasks["mm_vet"]["n"] == 4
    summary = tasks["mm_vet"]["judge"]
    assert (summary["model"], summary["url"], summary["judged"]) == ("judge-1", url, 3)
    [failed] = summary["failed"]
    assert failed["id"] == "v1_3"
    assert "400" in failed["reason"]
    rows = [json.loads(line) for line in (run / "responses/mm_vet.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == [0.0, 1.0, 0.5, None]
    assert rows[1]["judgement"]["reply"] == "Score: 1.0"


def test_categories_and_the_baseline_get_scores(tmp_path, plain):
    metadata = {"reference": "no dog", "content": "cat"}
    rows = [
        {**row(n), "metadata": metadata, "category": name} for n, name in enumerate(["a", "a", "b"])
    ]
    (tmp_path / "responses").mkdir()
    lines = "".join(json.dumps(one) + "\n" for one in rows)
    for file in ("mmhal", "mmhal_no_image"):
        (tmp_path / "responses" / f"{file}.jsonl").write_text(lines)
        lines = lines.replace("an answer", "a guess")
    categories = {"a": {"n": 2, "judged": 0.0}, "b": {"n": 1, "judged": 0.0}}
    results = {"tasks": {"mmhal": {"metrics": {"judged": 0.0}, "per_category": categories}}}
    (tmp_path / "results.json").write_text(json.dumps(results))

    def step(body):
        text = body["messages"][0]["content"]
        number = int(re.search(r"question (\d)", text)[1])
        return completion(f"Rating: {number if 'a guess' in text else number + 3}")

    with serving(step) as server:
        done = judge_run(tmp_path, quick(server), plain)
    assert [done[name].judged for name in ("mmhal", "mmhal_no_image")] == [3, 3]
    entry = json.loads((tmp_path / "results.json").read_text())["tasks"]["mmhal"]
    assert entry["judge"]["judged"] == 6
    metrics, categories = entry["metrics"], entry["per_category"]
    assert (metrics["score"], metrics["hallucination_rate"]) == (4.0, 0.0)
    assert (metrics["score_no_image"], metrics["hallucination_rate_no_image"]) == (1.0, 1.0)
    assert (categories["a"]["score"], categories["a"]["n"]) == (3.5, 2)
    assert categories["b"]["score_no_image"] == 2.0


def test_directory_without_responses_to_judge_is_an_error(run, tmp_path, plain):
    endpoint = ChatEndpoint("http://localhost:1/v1", "judge-1")
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "results.json"):
        judge_run(tmp_path / "nowhere", endpoint, plain)
    (run / "results.json").write_text('{"tasks": {"mme": {}}}')
    with raises_input_error(ErrorCode.EMPTY_DATASET, run):
        judge_run(run, endpoint, plain)


def test_judge_in_a_running_event_loop(judge):
    """As in a notebook, whose cells run in an event loop."""

    async def cell(server):
        return judge([row(1)], server)

    with serving(completion("Score: 0.5")) as server:
        assert asyncio.run(cell(server)).judged == 1
