"""config.json: the released files are read; written files load here and in the authors' code."""

import copy
import json

import pytest
from transformers import AutoConfig

import owl2  # noqa: F401  # registers with the Auto classes
from owl2.errors import ErrorCode
from owl2.model.configuration import Owl2Config
from tests.errors import raises_input_error
from tests.model.golden import FOLDER, MODELS
from tests.tiny import make_config

# The keys that the model uses. transformers 4.31 also wrote all defaults; version 5 does not.
# fmt: off
SETTINGS = [
    "architectures", "attention_bias", "bos_token_id", "eos_token_id", "hidden_act",
    "hidden_size", "initializer_range", "intermediate_size", "max_position_embeddings",
    "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "pad_token_id", "pretraining_tp", "rms_norm_eps", "rope_scaling", "rope_theta",
    "tie_word_embeddings", "torch_dtype", "use_cache", "vocab_size",
]
VISUAL = [
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "layer_norm_eps", "model_type", "initializer_range", "use_cls_token",
]
OWN = {
    "visual_model": [
        *VISUAL,
        "attention_dropout", "hidden_act", "image_size", "initializer_factor", "num_channels",
        "patch_size", "projection_dim", "use_flash_attn", "use_post_layernorm",
    ],
    "visual_abstractor": [
        *VISUAL,
        "add_v2t_pos_emb", "attention_probs_dropout_prob", "encoder_hidden_size", "grid_size",
        "num_learnable_queries",
    ],
}
# fmt: on


