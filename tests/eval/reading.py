"""Shared by the tests of evaluation: the fixtures, parts of samples, and written files."""

import json
from pathlib import Path

from owl2.eval.samples import EvalSample, Response
from owl2.eval.tasks import find_tasks
from owl2.processing.messages import parse_messages

FIXTURES = Path(__file__).parent / "fixtures"
SHORT = "\nAnswer the question using a single word or phrase."
# Of the authors' evaluation scripts.
REQUEST = " Answer the question using a single word or phrase."
LETTER_REQUEST = "\nAnswer with the option’s letter from the given choices directly."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def read(name, data=FIXTURES, prompt=None, prompts="authors"):
    [task] = find_tasks(name)
    return task.read(task.data(data, prompt, prompts))


def by_id(name, data=FIXTURES):
    return {sample.id: sample for sample in read(name, data)[0]}


def prompt_text(sample):
    return sample.messages[-1]["content"][-1]["text"]


def images(sample):
    return parse_messages(sample.messages).images


def score(name, respond):
    """The metrics if `respond` is the response to each sample of the fixture."""
    [task] = find_tasks(name)
    responses = [Response(sample, "", respond(sample)) for sample in read(name)[0]]
    return task.metric.score(responses).metrics


def response(text, *expected, **metadata):
    """A response to a sample with these expected answers."""
    return Response(EvalSample(text, "?", [], expected, metadata=metadata), "", text)


def files(folder):
    """The paths of all files, relative to the folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def rows(path):
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
