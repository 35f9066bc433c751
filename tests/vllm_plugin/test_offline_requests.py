"""What offline inference requests of vLLM, for which a class stands that answers with the prompt.

It needs no vLLM, unlike the other tests in this directory.
"""

import sys
from types import SimpleNamespace

import pytest
import torch

from owl2.errors import ErrorCode, InputError
from owl2.processing.prepared_prompt import PreparedPrompt
from owl2.quantization.quantize_checkpoint import quantize_checkpoint
from owl2.vllm_plugin import offline
from tests.engine.conftest import ask, random_image
from tests.errors import raises_input_error

CONTEXT = 64


class FakeLLM:
    """Records requests; the answer to a prompt is its last two tokens."""

    def __init__(self, model, **settings):
        config = SimpleNamespace(max_model_len=CONTEXT, dtype=torch.bfloat16)
        core = SimpleNamespace(shutdown=lambda: self.calls.append("shutdown"))
        self.llm_engine = SimpleNamespace(model_config=config, engine_core=core)
        self.settings = settings

    def generate(self, prompts, sampling, use_tqdm):
        self.calls.append((prompts, sampling))
        ids = [prompt["prompt_token_ids"][-2:] for prompt in prompts]
        answers = [SimpleNamespace(token_ids=row, finish_reason="length") for row in ids]
        return [SimpleNamespace(outputs=[answer]) for answer in answers]


@pytest.fixture
def calls(monkeypatch):
    FakeLLM.calls = []
    vllm = SimpleNamespace(LLM=FakeLLM, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    return FakeLLM.calls


def test_answers_are_in_order_and_seeds_count_all_conversations(calls, tiny_checkpoint, tmp_path):
    many = [ask("red"), ask("x", tmp_path / "missing.png"), ask("blue", random_image(0)), ask("no")]
    options = {"temperature": 0.5, "seed": 10}
    found = list(offline.answer_all(tiny_checkpoint, iter(many), options, window=3))
    assert [answer.code if isinstance(answer, InputError) else "" for answer in found] == [
        *("", ErrorCode.MISSING_IMAGE, "", "")
    ]
    (first, seeds), (second, last_seeds), end = calls
    assert [one["seed"] for one in seeds + last_seeds] == [10, 12, 13]
    assert [len(prompts) for prompts in (first, second)] == [2, 1]
    assert first[0]["multi_modal_data"] == {}
    assert first[1]["multi_modal_data"]["image"].dtype == torch.bfloat16
    assert end == "shutdown"


def test_a_prompt_that_is_too_long_is_an_error_before_vllm(calls, tiny_checkpoint):
    engine = offline.VllmEngine(tiny_checkpoint)
    prompt = PreparedPrompt.from_ids([5] * CONTEXT, None, 3, 2)
    with raises_input_error(ErrorCode.TOO_LONG, CONTEXT):
        engine.next_token_logits([prompt], [3, 4])
    assert calls == []


@pytest.mark.parametrize(
    "use", [lambda model: next(offline.answer_all(model, [])), offline.VllmEngine]
)
def test_quantized_checkpoints_are_refused_before_vllm_starts(
    calls, tiny_checkpoint, tmp_path, use
):
    model = quantize_checkpoint(tiny_checkpoint, tmp_path / "4bit")
    with raises_input_error(ErrorCode.UNSUPPORTED, str(model)):
        use(model)
    assert calls == []
