"""Bad input through the real command line: a clear error, exit code 2, no traceback."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from owl2 import cli


@pytest.fixture
def owl2(monkeypatch, capfd):
    """The command: its exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["owl2", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def refused(owl2):
    """Runs the command, which must fail; gives its only line on stderr."""

    def run(*arguments):
        code, out, err = owl2(*arguments)
        assert code == 2, (out, err)
        assert out == ""
        assert "Traceback" not in err
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (10, 10), "red").save(path)
    return path


@pytest.fixture
def spoilt(tiny_checkpoint, tmp_path):
    """A copy of the checkpoint whose weights `change` (a function of the tensors) has spoilt."""

    def make(change):
        copy = tmp_path / "spoilt"
        copy.mkdir()
        for file in Path(tiny_checkpoint).iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        tensors = load_file(copy / "model.safetensors")
        change(tensors)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return make


def test_what_works(owl2, tiny_checkpoint, image):
    arguments = ("chat", "--model", tiny_checkpoint, "--image", image, "--max-new-tokens", "5")
    code, out, err = owl2(*arguments, "what is this?")
    assert (code, err) == (0, "")
    assert out.endswith("\n")
    assert len(out) > 2
    assert owl2(*arguments, "what is this?", "--seed", "3", "--temperature", "5")[1] != out
    assert owl2(*arguments, "what is <|image|>?", "--image-policy", "pad")[0] == 0


def test_a_conversation_is_read_from_stdin(owl2, tiny_checkpoint, image, monkeypatch):
    lines = "what is this?\n/image nowhere.png\n/quit\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, out, err = owl2(
        "chat", "--model", tiny_checkpoint, "--image", image, "--max-new-tokens", 3
    )
    assert (code, err) == (0, "")
    assert "error: No image at 'nowhere.png'" in out


def test_as_a_program(tiny_checkpoint, tmp_path):
    command = [sys.executable, "-m", "owl2", "chat", "--model", str(tiny_checkpoint), "what?"]
    command += ["--image", str(tmp_path / "none.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: No image at")
    assert done.stderr.count("\n") == 1


def test_a_missing_image(refused, tiny_checkpoint, tmp_path):
    path = tmp_path / "none.png"
    assert str(path) in refused("chat", "--model", tiny_checkpoint, "--image", path, "what?")


def test_a_broken_image(refused, tiny_checkpoint, image):
    image.write_bytes(image.read_bytes()[:50])
    assert "red.png" in refused("chat", "--model", tiny_checkpoint, "--image", image, "what?")
    image.write_text("no image")
    line = refused("chat", "--model", tiny_checkpoint, "--image", image, "what?")
    assert "is not an image" in line


def test_a_decompression_bomb(refused, owl2, tiny_checkpoint, tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (12_000, 12_000)).save(path)
    arguments = ("chat", "--model", tiny_checkpoint, "--image", path, "what?")
    assert "144,000,000 pixels; the limit is" in refused(*arguments)
    assert owl2(*arguments, "--max-pixels", 150_000_000, "--max-new-tokens", "1")[0] == 0
    Image.new("1", (20, 20)).save(path)
    assert "the limit is 100" in refused(*arguments, "--max-pixels", 100)


@pytest.mark.parametrize("placeholders", [2, 3])
def test_more_placeholders_than_images(refused, tiny_checkpoint, image, placeholders):
    question = "what is " + "<|image|>" * placeholders
    line = refused("chat", "--model", tiny_checkpoint, "--image", image, question)
    assert f"{placeholders} <|image|> for 1 image" in line


@pytest.mark.parametrize("question", ["", "   ", "<|image|>"])
def test_an_empty_question(refused, tiny_checkpoint, image, question):
    line = refused("chat", "--model", tiny_checkpoint, "--image", image, question)
    assert "empty" in line


def test_a_prompt_beyond_the_context(refused, tiny_checkpoint):
    line = refused("chat", "--model", tiny_checkpoint, "why " * 300)
    assert "context is 128" in line
    assert "too many" in line


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--device", "abacus"),
        ("--dtype", "int3"),
        ("--image-policy", "crop"),
        ("--temperature", "-1"),
        ("--top-p", "2"),
        ("--max-new-tokens", "0"),
    ],
)
def test_wrong_options(refused, tiny_checkpoint, option, value):
    line = refused("chat", "--model", tiny_checkpoint, "what?", option, value)
    assert value in line


@pytest.mark.parametrize(("option", "value"), [("--seed", 2**64), ("--max-pixels", 0)])
def test_options_out_of_their_range(owl2, tiny_checkpoint, option, value):
    code, _, err = owl2("chat", "--model", tiny_checkpoint, "what?", option, value)
    assert code == 2
    assert option in err


def test_no_checkpoint(refused, tmp_path, image):
    assert "red.png" in refused("chat", "--model", image, "what?")
    assert "empty" in refused("chat", "--model", tmp_path / "empty", "what?")
    (tmp_path / "empty").mkdir()
    assert "empty" in refused("chat", "--model", tmp_path / "empty", "what?")


def test_checkpoints_whose_keys_do_not_fit(owl2, spoilt):
    def change(tensors):
        tensors["model.norm.wight"] = tensors.pop("model.norm.weight")
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()

    code, out, err = owl2("chat", "--model", spoilt(change), "what?")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for line in ("1 missing:", "1 unexpected:", "1 of another shape:", "model.norm.wight"):
        assert line in err, "all three lists belong into one message"


def test_a_broken_weight_file(refused, spoilt):
    copy = spoilt(lambda tensors: None)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    assert "spoilt" in refused("chat", "--model", copy, "what?")


@pytest.mark.parametrize("options", [(), ("--temperature", "1", "--seed", "1")])
def test_logits_that_are_not_finite(refused, spoilt, options):
    def change(tensors):
        tensors["lm_head.weight"][3] = torch.nan

    line = refused("chat", "--model", spoilt(change), "what?", *options)
    assert "not finite" in line


def test_recipes(refused, tiny_checkpoint, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    good = {"model": str(tiny_checkpoint), "output": str(tmp_path / "out"), "stage": 2}
    good |= {"data": [{"dataset": "easy_vqa"}]}
    recipe.write_text(json.dumps(good | {"learning_rat": 1e-3}))
    assert "learning_rate" in refused("train", recipe)
    recipe.write_text(json.dumps(good | {"max_steps": "many"}))
    assert "max_steps" in refused("train", recipe)
    assert "none.yaml" in refused("train", tmp_path / "none.yaml")
    assert not (tmp_path / "out").exists()
