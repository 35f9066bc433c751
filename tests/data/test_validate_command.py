"""`owl2 data check` on the command line: exit codes, recipes, invalid arguments."""

import json
import os
import signal
from dataclasses import astuple

import pytest

from owl2.data.open_dataset import unique_names
from owl2.data.validate.command import effective_max_length
from owl2.data.validate.validator import SampleValidator
from owl2.errors import ErrorCode
from tests.data.bad_rows import BAD, MAX_LENGTH, ROWS, save_checkpoint, write_rows


@pytest.fixture
def checkpoint(tmp_path, processor):
    return save_checkpoint(tmp_path, processor)


@pytest.fixture
def chat(tmp_path):
    return write_rows(tmp_path)


@pytest.fixture
def check(run_cli, monkeypatch):
    """`owl2 data check`, as (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: astuple(run_cli("data", "check", *arguments))


def test_the_exit_code_depends_on_invalid_samples(check, checkpoint, chat, tmp_path):
    options = ("--model", checkpoint, "--max-length", MAX_LENGTH, "--workers", 1)
    code, out, err = check(*options, chat, f"images={tmp_path}", "--output", tmp_path / "out")
    assert (code, err) == (1, "")
    assert f"{len(BAD)} samples are invalid" in out
    assert len((tmp_path / "out" / "invalid_samples.jsonl").read_text().splitlines()) == len(BAD)
    chat.write_text(json.dumps([ROWS[0][0]]))
    code, out, err = check(*options, chat)
    assert (code, err) == (0, "")
    assert "No sample is invalid." in out
    assert "tokens per sample, before truncation" in out


def test_a_second_check_replaces_the_results_of_the_first(check, checkpoint, chat, tmp_path):
    options = ("--model", checkpoint, chat, f"images={tmp_path}", "--workers", 1)
    output = tmp_path / "out"
    assert check(*options, "--output", output)[0] == 1
    chat.write_text(json.dumps([ROWS[0][0]]))
    assert check(*options, "--output", output)[0] == 0
    names = {"invalid_samples.jsonl", "statistics.json", "statistics.png"}
    assert {path.name for path in output.iterdir()} == names
    assert (output / "invalid_samples.jsonl").read_text() == ""
    assert json.loads((output / "statistics.json").read_text())["all"]["rows"] == 1
    code, _, err = check(*options, "--output", chat)
    assert code == 2 and str(chat) in err and "Not a directory" in err


def test_keys_that_are_not_read_are_counted(check, checkpoint, chat, tmp_path):
    row = ROWS[0][0]
    chat.write_text(
        json.dumps([row | {"id": 1, "model": "x"}, row | {"id": 2}, row | {"img": "a"}])
    )
    output = tmp_path / "out"
    code, out, _ = check("--model", checkpoint, chat, "--workers", 1, "--output", output)
    assert code == 1
    assert "id (2), model (1)" in out and "'img'" in out
    facts = json.loads((output / "statistics.json").read_text(encoding="utf-8"))
    assert facts["all"]["unused_keys"] == {"id": 2, "model": 1}
    assert facts["all"]["invalid_by_code"] == {ErrorCode.UNKNOWN_NAME: 1}


def test_the_exit_code_after_an_interrupt(check, checkpoint, chat, monkeypatch):
    validate = SampleValidator.validate

    def interrupted(self, sample: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return validate(self, sample)

    monkeypatch.setattr(SampleValidator, "validate", interrupted)
    code, out, err = check("--model", checkpoint, chat, "--workers", 1)
    assert (code, err) == (130, "")
    assert "Stopped after 1 rows" in out
    assert "No sample is invalid" not in out


def test_a_recipe_provides_model_length_and_batch_size(check, checkpoint, chat, tmp_path):
    recipe = {
        "model": str(checkpoint),
        "output": str(tmp_path / "run"),
        "stage": 2,
        "max_length": MAX_LENGTH,
        "batch_size": 6,
        "gradient_accumulation_steps": 2,
        "data": [{"file": str(chat)}],
        "validation": {"data": [{"file": str(chat)}]},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    assert check(path, "--output", tmp_path / "out", "--workers", 2)[0] == 1
    facts = json.loads((tmp_path / "out" / "statistics.json").read_text(encoding="utf-8"))
    assert list(facts["datasets"]) == [str(chat), f"{chat} (2)"]
    assert (facts["max_length"], facts["padding"]["batch_size"]) == (MAX_LENGTH, 3)
    assert facts["all"]["invalid"] == 2 * len(BAD)
    check(path, "max_length=4000", "--output", tmp_path / "out", "--workers", 1)
    facts = json.loads((tmp_path / "out" / "statistics.json").read_text(encoding="utf-8"))
    assert facts["max_length"] == 4000
    assert ErrorCode.TOO_LONG not in facts["all"]["invalid_by_code"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["chat.json"], "--model"),
        (["--model", "nowhere", "chat.json"], "'nowhere'"),
        (["--model", "model", "gone.json"], "gone.json"),
        (["--model", "model", "chat.json", "split=test"], "split"),
        (["gone.yaml"], "gone.yaml"),
    ],
)
def test_invalid_arguments_are_refused(
    check, checkpoint, chat, tmp_path, monkeypatch, arguments, complaint
):
    monkeypatch.chdir(tmp_path)
    code, out, err = check(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert complaint in err


def test_max_length_defaults_to_the_context(checkpoint, check, chat, processor):
    assert effective_max_length(str(checkpoint), None) is None
    assert effective_max_length(str(checkpoint), 7) == 7
    config = {"model_type": "mplug_owl2", "max_position_embeddings": MAX_LENGTH}
    config |= {"visual_config": {"visual_abstractor": {"num_learnable_queries": 4}}}
    config["image_token_id"] = config["vocab_size"] = processor.image_token_id
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert effective_max_length(str(checkpoint), None) == MAX_LENGTH
    code, out, _ = check("--model", checkpoint, chat, "--workers", 1)
    assert code == 1
    assert "are truncated to 40 tokens" in out
    code, _, err = check("--model", checkpoint, chat, "--max-length", MAX_LENGTH + 1)
    assert code == 2
    assert "exceeds the 40 positions" in err


def test_dataset_names_are_unique():
    assert list(unique_names((name, []) for name in "abaa")) == ["a", "b", "a (2)", "a (3)"]
