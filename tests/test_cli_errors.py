"""Invalid input on the command line: one line on stderr, exit code 2, no traceback."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file


@pytest.fixture
def error_line(run_cli):
    """Runs a command that must fail and returns its only line on stderr."""

    def run(*arguments):
        result = run_cli(*arguments)
        assert (result.exit_code, result.stdout) == (2, ""), result
        assert "Traceback" not in result.stderr
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (10, 10), "red").save(path)
    return path


@pytest.fixture
def modified(tiny_checkpoint, tmp_path):
    """Creates a copy of the checkpoint after `change` modified its tensors."""

    def make(change):
        copy = tmp_path / "modified"
        copy.mkdir()
        for file in Path(tiny_checkpoint).iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        tensors = load_file(copy / "model.safetensors")
        change(tensors)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return make


def test_valid_commands_succeed(run_cli, tiny_checkpoint, image):
    arguments = ("chat", "--model", tiny_checkpoint, "--image", image, "--max-new-tokens", "5")
    result = run_cli(*arguments, "what is this?")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.endswith("\n")
    assert len(result.stdout) > 2
    sampled = run_cli(*arguments, "what is this?", "--seed", "3", "--temperature", "5")
    assert sampled.stdout != result.stdout
    assert run_cli(*arguments, "what is <|image|>?", "--image-policy", "pad").exit_code == 0


def test_conversation_is_read_from_stdin(run_cli, tiny_checkpoint, image, monkeypatch):
    lines = "what is this?\n/image nowhere.png\n/quit\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    result = run_cli("chat", "--model", tiny_checkpoint, "--image", image, "--max-new-tokens", 3)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "error: " in result.stdout and "nowhere.png" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["what?", "--image", "none.png"], ["none.png"]),
        (["what is <|image|><|image|>", "--image", "red.png"], ["2", "<|image|>"]),
        (["what is <|image|><|image|><|image|>", "--image", "red.png"], ["3", "<|image|>"]),
        ([""], ["empty"]),
        (["   "], ["empty"]),
        (["why " * 300], ["128"]),
        (["what?", "--device", "abacus"], ["abacus"]),
        (["what?", "--dtype", "int3"], ["int3"]),
        (["what?", "--image-policy", "stretch"], ["stretch"]),
        (["what?", "--temperature", "-1"], ["-1"]),
        (["what?", "--top-p", "2"], ["2"]),
        (["what?", "--max-new-tokens", "0"], ["0"]),
    ],
)
def test_invalid_input(error_line, tiny_checkpoint, image, monkeypatch, arguments, needles):
    monkeypatch.chdir(image.parent)
    line = error_line("chat", "--model", tiny_checkpoint, *arguments)
    assert all(needle in line for needle in needles)


def test_broken_image(error_line, tiny_checkpoint, image):
    image.write_bytes(image.read_bytes()[:50])
    assert "red.png" in error_line("chat", "--model", tiny_checkpoint, "--image", image, "what?")
    image.write_text("no image")
    line = error_line("chat", "--model", tiny_checkpoint, "--image", image, "what?")
    assert "red.png" in line


def test_decompression_bomb(error_line, run_cli, tiny_checkpoint, tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (12_000, 12_000)).save(path)
    arguments = ("chat", "--model", tiny_checkpoint, "--image", path, "what?")
    assert "144,000,000" in error_line(*arguments)
    result = run_cli(*arguments, "--max-pixels", 150_000_000, "--max-new-tokens", "1")
    assert result.exit_code == 0
    Image.new("1", (20, 20)).save(path)
    assert "100 pixels" in error_line(*arguments, "--max-pixels", 100)


@pytest.mark.parametrize(("option", "value"), [("--seed", 2**64), ("--max-pixels", 0)])
def test_options_out_of_their_range(run_cli, tiny_checkpoint, option, value):
    result = run_cli("chat", "--model", tiny_checkpoint, "what?", option, value)
    assert result.exit_code == 2
    assert option in result.stderr


def test_missing_checkpoint(error_line, tmp_path, image):
    assert "red.png" in error_line("chat", "--model", image, "what?")
    assert "empty" in error_line("chat", "--model", tmp_path / "empty", "what?")
    (tmp_path / "empty").mkdir()
    assert "empty" in error_line("chat", "--model", tmp_path / "empty", "what?")


def test_mismatched_checkpoint_keys_are_listed(run_cli, modified):
    def change(tensors):
        tensors["model.norm.wight"] = tensors.pop("model.norm.weight")
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()

    result = run_cli("chat", "--model", modified(change), "what?")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    for line in ("model.norm.weight", "model.norm.wight", "lm_head.weight"):
        assert line in result.stderr


def test_corrupt_weight_file(error_line, modified):
    copy = modified(lambda tensors: None)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    assert "modified" in error_line("chat", "--model", copy, "what?")


@pytest.mark.parametrize("options", [(), ("--temperature", "1", "--seed", "1")])
def test_logits_that_are_not_finite(error_line, modified, options):
    def change(tensors):
        tensors["lm_head.weight"][3] = torch.nan

    line = error_line("chat", "--model", modified(change), "what?", *options)
    assert "not finite" in line


def test_recipes(error_line, tiny_checkpoint, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    good = {"model": str(tiny_checkpoint), "output": str(tmp_path / "out"), "stage": 2}
    good |= {"data": [{"dataset": "easy_vqa"}]}
    recipe.write_text(json.dumps(good | {"learning_rat": 1e-3}))
    assert "learning_rate" in error_line("train", recipe)
    recipe.write_text(json.dumps(good | {"max_steps": "many"}))
    assert "max_steps" in error_line("train", recipe)
    assert "none.yaml" in error_line("train", tmp_path / "none.yaml")
    assert not (tmp_path / "out").exists()


def test_full_disk_under_the_log():
    command = [sys.executable, "-m", "owl2", "version"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
