"""Torch's modes around a call, and changes of the model, do not affect later answers."""

import pytest
import torch

from owl2.checkpoints.hf_quantizer import quantize_model
from owl2.engine.backends.weight_only_quantization import QuantizedLinear
from owl2.engine.engine_core import EngineCore
from owl2.engine.model_runner import ModelRunner
from owl2.engine.sampling_params import SamplingParams
from owl2.errors import ErrorCode
from tests.engine.conftest import stream_tokens
from tests.errors import raises_input_error
from tests.tiny import make_model

GREEDY = SamplingParams()
IDS = (1, 5, 9, 13)
TOKENS = 6


@pytest.fixture
def model():
    result = make_model(
        hidden_size=64, num_attention_heads=2, intermediate_size=80, initializer_range=0.4
    ).eval()
    assert ModelRunner(result).uses_cpu_kernels
    return result


def answer(core, ids=IDS):
    return core.generate([core.prepare(ids)], GREEDY, [TOKENS], ())[0]


@pytest.mark.parametrize("length", [4, 100])
def test_autocast_of_the_caller_has_no_effect(model, length):
    ids = [3 + index % 30 for index in range(length)]
    expected = answer(EngineCore(model), ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert answer(EngineCore(model), ids) == expected


def test_inference_mode_of_a_caller_has_no_effect(model):
    core = EngineCore(model)
    with torch.inference_mode():
        first = answer(core)
    assert answer(core) == first


@pytest.mark.parametrize("bits", [None, "8bit", "4bit"])
def test_nan_is_reported_with_any_number_of_bits(model, bits):
    if bits:
        quantize_model(model, bits)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with raises_input_error(ErrorCode.NON_FINITE):
        answer(EngineCore(model))


def test_a_cast_during_an_answer_is_an_error(model, gate):
    core = EngineCore(model)
    stream = stream_tokens(core, core.prepare(IDS), TOKENS)
    next(stream)
    assert gate.reached.wait(20)
    model.to(torch.bfloat16)
    gate.open()
    with pytest.raises(RuntimeError, match="cast"):
        list(stream)
    assert len(answer(core)) == TOKENS


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scales_keep_their_dtype(bits, dtype):
    linear = QuantizedLinear(torch.nn.Linear(64, 8), bits)
    scale = linear.scale.clone()
    linear = linear.to(dtype)
    assert scale.dtype == linear.scale.dtype == {8: torch.float32, 4: torch.bfloat16}[bits]
    assert torch.equal(linear.scale, scale)
    assert linear.bias.dtype == dtype


def test_quantized_and_plain_linears_of_different_widths(model):
    """The kernels read quantized values 64 at a time; a plain matrix may have another width."""
    layer = model.model.layers[0]
    assert layer.mlp.down_proj.in_features % 64
    layer.self_attn.q_proj = QuantizedLinear(layer.self_attn.q_proj, 8)
    core = EngineCore(model)
    prompts = [core.prepare(IDS)] * 2
    batched = core.generate(prompts, GREEDY, [TOKENS] * 2, ())
    assert batched == [answer(core)] * 2
