"""The README's server: its `owl2 serve` command, curl command and Python client work together."""

import json
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from owl2 import cli
from owl2.serve import launch
from tests.documents import blocks, commands
from tests.serve.running import wait_until

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
README_URL = "http://127.0.0.1:8000"  # replaced by the URL with a free port


@pytest.fixture(scope="module")
def url(tiny_checkpoint):
    """The URL of the README's command with a tiny model, in a thread; test_launch has processes."""
    [line] = [line for line in commands(README) if line.startswith("owl2 serve")]
    command = shlex.split(line.replace("runs/demo/model", str(tiny_checkpoint)))
    configs, servers = [], []

    class RecordedServer(launch.Server):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            servers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*command, "--port", "0", "--device", "cpu"])
        patch.setattr(launch, "serve_model", lambda config: configs.append(config) or 0)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code in (0, None)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(launch, "Server", RecordedServer)
        exit_code = pool.submit(launch.serve_model, *configs)
        wait_until(lambda: exit_code.done() or (servers and servers[0].started), 60)
        yield launch.socket_url(servers[0].servers[0].sockets[0])
        servers[0].handle_exit(signal.SIGTERM, None)
        assert exit_code.result(20) == 0


@pytest.fixture
def demo_image(tmp_path, monkeypatch):
    """An image at the path that the README's examples read."""
    monkeypatch.chdir(tmp_path)
    Path("runs/demo/images").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save("runs/demo/images/1.png")


@pytest.mark.usefixtures("demo_image")
def test_curl_command(url):
    [line] = [block for block in blocks(README, "bash") if block.startswith("curl")]
    done = subprocess.run(
        ["bash", "-c", line.replace(README_URL, url)], capture_output=True, text=True, check=True
    )
    [choice] = json.loads(done.stdout)["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")


@pytest.mark.usefixtures("demo_image")
def test_python_client(url, capsys):
    """The streamed output equals the answer without streaming."""
    from openai import OpenAI

    [code] = [block for block in blocks(README, "python") if "import OpenAI" in block]
    code = code.replace(README_URL, url).replace("stream=True", "stream=True, max_tokens=8")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    complete = OpenAI(base_url=f"{url}/v1", api_key="none").chat.completions.create(
        model="owl2",
        max_tokens=8,
        messages=json.loads(_messages(code, names["image"])),
    )
    assert capsys.readouterr().out == complete.choices[0].message.content != ""


def _messages(code, image):
    """The messages of the README's client, as JSON."""
    inner = re.search(r"messages=(\[.*?\n    \]),", code, re.DOTALL)[1]
    return json.dumps(eval(inner, {"image": image}))


def test_web_page_is_served(url):
    assert f"{README_URL}/web" in README
    page = httpx.get(f"{url}/web", follow_redirects=True)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
