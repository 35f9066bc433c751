"""`owl2 quantize`, and loading of its checkpoints."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText

from owl2.checkpoints import stored_weights
from owl2.checkpoints.hf_quantizer import Owl2QuantizationConfig, quantize_model
from owl2.checkpoints.weight_files import weight_files
from owl2.engine.backends.weight_only_quantization import QuantizedLinear, quantize_linear
from owl2.engine.engine import Engine
from owl2.engine.load_model import ModelArgs
from owl2.errors import ErrorCode
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.processor import Owl2Processor
from owl2.quantization.command import quantize
from owl2.quantization.quantize_checkpoint import quantize_checkpoint
from owl2.train.adapters import apply_lora
from owl2.train.recipe_sections import LoraSettings
from tests.engine.conftest import ask
from tests.errors import raises_input_error
from tests.tiny import make_model

HEAD = "lm_head"
VISUAL_V = "model.layers.0.self_attn.v_proj.multiway.1"


def load(folder, **options):
    return Owl2ForConditionalGeneration.from_pretrained(folder, **options)


def quantized_linears(model):
    return {
        name: module.bits
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def assert_same_state(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint, tmp_path_factory):
    return quantize_checkpoint(tiny_checkpoint, tmp_path_factory.mktemp("quantized") / "4bit")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", [".safetensors", ".bin"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_ahead_equals_quantized_while_loading(
    run_cli, tiny_checkpoint, tmp_path, bits, kind, dtype
):
    source = shutil.copytree(tiny_checkpoint, tmp_path / "source")
    tensors = {n: t.half() for n, t in load_file(source / "model.safetensors").items()}
    (source / "model.safetensors").unlink()
    files = {}
    names = sorted(tensors)
    for number in range(3):
        file = f"{'model' if kind == '.safetensors' else 'pytorch_model'}-{number}{kind}"
        part = {name: tensors[name] for name in names[number::3]}
        save_file(part, source / file) if kind == ".safetensors" else torch.save(
            part, source / file
        )
        files |= dict.fromkeys(part, file)
    index = "model.safetensors" if kind == ".safetensors" else "pytorch_model.bin"
    (source / f"{index}.index.json").write_text(json.dumps({"weight_map": files}))

    output = tmp_path / "output"
    assert run_cli("quantize", source, output, "--bits", bits).exit_code == 0
    ahead = ModelArgs(output, "cpu", dtype).load_model()
    loaded = ModelArgs(source, "cpu", dtype, quantize=f"{bits}bit").load_model()
    assert_same_state(ahead, loaded)
    assert set(quantized_linears(ahead).values()) == {bits, 8}
    # The stored values are quantized, whatever the dtype of the model.
    layer = ahead.model.layers[0].mlp.up_proj
    weight, scale = quantize_linear(tensors["model.layers.0.mlp.up_proj.weight"], bits)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.scale, scale)
    answers = [
        Engine.from_pretrained(*args, dtype=dtype).chat(ask("what?"), max_new_tokens=4)
        for args in ((output, "cpu"),)
    ]
    engine = Engine.from_pretrained(source, "cpu", dtype, quantize=f"{bits}bit")
    assert answers == [engine.chat(ask("what?"), max_new_tokens=4)]


def test_options_as_a_dictionary(tiny_checkpoint, quantized, tmp_path):
    """As transformers takes them, for weights that are not quantized yet."""
    options = {"quant_method": "owl2", "bits": 4}
    model = load(tiny_checkpoint, quantization_config=options)
    assert_same_state(model, load(quantized))
    model.save_pretrained(tmp_path)
    assert_same_state(load(tmp_path), model)


@pytest.mark.parametrize("activation_bits", [16, 8])
def test_activation_bits_of_a_quantized_checkpoint(quantized, activation_bits):
    model = ModelArgs(quantized, "cpu", activation_bits=activation_bits).load_model()
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert linears
    assert {linear.activation_bits for linear in linears} == {activation_bits}


def test_the_same_values_as_a_model_quantized_in_memory(tiny_checkpoint, quantized):
    model = load(tiny_checkpoint)
    quantize_model(model, "4bit")
    assert_same_state(model, load(quantized))


def test_large_weights_are_quantized_in_blocks(monkeypatch):
    weight = torch.randn(50, 100)
    for bits in (4, 8):
        expected = quantize_linear(weight, bits)
        with monkeypatch.context() as patch:
            patch.setattr("owl2.engine.backends.weight_only_quantization.WEIGHTS_AT_A_TIME", 1700)
            found = quantize_linear(weight, bits)
        assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize("bits", [4, 8])
def test_shapes_without_values(bits):
    weight = torch.randn(6, 100)
    for values, empty in zip(
        quantize_linear(weight, bits), quantize_linear(weight.to("meta"), bits), strict=True
    ):
        assert (empty.shape, empty.dtype) == (values.shape, values.dtype)
        assert empty.is_meta


def test_shards_and_their_index(tiny_checkpoint, quantized, tmp_path):
    output = quantize_checkpoint(tiny_checkpoint, tmp_path / "shards", max_shard_size=20_000)
    files = weight_files(output)
    assert len(files) > 2
    assert [file.name for file in files][
        -1
    ] == f"model-0000{len(files)}-of-0000{len(files)}.safetensors"
    assert all(file.stat().st_size < 40_000 for file in files)
    assert_same_state(load(output), load(quantized))


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModel])
def test_the_auto_classes_load_a_quantized_checkpoint(quantized, auto):
    model = auto.from_pretrained(quantized)
    assert len(quantized_linears(model)) == 2 * 9 + (auto is not AutoModel)


def test_save_pretrained_writes_the_same_checkpoint(quantized, tmp_path):
    model = load(quantized)
    model.save_pretrained(tmp_path / "again")
    assert_same_state(load(tmp_path / "again"), model)
    assert (tmp_path / "again" / "model.safetensors").stat().st_size == (
        quantized / "model.safetensors"
    ).stat().st_size
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    written = json.loads((quantized / "config.json").read_text())
    assert saved["quantization_config"] == written["quantization_config"]


def test_shared_embeddings_are_those_of_the_head(run_cli, tiny_checkpoint, tmp_path):
    source = tmp_path / "tied"
    make_model(tie_word_embeddings=True).save_pretrained(source)
    output = tmp_path / "out"
    assert run_cli("quantize", source, output, "--share-embeddings").exit_code == 0
    assert "model.embed_tokens.weight" not in load_file(output / "model.safetensors")
    model = load(output)
    embeddings = model.model.embed_tokens.weight
    assert torch.equal(embeddings, model.lm_head.dequantize(embeddings.dtype))
    before = load(source).model.embed_tokens.weight
    assert 0 < (embeddings - before).abs().max() < before.abs().max() / 100
    expected = load(quantize_checkpoint(source, tmp_path / "twice"))
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
    model.save_pretrained(tmp_path / "again")
    assert_same_state(load(tmp_path / "again"), model)


def test_embeddings_of_a_model_with_a_head_cannot_be_shared(run_cli, tiny_checkpoint, tmp_path):
    result = run_cli("quantize", tiny_checkpoint, tmp_path / "out", "--share-embeddings")
    assert result.exit_code == 2 and str(tiny_checkpoint) in result.stderr
    assert not (tmp_path / "out").exists()


def test_tied_embeddings(tmp_path):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    output = quantize_checkpoint(tmp_path / "tied", tmp_path / "out")
    model = load(output)
    assert_same_state(model, load(tmp_path / "tied", quantization_config=Owl2QuantizationConfig(4)))
    weight, scale = quantize_linear(model.model.embed_tokens.weight.detach(), 8)
    assert torch.equal(model.lm_head.weight, weight)
    assert torch.equal(model.lm_head.scale, scale)
    model.save_pretrained(tmp_path / "again")
    assert_same_state(load(tmp_path / "again"), model)


def test_bits_of_single_modules(tiny_checkpoint, tmp_path):
    modules = {HEAD: 16, VISUAL_V: 8, "model.layers.1.mlp.up_proj": 16}
    config = Owl2QuantizationConfig(4, modules=modules)
    model = load(quantize_checkpoint(tiny_checkpoint, tmp_path / "out", config))
    bits = quantized_linears(model)
    assert bits["model.layers.0.self_attn.multiway.1.v_proj"] == 8
    assert bits["model.layers.0.self_attn.multiway.0.v_proj"] == 4
    assert not {HEAD, "model.layers.1.mlp.up_proj"} & bits.keys()
    assert_same_state(model, load(tiny_checkpoint, quantization_config=config))


def test_another_rounding(tiny_checkpoint, tmp_path):
    """The function gets the released name, the stored weight and the bits of each module."""
    calls = {}

    def quantize_weight(name, weight, bits):
        calls[name] = (tuple(weight.shape), bits)
        return quantize_linear(torch.zeros_like(weight), bits)

    output = quantize_checkpoint(tiny_checkpoint, tmp_path / "out", None, quantize_weight)
    assert calls[VISUAL_V] == ((8, 16), 4)
    assert calls[HEAD][1] == 8
    assert len(calls) == 19
    assert not load(output).lm_head.dequantize(torch.float32).any()


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize(
    ("code", "key"),
    [
        (ErrorCode.MISSING_WEIGHTS, "model.layers.1.mlp.up_proj.weight"),
        (ErrorCode.UNEXPECTED_WEIGHTS, "model.layers.7.mlp.up_proj.weight"),
        (ErrorCode.SHAPE_MISMATCH, "model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_keys_that_do_not_fit(tiny_checkpoint, quantized, tmp_path, is_quantized, code, key):
    folder = shutil.copytree(quantized if is_quantized else tiny_checkpoint, tmp_path / "model")

    def change(tensors):
        if code is ErrorCode.MISSING_WEIGHTS:
            del tensors[key]
        else:
            tensors[key] = tensors["model.layers.1.mlp.up_proj.weight"][:-1].clone()

    change_weights(folder, change)
    with raises_input_error(code, key):
        load(folder, **({} if is_quantized else {"quantization_config": Owl2QuantizationConfig(4)}))
    with raises_input_error(ErrorCode.UNSUPPORTED if is_quantized else code):
        quantize_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_named_chat_templates_are_copied(tiny_checkpoint, tmp_path):
    source = shutil.copytree(tiny_checkpoint, tmp_path / "source")
    processor = Owl2Processor.from_pretrained(source)
    processor.chat_template = {"default": processor.chat_template, "short": "{{ messages }}"}
    processor.save_pretrained(source)
    output = quantize(source, tmp_path / "out")
    assert Owl2Processor.from_pretrained(output).chat_template == processor.chat_template


def test_a_missing_scale(quantized, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "model")
    change_weights(folder, lambda tensors: tensors.pop("lm_head.scale"))
    with raises_input_error(ErrorCode.MISSING_WEIGHTS, "lm_head.scale"):
        load(folder)


def test_a_checkpoint_of_earlier_versions_is_refused(quantized, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"].pop("block_rows") == 16
    (folder / "config.json").write_text(json.dumps(config))
    with raises_input_error(ErrorCode.INVALID_CONFIG, "block_rows"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        ({"bits": 3}, "3"),
        ({"group_size": 32}, "32"),
        ({"awq": 1}, "awq"),
        ({"modules": {HEAD: 2}}, "2"),
    ],
)
def test_invalid_quantization_config(quantized, tmp_path, change, needle):
    folder = shutil.copytree(quantized, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with raises_input_error(ErrorCode.INVALID_CONFIG, needle):
        load(folder)


def test_quantized_checkpoint_with_the_option_quantize(run_cli, quantized):
    options = ("--device", "cpu", "--max-new-tokens", 2, "what?")
    same = run_cli("chat", "--model", quantized, "--quantize", "4bit", *options)
    assert same.exit_code == 0
    assert same.stdout == run_cli("chat", "--model", quantized, *options).stdout
    other = run_cli("chat", "--model", quantized, "--quantize", "8bit", *options)
    assert other.exit_code == 2
    assert str(quantized) in other.stderr


def test_checkpoints_that_cannot_be_quantized(run_cli, tiny_checkpoint, quantized, tmp_path):
    adapter = load(tiny_checkpoint)
    apply_lora(adapter, LoraSettings(r=2), seed=0)
    adapter.save_pretrained(tmp_path / "adapter")
    (tmp_path / "exists").mkdir()
    out = tmp_path / "out"
    for arguments, needle in (
        ((tmp_path / "adapter", out), "merge"),
        ((quantized, out), "already"),
        ((tiny_checkpoint, tmp_path / "exists"), "exists"),
        ((tmp_path / "absent", out), "absent"),
        (("nobody/absent", out), "nobody/absent"),
        ((tiny_checkpoint, out, "--bits", 3), "3"),
    ):
        result = run_cli("quantize", *arguments)
        assert (result.exit_code, needle in result.stderr) == (2, True), result.stderr
        assert not out.exists()


def test_the_checkpoint_is_checked_once(tiny_checkpoint, quantized, tmp_path, monkeypatch):
    checks = []
    monkeypatch.setattr(stored_weights, "check_keys", lambda *keys: checks.append(keys))
    output = quantize(tiny_checkpoint, tmp_path / "out")
    assert len(checks) == 1
    assert_same_state(load(output), load(quantized))


def test_an_adapter_fits_the_quantized_base(tiny_checkpoint, quantized, tmp_path):
    model = load(tiny_checkpoint)
    apply_lora(model, LoraSettings(r=2), seed=0)
    model.save_pretrained(tmp_path / "adapter")
    for options in ({"base": quantized}, {"quantization_config": Owl2QuantizationConfig(4)}):
        loaded = load(tmp_path / "adapter", **options)
        assert quantized_linears(loaded)["model.layers.0.mlp.up_proj.base_layer"] == 4
        weights = dict(loaded.named_parameters())
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                assert torch.equal(weights[name], parameter)
    # Another checkpoint is rejected.
    make_model(
        seed=1, vocab_size=model.config.vocab_size, max_position_embeddings=128
    ).save_pretrained(tmp_path / "other")
    other = quantize_checkpoint(tmp_path / "other", tmp_path / "other4")
    with raises_input_error(ErrorCode.BASE_MODEL_MISMATCH):
        load(tmp_path / "adapter", base=other)


def test_copied_files(tiny_checkpoint, quantized):
    names = {file.name for file in quantized.iterdir()}
    assert names == {file.name for file in tiny_checkpoint.iterdir()}
    for name in names - {"config.json", "model.safetensors"}:
        assert (quantized / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    stored = json.loads((quantized / "config.json").read_text())
    source = json.loads((tiny_checkpoint / "config.json").read_text())
    changed = {"quantization_config", "tie_word_embeddings"}
    assert {k: v for k, v in stored.items() if k not in changed} == {
        k: v for k, v in source.items() if k not in changed
    }
