"""Calibration of a model's layers: tokens by modality, `owl2 quantize --method gptq`."""

import copy
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from owl2 import Engine, Owl2ForConditionalGeneration
from owl2.checkpoints.hf_quantizer import Owl2QuantizationConfig
from owl2.checkpoints.stored_weights import open_weights
from owl2.engine.backends.weight_only_quantization import QuantizedLinear
from owl2.errors import ErrorCode
from owl2.model.modality import module_pair
from owl2.processing.processor import Owl2Processor
from owl2.quantization.calibrate import calibrate_layers, first_hidden
from owl2.quantization.calibrated_weights import CalibratedWeights
from owl2.quantization.calibration_data import PYTHON_REFERENCE, calibration_inputs
from owl2.quantization.command import Calibration, quantize
from tests.engine.conftest import ask
from tests.errors import raises_input_error
from tests.family import FOLDER as FAMILY
from tests.family import SIBLINGS
from tests.tiny import PARTIAL_MAM, make_model

COLORS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def samples_file(tmp_path_factory):
    """A JSONL file with three questions about images and one without."""
    folder = tmp_path_factory.mktemp("samples")
    rows = [conversation("what is this?", "a red circle")]
    for color in COLORS:
        Image.new("RGB", (8, 8), color).save(folder / f"{color}.png")
        rows.append(conversation("<image>\nwhat is this?", color) | {"image": f"{color}.png"})
    file = folder / "samples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def conversation(question, answer):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns}


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint, samples_file, tmp_path_factory):
    """The tiny checkpoint with 4 bits, calibrated on the samples, one module with 8 bits."""
    output = tmp_path_factory.mktemp("quantized") / "gptq"
    sources = [str(samples_file), PYTHON_REFERENCE]
    calibration = Calibration(sources, num_samples=8, max_length=32)
    modules = ["layers.1.mlp.down_proj"]
    return quantize(
        tiny_checkpoint, output, method="gptq", modules_8bit=modules, calibration=calibration
    )


@torch.no_grad()
def test_statistics_of_a_modality_are_those_of_its_tokens():
    model = make_model(initializer_range=0.3).eval()
    ids = torch.randint(3, 40, (1, 12))
    ids[0, 4 : 4 + model.config.num_image_tokens] = model.config.image_token_id
    is_visual = (ids == model.config.image_token_id)[0]
    image = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8)}
    samples = [first_hidden(model.model, inputs) for inputs in (image, {"input_ids": ids[:, :4]})]
    found = {}

    def keep_weight(index, name, weight, statistics):
        found[index, name] = statistics
        return weight

    calibrate_layers(copy.deepcopy(model.model.layers), samples, keep_weight)
    layer = model.model.layers[0]
    text = torch.cat([samples[0][0][0, ~is_visual], samples[1][0][0]])
    visual = samples[0][0][0, is_visual]
    for modality, tokens in enumerate((text, visual)):
        inputs = layer.multiway.pair("input_layernorm")[modality](tokens)
        for name in ("k_proj", "v_proj"):
            statistics = found[0, f"self_attn.multiway.{modality}.{name}"]
            assert statistics.tokens == len(tokens)
            torch.testing.assert_close(statistics.hessian, inputs.T @ inputs)
            # No layer before it is quantized; the inputs of the original model have 16 bits.
            assert statistics.shift.abs().max() < 4e-3 * statistics.hessian.abs().max()
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        assert found[1, name].tokens == len(text) + len(visual)


