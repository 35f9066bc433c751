"""Answers that wait for a judge → scores.

::

    RUN/answers/NAME.jsonl ──Rubric──► prompts ──Endpoint──► RUN/judgements/NAME.jsonl
                                                      ──metric──► RUN/results.json

Each judgement is written down as soon as it is there, so that a run that was killed, or that the
server failed, goes on where it was. What cannot be judged is named, and never scored as wrong.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from owl2.errors import InputError
from owl2.eval.metrics import Metric, find_metric
from owl2.eval.metrics.llm_judge import RUBRICS, Rubric
from owl2.eval.openai_client import Endpoint, NoReply
from owl2.eval.response_cache import json_text
from owl2.eval.samples import Answer, Question
from owl2.eval.task_config import Recipe, recipes
from owl2.files import atomic_write_text
from owl2.json_records import json_lines, json_object

WORKERS = 4
BLIND = "_blind"  # ends the names of what was asked without the image
UNREACHED_IN_A_ROW = 4  # then the server is taken to be away

Say = Callable[[str], None]
Judgement = dict[str, Any]  # a line of the journal: id, key, value, reply, judge


@dataclass
class Judged:
    """What came of a task's answers.

    Attributes:
        judged: how many have a judgement now, earlier ones too.
        new: how many of them were made by this call.
        failed: why the others have none, by the question's id.
    """

    judged: int = 0
    new: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def judge_run(
    run: Path, url: str, model: str, say: Say = print, *, endpoint: Endpoint | None = None
) -> dict[str, Judged]:
    """Judge the answers of a run that need it; its results have the scores afterwards.

    Args:
        run: the folder that `owl2 eval` wrote.
        endpoint: with other limits than the usual ones; `url` and `model` otherwise.

    Returns:
        By task. Those that failed are asked again by the next call.

    Raises:
        InputError: no such run, or nothing in it that is to be judged; an endpoint that refuses the
            key or the model. Judgements made until then are kept.
    """
    endpoint = endpoint or Endpoint(url, model)
    path = run / "results.json"
    if not path.is_file():
        raise InputError(f"{path} is not there: give the folder that `owl2 eval` wrote.")
    results = json_object(path).value
    table = recipes()
    names = [name for name in results.get("tasks", {}) if name in table and table[name].judge]
    if not names:
        raise InputError(f"{run} has no task that a judge scores.")
    done = {}
    for name in names:
        done[name] = _judge_task(run, name, table[name], results["tasks"][name], endpoint, say)
        atomic_write_text(path, json_text(results, indent=2) + "\n")
    return done


def _judge_task(
    run: Path, name: str, recipe: Recipe, entry: dict[str, Any], endpoint: Endpoint, say: Say
) -> Judged:
    """Judges a task's answers, those without the image too, and changes its entry of results."""
    metric = find_metric(recipe.metric)
    metrics: dict[str, float] = {}
    kinds: dict[str, dict[str, float]] = entry.get("by_answer_kind", {})
    both = Judged()
    for ending in ("", BLIND):
        file = run / "answers" / f"{name}{ending}.jsonl"
        if ending and not file.is_file():
            continue
        rows = [row.value for row in json_lines(file)]
        journal = Journal(run / "judgements" / f"{name}{ending}.jsonl")
        judged = judge_rows(rows, RUBRICS[metric.name], endpoint, journal, f"{name}{ending}", say)
        answers = [_answer(row) for row in rows]
        for row, score in zip(rows, metric.score(answers).each, strict=True):
            row["score"] = score
        atomic_write_text(file, "".join(json_text(row) + "\n" for row in rows))
        metrics |= _named(metric, answers, ending)
        for kind, figures in kinds.items():
            some = [answer for answer in answers if answer.question.kind == kind]
            figures |= _named(metric, some, ending) if some else {}
        both.judged += judged.judged
        both.new += judged.new
        both.failed |= {f"{key}{ending}": reason for key, reason in judged.failed.items()}
    entry["metrics"] = metrics
    entry["judge"] = {
        "model": endpoint.model,
        "url": endpoint.url,
        "judged": both.judged,
        "not_judged": [{"id": key, "reason": reason} for key, reason in both.failed.items()],
    }
    return both


