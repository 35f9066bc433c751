"""OpenVINO GenAI with continuous batching; `optimum-intel` converts the model.

Weights of 8 bits have one scale per row, weights of 4 bits one per 32 values. On CPUs, OpenVINO
quantizes activations to 8 bits during matrix products with quantized weights.
"""

from pathlib import Path
from typing import Any

from engines import Answer, Prompts, Task

PACKAGES = ("openvino", "openvino-genai", "optimum-intel", "nncf")
BITS = (16, 8, 4)
CACHE_GB = 2


def convert(task: Task) -> Path:
    """The directory of the model with `task.bits`; written on first use."""
    path = task.folder / f"openvino-{task.bits}"
    if not path.exists():
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

        options: dict[str, Any] = {"load_in_8bit": False}  # by default, large models have 8 bits
        if task.bits == 8:
            options = {"quantization_config": OVWeightQuantizationConfig(bits=8, sym=True)}
        elif task.bits == 4:
            config = OVWeightQuantizationConfig(bits=4, sym=True, group_size=32)
            options = {"quantization_config": config}
        model = OVModelForCausalLM.from_pretrained(
            task.folder / "llama", export=True, compile=False, **options
        )
        model.save_pretrained(path)
    return path


def prepare(task: Task) -> Answer:
    """See `engines`."""
    path = convert(task)
    import numpy as np
    import openvino_genai as genai
    from openvino import Tensor

    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.cache_size = CACHE_GB
    scheduler.max_num_seqs = task.requests
    scheduler.max_num_batched_tokens = task.requests * task.positions
    pipeline = genai.ContinuousBatchingPipeline(
        path, scheduler, "CPU", {"INFERENCE_NUM_THREADS": task.threads}
    )

    def answer(prompts: Prompts, new: int) -> list[list[int]]:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        inputs = [Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
        results = pipeline.generate(inputs, [config] * len(inputs))
        return [list(result.m_generation_ids[0]) for result in results]

    return answer
