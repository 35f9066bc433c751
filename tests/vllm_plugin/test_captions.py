"""`owl2 caption` writes the same file with both engines."""

import json
import os
import subprocess
import sys

import pytest

from tests.engine.conftest import random_image

pytestmark = pytest.mark.vllm


def test_both_engines_write_the_same_captions(checkpoint, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        random_image(number, size=(20, 12)).save(folder / f"{number}.png")
    (folder / "1b.png").write_bytes(b"broken")
    base = [sys.executable, "-m", "owl2", "caption", str(folder), "--model", str(checkpoint)]
    base += ["--dtype", "float32", "--max-new-tokens", "8"]
    engine_file, vllm_file = tmp_path / "engine_file.jsonl", tmp_path / "vllm_file.jsonl"
    for output, options in ((engine_file, ["--device", "cpu"]), (vllm_file, ["--engine", "vllm"])):
        command = [*base, *options, "--output-file", str(output)]
        subprocess.run(command, check=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert vllm_file.read_text("utf-8") == engine_file.read_text("utf-8")
    assert len(engine_file.read_text("utf-8").split("\n")) == 5
    [error] = json.loads((tmp_path / "vllm_file.report.json").read_text("utf-8"))["errors"]
    assert error["file_name"] == "1b.png"
