"""What tests of the readers share: the fixtures, and a look into questions."""

from pathlib import Path

from owl2.eval.samples import Answer
from owl2.eval.tasks import find_tasks
from owl2.processing.chat_template import parse_messages

FIXTURES = Path(__file__).parent / "fixtures"
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def read(name, data=FIXTURES):
    [task] = find_tasks(name)
    return task.read(task.source(data))


def by_id(name, data=FIXTURES):
    return {question.id: question for question in read(name, data)[0]}


def words(question):
    return question.messages[-1]["content"][-1]["text"]


def images(question):
    return parse_messages(question.messages).images


def score(name, say):
    """The metric's figures when `say` answers each of the fixture's questions."""
    [task] = find_tasks(name)
    return task.metric.score([Answer(q, "", say(q)) for q in read(name)[0]]).metrics
