"""Quantize a trained model of a study and write its model card.

    python recipes/small/package_model.py recipes/small/small_model.yaml --output MODEL

The card contains the scores of the quantized model, those without images, those before
quantization, the changes of the text abilities, the licenses of the training data, and the limits.
"""

import argparse
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jinja2 import StrictUndefined, Template
from rich.console import Console

STUDY = Path(__file__).parents[1] / "study"
sys.path.append(str(STUDY))

from cells import Runner, finished  # noqa: E402 - of the directory that was added above
from measures import BASELINES, MEASURES, measure  # noqa: E402
from study import read_study  # noqa: E402

from owl2 import Owl2ForConditionalGeneration  # noqa: E402
from owl2.errors import ErrorCode, InputError  # noqa: E402
from owl2.files import atomic_directory, atomic_write_text  # noqa: E402
from owl2.processing.processor import Owl2Processor  # noqa: E402
from owl2.quantization.command import Calibration, quantize  # noqa: E402

NAME = "owl2-small"  # on the hub
ARM = "full"
MAX_SIZE = 150_000_000  # bytes of the checkpoint
TEXT_MEASURES = ("perplexity", "hamexam")
CARD = Path(__file__).with_name("model_card.md.jinja")


def package(
    study_file: Path, output: Path, arm: str = ARM, seed: int = 0, name: str = NAME
) -> dict[str, Any]:
    """Write the quantized checkpoint with its card; returns the scores of the quantized model.

    Args:
        name: On the hub, for the card.

    Raises:
        InputError: The model has not been trained; the checkpoint has more than `MAX_SIZE` bytes.
    """
    study = read_study(study_file)
    runner = Runner(study, Console(stderr=True, highlight=False))
    folder = runner.cell_folder(arm, seed)
    trained = Path(runner.cell_recipes(arm, seed)[-1].output) / "model"
    if not finished(trained) or not (folder / "cell.json").is_file() or study.measures is None:
        raise InputError(
            f"{trained} does not exist. Train it with `python recipes/study/run.py {study_file} "
            f"--arms {arm}`, with keep_models: true.",
            ErrorCode.FILE_NOT_FOUND,
        )
    scores = output.parent / "scores"
    if not finished(output):
        shutil.rmtree(scores, ignore_errors=True)  # of an earlier model
        _quantize(trained, output, Path(study.measures.data))
    if (size := checkpoint_size(output)) > MAX_SIZE:
        raise InputError(
            f"{output} has {size / 1e6:.0f} MB, more than {MAX_SIZE / 1e6:.0f} MB.",
            ErrorCode.INVALID_VALUE,
        )
    start, data = runner.common_models(arm)[0][1], Path(study.measures.data)
    limit = study.measures.limit
    found = {
        "size": size,
        "arm": study.arms[arm].title or arm,
        "quantized": measure(output, start, data, scores / "quantized", limit=limit),
        "trained": json.loads((folder / "cell.json").read_text("utf-8")),
        "start": measure(start, start, data, scores / "start", limit=limit, only=TEXT_MEASURES),
        "categories": categories(scores / "quantized" / "responses"),
        "data": json.loads((data / "data.json").read_text("utf-8")),
    }
    atomic_write_text(output / "README.md", model_card(name, found))
    return found


def _quantize(trained: Path, output: Path, data: Path) -> None:
    """Write the model with 4-bit weights; GPTQ uses questions of the training data."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent) as scratch:
        half = Path(scratch) / "half"
        model = Owl2ForConditionalGeneration.from_pretrained(trained, dtype=torch.bfloat16)
        model.save_pretrained(half)
        Owl2Processor.from_pretrained(trained).save_pretrained(half)
        is_tied = model.config.tie_word_embeddings
        del model
        calibration = Calibration([str(data / "questions.json"), str(data / "text.json")])
        quantize(half, Path(scratch) / "model", method="gptq", share_embeddings=is_tied,
                 calibration=calibration)  # fmt: skip
        with atomic_directory(output) as directory:
            shutil.copytree(Path(scratch) / "model", directory, dirs_exist_ok=True)


def checkpoint_size(folder: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def categories(responses: Path) -> dict[str, tuple[int, float, float]]:
    """Of each category of the exact questions: their number, the share of correct answers, and the
    share that the answer to most of them would have."""
    rows = map(json.loads, (responses / "test_exact.jsonl").read_text("utf-8").splitlines())
    scores: dict[str, list[float]] = {}
    answers: dict[str, Counter[str]] = {}
    for row in rows:
        scores.setdefault(row["category"], []).append(row["score"])
        answers.setdefault(row["category"], Counter())[row["expected"][0]] += 1
    return {
        name: (len(own), sum(own) / len(own), max(answers[name].values()) / len(own))
        for name, own in sorted(scores.items())
    }


def model_card(name: str, found: dict[str, Any]) -> str:
    """The README.md of the checkpoint; all figures are of this run."""
    rows = []
    for measure_name, title in MEASURES.items():
        if measure_name not in BASELINES.values():
            values = (
                found["quantized"].get(measure_name),
                found["quantized"].get(BASELINES.get(measure_name, "")),
                found["trained"]["metrics"].get(measure_name),
                found["start"].get(measure_name),
            )
            rows.append([title, *map(_format, values)])
    template = Template(CARD.read_text("utf-8"), undefined=StrictUndefined)
    return f"{template.render(found, name=name, measures=rows)}\n"


def _format(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--name", default=NAME, help="on the hub; default: %(default)s")
    parser.add_argument("--arm", default=ARM)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        found = package(given.study, given.output, given.arm, given.seed, given.name)
    except InputError as error:
        parser.exit(2, f"{error}\n")
    print(f"{given.output}: {found['size'] / 1e6:.0f} MB, model card in README.md")
    print(f"Publish it with: hf upload USER/{given.name} {given.output}")


if __name__ == "__main__":
    main()
