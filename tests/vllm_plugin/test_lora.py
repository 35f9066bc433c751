"""vLLM with several LoRA adapters: greedy tokens equal those of the `Engine`, also mixed."""

import pytest

from tests.adapters import make_adapter
from tests.vllm_plugin.conftest import NEW, conversations, start_vllm, vllm_tokens

pytestmark = pytest.mark.vllm

SETTINGS = {
    "all": {"r": 4, "parts": ["decoder"]},
    "visual": {"r": 8, "parts": ["decoder"], "target_modules": ["multiway.1.v_proj", "o_proj"]},
}


def test_mixed_adapters(checkpoint, tmp_path):
    from vllm.lora.request import LoRARequest

    from owl2.engine.engine import Engine

    folders = {
        name: make_adapter(checkpoint, tmp_path / name, seed, **settings)
        for seed, (name, settings) in enumerate(SETTINGS.items(), 1)
    }
    engine = Engine.from_pretrained(checkpoint, "cpu", "float32", adapters=folders)
    many, names = conversations(), [None, *SETTINGS]
    expected = {name: engine.batch_outputs(many, name, max_new_tokens=NEW) for name in names}
    requests = {
        name: LoRARequest(name, index, str(folder))
        for index, (name, folder) in enumerate(folders.items(), 1)
    }
    # One slot more than adapters: vLLM's CPU kernels use the last slot for rows without an adapter.
    with start_vllm(checkpoint, enable_lora=True, max_loras=3, max_lora_rank=8) as llm:
        chosen = [names[index % len(names)] for index in range(len(many))]
        for own in (chosen, chosen[1:] + chosen[:1], chosen):
            lora_requests = [requests.get(name) for name in own]
            tokens = vllm_tokens(llm, many, lora_request=lora_requests)
            texts = [engine.processor.decode(ids, True).strip() for ids in tokens]
            answers = [expected[name][index].text for index, name in enumerate(own)]
            assert texts == answers
    assert len({tuple(one.text for one in outputs) for outputs in expected.values()}) == 3
