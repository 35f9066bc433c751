"""Other questions about images: MME, MM-Vet and easy-VQA."""

from collections.abc import Iterator
from pathlib import Path

from owl2.data.datasets import load_dataset
from owl2.data.datasets.easy_vqa import COLORS, SHAPES
from owl2.errors import ErrorCode, InputError
from owl2.eval.metrics.yes_no import COGNITION, PERCEPTION
from owl2.eval.readers import EvalData, read_each, read_text
from owl2.eval.samples import EvalSample, InvalidEvalSample
from owl2.json_records import JsonRecord, json_entries

MME_FOLDER = "questions_answers_YN"
MME_REQUEST = "Please answer yes or no."  # replaced by the prompt of the task


def mme(data: EvalData) -> Iterator[EvalSample | InvalidEvalSample]:
    """MME (arXiv:2306.13394): folders by category, with a text file for each image.

    Text and image are in the same folder, or in ``questions_answers_YN/`` and ``images/``. The two
    lines of a text are a question and its answer, Yes or No, with a tab between them. Ids are such
    as "OCR/0001#1"; categories are the 14 folders.

    Raises:
        InputError: A category has no texts.
    """
    for category in (*PERCEPTION, *COGNITION):
        for path in data.siblings(f"{category}/*.txt", f"{category}/{MME_FOLDER}/*.txt"):
            try:
                yield from _mme_samples(data, category, path)
            except InputError as error:  # one of many files, such as notes
                yield InvalidEvalSample(f"{category}/{path.stem}", str(error))


def _mme_samples(
    data: EvalData, category: str, path: Path
) -> Iterator[EvalSample | InvalidEvalSample]:
    folder = path.parent.parent / "images" if path.parent.name == MME_FOLDER else path.parent
    candidates = [folder / f"{path.stem}{suffix}" for suffix in (".jpg", ".png", ".jpeg")]
    image = next((candidate for candidate in candidates if candidate.exists()), None)
    metadata = {"category": category, "image": path.stem}
    for number, (text, answer) in enumerate(_mme_pairs(path), start=1):
        identifier = f"{category}/{path.stem}#{number}"
        if image is None:
            yield InvalidEvalSample(identifier, f"The image of {path} does not exist.")
            continue
        question = text.removesuffix(MME_REQUEST).rstrip()
        yield data.sample(identifier, question, [image], [answer], category, metadata)


def _mme_pairs(path: Path) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        question, tab, answer = line.rpartition("\t")
        if not tab or answer.strip().lower() not in ("yes", "no"):
            raise InputError(
                f"{path}, line {number}: {line!r:.80} is not a question, a tab, and Yes or No.",
                ErrorCode.INVALID_FORMAT,
            )
        pairs.append((question.strip(), answer.strip()))
    return pairs


def mm_vet(data: EvalData) -> Iterator[EvalSample | InvalidEvalSample]:
    """MM-Vet (arXiv:2308.02490): 218 questions that combine several capabilities.

    Ids are such as "v1_17". `<AND>` and `<OR>` in the reference are for the judge.

    Raises:
        InputError: `mm-vet.json` is missing or has another format.
    """
    entries = dict(json_entries(data.file("mm-vet.json")))
    identifiers = list(entries)

    def make(identifier: str, row: JsonRecord) -> EvalSample:
        image = data.image(f"images/{row.text('imagename')}")
        metadata = {"reference": row.text("answer"), "capabilities": row.texts("capability")}
        return data.sample(identifier, row.text("question"), [image], (), metadata=metadata)

    return read_each(entries.values(), lambda number, _: identifiers[number - 1], make)


def easy_vqa(data: EvalData) -> Iterator[EvalSample]:
    """The 9,673 questions of the test split of easy-VQA; never use them for training.

    Ids are such as "easy_vqa/test#17", in the order of the package.

    Raises:
        InputError: The prompt does not contain `{question}`; the package easy-vqa is missing.
    """
    categories = {"yes or no": ("yes", "no"), "shape": SHAPES, "color": COLORS}
    prompted = load_dataset("easy_vqa", "test", style="single", prompt=data.prompt)
    plain = load_dataset("easy_vqa", "test", style="single", prompt="{question}")
    for sample, bare in zip(prompted, plain, strict=True):
        *messages, response = sample.messages
        parts = bare.messages[0]["content"]
        question = "".join(part["text"] for part in parts if part["type"] == "text")
        answer = response["content"]
        category = next(name for name, answers in categories.items() if answer in answers)
        yield EvalSample(sample.source, question, messages, (answer,), category)
