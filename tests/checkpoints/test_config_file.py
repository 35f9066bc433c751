"""``config.json`` and ``generation_config.json`` that make no model of ours."""

import json

import pytest

from owl2.errors import InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.model.parameter_counts import describe
from tests.tiny import make_model

READERS = (Owl2ForConditionalGeneration.from_pretrained, lambda path: describe(str(path)))


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path)
    return tmp_path


def change(file, **settings):
    values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    values = {k: v for k, v in (values | settings).items() if v != "absent"}
    file.write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("kind", "message"), [("llama", "llama model.*owl2 init"), ("absent", "model_type")]
)
def test_another_models_config_is_refused(read, kind, message, folder):
    change(folder / "config.json", model_type=kind)
    (folder / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(InputError, match=message):
        read(folder)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("text", ["{}", "[]", "3"])
def test_what_is_no_configuration_is_refused(read, text, folder):
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.json"):
        read(folder)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "setting",
    [
        {"rope_theta": "x"},
        {"torch_dtype": "floatx"},
        {"rope_scaling": {"type": "foo"}},
        {"rope_scaling": {"type": "linear"}},
        {"visual_config": {"visual_model": 3}},
    ],
)
def test_a_setting_that_makes_no_model_is_refused(read, setting, folder):
    change(folder / "config.json", **setting)
    with pytest.raises(InputError, match=r"config\.json: "):
        read(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "x"),
        ("top_k", 1.5),
        ("max_new_tokens", "5"),
        ("do_sample", "yes"),
        ("eos_token_id", "x"),
        ("eos_token_id", [2, "x"]),
        ("pad_token_id", [0]),
    ],
)
def test_generation_settings_of_a_wrong_type_are_refused(name, value, folder):
    change(folder / "generation_config.json", **{name: value})
    with pytest.raises(InputError, match=rf"generation_config\.json: {name} must be"):
        READERS[0](folder)


def test_generation_settings_are_taken(folder):
    file = folder / "generation_config.json"
    change(file, temperature=1, eos_token_id=[2, 3], top_p=None, max_new_tokens=5)
    assert READERS[0](folder).generation_config.eos_token_id == [2, 3]
    for text in ("[1]", "{x"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"generation_config\.json"):
            READERS[0](folder)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "There is no directory 'nowhere' to load a model from"),
        ("./nowhere", "There is no directory './nowhere' to load a model from"),
        ("a/b/c", "There is no directory 'a/b/c' to load a model from"),
        ("here/nothing", "There is no directory 'here/nothing', though 'here' is here"),
        ("nobody/nothing", "There is no directory 'nobody/nothing' here, and the hub"),
    ],
)
def test_a_wrong_path_is_called_one(read, name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    with pytest.raises(InputError, match=message) as caught:
        read(name)
    assert "Repo id" not in str(caught.value)
