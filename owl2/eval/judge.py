"""Scores from a judge model for existing responses.

::

    RUN/responses/NAME.jsonl ──Rubric──► prompts ──ChatEndpoint──► RUN/judgements/NAME.jsonl
                                              ──metric──► RUN/results.json, report.md, report.html

Each judgement is written immediately, so that a later call resumes. Responses that cannot be judged
are listed and have no score.
"""

import asyncio
import hashlib
import json
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from owl2.errors import ErrorCode, InputError
from owl2.eval.metrics import Metric, find_metric
from owl2.eval.metrics.llm_judge import RUBRICS, Rubric
from owl2.eval.openai_client import ChatEndpoint, NoReplyError
from owl2.eval.report import load_results, write_report
from owl2.eval.samples import NO_IMAGE, EvalSample, Response, with_suffix
from owl2.eval.task_config import task_configs
from owl2.files import atomic_write_text, translate_write_errors
from owl2.json_records import json_lines
from owl2.sharded_jsonl import Record, remove_torn_line, to_json

WORKERS = 4  # concurrent requests
MAX_UNREACHED = 4  # in succession; then there are no further requests


@dataclass
class JudgeSummary:
    """The result of judging a file of responses.

    Attributes:
        judged: Number of responses with a judgement, including earlier ones.
        new: Number of judgements of this call.
        failed: Reasons by the ids of the other responses.
    """

    judged: int = 0
    new: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def judge_run(run: Path, endpoint: ChatEndpoint, console: Console) -> dict[str, JudgeSummary]:
    """Judge the responses of a run that need it, and update its results and its report.

    Args:
        run: The directory that `owl2 eval` wrote.

    Returns:
        Summaries by the names of tasks and baselines. The next call tries failed responses again.

    Raises:
        InputError: The directory is not that of a run, or no task needs a judge; the endpoint
            rejects the key or the model; all pending responses failed. Earlier judgements are kept.
    """
    results, configs = load_results(run), task_configs()
    names = [name for name in results["tasks"] if name in configs and configs[name].judge]
    if not names:
        raise InputError(f"No task of {run} needs a judge.", ErrorCode.EMPTY_DATASET)
    summaries = {}
    for name in names:
        entry, metric = results["tasks"][name], find_metric(configs[name].metric)
        judge: Record = {"model": endpoint.model, "url": endpoint.url, "judged": 0, "failed": []}
        entry |= {"metrics": {}, "judge": judge}
        for suffix in ("", NO_IMAGE):
            path = run / "responses" / f"{name}{suffix}.jsonl"
            if path.is_file() or not suffix:
                summaries[path.stem] = _judge_file(path, suffix, metric, entry, endpoint, console)
        atomic_write_text(run / "results.json", to_json(results, indent=2) + "\n")
    write_report(run)
    failed = [
        f"{name}, {identifier}: {reason}"
        for name, summary in summaries.items()
        for identifier, reason in summary.failed.items()
    ]
    if failed and not any(summary.new for summary in summaries.values()):
        raise InputError(
            f"No response could be judged: {len(failed)} failed. The first: {failed[0]}. The same "
            "command tries again.",
            ErrorCode.NETWORK,
        )
    return summaries


def _judge_file(
    path: Path,
    suffix: str,
    metric: Metric,
    entry: dict[str, Any],
    endpoint: ChatEndpoint,
    console: Console,
) -> JudgeSummary:
    """Judge the responses of a task or of its baseline, and update its entry in the results."""
    rows = [record.value for record in json_lines(path)]
    judgements = path.parent.parent / "judgements" / path.name
    summary = judge_rows(rows, RUBRICS[metric.name], endpoint, judgements, console)
    responses = [_judged_response(row) for row in rows]
    scores = metric.score(responses)
    for row, score in zip(rows, scores.per_sample, strict=True):
        row["score"] = score
    atomic_write_text(path, "".join(f"{to_json(row)}\n" for row in rows))
    entry["metrics"] |= with_suffix(scores.metrics, suffix)
    for category, values in entry.get("per_category", {}).items():
        own = [response for response in responses if response.sample.category == category]
        values |= with_suffix(metric.score(own).metrics if own else {}, suffix)
    entry["judge"]["judged"] += summary.judged
    entry["judge"]["failed"] += [
        {"id": f"{identifier}{suffix}", "reason": reason}
        for identifier, reason in summary.failed.items()
    ]
    return summary


def judge_rows(
    rows: Sequence[Record], rubric: Rubric, endpoint: ChatEndpoint, path: Path, console: Console
) -> JudgeSummary:
    """Judge responses concurrently; each row gets its `judgement`, or None.

    Args:
        rows: Lines of a file of responses: `id`, `question`, `metadata`, `response`.
        path: The file of the judgements. Their keys are digests of the judge and the prompt.

    Raises:
        InputError: The endpoint rejects the key or the model; earlier judgements are in `path`. A
            line of `path` is not a judgement.
    """
    prompts = [rubric.format(row["question"], row["metadata"], row["response"]) for row in rows]
    # As in the file of the responses, so that a second run has the same prompts.
    prompts = [json.loads(to_json(prompt)) for prompt in prompts]
    keys = [
        hashlib.sha256(f"{endpoint.model}\n{prompt}".encode()).hexdigest() for prompt in prompts
    ]
    known: dict[str, Record] = {}
    if path.is_file():
        remove_torn_line(path)
        known = {record.text("key"): record.value for record in json_lines(path)}
    pending = [index for index, key in enumerate(keys) if key not in known]
    summary, unreached = JudgeSummary(), 0
    with translate_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)

    async def judge(index: int, slots: asyncio.Semaphore) -> None:
        nonlocal unreached
        identifier, key = rows[index]["id"], keys[index]
        async with slots:
            if unreached >= MAX_UNREACHED:
                summary.failed[identifier] = "cancelled, as the server does not answer"
                return
            try:
                value, reply = await endpoint.ask(prompts[index], rubric.parse)
                unreached = 0
            except NoReplyError as error:
                unreached = 0 if error.reached else unreached + 1
                summary.failed[identifier] = str(error)
                console.out(f"{path.stem}, {identifier}: not judged: {error}")
                return
        judgement = {"id": identifier, "key": key, "judge": endpoint.model, "value": value}
        known[key] = judgement | {"reply": reply}
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{to_json(known[key])}\n")
        summary.new += 1

    async def judge_all() -> None:
        slots = asyncio.Semaphore(WORKERS)
        await asyncio.gather(*(judge(index, slots) for index in pending))

    _run(judge_all())
    for row, key in zip(rows, keys, strict=True):
        row["judgement"] = known.get(key)
    summary.judged = sum(row["judgement"] is not None for row in rows)
    line = f"{path.stem}: {summary.judged} of {len(rows)} responses are judged"
    console.out(line)
    return summary


def _run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run to the end; after an error or Ctrl-C the other requests are cancelled."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(coroutine)
    else:  # in a notebook, whose loop this thread runs
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, coroutine).result()


def _judged_response(row: Record) -> Response:
    judgement = row.get("judgement")
    metadata = {**row["metadata"], "judge_score": judgement and judgement["value"]}
    sample = EvalSample(row["id"], row["question"], [], (), row["category"], metadata)
    return Response(sample, row["prompt"], row["response"])
