"""Checkpoints: every key is loaded or recomputed; saved models load again."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
)
from transformers.utils import logging as transformers_logging

import owl2  # noqa: F401  # registers with the Auto classes
from owl2.checkpoints.weight_names import module_name, released_name
from owl2.errors import ErrorCode
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.train.adapters import apply_lora
from owl2.train.recipe_sections import LoraSettings
from tests.checkpoints.conftest import load
from tests.checkpoints.layouts import GOLDEN, LAYOUTS, write
from tests.errors import raises_input_error
from tests.family import SIBLINGS
from tests.model.golden import FOLDER, MODELS
from tests.tiny import make_config, make_model

POSITIONS = "pos_embed"
INV_FREQ = "rotary_emb.inv_freq"  # in the golden checkpoints, as in old LLaMA checkpoints


@pytest.fixture
def log(caplog):
    """The log of transformers, which does not propagate to pytest by default."""
    transformers_logging.enable_propagation()
    yield caplog
    transformers_logging.disable_propagation()


def assert_has_tensors(model, tensors):
    state = {released_name(name): tensor for name, tensor in model.state_dict().items()}
    tensors = {released_name(name): tensor for name, tensor in tensors.items()}
    assert state.keys() == without(INV_FREQ, tensors).keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, tensors[name]), name


def without(part, tensors):
    return {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors_without_warnings(
    layout, released, tmp_path, log, capfd
):
    model = load(write(tmp_path / "model", released, layout))
    assert_has_tensors(model, released)
    output = log.text + "".join(capfd.readouterr())
    assert "newly initialized" not in output and "not used" not in output
    assert not [record for record in log.records if record.levelname in ("WARNING", "ERROR")]


@pytest.mark.parametrize("added", [0, 3])
def test_saved_layout_is_the_released_one(released, tmp_path, added, log):
    """Keys, shapes and fields, so that the authors' code loads it; also with added tokens."""
    model = load(GOLDEN)
    rows = model.config.vocab_size + added
    if added:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(tmp_path)
    assert "image_token_id" not in log.text
    saved = load_file(tmp_path / "model.safetensors")
    vocabulary = ("model.embed_tokens.weight", "lm_head.weight")
    assert {name: tensor.shape for name, tensor in saved.items()} == {
        name: (rows, *tensor.shape[1:]) if name in vocabulary else tensor.shape
        for name, tensor in without(INV_FREQ, released).items()
    }
    written, expected = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path, GOLDEN)
    )
    new = {"attention_dropout", "head_dim", "mlp_bias"}  # of later versions of transformers
    assert written.keys() - expected.keys() - new == ({"image_token_id"} if added else set())
    assert written["visual_config"].keys() == expected["visual_config"].keys()


def test_released_repository_is_loaded(released, tmp_path):
    """33 shards without leading zeros, ModelScope's `configuration.json`, and images."""
    folder = tmp_path / "model"
    write(folder, released, "pytorch_model-*.bin", shards=33)
    index = folder / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    for name in set(content["weight_map"].values()):
        number = int(name.split("-")[1])
        (folder / name).rename(folder / f"pytorch_model-{number}-of-33.bin")
    files = {key: int(name.split("-")[1]) for key, name in content["weight_map"].items()}
    content["weight_map"] = {key: f"pytorch_model-{n}-of-33.bin" for key, n in files.items()}
    index.write_text(json.dumps(content))
    (folder / "configuration.json").write_text('{"framework": "pytorch", "task": "chat"}')
    (folder / "assets").mkdir()
    (folder / "assets" / "model.safetensors.png").write_bytes(b"not weights")
    assert sum(path.suffix == ".bin" for path in folder.iterdir()) == 33
    model = load(folder)
    assert_has_tensors(model, released)
    assert (
        model.provenance.fingerprint
        == load(write(tmp_path / "1", released, LAYOUTS[3])).provenance.fingerprint
    )


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2]])
@pytest.mark.parametrize("metadata", [None, {}])
def test_index_without_metadata_is_loaded(layout, metadata, released, tmp_path):
    folder = write(tmp_path / "model", released, layout)
    (folder / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (index,) = folder.glob("*.index.json")
    content = {"weight_map": json.loads(index.read_text())["weight_map"], "metadata": metadata}
    index.write_text(json.dumps(content if metadata else {"weight_map": content["weight_map"]}))
    model = load(folder)
    assert_has_tensors(model, released)
    assert model.generation_config.max_new_tokens == 7
    assert (model.name_or_path, model.provenance.name) == (str(folder), str(folder))


@pytest.mark.parametrize("umask", [0o022, 0o027])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("has_adapter", [True, False])
def test_weight_files_have_the_permissions_of_the_umask(umask, shard_size, has_adapter, tmp_path):
    model = make_model()
    if has_adapter:
        apply_lora(model, LoraSettings(r=2), seed=0)
    previous = os.umask(umask)
    try:
        model.save_pretrained(tmp_path / "model", max_shard_size=shard_size)
    finally:
        os.umask(previous)
    files = list((tmp_path / "model").iterdir())
    assert any(file.suffix == ".safetensors" for file in files)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_8_bit_checkpoint_loads_in_another_dtype(dtype, tmp_path):
    config = BitsAndBytesConfig(load_in_8bit=True)
    load(GOLDEN, quantization_config=config).save_pretrained(tmp_path)
    model = load(tmp_path, **({"dtype": dtype} if dtype else {}))
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    assert floats == {dtype or torch.float32}
    pixels = torch.randn(1, 3, 56, 56)
    ids = torch.cat([torch.tensor([[1]]), torch.full((1, model.config.num_image_tokens), 320)], 1)
    assert torch.isfinite(model(input_ids=ids, pixel_values=pixels).logits).all()


def test_log_fixture_captures_warnings(log):
    """The fixture captures such messages."""
    transformers_logging.get_logger("transformers.modeling_utils").warning("newly initialized")
    assert "newly initialized" in log.text


@pytest.mark.parametrize("name", MODELS)
def test_missing_position_embeddings_are_computed(name, tmp_path):
    tensors = load_file(FOLDER / name / "model.safetensors")
    learned = without(POSITIONS, without(INV_FREQ, tensors))
    assert len(learned) < len(without(INV_FREQ, tensors))
    folder = write(tmp_path / "model", learned, "pytorch_model-*.bin")
    shutil.copy(FOLDER / name / "config.json", folder)
    state = load(folder).state_dict()
    for key, value in without(INV_FREQ, tensors).items():
        bound = 1e-6 if POSITIONS in key else 0
        torch.testing.assert_close(state[module_name(key)], value, rtol=0, atol=bound, msg=key)


def test_stored_inv_freq_is_recomputed(released, tmp_path):
    """Old LLaMA checkpoints contain it, rounded if they were cast to 16 bits."""
    wrong = {name: torch.ones_like(tensor) for name, tensor in released.items() if INV_FREQ in name}
    assert wrong
    model = load(write(tmp_path / "wrong", released | wrong, "pytorch_model*.bin"))
    assert_has_tensors(model, released)
    bare = load(write(tmp_path / "bare", without(INV_FREQ, released), "pytorch_model*.bin"))
    stored = released[next(iter(wrong))]
    for loaded in (model, bare):
        torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, stored)


