"""transformers' `generate` with its default settings."""

from typing import Any

from engines import Answer, Prompts, Task

PACKAGES = ("torch", "transformers")
BITS = (16,)


def prepare(task: Task, **options: Any) -> Answer:
    """See `engines`.

    Args:
        options: Further options of `generate`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(task.threads)
    model = AutoModelForCausalLM.from_pretrained(task.folder / "llama", dtype="auto").eval()
    model.generation_config.eos_token_id = None

    def answer(prompts: Prompts, new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        mask = torch.ones_like(ids)
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=new, **options
        )
        return out[:, ids.shape[1] :].tolist()

    return answer