def _named(metric: Metric, answers: Sequence[Answer], ending: str) -> dict[str, float]:
    return {f"{name}{ending}": value for name, value in metric.score(answers).metrics.items()}


class Journal:
    """Judgements in a file, a line each as soon as it is there.

    Attributes:
        known: by key, which is of the judge's model and of all that it was asked.

    Raises:
        InputError: a line that is none of ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Judgement] = {}
        if not path.is_file():
            return
        # A kill may leave half a line at the end; what comes next must not be joined to it.
        whole = path.read_bytes().rpartition(b"\n")
        path.write_bytes(whole[0] + whole[1])
        for row in json_lines(path):
            self.known[row.text("key")] = row.value

    def add(self, judgement: Judgement) -> None:
        """Write it down."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_text(judgement) + "\n")
        self.known[judgement["key"]] = judgement


def judge_rows(
    rows: Sequence[dict[str, Any]],
    rubric: Rubric,
    endpoint: Endpoint,
    journal: Journal,
    name: str,
    say: Say,
) -> Judged:
    """Judge answers, `WORKERS` at once; each row gets its `judgement`, or None.

    Args:
        rows: as `owl2 eval` writes answers: `id`, `question`, `facts`, `answer`.
        name: what `say` is told that this is about.

    Raises:
        InputError: the endpoint refuses the key or the model; what it said before is in `journal`.
    """
    prompts = [rubric.ask(row["question"], row["facts"], row["answer"]) for row in rows]
    keys = [_key(endpoint.model, prompt) for prompt in prompts]
    todo = [place for place, key in enumerate(keys) if key not in journal.known]
    result = Judged()
    pool, stop = ThreadPoolExecutor(WORKERS), threading.Event()
    try:
        asked = {
            pool.submit(endpoint.ask, prompts[place], rubric.read, stop): place for place in todo
        }
        for place, future in _finished(asked):
            identity = {"id": rows[place]["id"], "key": keys[place], "judge": endpoint.model}
            if future.cancelled():
                result.failed[rows[place]["id"]] = "not asked, as the server does not answer"
            elif isinstance(error := future.exception(), NoReply):
                result.failed[rows[place]["id"]] = str(error)
                say(f"{name}, {rows[place]['id']}: not judged: {error}")
            else:
                value, reply = future.result()
                journal.add({**identity, "value": value, "reply": reply})
                result.new += 1
    finally:
        stop.set()  # or Ctrl-C would wait for all attempts of those that are being asked
        pool.shutdown(wait=False, cancel_futures=True)
    for row, key in zip(rows, keys, strict=True):
        row["judgement"] = journal.known.get(key)
    result.judged = sum(row["judgement"] is not None for row in rows)
    say(f"{name}: {result.judged} of {len(rows)} answers are judged")
    return result


def _finished(asked: dict["Future[Any]", int]) -> "Iterator[tuple[int, Future[Any]]]":
    """Places with what came of them, as they come.

    When the server is away, or refuses us, the rest is cancelled; a refusal is raised at the end.
    """
    unreached = 0
    refused: InputError | None = None
    for future in as_completed(asked):
        error = None if future.cancelled() else future.exception()
        if isinstance(error, InputError):
            refused = error
        else:
            yield asked[future], future
        if not future.cancelled():
            unreached = unreached + 1 if isinstance(error, NoReply) and not error.reached else 0
        if refused or unreached >= UNREACHED_IN_A_ROW:
            for other in asked:
                other.cancel()
    if refused is not None:
        raise refused


def _key(model: str, prompt: str) -> str:
    return hashlib.sha256(f"{model}\n{prompt}".encode(errors="surrogatepass")).hexdigest()


def _answer(row: dict[str, Any]) -> Answer:
    judgement = row.get("judgement")
    facts = {**row["facts"], "judged": None if judgement is None else judgement["value"]}
    question = Question(row["id"], row["question"], [], (), row["kind"], facts)
    return Answer(question, row["prompt"], row["answer"])
