"""A server with a tiny model in a process, started with the environment of owl2.

The clients have an environment of their own, because their dependencies exclude those of owl2.
`OWL2_PYTHON` is the interpreter of the server; `make test-clients` sets it.
"""

import base64
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SERVER_PYTHON = os.environ.get("OWL2_PYTHON", str(ROOT / ".venv/bin/python"))
KEY = "secret-key"
MODEL = "tiny"

# Clients send no statistics, and download no prices, certificates or schemas.
os.environ |= {
    "DO_NOT_TRACK": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "PROMPTFOO_DISABLE_TELEMETRY": "1",
    "PROMPTFOO_DISABLE_UPDATE": "1",
    "HF_HUB_OFFLINE": "1",
    "NO_PROXY": "127.0.0.1",
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A model that answers with a few words, or with short strings in JSON."""
    directory = tmp_path_factory.mktemp("model")
    run_owl2(ROOT / "tests/clients/make_model.py", directory)
    return directory


@pytest.fixture(scope="session")
def server_url(checkpoint, tmp_path_factory):
    """The address of the server, without `/v1`."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"{KEY}\n")
    log = keys.with_name("server.log")
    options = ["--model", checkpoint, "--served-model-name", MODEL, "--port", "0"]
    options += ["--api-key-file", keys, "--device", "cpu", "--dtype", "float32"]
    with log.open("w") as output, owl2("-m", "owl2", "serve", *options, output=output) as server:
        try:
            yield _address(server, log)
        finally:
            server.terminate()
            server.wait(60)


def _address(server, log):
    while "Press Ctrl-C to stop." not in log.read_text():
        assert server.poll() is None, log.read_text()
        time.sleep(0.1)
    return re.search(r"http://127\.0\.0\.1:\d+", log.read_text())[0]


def owl2(*arguments, output=None):
    """A process with the interpreter of the server."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [SERVER_PYTHON, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=ROOT)


def run_owl2(*arguments):
    """Run a script in the environment of the server."""
    with owl2(*arguments, output=sys.stderr.fileno()) as process:
        assert process.wait() == 0


@pytest.fixture(scope="session")
def base_url(server_url):
    return f"{server_url}/v1"


@pytest.fixture(scope="session")
def image_url():
    """A red image as a data URL."""
    return data_url("red")


def data_url(color, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (16, 12), color).save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
