"""`owl2 train`: exit codes, messages, Ctrl-C in the terminal."""

import os
import signal
import subprocess
import sys

import pytest

from owl2.model.modeling import Owl2ForConditionalGeneration
from tests.train.runs import read_jsonl, wait_for, write_recipe


@pytest.fixture
def recipe_file(recipe, tmp_path):
    settings = recipe(logging_steps=1).model_dump(mode="json", exclude_unset=True)
    return write_recipe(tmp_path, settings)


def test_train_command(run_cli, recipe_file, tmp_path):
    result = run_cli("train", recipe_file, "max_steps=3", "seed=2")
    assert result.exit_code == 0
    assert "3 steps in" in result.stdout
    assert f"the model is in {tmp_path / 'run' / 'model'}" in result.stdout
    Owl2ForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.parametrize(
    ("argument", "needle"),
    [
        ("learnin_rate=1", "`learning_rate`"),
        ("batch_size=many", "`batch_size` is 'many'"),
        ("model=/no/where", "/no/where"),
        ("model=./runs/typo", "./runs/typo"),
        ("data.0.file=/no/where.json", "/no/where.json"),
        ("image_size=7", "image_size (7)"),
    ],
)
def test_invalid_argument_exits_with_2(run_cli, recipe_file, argument, needle):
    result = run_cli("train", recipe_file, argument)
    assert result.exit_code == 2
    assert needle in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_local_model_is_reported_without_asking_the_hub(run_cli, recipe_file, monkeypatch):
    def ask_the_hub(*args, **kwargs):
        pytest.fail("a request to the hub")

    monkeypatch.setattr("huggingface_hub.utils.get_session", ask_the_hub)
    for model in ("./runs/typo", "/no/where", "runs/demo/typo"):
        result = run_cli("train", recipe_file, f"model={model}")
        assert result.exit_code == 2 and model in result.stderr


def test_loss_that_is_not_finite_exits_with_2_and_writes_no_model(run_cli, recipe_file, tmp_path):
    diverging = ["learning_rate=1e30", "max_grad_norm=1e30", "warmup_steps=0"]
    result = run_cli("train", recipe_file, *diverging)
    assert result.exit_code == 2
    assert "step" in result.stderr and "learning_rate" in result.stderr
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.slow
def test_ctrl_c_in_the_terminal_and_resume(recipe_file, tmp_path):
    """The terminal sends SIGINT to the data loader workers too."""
    arguments = [recipe_file, "max_steps=40", "dataloader_num_workers=1"]
    command = [sys.executable, "-m", "owl2", "train", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = tmp_path / "run" / "log.jsonl"
    wait_for(lambda: process.poll() is not None or len(read_jsonl(log)) >= 4, seconds=120)
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
