"""Checkpoints: every key is loaded, recomputed or refused; what is written reads back."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

import owl2  # noqa: F401  # registers with the Auto classes
from owl2.errors import InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.model.parameter_counts import describe
from tests.model.golden import FOLDER, MODELS
from tests.tiny import make_config, make_model

GOLDEN = FOLDER / "model_mha"
CODES = "pos_embed"
INV_FREQ = "rotary_emb.inv_freq"  # golden's checkpoints hold it, as old LLaMA ones do
FIRST = "model.embed_tokens.weight"


def load(path, **options):
    return Owl2ForConditionalGeneration.from_pretrained(path, **options)


def write(folder, tensors, layout, shards=3):
    """The golden model with these tensors, in one of the layouts that checkpoints come in."""
    folder.mkdir(exist_ok=True)
    shutil.copy(GOLDEN / "config.json", folder)
    stem, kind = layout.split("*")
    if stem.endswith("-"):  # shards with an index
        stem = stem[:-1]
        names = sorted(tensors)
        files = {}
        for i in range(shards):
            file = f"{stem}-{i + 1:05}-of-{shards:05}{kind}"
            part = {name: tensors[name] for name in names[i::shards]}
            save(part, folder / file)
            files |= dict.fromkeys(part, file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": files}
        (folder / f"{stem}{kind}.index.json").write_text(json.dumps(index), encoding="utf-8")
    else:
        save(tensors, folder / f"{stem}{kind}")
    return folder


def save(tensors, path):
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata={"format": "pt"})


LAYOUTS = ["pytorch_model-*.bin", "pytorch_model*.bin", "model-*.safetensors", "model*.safetensors"]


@pytest.fixture(scope="module")
def released():
    return load_file(GOLDEN / "model.safetensors")


@pytest.fixture
def log(caplog):
    """What transformers says while loading; it keeps its log from pytest otherwise."""
    transformers_logging.enable_propagation()
    yield caplog
    transformers_logging.disable_propagation()


def assert_holds(model, tensors):
    state = model.state_dict()
    assert state.keys() == without(INV_FREQ, tensors).keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, tensors[name]), name


def without(part, tensors):
    return {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors_without_a_scare(
    layout, released, tmp_path, log, capfd
):
    model = load(write(tmp_path / "model", released, layout))
    assert_holds(model, released)
    said = log.text + "".join(capfd.readouterr())
    assert "newly initialized" not in said and "not used" not in said
    assert not [record for record in log.records if record.levelname in ("WARNING", "ERROR")]


def test_the_log_is_listened_to(log):
    """The test above would see it."""
    transformers_logging.get_logger("transformers.modeling_utils").warning("newly initialized")
    assert "newly initialized" in log.text


@pytest.mark.parametrize("name", MODELS)
def test_missing_position_codes_are_computed(name, tmp_path):
    tensors = load_file(FOLDER / name / "model.safetensors")
    learned = without(CODES, without(INV_FREQ, tensors))
    assert len(learned) < len(without(INV_FREQ, tensors))
    folder = write(tmp_path / "model", learned, "pytorch_model-*.bin")
    shutil.copy(FOLDER / name / "config.json", folder)
    state = load(folder).state_dict()
    for key, value in without(INV_FREQ, tensors).items():
        bound = 1e-6 if CODES in key else 0
        torch.testing.assert_close(state[key], value, rtol=0, atol=bound, msg=key)


def test_stored_inv_freq_is_recomputed(released, tmp_path):
    """Old LLaMA checkpoints hold it, rounded where they were cast to 16 bits."""
    wrong = {name: torch.ones_like(tensor) for name, tensor in released.items() if INV_FREQ in name}
    assert wrong
    model = load(write(tmp_path / "wrong", released | wrong, "pytorch_model*.bin"))
    assert_holds(model, released)
    bare = load(write(tmp_path / "bare", without(INV_FREQ, released), "pytorch_model*.bin"))
    stored = released[next(iter(wrong))]
    for loaded in (model, bare):
        torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, stored)


def test_missing_keys_are_listed(released, tmp_path):
    lost = ["model.norm.weight", "model.layers.1.self_attn.k_proj.multiway.1.weight"]
    kept = {name: tensor for name, tensor in released.items() if name not in lost}
    folder = write(tmp_path / "model", kept, "pytorch_model-*.bin")
    with pytest.raises(InputError, match=r"2 missing:\n(.|\n)*k_proj(.|\n)*model\.norm") as error:
        load(folder)
    assert str(folder) in str(error.value)


def test_unexpected_keys_are_listed(released, tmp_path):
    more = released | {"model.surprise.weight": torch.ones(2), "other": torch.ones(2)}
    with pytest.raises(InputError, match=r"2 unexpected:\n *model\.surprise\.weight\n *other"):
        load(write(tmp_path / "model", more, "model*.safetensors"))


def test_mis_shaped_keys_are_listed_with_both_shapes(released, tmp_path):
    wrong = released | {"model.norm.weight": torch.ones(63), FIRST: torch.ones(321, 64)}
    with pytest.raises(InputError, match="2 of another shape") as error:
        load(write(tmp_path / "model", wrong, "pytorch_model*.bin"))
    assert "model.norm.weight: (63,) in the file, (64,) in the model" in str(error.value)
    assert f"{FIRST}: (321, 64) in the file, (320, 64) in the model" in str(error.value)


def test_a_long_list_is_cut(released, tmp_path):
    few = {name: tensor for name, tensor in released.items() if "layers" not in name}
    with pytest.raises(InputError, match=r"\.\.\. and \d+ more"):
        load(write(tmp_path / "model", few, "model*.safetensors"))


def test_a_plain_llama_is_told_apart(tmp_path):
    make_model(use_mam=False).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(values | {"use_mam": True}), encoding="utf-8")
    with pytest.raises(InputError, match="owl2 init"):
        load(tmp_path)


class Malicious:
    """Unpickling it would call `print`."""

    def __reduce__(self):
        return print, ("this ran while loading",)


@pytest.mark.parametrize("layout", ["pytorch_model*.bin", "pytorch_model-*.bin"])
def test_a_pickle_that_runs_code_is_refused(layout, released, tmp_path, capfd):
    folder = write(tmp_path / "model", released, layout)
    file = sorted(folder.glob("*.bin"))[-1]
    torch.save(torch.load(file, weights_only=True) | {"extra": Malicious()}, file)
    with pytest.raises(InputError, match="model"):
        load(folder)
    assert "this ran" not in "".join(capfd.readouterr())


def test_an_old_style_pickle_that_runs_code_is_refused(released, tmp_path, capfd):
    folder = write(tmp_path / "model", released, "pytorch_model*.bin")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(InputError, match="model"):
        load(folder)
    assert "this ran" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("damage", [b"", b"no weights at all", "half"])
def test_a_broken_weight_file_is_refused(layout, damage, released, tmp_path):
    folder = write(tmp_path / "model", released, layout)
    file = sorted(path for path in folder.glob("*model*") if path.suffix != ".json")[0]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    with pytest.raises(InputError, match="model"):
        load(folder)


def test_a_shard_that_is_not_there_is_refused(released, tmp_path):
    folder = write(tmp_path / "model", released, "pytorch_model-*.bin")
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(InputError, match="pytorch_model-00002-of-00003"):
        load(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no config"):
        load(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(InputError, match="is a file"):
        load(file)
    shutil.copy(GOLDEN / "config.json", tmp_path)
    file.unlink()
    with pytest.raises(InputError, match=str(tmp_path)):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{no json", encoding="utf-8")
    with pytest.raises(InputError, match=str(tmp_path)):
        load(tmp_path)
    with pytest.raises(InputError, match="no-such/model"):
        load("no-such/model")


@pytest.mark.parametrize(
    ("setting", "value"), [("hidden_size", "many"), ("rms_norm_eps", "small"), ("use_mam", 3)]
)
def test_a_setting_of_a_wrong_type_is_refused(setting, value, tmp_path):
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) | {setting: value}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for read in (load, lambda path: describe(str(path))):
        with pytest.raises(InputError, match=setting):
            read(tmp_path)


def test_a_subfolder_is_looked_into(tmp_path):
    make_model().save_pretrained(tmp_path / "inner")
    assert load(tmp_path, subfolder="inner").config.vocab_size == 40
    with pytest.raises(InputError, match="has no config"):
        load(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_changes_neither_names_nor_bytes(name, tmp_path):
    load(FOLDER / name).save_pretrained(tmp_path / "1")
    load(tmp_path / "1").save_pretrained(tmp_path / "2")
    released, first, second = (
        without(INV_FREQ, load_file(path / "model.safetensors"))
        for path in (FOLDER / name, tmp_path / "1", tmp_path / "2")
    )
    assert released.keys() == first.keys() == second.keys()
    for key, tensor in released.items():
        assert tensor.dtype == first[key].dtype == second[key].dtype
        assert tensor.numpy().tobytes() == first[key].numpy().tobytes(), key
    files = [tmp_path / "1" / "model.safetensors", tmp_path / "2" / "model.safetensors"]
    assert files[0].read_bytes() == files[1].read_bytes()
    configs = [json.loads((tmp_path / n / "config.json").read_text("utf-8")) for n in "12"]
    assert configs[0] == configs[1]


def test_saved_in_shards_it_loads_again(tmp_path):
    model = load(GOLDEN)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_holds(load(tmp_path), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(dtype, tmp_path):
    model = make_model().to(dtype)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert values["torch_dtype"] == str(dtype).removeprefix("torch.")
    again = load(tmp_path)
    assert again.dtype == dtype
    assert_holds(again, model.state_dict())
    assert load(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_tied_embeddings_are_stored_once(tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = load(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_holds(again, model.state_dict())


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForCausalLM])
@pytest.mark.parametrize("folder", ["llama-7b", "clip", "mplug_owl2"])
def test_the_type_comes_from_the_config_not_from_the_folders_name(auto, folder, tmp_path):
    make_model().save_pretrained(tmp_path / folder)
    assert type(auto.from_pretrained(tmp_path / folder)) is Owl2ForConditionalGeneration
    assert AutoConfig.from_pretrained(tmp_path / folder).model_type == "mplug_owl2"


def test_a_folder_named_like_us_is_what_its_config_says(tmp_path):
    values = make_config().to_dict() | {"model_type": "llama"}
    folder = tmp_path / "mplug_owl2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    assert AutoConfig.from_pretrained(folder).model_type == "llama"


def test_old_default_lengths_do_not_cap_answers():
    """4.31 wrote `max_length: 20` into every config.json."""
    assert load(GOLDEN).generation_config.max_length is None


def test_loading_info_is_given_on_request():
    model, info = load(GOLDEN, output_loading_info=True)
    assert isinstance(model, Owl2ForConditionalGeneration)
    assert not info["missing_keys"] and not info["mismatched_keys"]
