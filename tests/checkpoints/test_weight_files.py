"""Files beside a ``config.json`` that are no weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from owl2.checkpoints.from_backbones import load_llm
from owl2.errors import InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from tests.tiny import make_model

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture
def pickled(folder):
    """Where a pickle is read from."""
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


def refusal(folder, read=Owl2ForConditionalGeneration.from_pretrained):
    with pytest.raises(InputError) as caught:
        read(folder)
    assert "weights_only" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("read", [Owl2ForConditionalGeneration.from_pretrained, load_llm])
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no weights at all", "broken"), (b"", "is empty"), (LFS, "git lfs pull")],
)
def test_pickles_of_other_bytes(read, content, message, folder, pickled):
    pickled.write_bytes(content)
    said = refusal(folder, read)
    assert str(pickled) in said
    assert message in said


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(("thing", "message"), [([1], "a list"), ({"a": 3}, "'a' is a int")])
def test_pickles_of_other_things(new, thing, message, folder, pickled):
    torch.save(thing, pickled, _use_new_zipfile_serialization=new)
    assert message in refusal(folder)


@pytest.mark.parametrize("new", [True, False])
def test_pickles_cut_short(new, folder, weights, pickled):
    torch.save(weights, pickled, _use_new_zipfile_serialization=new)
    Owl2ForConditionalGeneration.from_pretrained(folder)
    pickled.write_bytes(pickled.read_bytes()[:-1000])
    assert str(pickled) in refusal(folder)


@pytest.mark.parametrize("content", [b"no weights at all", b"", LFS])
def test_safetensors_of_other_bytes(content, folder):
    (folder / "model.safetensors").write_bytes(content)
    assert str(folder / "model.safetensors") in refusal(folder)


@pytest.mark.parametrize("name", ["../other.bin", "/etc/passwd", "..", "a\\b", 3])
def test_an_index_names_files_of_its_directory_only(name, folder, pickled):
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}), encoding="utf-8")
    assert repr(name) in refusal(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', "{x"])
def test_an_index_that_is_none(text, folder, pickled):
    (folder / "pytorch_model.bin.index.json").write_text(text, encoding="utf-8")
    assert "no index" in refusal(folder)


@pytest.mark.parametrize("safe", [True, False])
def test_whole_numbers_are_no_weights(safe, folder, weights):
    changed = weights | {"lm_head.weight": weights["lm_head.weight"].to(torch.int8)}
    if safe:
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        (folder / "model.safetensors").unlink()
        torch.save(changed, folder / "pytorch_model.bin")
    assert "lm_head.weight" in refusal(folder)


def test_a_pickle_that_is_not_read_does_no_harm(folder):
    (folder / "pytorch_model.bin").write_bytes(LFS)
    Owl2ForConditionalGeneration.from_pretrained(folder)