def read(path):
    return json.loads((path / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", MODELS)
def test_released_config_keeps_its_options(name, tmp_path):
    released = read(FOLDER / name)
    Owl2Config.from_pretrained(FOLDER / name).save_pretrained(tmp_path)
    written = read(tmp_path)
    for setting in SETTINGS:
        assert written.get(setting) == released.get(setting), setting
    for part, settings in OWN.items():
        for setting in settings:
            expected = released["visual_config"][part][setting]
            assert written["visual_config"][part][setting] == expected, (part, setting)
    assert "use_mam" not in written
    # Reading and writing again gives the same file.
    Owl2Config.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert read(tmp_path / "again") == written


def test_defaults_are_the_released_model():
    config = Owl2Config()
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (4096, 32, 32000)
    assert (config.image_size, config.num_image_tokens, config.image_token_id) == (448, 65, 32000)
    assert config.visual_config.visual_abstractor.grid_size == 32
    assert config.rms_norm_eps == 1e-6
    assert config.max_position_embeddings == 2048
    assert config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize("use_mam", [True, False])
def test_use_mam_is_written_only_if_false(use_mam, tmp_path):
    make_config(use_mam=use_mam).save_pretrained(tmp_path)
    assert read(tmp_path).get("use_mam") == (None if use_mam else False)
    assert AutoConfig.from_pretrained(tmp_path).use_mam is use_mam


@pytest.mark.parametrize(
    ("given", "separate", "written"),
    [
        (None, ("input_layernorm", "post_attention_layernorm", "k_proj", "v_proj"), None),
        (["v_proj", "k_proj"], ("k_proj", "v_proj"), ["k_proj", "v_proj"]),
        (
            ["k_proj", "v_proj", "post_attention_layernorm", "input_layernorm"],
            ("input_layernorm", "post_attention_layernorm", "k_proj", "v_proj"),
            None,
        ),
    ],
)
def test_mam_modules_are_written_only_if_some_are_shared(given, separate, written, tmp_path):
    make_config(mam_modules=given).save_pretrained(tmp_path)
    assert read(tmp_path).get("mam_modules") == written
    assert AutoConfig.from_pretrained(tmp_path).separate_modules == separate
    assert make_config(mam_modules=given, use_mam=False).separate_modules == ()


def test_rope_is_written_under_the_names_of_4_31(tmp_path):
    make_config(rope_theta=5e5).save_pretrained(tmp_path)
    written = read(tmp_path)
    assert (written["rope_theta"], written["rope_scaling"]) == (5e5, None)
    assert "rope_parameters" not in written
    assert Owl2Config.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_rope_scaling_has_the_keys_of_4_31(kind, tmp_path):
    """transformers 4.31 accepts only a dict with exactly `type` and `factor`."""
    scaling = {"type": kind, "factor": 2.0}
    make_config(rope_scaling=dict(scaling)).save_pretrained(tmp_path)
    assert read(tmp_path)["rope_scaling"] == scaling
    again = Owl2Config.from_pretrained(tmp_path)
    assert again.rope_parameters["rope_type"] == kind
    assert again.rope_parameters["factor"] == 2.0


def test_newer_rope_scaling_is_kept(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    make_config(rope_scaling=dict(scaling), rope_theta=5e5).save_pretrained(tmp_path)
    assert read(tmp_path)["rope_scaling"] == scaling
    again = Owl2Config.from_pretrained(tmp_path)
    assert again.rope_parameters == scaling | {"rope_theta": 5e5}


def test_edited_image_size_changes_the_grid(tmp_path):
    make_config().save_pretrained(tmp_path)
    edited = read(tmp_path)
    edited["visual_config"]["visual_model"]["image_size"] = 16
    (tmp_path / "config.json").write_text(json.dumps(edited), encoding="utf-8")
    assert AutoConfig.from_pretrained(tmp_path).visual_config.visual_abstractor.grid_size == 4


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"vision": {"use_cls_token": False}}, ["visual_model.use_cls_token"]),
        ({"vision": {"use_post_layernorm": False}}, ["visual_model.use_post_layernorm"]),
        ({"vision": {"hidden_size": "8"}}, ["visual_model", "hidden_size", "'8'"]),
        ({"vision": {"patch_size": 0}}, ["visual_model", "patch_size", "0"]),
        ({"vision": {"hidden_act": "nope"}}, ["visual_model.hidden_act", "nope"]),
        ({"abstractor": {"num_learnable_queries": 0}}, ["num_learnable_queries", "0"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads", "4", "num_key_value_heads", "3"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads", "0"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"use_mam": "false"}, ["use_mam", "'false'"]),
        ({"mam_modules": ["q_proj"]}, ["mam_modules", "q_proj"]),
        ({"mam_modules": [["k_proj"]]}, ["mam_modules"]),
        ({"mam_modules": []}, ["mam_modules"]),
        ({"mam_modules": "k_proj"}, ["mam_modules", "k_proj"]),
        ({"member": "mplug_owl2_1", "mam_modules": ["k_proj"]}, ["mam_modules", "c_attn"]),
        ({"vision": {"image_size": 9}}, ["visual_model.image_size", "9", "4"]),
        ({"vision": {"num_attention_heads": 3}}, ["visual_model.hidden_size", "8", "3"]),
        ({"abstractor": {"use_cls_token": False}}, ["visual_abstractor.use_cls_token"]),
        ({"abstractor": {"add_v2t_pos_emb": True}}, ["visual_abstractor.add_v2t_pos_emb"]),
        ({"abstractor": {"hidden_size": 12}}, ["hidden_size", "12", "8"]),
        ({"abstractor": {"num_attention_heads": 3}}, ["visual_abstractor.hidden_size", "8", "3"]),
        (
            {"abstractor": {"hidden_size": 12, "encoder_hidden_size": 12}},
            ["encoder_hidden_size", "12", "8"],
        ),
        (
            {
                "vision": {"hidden_size": 6},
                "abstractor": {"hidden_size": 6, "encoder_hidden_size": 6},
            },
            ["visual_abstractor.hidden_size", "6", "4"],
        ),
    ],
)
def test_unsupported_architectures_are_rejected(changes, names):
    with raises_input_error(ErrorCode.INVALID_CONFIG, *names):
        make_config(**changes)


def test_config_can_be_copied():
    config = make_config(use_mam=False)
    copied = copy.deepcopy(config)
    copied.visual_config.visual_model.image_size = 16
    assert config.image_size == 8
    assert Owl2Config(**config.to_dict()).to_dict() == config.to_dict()


def test_integer_rope_factor_is_written_as_a_float():
    """transformers 4.31 rejects an int."""
    scaling = {"type": "linear", "factor": 2}
    written = make_config(rope_scaling=scaling).to_diff_dict()["rope_scaling"]
    assert type(written["factor"]) is float
