"""Ids of ModelScope, with a package `modelscope` that copies a local checkpoint."""

import sys

import pytest

from owl2.checkpoints.config_file import resolve_checkpoint
from owl2.engine.load_model import ModelArgs
from owl2.errors import ErrorCode
from tests.errors import raises_input_error

PACKAGE = """
from pathlib import Path

def snapshot_download(model_id, revision=None, ignore_file_pattern=None):
    with Path({log!r}).open("a") as file:
        file.write(f"{{model_id}} {{revision}} {{ignore_file_pattern is None}}\\n")
    if "missing" in model_id:
        raise OSError("404 " + model_id)
    return {checkpoint!r}
"""


@pytest.fixture
def downloads(tmp_path, tiny_checkpoint, monkeypatch):
    """The downloads so far, each with the revision and whether it includes the weights."""
    log = tmp_path / "log"
    (tmp_path / "modelscope.py").write_text(
        PACKAGE.format(log=str(log), checkpoint=str(tiny_checkpoint))
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OWL2_USE_MODELSCOPE", "0")
    monkeypatch.delenv("VLLM_USE_MODELSCOPE", raising=False)
    yield lambda: log.read_text().splitlines() if log.exists() else []
    sys.modules.pop("modelscope", None)


def test_option_selects_modelscope(run_cli, downloads):
    result = run_cli("info", "iic/option", "--hub", "modelscope")
    assert result.exit_code == 0, result.stderr
    assert "iic/option" in result.stdout
    assert downloads() == ["iic/option None False"]  # no weights for `owl2 info`


@pytest.mark.parametrize("variable", ["OWL2_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE"])
def test_environment_variable_selects_modelscope(monkeypatch, downloads, variable):
    monkeypatch.delenv("OWL2_USE_MODELSCOPE")
    monkeypatch.setenv(variable, "True")
    args = ModelArgs(f"iic/{variable}", device="cpu", dtype="float32")
    args.load_processor()
    model = args.load_model()
    assert {f"iic/{variable} None False", f"iic/{variable} None True"} == set(downloads())
    # An adapter contains the id, which other machines can find, not the path of a cache.
    assert model.provenance.name == f"iic/{variable}"
    assert model.provenance.fingerprint


def test_option_overrides_the_environment_variable(run_cli, monkeypatch, downloads):
    monkeypatch.setenv("OWL2_USE_MODELSCOPE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run_cli("info", "iic/other", "--hub", "huggingface").exit_code == 2
    assert downloads() == []


def test_directories_are_not_downloaded(monkeypatch, downloads, tiny_checkpoint):
    monkeypatch.setenv("OWL2_USE_MODELSCOPE", "1")
    assert resolve_checkpoint(tiny_checkpoint) == str(tiny_checkpoint)
    assert downloads() == []


def test_revision_is_passed_on(monkeypatch, downloads):
    monkeypatch.setenv("OWL2_USE_MODELSCOPE", "1")
    resolve_checkpoint("iic/revision", revision="v1.0")
    assert downloads() == ["iic/revision v1.0 True"]


def test_missing_repository_is_an_input_error(run_cli, downloads):
    result = run_cli("info", "iic/missing", "--hub", "modelscope")
    assert result.exit_code == 2
    assert "404 iic/missing" in result.stderr


def test_missing_package_is_an_input_error(monkeypatch):
    monkeypatch.setenv("OWL2_USE_MODELSCOPE", "1")
    monkeypatch.setattr("owl2.errors.find_spec", lambda package: None)
    with raises_input_error(ErrorCode.MISSING_DEPENDENCY, "owl2-vlm[modelscope]"):
        resolve_checkpoint("iic/no-package")