def test_subfolder_is_loaded(tmp_path):
    make_model().save_pretrained(tmp_path / "inner")
    assert load(tmp_path, subfolder="inner").config.vocab_size == 40
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "config.json"):
        load(tmp_path)


def read_weights(folder):
    """The tensors of all weight files, without those that are recomputed."""
    tensors = {}
    for file in (*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")):
        is_pickle = file.suffix == ".bin"
        tensors |= torch.load(file, weights_only=True) if is_pickle else load_file(file)
    return without(INV_FREQ, tensors)


@pytest.mark.parametrize("name", [*MODELS, *(f"family/{name}/model" for name in SIBLINGS)])
def test_round_trip_keeps_names_and_bytes(name, tmp_path):
    load(FOLDER / name, dtype=torch.float32).save_pretrained(tmp_path / "1")
    load(tmp_path / "1").save_pretrained(tmp_path / "2")
    released, first, second = map(read_weights, (FOLDER / name, tmp_path / "1", tmp_path / "2"))
    assert released.keys() == first.keys() == second.keys()
    for key, tensor in released.items():
        assert tensor.dtype == first[key].dtype == second[key].dtype
        assert tensor.numpy().tobytes() == first[key].numpy().tobytes(), key
    files = [tmp_path / "1" / "model.safetensors", tmp_path / "2" / "model.safetensors"]
    assert files[0].read_bytes() == files[1].read_bytes()
    configs = [json.loads((tmp_path / n / "config.json").read_text("utf-8")) for n in "12"]
    assert configs[0] == configs[1]


def test_saved_shards_load_again(tmp_path):
    model = load(GOLDEN)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_has_tensors(load(tmp_path), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_saved(dtype, tmp_path):
    model = make_model().to(dtype)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert values["torch_dtype"] == str(dtype).removeprefix("torch.")
    again = load(tmp_path)
    assert again.dtype == dtype
    assert_has_tensors(again, model.state_dict())
    assert load(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_tied_embeddings_are_stored_once(tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = load(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_has_tensors(again, model.state_dict())


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForCausalLM])
@pytest.mark.parametrize("folder", ["llama-7b", "clip", "mplug_owl2"])
def test_model_type_comes_from_the_config_not_the_directory_name(auto, folder, tmp_path):
    make_model().save_pretrained(tmp_path / folder)
    assert type(auto.from_pretrained(tmp_path / folder)) is Owl2ForConditionalGeneration
    assert AutoConfig.from_pretrained(tmp_path / folder).model_type == "mplug_owl2"


def test_directory_name_does_not_change_the_model_type(tmp_path):
    values = make_config().to_dict() | {"model_type": "llama"}
    folder = tmp_path / "mplug_owl2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    assert AutoConfig.from_pretrained(folder).model_type == "llama"


def test_old_default_max_length_is_ignored():
    """4.31 wrote `max_length: 20` into every config.json."""
    assert load(GOLDEN).generation_config.max_length is None


def test_loading_info_is_returned_on_request():
    model, info = load(GOLDEN, output_loading_info=True)
    assert isinstance(model, Owl2ForConditionalGeneration)
    assert not info["missing_keys"] and not info["mismatched_keys"]