@torch.no_grad()
def test_errors_that_are_added_to_hidden_states_are_relative_to_them():
    model = make_model(initializer_range=0.3).eval()
    model.model.embed_tokens.weight[3] *= 1000  # as the first token of large models
    samples = [first_hidden(model.model, {"input_ids": torch.randint(3, 40, (1, 12))})]
    samples += [first_hidden(model.model, {"input_ids": torch.tensor([[3, 4, 5]])})]
    found, names = {}, ("self_attn.o_proj", "mlp.down_proj")

    def keep_weight(index, name, weight, statistics):
        found[index, name] = statistics.hessian
        return weight

    calibrate_layers(copy.deepcopy(model.model.layers), samples, keep_weight)
    layer, inputs = model.model.layers[0], {name: [] for name in names}
    for name in names:
        module, own = layer.get_submodule(name), inputs[name]
        module.register_forward_pre_hook(lambda _, x, own=own: own.append(x[0].flatten(0, -2)))
    outputs = torch.cat([layer(hidden, **arguments)[0] for hidden, arguments in samples])
    sizes = outputs.square().mean(1, keepdim=True).sqrt()
    assert sizes.max() > 50 * sizes.median()
    for name in names:
        weighted = torch.cat(inputs[name]) / sizes
        torch.testing.assert_close(found[0, name], weighted.T @ weighted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"use_mam": False}, *PARTIAL_MAM], ids=str)
@torch.no_grad()
def test_inputs_are_those_of_the_quantized_layers(settings):
    model = make_model(initializer_range=0.3, **settings).eval()
    ids = torch.randint(3, 40, (1, 12))
    samples = [first_hidden(model.model, {"input_ids": ids})]
    layers, found = copy.deepcopy(model.model.layers), {}

    def change_weight(index, name, weight, statistics):
        found[index, name] = statistics
        return 0.9 * weight

    calibrate_layers(layers, samples, change_weight)
    hidden, arguments = samples[0]
    changed = layers[0](hidden, **arguments)[0]
    original = model.model.layers[0](hidden, **arguments)[0]
    norm = module_pair(layers[1], "input_layernorm")[0]
    inputs, wanted = norm(changed), norm(original)
    statistics = found[1, "self_attn.q_proj"]
    torch.testing.assert_close(statistics.hessian, inputs.T @ inputs)
    shift = (wanted.bfloat16().float() - inputs).T @ inputs
    torch.testing.assert_close(statistics.shift, shift, rtol=1e-3, atol=1e-4)
    # Within a layer as well: the inputs of the output projection are those of the changed v_proj.
    output = found[0, "self_attn.o_proj"]
    share = output.shift.diagonal().sum() / output.hessian.diagonal().sum()
    assert share > 0.05


@torch.no_grad()
def test_gptq_is_closer_to_the_model_than_rounding(
    tiny_checkpoint, quantized, samples_file, tmp_path
):
    modules = ["layers.1.mlp.down_proj"]
    rounded = quantize(tiny_checkpoint, tmp_path / "rtn", modules_8bit=modules)
    processor = Owl2Processor.from_pretrained(tiny_checkpoint)
    samples = list(calibration_inputs([str(samples_file)], processor, 4, 32))
    folders = {"full": tiny_checkpoint, "gptq": quantized, "rtn": rounded}
    logits = {}
    for name, folder in folders.items():
        model = Owl2ForConditionalGeneration.from_pretrained(folder)
        logits[name] = torch.cat([model(**inputs).logits[0] for inputs in samples])
    errors = {name: (logits[name] - logits["full"]).norm() for name in ("gptq", "rtn")}
    assert 0 < errors["gptq"] < 0.8 * errors["rtn"]


@torch.no_grad()
def test_the_kernels_answer_as_the_dequantized_model(quantized, samples_file):
    engine = Engine.from_pretrained(quantized, "cpu", "float32")
    model = copy.deepcopy(engine.model)
    bits = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            bits[name] = module.bits
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight.copy_(module.dequantize(torch.float32))
            model.set_submodule(name, linear)
    assert bits.pop("lm_head") == bits.pop("model.layers.1.mlp.down_proj") == 8
    assert set(bits.values()) == {4}
    dequantized = Engine(model, engine.processor)
    conversations = [ask("what is this?")]
    for color in COLORS:
        image = {"type": "image", "path": str(samples_file.with_name(f"{color}.png"))}
        conversations.append([{"role": "user", "content": [image, {"type": "text", "text": "?"}]}])
    options = {"max_new_tokens": 8, "do_sample": False}
    assert engine.batch(conversations, **options) == dequantized.batch(conversations, **options)


