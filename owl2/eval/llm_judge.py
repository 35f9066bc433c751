"""Scores from a judge model for existing responses.

::

    RUN/responses/NAME.jsonl ──Rubric──► prompts ──ChatEndpoint──► RUN/judgements/NAME.jsonl
                                                       ──metric──► RUN/results.json

Each judgement is written immediately, so that a later call resumes. Responses that cannot be judged
are listed and have no score.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from owl2.errors import ErrorCode, InputError
from owl2.eval.metrics import find_metric
from owl2.eval.metrics.llm_judge import RUBRICS, Rubric
from owl2.eval.openai_client import ChatEndpoint, NoReplyError
from owl2.eval.report import load_results
from owl2.eval.samples import NO_IMAGE, EvalSample, Response, with_suffix
from owl2.eval.task_config import TaskConfig, task_configs
from owl2.files import atomic_write_text
from owl2.json_records import json_lines
from owl2.sharded_jsonl import Record, remove_torn_line, to_json

WORKERS = 4  # concurrent requests
MAX_UNREACHED = 4  # in succession; then the remaining requests are cancelled

Log = Callable[[str], None]


@dataclass
class JudgeSummary:
    """The result of judging a task.

    Attributes:
        judged: Number of responses with a judgement, including earlier ones.
        new: Number of judgements of this call.
        failed: Reasons by the ids of the other responses.
    """

    judged: int = 0
    new: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def judge_run(
    run: Path, url: str, model: str, log: Log = print, *, endpoint: ChatEndpoint | None = None
) -> dict[str, JudgeSummary]:
    """Judge the responses of a run that need it, and update its results.

    Args:
        run: The directory that `owl2 eval` wrote.
        log: Receives lines about the progress.
        endpoint: Replaces `url` and `model`, for other timeouts and retries.

    Returns:
        Summaries by task. The next call tries failed responses again.

    Raises:
        InputError: The directory is not that of a run, or no task needs a judge; the endpoint
            rejects the key or the model. Earlier judgements are kept.
    """
    endpoint = endpoint or ChatEndpoint(url, model)
    results, configs = load_results(run), task_configs()
    names = [name for name in results["tasks"] if name in configs and configs[name].judge]
    if not names:
        raise InputError(f"No task of {run} needs a judge.", ErrorCode.EMPTY_DATASET)
    summaries = {}
    for name in names:
        entry = results["tasks"][name]
        summaries[name] = _judge_task(run, name, configs[name], entry, endpoint, log)
        atomic_write_text(run / "results.json", to_json(results, indent=2) + "\n")
    return summaries


def _judge_task(
    run: Path,
    name: str,
    config: TaskConfig,
    entry: dict[str, Any],
    endpoint: ChatEndpoint,
    log: Log,
) -> JudgeSummary:
    """Judge a task and its baseline, and update its entry in the results."""
    metric = find_metric(config.metric)
    metrics: dict[str, float] = {}
    total = JudgeSummary()
    for suffix in ("", NO_IMAGE):
        file = run / "responses" / f"{name}{suffix}.jsonl"
        if suffix and not file.is_file():
            continue
        rows = [record.value for record in json_lines(file)]
        journal = JudgementLog(run / "judgements" / file.name)
        summary = judge_rows(rows, RUBRICS[metric.name], endpoint, journal, file.stem, log)
        responses = [_judged_response(row) for row in rows]
        scores = metric.score(responses)
        for row, score in zip(rows, scores.per_sample, strict=True):
            row["score"] = score
        atomic_write_text(file, "".join(f"{to_json(row)}\n" for row in rows))
        metrics |= with_suffix(scores.metrics, suffix)
        for category, values in entry.get("per_category", {}).items():
            own = [response for response in responses if response.sample.category == category]
            values |= with_suffix(metric.score(own).metrics if own else {}, suffix)
        total.judged += summary.judged
        total.new += summary.new
        total.failed |= {f"{key}{suffix}": reason for key, reason in summary.failed.items()}
    entry["metrics"] = metrics
    entry["judge"] = {
        "model": endpoint.model,
        "url": endpoint.url,
        "judged": total.judged,
        "failed": [{"id": key, "reason": reason} for key, reason in total.failed.items()],
    }
    return total


class JudgementLog:
    """The judgements in a JSONL file.

    Attributes:
        known: Judgements by key, a digest of the name of the judge and of the prompt.

    Raises:
        InputError: A line is not a judgement.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Record] = {}
        if path.is_file():
            remove_torn_line(path)
            self.known = {record.text("key"): record.value for record in json_lines(path)}

    def append(self, judgement: Record) -> None:
        """Write a judgement."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{to_json(judgement)}\n")
        self.known[judgement["key"]] = judgement


def judge_rows(
    rows: Sequence[Record],
    rubric: Rubric,
    endpoint: ChatEndpoint,
    journal: JudgementLog,
    name: str,
    log: Log,
) -> JudgeSummary:
    """Judge responses concurrently; each row gets its `judgement`, or None.

    Args:
        rows: Lines of a file of responses: `id`, `question`, `metadata`, `response`.
        name: For lines to `log`.

    Raises:
        InputError: The endpoint rejects the key or the model; earlier judgements are in `journal`.
    """
    prompts = [rubric.format(row["question"], row["metadata"], row["response"]) for row in rows]
    keys = [
        hashlib.sha256(f"{endpoint.model}\n{prompt}".encode(errors="surrogatepass")).hexdigest()
        for prompt in prompts
    ]
    summary = JudgeSummary()
    pool, stop = ThreadPoolExecutor(WORKERS), threading.Event()
    try:
        requests = {
            pool.submit(endpoint.ask, prompt, rubric.parse, stop): index
            for index, prompt in enumerate(prompts)
            if keys[index] not in journal.known
        }
        for index, future in _completed(requests):
            identifier = rows[index]["id"]
            if future.cancelled():
                summary.failed[identifier] = "cancelled, as the server does not answer"
            elif isinstance(error := future.exception(), NoReplyError):
                summary.failed[identifier] = str(error)
                log(f"{name}, {identifier}: not judged: {error}")
            else:
                value, reply = future.result()
                row = {"id": identifier, "key": keys[index], "judge": endpoint.model}
                journal.append({**row, "value": value, "reply": reply})
                summary.new += 1
    finally:
        stop.set()  # otherwise Ctrl-C waits for all attempts of the running requests
        pool.shutdown(wait=False, cancel_futures=True)
    for row, key in zip(rows, keys, strict=True):
        row["judgement"] = journal.known.get(key)
    summary.judged = sum(row["judgement"] is not None for row in rows)
    log(f"{name}: {summary.judged} of {len(rows)} responses are judged")
    return summary


def _completed(requests: "dict[Future[Any], int]") -> "Iterator[tuple[int, Future[Any]]]":
    """Indices and futures as they complete.

    If the server does not answer or rejects the request, the remaining requests are cancelled. A
    rejection is raised at the end.
    """
    unreached = 0
    rejection: InputError | None = None
    for future in as_completed(requests):
        error = None if future.cancelled() else future.exception()
        if isinstance(error, InputError):
            rejection = error
        else:
            yield requests[future], future
        if not future.cancelled():
            is_unreached = isinstance(error, NoReplyError) and not error.reached
            unreached = unreached + 1 if is_unreached else 0
        if rejection or unreached >= MAX_UNREACHED:
            for other in requests:
                other.cancel()
    if rejection is not None:
        raise rejection


def _judged_response(row: Record) -> Response:
    judgement = row.get("judgement")
    metadata = {**row["metadata"], "judge_score": judgement and judgement["value"]}
    sample = EvalSample(row["id"], row["question"], [], (), row["category"], metadata)
    return Response(sample, row["prompt"], row["response"])
