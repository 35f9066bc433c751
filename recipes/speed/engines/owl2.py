"""owl2's engine core, without caches across requests."""

from typing import Any

from engines import Answer, Prompts, Task

PACKAGES = ("torch", "transformers")
BITS = (16, 8, 4)


def prepare(task: Task, **options: Any) -> Answer:
    """See `engines`.

    Args:
        options: Further options of `ModelArgs`.
    """
    import torch

    from owl2.engine.engine_core import EngineCore
    from owl2.engine.load_model import ModelArgs
    from owl2.engine.sampling_params import SamplingParams

    torch.set_num_threads(task.threads)
    if task.bits < 16:
        options["quantize"] = f"{task.bits}bit"
    model = ModelArgs(task.folder / "owl2", "cpu", task.config["dtype"], **options).load_model()
    core = EngineCore(model, max_num_seqs=task.requests, enable_prefix_caching=False)

    def answer(prompts: Prompts, new: int) -> list[list[int]]:
        prepared = [core.prepare(ids) for ids in prompts]
        return core.generate(prepared, SamplingParams(), [new] * len(prepared), ())

    return answer