def test_modalities_without_samples_are_reported(run_cli, tiny_checkpoint, tmp_path):
    options = ("--method", "gptq", "--calibration-samples", 2, "--calibration-length", 16)
    result = run_cli("quantize", tiny_checkpoint, tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    assert "4 Linears" in result.stdout  # keys and values of images in two layers
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (stored["method"], stored["bits"]) == ("gptq", 4)


@pytest.mark.parametrize(
    ("options", "code", "needle"),
    [
        ({"method": "awq"}, ErrorCode.UNKNOWN_NAME, "awq"),
        ({"calibration": Calibration()}, ErrorCode.CONFLICT, "gptq"),
        ({"modules_8bit": ["layers.7"]}, ErrorCode.UNKNOWN_NAME, "layers.7"),
        (
            {"method": "gptq", "calibration": Calibration(["missing.jsonl"])},
            ErrorCode.FILE_NOT_FOUND,
            "missing.jsonl",
        ),
    ],
)
def test_options_that_cannot_be_used(tiny_checkpoint, tmp_path, options, code, needle):
    with raises_input_error(code, needle):
        quantize(tiny_checkpoint, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_calibration_that_does_not_fit_is_refused_before_weights_are_read(
    tiny_checkpoint, tmp_path, monkeypatch
):
    calls = []
    module = "owl2.quantization.calibrated_weights"

    def memory(config, tensors, quantization, num_tokens):
        calls.append(num_tokens)
        return 10**15

    monkeypatch.setattr(f"{module}.calibration_memory", memory)
    monkeypatch.setattr(f"{module}._FirstLayer.from_pretrained", None)
    calibration = Calibration(num_samples=3, max_length=16)
    with raises_input_error(ErrorCode.OUT_OF_MEMORY, "1,000,000.0 GB"):
        quantize(tiny_checkpoint, tmp_path / "out", method="gptq", calibration=calibration)
    assert calls == [3 * 16]
    assert not (tmp_path / "out").exists()


def test_calibration_without_samples(tiny_checkpoint):
    source, reader, _ = open_weights(tiny_checkpoint)
    config = Owl2QuantizationConfig(4)
    with raises_input_error(ErrorCode.EMPTY_DATASET):
        CalibratedWeights(source, reader, config, list)("lm_head", torch.zeros(1, 1), 8)


def test_an_image_that_does_not_fit_names_its_row(tiny_checkpoint, samples_file):
    processor = Owl2Processor.from_pretrained(tiny_checkpoint)
    with raises_input_error(ErrorCode.TOO_LONG, samples_file.name):
        list(calibration_inputs([str(samples_file)], processor, 4, 6))


def test_samples_are_taken_at_equal_distances(tiny_checkpoint, samples_file):
    processor = Owl2Processor.from_pretrained(tiny_checkpoint)
    sources = [str(samples_file), PYTHON_REFERENCE]
    inputs = list(calibration_inputs(sources, processor, 4, 32))
    assert [one.get("pixel_values") is not None for one in inputs] == [False, True, False, False]
    assert [one["input_ids"].shape[1] for one in inputs[2:]] == [32, 32]
    assert [one["input_ids"][0, 0] for one in inputs] == [processor.tokenizer.bos_token_id] * 4
    assert not torch.equal(inputs[2]["input_ids"], inputs[3]["input_ids"])


@pytest.mark.parametrize("sibling", SIBLINGS)
def test_every_linear_of_a_sibling_is_calibrated(sibling, tmp_path):
    source = FAMILY / sibling / "model"
    calibration = Calibration(num_samples=2, max_length=16)
    folders = [tmp_path / "rtn", tmp_path / "gptq"]
    quantize(source, folders[0])
    quantize(source, folders[1], method="gptq", calibration=calibration)
    rtn, gptq = (load_file(folder / "model.safetensors") for folder in folders)
    quantized = {name for name, tensor in rtn.items() if tensor.dtype == torch.uint8}
    equal = {name for name in quantized if torch.equal(rtn[name], gptq[name])}
    assert len(quantized) > 8
    assert equal == {"lm_head.weight"}
