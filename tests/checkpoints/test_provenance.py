"""Where weights came from, and the fingerprint that tells them from others."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from owl2.checkpoints.provenance import Provenance, fingerprint
from owl2.model.modeling import Owl2ForConditionalGeneration
from tests.tiny import make_model


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
    without_codes = tmp_path / "without"
    without_codes.mkdir()
    tensors = load_file(checkpoint / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not name.endswith("_pos_embed")}
    assert len(kept) < len(tensors)
    save_file(kept, without_codes / "model.safetensors")
    for folder in (tmp_path / "shards", pickled, without_codes):
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
