"""The 9,673 questions of easy-VQA's test split, in the package's order; never to be trained on."""

from collections.abc import Iterator

from owl2.data.datasets import load_dataset
from owl2.data.datasets.easy_vqa import COLORS, SHAPES, SHORT_PROMPT
from owl2.eval.readers import Source
from owl2.eval.samples import Question


def easy_vqa(source: Source) -> Iterator[Question]:
    """Ids such as "easy_vqa/test#17".

    Raises:
        InputError: a prompt without `{question}`; the package easy-vqa is missing.
    """
    asked = load_dataset("easy_vqa", "test", style="single", prompt=source.prompt)
    bare = load_dataset("easy_vqa", "test", style="single", prompt=SHORT_PROMPT)
    for sample, words in zip(asked, bare, strict=True):
        *messages, answer = sample.messages
        [turn] = words.messages[:-1]
        text = "".join(part["text"] for part in turn["content"] if part["type"] == "text")
        expected = (answer["content"],)
        yield Question(sample.source, text, messages, expected, _kind(expected[0]))


def _kind(answer: str) -> str:
    kinds = {"yes or no": ("yes", "no"), "shape": SHAPES, "colour": COLORS}
    return next(kind for kind, answers in kinds.items() if answer in answers)
