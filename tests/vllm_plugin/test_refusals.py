"""Checkpoints that vLLM cannot load are refused before it starts."""

import pytest

from owl2.errors import ErrorCode
from owl2.quantization.quantize_checkpoint import quantize_checkpoint
from owl2.vllm_plugin import offline
from tests.errors import raises_input_error


@pytest.mark.parametrize(
    "use", [lambda model: next(offline.answer_all(model, [])), offline.VllmLogitsEngine]
)
def test_quantized_checkpoints(tiny_checkpoint, tmp_path, monkeypatch, use):
    model = quantize_checkpoint(tiny_checkpoint, tmp_path / "4bit")
    monkeypatch.setattr(offline, "_import_llm", lambda: None)
    with raises_input_error(ErrorCode.UNSUPPORTED, str(model)):
        use(model)
