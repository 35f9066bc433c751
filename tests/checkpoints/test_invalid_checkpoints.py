"""Checkpoints with missing, unexpected, or corrupt content are rejected."""

import json
import pickle
import shutil

import pytest
import torch

from owl2.cli.info import size_table
from owl2.errors import ErrorCode
from tests.checkpoints.conftest import load
from tests.checkpoints.layouts import GOLDEN, LAYOUTS, write
from tests.errors import raises_input_error
from tests.tiny import make_model

FIRST = "model.embed_tokens.weight"


def test_missing_keys_are_listed(released, tmp_path):
    lost = ["model.norm.weight", "model.layers.1.self_attn.k_proj.multiway.1.weight"]
    kept = {name: tensor for name, tensor in released.items() if name not in lost}
    folder = write(tmp_path / "model", kept, "pytorch_model-*.bin")
    with raises_input_error(ErrorCode.MISSING_WEIGHTS, folder, *lost):
        load(folder)


def test_unexpected_keys_are_listed(released, tmp_path):
    more = released | {"model.surprise.weight": torch.ones(2), "other": torch.ones(2)}
    with raises_input_error(ErrorCode.UNEXPECTED_WEIGHTS, "model.surprise.weight", "other"):
        load(write(tmp_path / "model", more, "model*.safetensors"))


def test_mismatched_keys_are_listed_with_both_shapes(released, tmp_path):
    wrong = released | {"model.norm.weight": torch.ones(63), FIRST: torch.ones(321, 64)}
    needles = ("model.norm.weight", "(63,)", "(64,)", FIRST, "(321, 64)", "(320, 64)")
    with raises_input_error(ErrorCode.SHAPE_MISMATCH, *needles):
        load(write(tmp_path / "model", wrong, "pytorch_model*.bin"))


def test_long_key_lists_are_shortened(released, tmp_path):
    few = {name: tensor for name, tensor in released.items() if "layers" not in name}
    with raises_input_error(ErrorCode.MISSING_WEIGHTS, "...") as error:
        load(write(tmp_path / "model", few, "model*.safetensors"))
    assert len(str(error.value).splitlines()) < 20 < len(released) - len(few)


def test_llama_weights_give_a_hint(tmp_path):
    make_model(use_mam=False).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(values | {"use_mam": True}), encoding="utf-8")
    with raises_input_error(ErrorCode.MISSING_WEIGHTS, "owl2 init"):
        load(tmp_path)


class Malicious:
    """Unpickling it would call `print`."""

    def __reduce__(self):
        return print, ("this ran while loading",)


@pytest.mark.parametrize("layout", ["pytorch_model*.bin", "pytorch_model-*.bin"])
def test_pickle_with_code_is_rejected(layout, released, tmp_path, capfd):
    folder = write(tmp_path / "model", released, layout)
    file = sorted(folder.glob("*.bin"))[-1]
    torch.save(torch.load(file, weights_only=True) | {"extra": Malicious()}, file)
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "model"):
        load(folder)
    assert "this ran" not in "".join(capfd.readouterr())


def test_old_pickle_with_code_is_rejected(released, tmp_path, capfd):
    folder = write(tmp_path / "model", released, "pytorch_model*.bin")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(), protocol=2))
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "model"):
        load(folder)
    assert "this ran" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("damage", [b"", b"no weights at all", "half"])
def test_corrupt_weight_file_is_rejected(layout, damage, released, tmp_path):
    folder = write(tmp_path / "model", released, layout)
    file = sorted(path for path in folder.glob("*model*") if path.suffix != ".json")[0]
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage == "half" else damage)
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "model"):
        load(folder)


def test_missing_shard_is_rejected(released, tmp_path):
    folder = write(tmp_path / "model", released, "pytorch_model-*.bin")
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "pytorch_model-00002-of-00003"):
        load(folder)


def test_other_directories_and_files_are_rejected(tmp_path):
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "config.json"):
        load(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    with raises_input_error(ErrorCode.INVALID_VALUE, file):
        load(file)
    shutil.copy(GOLDEN / "config.json", tmp_path)
    file.unlink()
    with raises_input_error(ErrorCode.UNREADABLE_FILE, tmp_path):
        load(tmp_path)
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "no-such/model"):
        load("no-such/model")


@pytest.mark.parametrize(
    ("setting", "value"), [("hidden_size", "many"), ("rms_norm_eps", "small"), ("use_mam", 3)]
)
def test_option_of_a_wrong_type_is_rejected(setting, value, tmp_path):
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) | {setting: value}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for read in (load, lambda path: size_table(str(path))):
        with raises_input_error(ErrorCode.INVALID_CONFIG, setting):
            read(tmp_path)
