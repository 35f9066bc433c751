"""`owl2 serve` as a process: its output, its options and its shutdown."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
from fastapi import FastAPI

from owl2.constants import MAX_NUM_FRAMES
from owl2.errors import ErrorCode
from owl2.serve.config import MIB, ServerConfig, ServerLimits
from owl2.serve.launch import Server, bind_socket
from tests.errors import raises_input_error
from tests.serve.running import wait_until

MESSAGES = [{"role": "user", "content": "what is this?"}]


class ServerProcess:
    """`owl2 serve` in a process.

    Args:
        delay: Seconds that are added to each decoding step.

    Attributes:
        lines: The output.
    """

    def __init__(self, *arguments, environment=None, delay=0.0):
        code = (
            "import sys, time, owl2.cli\nfrom owl2.engine.engine_core import EngineCore\n"
            f"EngineCore.on_step = lambda core, num_running: time.sleep({delay})\n"
            "sys.argv = ['owl2', 'serve', *sys.argv[1:]]\nowl2.cli.main()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        )
        self.lines, self.clients = [], []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        started = "Press Ctrl-C to stop."
        wait_until(lambda: started in self.lines or self.process.poll() is not None, 60)
        assert self.process.poll() is None, self.lines
        self.url = re.search(r"http://\S+(?=/v1\n)", "\n".join([*self.lines, ""]))[0]

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def ask(self, key="any", **options):
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)
        self.clients.append(client)  # keeps the connection open
        return client.chat.completions.create(model="tiny", messages=MESSAGES, **options)

    def wait(self):
        exit_code = self.process.wait(20)
        self._reader.join(5)
        return exit_code

    def close(self):
        self.process.kill()
        self.process.wait()
        for client in self.clients:
            client.close()

    def run_curl_example(self, **environment):
        [line] = [line for line in self.lines if line.startswith("curl ")]
        result = subprocess.run(
            ["bash", "-c", line],
            capture_output=True,
            text=True,
            timeout=30,
            env=os.environ | environment,
        )
        return json.loads(result.stdout)


@pytest.fixture
def start(tiny_checkpoint):
    started = []

    def start(*arguments, **options):
        model = ["--model", tiny_checkpoint, "--port", "0", "--served-model-name", "tiny"]
        started.append(ServerProcess(*model, "--device", "cpu", *arguments, **options))
        return started[-1]

    yield start
    for server in started:
        server.close()


def test_printed_example_works_and_shutdown_finishes_requests(start, tmp_path):
    file = tmp_path / "the keys"
    file.write_text("# comment\n\nfirst-secret-key\nsecond-secret-key\n")
    server = start("--api-key-file", file, delay=0.05)
    reply = server.run_curl_example()
    assert reply["choices"][0]["message"]["content"]
    assert reply["model"] == "tiny"
    assert httpx.get(f"{server.url}/docs").status_code == 200
    rebound = httpx.get(f"{server.url}/health", headers={"Host": "rebind.example"})
    assert rebound.status_code == 403  # on a loopback address
    with pytest.raises(openai.AuthenticationError):
        server.ask("another-secret-key")

    stream = server.ask("second-secret-key", max_tokens=60, stream=True, temperature=0)
    first = next(stream)
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
    with pytest.raises(openai.InternalServerError) as rejected:
        server.ask("second-secret-key")
    assert (rejected.value.status_code, rejected.value.code) == (503, "shutting_down")
    assert rejected.value.response.headers["Retry-After"]
    chunks = [first, *stream]
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert len(chunks) > 10

    assert server.wait() == 0
    log = "\n".join(server.lines)
    assert "POST /v1/chat/completions 200" in log
    assert "Traceback" not in log
    assert "secret" not in log


@pytest.mark.slow
def test_printed_example_works_with_keys_from_environment(start):
    keys = {"TINY_KEYS": "first-key-1,second-key-2"}
    server = start("--api-key-env", "TINY_KEYS", environment=keys)
    assert server.run_curl_example(**keys)["choices"]
    with pytest.raises(openai.AuthenticationError):
        server.ask()
    assert "first-key" not in "\n".join(server.lines)


@pytest.mark.slow
def test_shutdown_timeout_aborts_requests(start):
    server = start("--shutdown-timeout", "0.3", delay=0.2)
    stream = server.ask(max_tokens=100, stream=True, temperature=0)
    next(stream)
    server.process.send_signal(signal.SIGINT)
    with pytest.raises(openai.APIError) as aborted:
        list(stream)
    assert aborted.value.code == "shutting_down"
    assert server.wait() == 1
    assert "1 request(s)" in "\n".join(server.lines)


def test_shutdown_timeout_may_be_zero():
    assert ServerConfig(model="tiny", shutdown_timeout=0.0).shutdown_timeout == 0
    with raises_input_error(ErrorCode.INVALID_VALUE, "shutdown_timeout"):
        ServerConfig(model="tiny", shutdown_timeout=-1.0)


def test_port_in_use_is_reported_before_the_model_is_loaded(run_cli):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run_cli("serve", "--model", "no/such/model", "--port", port)
    assert result.exit_code == 2
    assert str(port) in result.stderr
    assert "no/such/model" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--api-key-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE"),
        (["--api-key-env", "A", "--api-key-file", "b"], "--api-key-file"),
        (["--max-images", "many"], "--max-images"),
        (["--max-n", "1000"], "max_n"),
        (["--no-such-option"], "--no-such-option"),
        ([], "no/such/model"),
    ],
)
def test_invalid_options_exit_with_2(run_cli, arguments, value):
    result = run_cli("serve", "--model", "no/such/model", "--port", "0", *arguments)
    assert result.exit_code == 2
    assert value in result.stderr


@pytest.mark.parametrize("command", ["serve", "web"])
def test_limits_are_options(run_cli, monkeypatch, command):
    configs = []
    monkeypatch.setattr("owl2.serve.launch.serve_model", lambda config: configs.append(config) or 0)
    options = ["--max-images", "3", "--request-timeout", "2.5", "--allow-remote-images"]
    assert run_cli(command, "--model", "any", *options).exit_code == 0
    [config] = configs
    assert (config.max_images, config.request_timeout, config.allow_remote_images) == (3, 2.5, True)
    assert config.web == (command == "web")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_images", -1),
        ("max_num_seqs", 0),
        ("max_n", 129),
        ("num_frames", MAX_NUM_FRAMES + 1),
        ("request_timeout", 0.0),
        ("body_timeout", float("inf")),
        ("image_fetch_timeout", float("nan")),
        ("image_decode_memory", MIB),
    ],
)
def test_limits_out_of_range(name, value):
    with raises_input_error(ErrorCode.INVALID_VALUE, name, value):
        ServerLimits(**{name: value})


def test_every_number_of_frames_of_a_checkpoint_is_served():
    assert ServerLimits().with_frames(MAX_NUM_FRAMES).num_frames == MAX_NUM_FRAMES


def serve_until_stopped(lifespan):
    """The exit code of a server that is stopped when it has started, and whether it started."""
    app = FastAPI(lifespan=lifespan)
    app.state.admission = SimpleNamespace(limits=ServerLimits(), shutting_down=False, in_flight=0)
    started = []

    def stop():
        started.append(True)
        server.handle_exit(signal.SIGTERM, None)

    with bind_socket("127.0.0.1", 0) as bound:
        server = Server(app, on_start=stop)
        try:
            return server.serve_until_signal(bound), bool(started)
        except SystemExit as exit:  # uvicorn's, if the startup fails
            return exit.code, bool(started)


@asynccontextmanager
async def lifespan_that_ends(app):
    yield


@asynccontextmanager
async def lifespan_with_failing_shutdown(app):
    yield
    raise OSError("a directory")


@asynccontextmanager
async def lifespan_with_failing_startup(app):
    raise OSError("no decoder")
    yield


@pytest.mark.parametrize(
    ("lifespan", "expected"),
    [
        (lifespan_that_ends, (0, True)),
        (lifespan_with_failing_shutdown, (1, True)),
        (lifespan_with_failing_startup, (3, False)),
    ],
)
def test_exit_code_after_a_failed_startup_or_shutdown(lifespan, expected):
    assert serve_until_stopped(lifespan) == expected


def test_every_limit_is_documented():
    path = Path(__file__).parents[2] / "docs/reference/server-options.md"
    text = path.read_text(encoding="utf-8")
    for limit in fields(ServerLimits):
        option = f"--{limit.name.replace('_', '-')}"
        default = {False: "off", None: "checkpoint's"}.get(limit.default) or f"{limit.default:g}"
        if isinstance(limit.default, int) and limit.default >= MIB:
            default = str(limit.default)
        [row] = [line for line in text.splitlines() if line.startswith(f"| `{option}`")]
        assert row.split("|")[2].split()[0] == default, option


def test_documented_proxies_accept_the_largest_upload():
    text = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
    limits = ServerLimits()
    uploads = limits.max_images * limits.max_image_bytes
    uploads += limits.max_videos * limits.max_video_bytes + MIB
    [nginx] = re.findall(r"client_max_body_size (\d+)m;", text)
    [caddy] = re.findall(r"max_size (\d+)MB", text)
    for size in (int(nginx) * MIB, int(caddy) * 10**6):
        assert size >= max(uploads, limits.max_body_bytes)
    [minutes] = re.findall(r"read_body (\d+)m\n", text)
    assert int(minutes) * 60 >= limits.body_timeout * (limits.max_images + limits.max_videos)


def test_missing_extra_is_reported(run_cli, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("owl2.serve.")]:
        if name != "owl2.serve.config":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = run_cli("serve", "--model", "any")
    assert result.exit_code == 2
    assert "owl2-vlm[serve]" in result.stderr
