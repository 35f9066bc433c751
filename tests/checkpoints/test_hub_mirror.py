"""A mirror of the hub (`HF_ENDPOINT`): a server on this machine with the API of the hub."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "owner/tiny-owl2"


@pytest.fixture
def mirror(tiny_checkpoint):
    """The address, and the requested files so far."""
    requested = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.split("?")[0].rpartition("/")[2]
            file = tiny_checkpoint / name
            is_file = self.path.startswith(f"/{REPOSITORY}/resolve/") and file.is_file()
            content = file.read_bytes() if is_file else b"{}"
            if is_file and self.command == "GET":
                requested.append(name)
            self.send_response(200 if is_file else 404)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{name}"')
            if not is_file:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", requested
        server.shutdown()


def owl2(endpoint, cache, *arguments):
    """A command in its own process: huggingface_hub reads the variable when it is imported."""
    variables = {key: value for key, value in os.environ.items() if "HUB_OFFLINE" not in key}
    variables |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "owl2", *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_models_are_loaded_from_a_mirror(mirror, tmp_path):
    endpoint, requested = mirror
    result = owl2(endpoint, tmp_path, "info", REPOSITORY)
    assert result.returncode == 0, result.stderr
    assert REPOSITORY in result.stdout
    assert "config.json" in requested and "model.safetensors" not in requested
    arguments = ("--model", REPOSITORY, "--device", "cpu", "--max-new-tokens", "2", "what?")
    result = owl2(endpoint, tmp_path, "chat", *arguments)
    assert result.returncode == 0, result.stderr
    assert {"model.safetensors", "tokenizer.model", "processor_config.json"} <= set(requested)


@pytest.mark.slow
def test_missing_repository_and_unreachable_mirror_are_errors(mirror, tmp_path):
    endpoint, _ = mirror
    result = owl2(endpoint, tmp_path, "info", "owner/missing")
    assert (result.returncode, "owner/missing" in result.stderr) == (2, True)
    assert "Traceback" not in result.stderr
    result = owl2("http://127.0.0.1:9", tmp_path, "info", REPOSITORY)
    assert (result.returncode, REPOSITORY in result.stderr) == (2, True)
    assert "Traceback" not in result.stderr
