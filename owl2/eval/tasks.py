"""Tasks by name: what is asked, what is expected, and how answers are scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from owl2.data.datasets import load_dataset
from owl2.data.datasets.easy_vqa import COLOURS, SHAPES, SHORT_PROMPT
from owl2.data.datasets.prompts import VQA_PROMPT
from owl2.data.names import look_up
from owl2.data.sample import Message
from owl2.errors import InputError
from owl2.eval.scoring import EXACT_MATCH, Scorer
from owl2.processing.chat import IMAGE_TOKEN


@dataclass(frozen=True)
class Question:
    """One question, asked by itself.

    `id`: where it came from, such as "easy_vqa/test#17"; unique in its task. `text`: the bare
    question. `messages`: what the model is asked, which ends with a user turn; pictures are not yet
    opened. `expected`: the answers that are right. `kind`: what the results are broken down by.
    """

    id: str
    text: str
    messages: list[Message]
    expected: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Task:
    """`read(prompt)` gives the questions; `prompt` (the default one) has `{question}` in it.

    `max_new_tokens`: how long an answer may be, with any tokenizer.
    """

    name: str
    read: Callable[[str], list[Question]]
    prompt: str
    scorer: Scorer
    max_new_tokens: int


def read_easy_vqa(prompt: str) -> list[Question]:
    """The 9,673 questions of easy-VQA's test split, in the package's order.

    Raises:
        InputError: a prompt without `{question}`; the package easy-vqa is missing.
    """
    asked = load_dataset("easy_vqa", "test", style="single", prompt=prompt)
    bare = load_dataset("easy_vqa", "test", style="single", prompt=SHORT_PROMPT)
    questions = []
    for sample, words in zip(asked, bare, strict=True):
        *messages, answer = sample.messages
        [turn] = words.messages[:-1]
        text = "".join(part["text"] for part in turn["content"] if part["type"] == "text")
        expected = (answer["content"],)
        questions.append(Question(sample.source, text, messages, expected, _kind(expected[0])))
    return questions


def _kind(answer: str) -> str:
    kinds = {"yes or no": ("yes", "no"), "shape": SHAPES, "colour": COLOURS}
    return next(kind for kind, answers in kinds.items() if answer in answers)


TASKS = {
    "easy_vqa": Task("easy_vqa", read_easy_vqa, VQA_PROMPT, EXACT_MATCH, max_new_tokens=10),
}


def find_tasks(names: str) -> list[Task]:
    """The tasks of a list such as "easy_vqa,another", each once.

    Raises:
        InputError: a name that is no task's (says which is the nearest), or none at all.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise InputError(f"No task is named. There are: {', '.join(sorted(TASKS))}.")
    return [look_up("task", name, TASKS) for name in dict.fromkeys(wanted)]


def full_prompt(task: Task, prompt: str | None) -> str:
    """The prompt to use: the task's own for None, the bare question for "short"."""
    return task.prompt if prompt is None else SHORT_PROMPT if prompt == "short" else prompt


def without_pictures(messages: Sequence[Message]) -> list[Message]:
    """The same messages, blind: no picture, and no place for one."""
    return [{**message, "content": _words(message["content"])} for message in messages]


def _words(content: str | list[Message]) -> str | list[Message]:
    if isinstance(content, str):
        return content.replace(IMAGE_TOKEN, "")
    texts = [part for part in content if part["type"] == "text"]
    return [{**part, "text": part["text"].replace(IMAGE_TOKEN, "")} for part in texts]
