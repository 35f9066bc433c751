"""Weight files and indices with other contents; fingerprints of weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from owl2.checkpoints.from_backbones import load_llm
from owl2.checkpoints.weight_files import Provenance, fingerprint, read_tensors
from owl2.errors import ErrorCode
from owl2.model.modeling import Owl2ForConditionalGeneration
from tests.errors import raises_input_error
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
    """The path of the pickle that is loaded."""
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


def assert_rejected(folder, code, needle, read=Owl2ForConditionalGeneration.from_pretrained):
    with raises_input_error(code, needle) as caught:
        read(folder)
    assert "weights_only" not in str(caught.value)  # torch's unsafe advice


@pytest.mark.parametrize("read", [Owl2ForConditionalGeneration.from_pretrained, load_llm])
@pytest.mark.parametrize("content", [b"no weights at all", b"", LFS])
def test_pickles_with_other_bytes(read, content, folder, pickled):
    pickled.write_bytes(content)
    assert_rejected(folder, ErrorCode.UNREADABLE_FILE, pickled, read)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("content", [[1], {"a": 3}])
def test_pickles_of_other_objects(new, content, folder, pickled):
    torch.save(content, pickled, _use_new_zipfile_serialization=new)
    assert_rejected(folder, ErrorCode.INVALID_FORMAT, pickled)


@pytest.mark.parametrize("new", [True, False])
def test_truncated_pickles(new, folder, weights, pickled):
    torch.save(weights, pickled, _use_new_zipfile_serialization=new)
    Owl2ForConditionalGeneration.from_pretrained(folder)
    pickled.write_bytes(pickled.read_bytes()[:-1000])
    assert_rejected(folder, ErrorCode.UNREADABLE_FILE, pickled)


@pytest.mark.parametrize("content", [b"no weights at all", b"", LFS])
def test_safetensors_with_other_bytes(content, folder):
    (folder / "model.safetensors").write_bytes(content)
    assert_rejected(folder, ErrorCode.UNREADABLE_FILE, folder / "model.safetensors")


@pytest.mark.parametrize("name", ["../other.bin", "/etc/passwd", "..", "a\\b", 3])
def test_index_must_name_files_in_its_directory(name, folder, pickled):
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}), encoding="utf-8")
    assert_rejected(folder, ErrorCode.INVALID_FORMAT, repr(name))


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', "{x"])
def test_invalid_index(text, folder, pickled):
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(text, encoding="utf-8")
    assert_rejected(folder, ErrorCode.INVALID_FORMAT, index)


@pytest.mark.parametrize("safe", [True, False])
def test_integer_weights_are_rejected(safe, folder, weights):
    changed = weights | {"lm_head.weight": weights["lm_head.weight"].to(torch.int8)}
    if safe:
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        (folder / "model.safetensors").unlink()
        torch.save(changed, folder / "pytorch_model.bin")
    assert_rejected(folder, ErrorCode.INVALID_FORMAT, "lm_head.weight")


def test_a_file_that_cannot_be_read(folder, monkeypatch):
    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", fail)
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "model.safetensors"):
        read_tensors(folder / "model.safetensors")


def test_unused_pickle_is_ignored(folder):
    (folder / "pytorch_model.bin").write_bytes(LFS)
    Owl2ForConditionalGeneration.from_pretrained(folder)


# ------------------------------------------------------------------ fingerprints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model().save_pretrained(folder)
    return folder


def test_fingerprint_does_not_depend_on_the_files(checkpoint, tmp_path):
    expected = fingerprint(checkpoint)
    model = Owl2ForConditionalGeneration.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    without = tmp_path / "without"
    without.mkdir()
    tensors = load_file(checkpoint / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not name.endswith("_pos_embed")}
    assert len(kept) < len(tensors)
    save_file(kept, without / "model.safetensors")
    for folder in (tmp_path / "shards", pickled, without):
        assert fingerprint(folder) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors["model.norm.weight"].add_(1e-3),
        lambda tensors: tensors["model.visual_abstractor.vit_eos"].add_(1e-3),
        lambda tensors: tensors.pop("lm_head.weight"),
        lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"][:-1].clone()}),
    ],
)
def test_other_weights_have_another_fingerprint(checkpoint, tmp_path, change):
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != fingerprint(checkpoint)


def test_directory_is_stored_as_an_absolute_path(checkpoint, tmp_path, monkeypatch):
    shutil.copytree(checkpoint, tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path / "here")
    source = Owl2ForConditionalGeneration.from_pretrained("model").provenance
    assert source == Provenance(str(tmp_path / "here" / "model"), None, tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path)
    assert source.fingerprint == fingerprint(checkpoint)
    # Read once: what is there later is not what the model was loaded from.
    shutil.rmtree(tmp_path / "here")
    assert source.fingerprint == fingerprint(checkpoint)


def test_without_weights_there_is_no_fingerprint(tmp_path):
    assert fingerprint(tmp_path) is None
    assert Provenance("owner/nothing", None, None).fingerprint is None
