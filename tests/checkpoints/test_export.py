"""`owl2 export`: checkpoints with shared weights become those of the authors' code.

The golden checkpoints were written by the authors' code, so their keys, shapes and options are
those that it expects.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from owl2.checkpoints.export import export_checkpoint, shared_weights, unsupported_reason
from owl2.checkpoints.weight_files import COMPUTED_KEYS, read_tensors, weight_files
from owl2.cli.info import size_table
from owl2.errors import ErrorCode
from owl2.model.configuration import Owl2Config
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.model.owl2_1_configuration import Owl2_1Config
from owl2.model.variants import with_separate_modules
from owl2.quantization.quantize_checkpoint import quantize_checkpoint
from tests.errors import raises_input_error
from tests.family import FOLDER as FAMILY
from tests.model.golden import FOLDER, inputs_of, load_cases, load_model
from tests.tiny import make_model

GOLDEN = FOLDER / "model_mha"
NORMS = ("input_layernorm", "post_attention_layernorm")
VARIANTS = [(), NORMS, ("k_proj", "v_proj"), ("post_attention_layernorm", "v_proj")]


def keys_and_shapes(folder):
    found = {}
    for file in weight_files(folder):
        found |= {name: tuple(tensor.shape) for name, tensor in read_tensors(file).items()}
    return {name: shape for name, shape in found.items() if not name.endswith(COMPUTED_KEYS)}


def save(model, folder):
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(b"")
    return folder


def logits(model, config):
    cases = load_cases("model_mha")
    with torch.inference_mode():
        return model(**inputs_of(cases, "image", config)).logits


@pytest.mark.parametrize("shard_size", [10**9, 20_000])
@pytest.mark.parametrize("names", VARIANTS, ids=["none", "norms", "kv", "mixed"])
def test_exported_variant_has_the_keys_and_the_logits(names, shard_size, tmp_path):
    variant = with_separate_modules(load_model("model_mha"), names)
    source = save(variant, tmp_path / "source")
    assert keys_and_shapes(source) != keys_and_shapes(GOLDEN)
    remarks = export_checkpoint(source, tmp_path / "out", max_shard_size=shard_size)
    assert remarks == []
    assert keys_and_shapes(tmp_path / "out") == keys_and_shapes(GOLDEN)
    assert len(weight_files(tmp_path / "out")) == 1 or shard_size < 10**9
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not config.keys() & {"use_mam", "mam_modules", "image_token_id"}
    assert config["architectures"] == ["MPLUGOwl2LlamaForCausalLM"]
    exported = Owl2ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert exported.config.use_mam
    assert exported.config.separate_modules == Owl2Config.mam_module_names
    expected = logits(variant, variant.config)
    torch.testing.assert_close(logits(exported, exported.config), expected, rtol=0, atol=1e-5)
    complete = logits(load_model("model_mha"), variant.config)
    assert not torch.allclose(complete, expected, atol=1e-3), "the variant has other logits"


def test_complete_checkpoint_is_unchanged(tmp_path):
    export_checkpoint(GOLDEN, tmp_path / "out")
    before = load_file(GOLDEN / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_tied_embeddings_are_written_twice(tmp_path):
    model = make_model(num_key_value_heads=4, tie_word_embeddings=True)
    source = save(model, tmp_path / "source")
    assert "lm_head.weight" not in keys_and_shapes(source)
    export_checkpoint(source, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    exported = Owl2ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert not exported.config.tie_word_embeddings
    ids = torch.tensor([[1, 5, 7]])
    torch.testing.assert_close(exported(ids).logits, model(ids).logits)


def test_siblings_keep_their_prefixes(tmp_path):
    model = Owl2ForConditionalGeneration.from_pretrained(FAMILY / "mplug_owl2_1" / "model")
    variant = with_separate_modules(model, ())
    source = save(variant, tmp_path / "source")
    export_checkpoint(source, tmp_path / "out")
    assert keys_and_shapes(tmp_path / "out") == keys_and_shapes(FAMILY / "mplug_owl2_1" / "model")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["multiway"] is True


@pytest.mark.parametrize(
    ("settings", "needle"),
    [
        ({"num_key_value_heads": 2}, "LLaMA-2-7B"),
        ({"num_key_value_heads": 4, "head_dim": 8}, "head_dim 8"),
        ({"num_key_value_heads": 4, "vision": {"hidden_act": "gelu"}}, "quick_gelu"),
        (
            {
                "num_key_value_heads": 4,
                "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0},
            },
            "yarn",
        ),
    ],
)
def test_options_that_the_authors_code_lacks_are_refused(settings, needle, tmp_path, run_cli):
    source = save(make_model(**settings), tmp_path / "source")
    with raises_input_error(ErrorCode.UNSUPPORTED, needle):
        export_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = run_cli("export", source, tmp_path / "out", "--for", "authors")
    assert (result.exit_code, needle in result.stderr) == (2, True)


def test_other_checkpoints_are_refused(tmp_path, run_cli):
    source = save(make_model(num_key_value_heads=4), tmp_path / "source")
    quantize_checkpoint(source, tmp_path / "4bit")
    with raises_input_error(ErrorCode.UNSUPPORTED, tmp_path / "4bit"):
        export_checkpoint(tmp_path / "4bit", tmp_path / "out")
    with raises_input_error(ErrorCode.UNSUPPORTED, "owl2 merge"):
        export_checkpoint(FAMILY / "q_align_lora" / "adapter", tmp_path / "out")
    with raises_input_error(ErrorCode.FILE_EXISTS, tmp_path / "4bit"):
        export_checkpoint(source, tmp_path / "4bit")
    assert run_cli("export", source, tmp_path / "out", "--for", "vllm").exit_code == 2


def test_command_and_remark_about_the_tokenizer(tmp_path, run_cli):
    model = make_model(num_key_value_heads=4, use_mam=False)
    source = save(model, tmp_path / "source")
    shutil.copy(FAMILY / "one_align" / "model" / "tokenizer.model", source)
    result = run_cli("export", source, tmp_path / "out")
    assert (result.exit_code, "tokenizer" in result.stdout) == (0, False)
    assert (tmp_path / "out" / "tokenizer.model").is_file()
    (source / "tokenizer.model").unlink()
    assert "tokenizer.model" in export_checkpoint(source, tmp_path / "other")[0]


@pytest.mark.parametrize(
    ("config", "shared", "row"),
    [
        (Owl2Config(), [], "loads as it is"),
        (Owl2Config(use_mam=False), list(Owl2Config.mam_module_names), "owl2 export"),
        (Owl2Config(mam_modules=list(NORMS)), ["k_proj", "v_proj"], "owl2 export"),
        (Owl2Config(num_key_value_heads=8), [], "no"),
        (Owl2_1Config(), [], "loads as it is"),
    ],
)
def test_info_says_whether_the_authors_code_loads_it(config, shared, row, tmp_path):
    assert shared_weights(config) == shared
    assert (unsupported_reason(config) is None) == (row != "no")
    config.save_pretrained(tmp_path)
    parts, values, _ = size_table(str(tmp_path)).columns
    assert dict(zip(parts.cells, values.cells, strict=True))["authors' code"] == row
