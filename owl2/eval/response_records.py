"""Records of responses: generated texts, responses of lm-eval, and ranked options.

Each function generates records by the index of their sample, one batch at a time. Scores of images
are in `rater.py`.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from owl2.engine.engine import Engine
from owl2.engine.offline import output_all
from owl2.errors import InputError
from owl2.eval.conditions import render_prompt
from owl2.eval.fingerprints import image_digests
from owl2.eval.readers import EvalData
from owl2.eval.samples import EvalSample
from owl2.sharded_jsonl import Record

if TYPE_CHECKING:
    from owl2.eval.tasks import EvalTask

LM_EVAL_BATCHES = 8  # batches of lm-eval per call


def generated_texts(
    samples: Sequence[EvalSample],
    pending: Sequence[int],
    engine: Engine,
    batch_size: int,
    options: dict[str, Any],
) -> Iterator[dict[int, Record]]:
    """The answers of the engine.

    Args:
        options: As `Engine.batch` takes them.
    """
    prompts = {index: render_prompt(engine, samples[index].messages) for index in pending}
    # Similar lengths need little padding; the longest first, so that a lack of memory shows at the
    # start.
    order = sorted(pending, key=lambda index: -len(prompts[index]))
    conversations = (samples[index].messages for index in order)
    outputs = output_all(engine, conversations, batch_size, **options)
    for start in range(0, len(order), batch_size):
        records: dict[int, Record] = {}
        for index, output in zip(order[start : start + batch_size], outputs, strict=False):
            if isinstance(output, InputError):
                records[index] = {"invalid": str(output)}
                continue
            records[index] = {
                "prompt": prompts[index],
                "text": output.text,
                "images": image_digests(samples[index]),
                "truncated": output.finish_reason == "length",
            }
        yield records


def lm_eval_records(
    task: "EvalTask",
    data: EvalData,
    samples: Sequence[EvalSample],
    pending: Sequence[int],
    engine: Engine,
    batch_size: int,
) -> Iterator[dict[int, Record]]:
    """The responses and scores of lm-eval. Raises `InputError` as `run_lm_eval`."""
    from owl2.eval.adapters.text_tasks import run_lm_eval  # importing lm-eval takes seconds

    size = batch_size * LM_EVAL_BATCHES
    for start in range(0, len(pending), size):
        indices = pending[start : start + size]
        own = [samples[index] for index in indices]
        responses = run_lm_eval(task, data, own, engine, batch_size)
        yield {
            index: {
                "prompt": response.prompt,
                "text": response.text,
                "images": [],
                "scores": response.sample.metadata["scores"],
            }
            for index, response in zip(indices, responses, strict=True)
        }


def most_likely_options(
    samples: Sequence[EvalSample], pending: Sequence[int], engine: Engine, normalize: bool
) -> Iterator[dict[int, Record]]:
    """The responses of a task with `rank_options`; the scores are log-probabilities.

    Args:
        normalize: Divide by the number of tokens.
    """
    for index in pending:
        sample = samples[index]
        options = sample.metadata["options"]
        record: Record
        try:
            scores = engine.score(sample.messages, options, normalize=normalize)
            record = {
                "prompt": render_prompt(engine, sample.messages),
                "text": options[scores.index(max(scores))],
                "images": image_digests(sample),
                "scores": scores,
            }
        except InputError as error:
            record = {"invalid": str(error)}
        yield {index: record}
