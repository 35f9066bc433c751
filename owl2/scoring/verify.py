"""`owl2 info MODEL --verify`: scores of a checkpoint beside the published ones.

The project has no machine with the released weights. People who have them run this command and
report its output.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from owl2.checkpoints.weight_files import fingerprint
from owl2.engine.engine import Engine
from owl2.engine.load_model import ModelArgs
from owl2.errors import ErrorCode, InputError
from owl2.files import expand_user
from owl2.processing.messages import user_message
from owl2.scoring.methods import CHECKPOINTS
from owl2.scoring.scorer import ImageScorer, recognize

_Q_INSTRUCT_IMAGES = "https://raw.githubusercontent.com/Q-Future/Q-Instruct/main/fig"
QUESTION = "Describe the image."
NUM_TOKENS = 24
TOLERANCE = 0.01  # of a score: the difference between float16 and float32


@dataclass(frozen=True)
class PublishedScore:
    """A score of the image behind a URL in the documentation of a checkpoint."""

    image: str
    score: float


# Model family §2: README of Q-Instruct, float16. OneAlign: its model card, rounded to 0.001.
PUBLISHED: dict[str, tuple[PublishedScore, ...]] = {
    "q-future/one-align": (
        PublishedScore(
            "https://raw.githubusercontent.com/Q-Future/Q-Align/main/fig/singapore_flyer.jpg", 1.911
        ),
    ),
    "q-future/q-instruct-mplug-owl2-1031": (
        PublishedScore(f"{_Q_INSTRUCT_IMAGES}/sausage.jpg", 0.429931640625),
        PublishedScore(f"{_Q_INSTRUCT_IMAGES}/examples_211.jpg", 0.204833984375),
    ),
}


def verify(args: ModelArgs, images: Sequence[str] = ()) -> tuple[str, bool]:
    """A report in Markdown, and whether all scores agree with the published ones.

    Args:
        images: Files in place of the URLs of the published images, in their order.

    Raises:
        InputError: The checkpoint or an image cannot be loaded, or the number of images differs.
    """
    try:
        checkpoint, method = recognize(args.model, base=args.base)
    except InputError as error:
        if error.code is not ErrorCode.UNSUPPORTED:
            raise
        checkpoint, method = None, None
    published = PUBLISHED.get(checkpoint or "", ())
    if images and len(images) != len(published):
        raise InputError(
            f"{checkpoint or args.model} has {len(published)} published scores; {len(images)} "
            "images were passed.",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    engine = Engine(args.load_model(), args.load_processor())
    lines = ["| item | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in _facts(args, engine, checkpoint).items()]
    if method is None or method.comparison is not None:
        answer = engine.chat(
            [user_message(QUESTION, [_test_image()])], do_sample=False, max_new_tokens=NUM_TOKENS
        )
        lines += ["", f"Answer to {QUESTION!r} about the test image: {answer!r}"]
        return "\n".join(lines), True
    scorer = ImageScorer(engine, method, checkpoint=checkpoint)
    known = CHECKPOINTS.get(checkpoint or "")
    task = known.tasks[0] if known else "quality"
    lines += ["", f"| {task} of | published | computed | agrees |", "|---|---|---|---|"]
    agrees = True
    sources = [*images] or [one.image for one in published]
    for source, one, score in zip(sources, published, scorer.score(sources, task), strict=True):
        is_equal = abs(score.score - one.score) <= TOLERANCE
        agrees &= is_equal
        name = Path(source).name
        lines.append(
            f"| {name} | {one.score:.6f} | {score.score:.6f} | {'yes' if is_equal else 'NO'} |"
        )
    [own] = scorer.score([_test_image()], task)
    lines.append(f"| the test image of owl2 | unknown | {own.score:.6f} | |")
    return "\n".join(lines), agrees


def _facts(args: ModelArgs, engine: Engine, checkpoint: str | None) -> dict[str, Any]:
    folder = expand_user(args.model)
    provenance = engine.model.provenance
    weights = provenance.fingerprint if provenance else fingerprint(folder)
    return {
        "model": args.model,
        "recognized as": checkpoint or "no published scoring model",
        "revision": (provenance.revision if provenance else None) or "local",
        "fingerprint of the weights": weights,
        "image policy": engine.processor.image_processor.image_policy,
        "device": engine.model.device,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "owl2": version("owl2-vlm"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "Python": platform.python_version(),
    }


def _test_image() -> Image.Image:
    """An image that is the same everywhere: gradients with noise."""
    y, x = np.mgrid[0:300, 0:400]
    noise = np.random.RandomState(0).randint(0, 32, (300, 400))
    channels = [x * 223 // 399, y * 223 // 299, (x + y) % 224]
    return Image.fromarray(np.stack([one + noise for one in channels], -1).astype(np.uint8))
