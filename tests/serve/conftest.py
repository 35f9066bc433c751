"""A tiny engine, and apps over it."""

import pytest


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint):
    from owl2.inference.engine import Engine

    return Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
