"""A tiny engine, and servers with it."""

import pytest


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint):
    from owl2.engine.engine import Engine

    return Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def server_url(tiny_engine):
    """A server with the tiny engine; the model is called tiny."""
    from owl2.serve.app import build_app
    from tests.serve.running import run_app

    with run_app(build_app(tiny_engine, "tiny")) as url:
        yield url


@pytest.fixture
def client(server_url):
    """OpenAI's client without retries, which would hide errors."""
    from openai import OpenAI

    with OpenAI(base_url=f"{server_url}/v1", api_key="any", max_retries=0, timeout=30) as client:
        yield client
