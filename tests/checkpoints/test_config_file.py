"""Invalid ``config.json`` and ``generation_config.json`` files."""

import json

import pytest

from owl2.cli.info import size_table
from owl2.errors import ErrorCode
from owl2.model.modeling import Owl2ForConditionalGeneration
from tests.errors import raises_input_error
from tests.family import FOLDER
from tests.tiny import make_model

READERS = (Owl2ForConditionalGeneration.from_pretrained, lambda path: size_table(str(path)))


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
    ("kind", "code", "needle"),
    [
        ("llama", ErrorCode.UNSUPPORTED, "owl2 init"),
        ("absent", ErrorCode.UNSUPPORTED, "model_type"),
        (["llama"], ErrorCode.UNSUPPORTED, "model_type"),
    ],
)
def test_other_model_types_are_rejected(read, kind, code, needle, folder):
    change(folder / "config.json", model_type=kind)
    (folder / "model.safetensors").write_bytes(b"never read")
    with raises_input_error(code, needle):
        read(folder)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("kind", "parts", "nearest"),
    [
        ("mplug_owl2", {"visual_hreducer": {}}, "'mplug_docowl'"),
        ("mplug_owl2", {"visual_hreducer": {}, "visual_hrcompressor": {}}, "DocOwl2"),
        ("mplug_owl2_1", {"visual_hreducer": {}}, "'mplug_docowl'"),
        ("mplug_docowl", {"visual_abstractor": {}}, "'mplug_owl2'"),
    ],
)
def test_parts_of_another_model_type_are_rejected(read, kind, parts, nearest, folder):
    change(folder / "config.json", model_type=kind, visual_config={"visual_model": {}, **parts})
    with raises_input_error(ErrorCode.INVALID_CONFIG, kind, nearest):
        read(folder)


@pytest.mark.parametrize(
    ("kind", "nearest"), [("mplug_docowl3", "mplug_docowl"), ("mplug_owl2.1", "mplug_owl2_1")]
)
def test_similar_model_type_is_suggested(kind, nearest, folder):
    change(folder / "config.json", model_type=kind)
    with raises_input_error(ErrorCode.UNSUPPORTED, kind, f"similar name is {nearest!r}"):
        size_table(str(folder))


@pytest.mark.parametrize(
    ("sibling", "title", "connector"),
    [
        ("docowl1_5", "DocOwl1.5", "H-Reducer 1x4"),
        ("docowl2", "DocOwl2", "2 layers of width 64"),
        ("mplug_owl2_1", "mPLUG-Owl2.1", "2 layers, width 32"),
    ],
)
def test_siblings_are_recognized(sibling, title, connector):
    table = size_table(str(FOLDER / sibling / "model"))
    assert str(table.title).endswith(title)
    assert any(connector in str(cell) for column in table.columns for cell in column.cells)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("text", ["{no json", "[]", "3"])
def test_other_json_is_rejected(read, text, folder):
    (folder / "config.json").write_text(text, encoding="utf-8")
    with raises_input_error(ErrorCode.INVALID_CONFIG, "config.json"):
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
def test_invalid_options_are_rejected(read, setting, folder):
    change(folder / "config.json", **setting)
    with raises_input_error(ErrorCode.INVALID_CONFIG, "config.json"):
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
def test_generation_options_of_a_wrong_type_are_rejected(name, value, folder):
    change(folder / "generation_config.json", **{name: value})
    with raises_input_error(ErrorCode.INVALID_CONFIG, "generation_config.json", name):
        READERS[0](folder)


def test_generation_options_are_loaded(folder):
    file = folder / "generation_config.json"
    change(file, temperature=1, eos_token_id=[2, 3], top_p=None, max_new_tokens=5)
    assert READERS[0](folder).generation_config.eos_token_id == [2, 3]
    for text in ("[1]", "{x"):
        file.write_text(text, encoding="utf-8")
        with raises_input_error(ErrorCode.INVALID_CONFIG, "generation_config.json"):
            READERS[0](folder)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "a/b/c", "here/nothing", "owner/nothing"])
def test_wrong_path_is_named(read, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, name) as caught:
        read(name)
    assert "Repo id" not in str(caught.value)
