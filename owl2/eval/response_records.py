"""Records of responses that are not generated texts: of lm-eval, and of ranked options.

A function generates records by the index of their sample, one batch at a time, as
`TaskRun.responses_to`.
"""

from collections.abc import Iterator, Sequence

from owl2.engine.engine import Engine
from owl2.errors import InputError
from owl2.eval.conditions import render_prompt
from owl2.eval.fingerprints import image_digests
from owl2.eval.readers import EvalData
from owl2.eval.samples import EvalSample
from owl2.eval.tasks import EvalTask
from owl2.sharded_jsonl import Record

LM_EVAL_BATCHES = 8  # batches of lm-eval per call


def lm_eval_records(
    task: EvalTask,
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
