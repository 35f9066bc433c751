"""`owl2 serve` as a person starts it: what it prints works, and how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from owl2 import cli
from owl2.errors import InputError
from owl2.serve.launch import read_limits
from tests.serve.running import wait_until

ASKED = [{"role": "user", "content": "what is this?"}]


class Started:
    """A server in a process of its own; everything it prints, line by line."""

    def __init__(self, *arguments, environment=None, delay=0.0):
        # With a delay each token takes so long, that a test can do something meanwhile.
        code = (
            "import sys, time, owl2.cli\nfrom owl2.engine.running_batch import RunningBatch\n"
            "step = RunningBatch.step\n"
            f"RunningBatch.step = lambda self: (time.sleep({delay}), step(self))[1]\n"
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
        threading.Thread(target=self._read, daemon=True).start()
        wait_until(lambda: "Ctrl-C ends it." in self.lines or self.process.poll() is not None, 60)
        assert self.process.poll() is None, self.lines
        self.url = re.search(r"http://\S+(?=/v1\n)", "\n".join([*self.lines, ""]))[0]

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def ask(self, key="any", **options):
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)
        self.clients.append(client)  # or its connection is closed with it
        return client.chat.completions.create(model="tiny", messages=ASKED, **options)

    def signal(self, number):
        self.process.send_signal(number)

    def end(self):
        code = self.process.wait(20)
        time.sleep(0.05)  # for the last lines
        return code

    def has_closed(self):
        return httpx.get(f"{self.url}/health").status_code == 503


@pytest.fixture
def start(tiny_checkpoint):
    started = []

    def start(*arguments, **more):
        words = ["--model", tiny_checkpoint, "--port", "0", "--served-model-name", "tiny"]
        server = Started(*words, "--device", "cpu", *arguments, **more)
        started.append(server)
        return server

    yield start
    for server in started:
        server.process.kill()
        server.process.wait()
        for client in server.clients:
            client.close()


def run_line(server, **environment):
    """What the printed curl line gets."""
    [line] = [line for line in server.lines if line.startswith("curl ")]
    done = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ | environment,
    )
    return json.loads(done.stdout)


def test_what_it_prints_works_and_it_finishes_what_runs(start, tmp_path):
    file = tmp_path / "the keys"
    file.write_text("# ours\n\nfirst-secret-key\nsecond-secret-key\n")
    server = start("--api-key-file", file, delay=0.05)
    reply = run_line(server)
    assert reply["choices"][0]["message"]["content"]
    assert reply["model"] == "tiny"
    assert httpx.get(f"{server.url}/docs").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        server.ask("another-secret-key")

    stream = server.ask("second-secret-key", max_tokens=60, stream=True, temperature=0)
    first = next(stream)
    server.signal(signal.SIGTERM)
    wait_until(server.has_closed)
    with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
        server.ask("second-secret-key")
    assert refused.value.status_code == 503
    assert refused.value.response.headers["Retry-After"]
    chunks = [first, *stream]
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert len(chunks) > 10

    assert server.end() == 0
    log = "\n".join(server.lines)
    assert "POST /v1/chat/completions 200" in log
    assert "Traceback" not in log
    assert "secret" not in log


@pytest.mark.slow
def test_the_line_with_keys_in_the_environment(start):
    keys = {"TINY_KEYS": "first-key-1,second-key-2"}
    server = start("--api-key-env", "TINY_KEYS", environment=keys)
    assert run_line(server, **keys)["choices"]
    with pytest.raises(openai.AuthenticationError):
        server.ask()
    assert "first-key" not in "\n".join(server.lines)


@pytest.mark.slow
def test_what_is_not_finished_in_time_is_told_and_cut_off(start):
    server = start("--shutdown-timeout", "0.3", delay=0.2)
    stream = server.ask(max_tokens=100, stream=True, temperature=0)
    next(stream)
    server.signal(signal.SIGINT)
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    assert server.end() == 1
    assert "1 request(s) were cut off" in "\n".join(server.lines)


@pytest.fixture
def refused(monkeypatch, capfd):
    """What `owl2 serve` says when it ends with exit code 2 at once."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["owl2", "serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2
        [*_, line] = capfd.readouterr().err.splitlines()
        return line

    return run


def test_a_port_in_use_is_said_before_anything_is_loaded(refused):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = refused("--model", "no/such/model", "--port", port)
    assert f"Port {port} of 127.0.0.1 cannot be used" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--api-key-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE"),
        (["--api-key-env", "A", "--api-key-file", "b"], "not by both"),
        (["images=many"], "images=many"),
        (["colours=3"], "is no limit"),
        (["--port", "0"], "no/such/model"),
    ],
)
def test_wrong_options(refused, arguments, words):
    assert words in refused("--model", "no/such/model", "--port", "0", *arguments)


def test_limits():
    limits = read_limits(["images=3", "seconds=2.5", "remote=true"])
    assert (limits.max_images, limits.request_timeout, limits.allow_remote_images) == (3, 2.5, True)
    with pytest.raises(InputError, match="seconds=-1"):
        read_limits(["seconds=-1"])


def test_without_the_extra(refused, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("owl2.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'owl2-vlm[serve]'" in refused("--model", "any")
