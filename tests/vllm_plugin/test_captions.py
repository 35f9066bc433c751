"""`owl2 caption --engine vllm` writes the file that our own engine writes."""

import json
import os
import subprocess
import sys

import pytest

from tests.engine.conftest import random_image

pytestmark = pytest.mark.vllm


def test_the_same_file_through_vllm(checkpoint, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        random_image(number, size=(20, 12)).save(folder / f"{number}.png")
    (folder / "1b.png").write_bytes(b"broken")
    base = [sys.executable, "-m", "owl2", "caption", str(folder), "--model", str(checkpoint)]
    base += ["--dtype", "float32", "--max-new-tokens", "8"]
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    for output, options in ((ours, ["--device", "cpu"]), (theirs, ["--engine", "vllm"])):
        command = [*base, *options, "--output-file", str(output)]
        subprocess.run(command, check=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert theirs.read_text("utf-8") == ours.read_text("utf-8")
    assert len(ours.read_text("utf-8").split("\n")) == 5
    [error] = json.loads((tmp_path / "theirs.report.json").read_text("utf-8"))["errors"]
    assert error["file_name"] == "1b.png"
