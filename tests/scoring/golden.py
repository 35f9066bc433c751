"""The golden values of the scoring models, see tests/golden/README.md."""

import json
from pathlib import Path

from safetensors.torch import load_file

FAMILY = Path(__file__).parent.parent / "golden" / "family"


def read(name, file):
    return json.loads((FAMILY / name / file).read_text(encoding="utf-8"))


def load_cases(name):
    return load_file(FAMILY / name / "cases.safetensors")


def image_files(name, images):
    return [FAMILY / name / "images" / f"{image}.png" for image in images]


def with_placeholders(ids, image_token_id):
    """Ids with one -200 for the positions of an image."""
    marked = [-200 if id_ == image_token_id else id_ for id_ in ids]
    pairs = zip([0, *marked], marked, strict=False)
    return [id_ for before, id_ in pairs if (before, id_) != (-200, -200)]
