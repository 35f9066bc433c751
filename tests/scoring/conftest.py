"""Engines of the golden checkpoints, one per session."""

import functools

import pytest

from owl2.engine.engine import Engine
from tests.scoring.golden import FAMILY


@pytest.fixture(scope="session")
def family_engine():
    """`family_engine("one_align")` is the engine of a golden checkpoint in float32."""

    @functools.cache
    def load(name):
        return Engine.from_pretrained(FAMILY / name / "model", device="cpu", dtype="float32")

    return load
