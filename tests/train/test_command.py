"""`owl2 train` as a user meets it: exit codes, messages, Ctrl-C in the terminal."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from owl2 import cli
from owl2.model.modeling import Owl2ForConditionalGeneration


@pytest.fixture
def recipe_file(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    settings = recipe(logging_steps=1).model_dump(exclude_unset=True)
    settings["data"] = [{"file": source["file"]} for source in settings["data"]]
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def exit_code(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["owl2", "train", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


def test_it_trains(monkeypatch, capsys, recipe_file, tmp_path):
    assert exit_code(monkeypatch, recipe_file, "max_steps=3", "seed=2") == 0
    out = capsys.readouterr().out
    assert "3 steps in" in out
    assert f"the model is in {tmp_path / 'run' / 'model'}" in out
    Owl2ForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["learnin_rate=1"], "nearest is `learning_rate`"),
        (["batch_size=many"], "`batch_size` is 'many', but must be a whole number"),
        (["model=/no/where"], "/no/where"),
        (["data.0.file=/no/where.json"], "/no/where.json"),
        (["image_size=7"], "image_size (7)"),
    ],
)
def test_what_the_user_got_wrong_exits_with_2(monkeypatch, capsys, recipe_file, arguments, words):
    assert exit_code(monkeypatch, recipe_file, *arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_a_loss_that_is_not_finite_exits_with_2_and_leaves_no_model(
    monkeypatch, capsys, recipe_file, tmp_path
):
    huge = ["learning_rate=1e30", "max_grad_norm=1e30", "warmup_steps=0"]
    assert exit_code(monkeypatch, recipe_file, *huge) == 2
    error = capsys.readouterr().err
    assert "error: step" in error
    assert "lower learning_rate" in error
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.slow
def test_ctrl_c_in_the_terminal_then_the_same_command(recipe_file, tmp_path):
    """The terminal sends it to the processes that prepare batches, too."""
    words = [recipe_file, "max_steps=40", "dataloader_num_workers=1"]
    command = [sys.executable, "-m", "owl2", "train", *map(str, words)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not log.is_file() or len(log.read_text(encoding="utf-8").splitlines()) < 4:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "of 40; run the same command to resume" in out
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "model").exists()

    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Resuming after step" in done.stdout
    assert "40 steps in" in done.stdout
