"""lm-eval's model `owl2`: text alone, by the code that lm-eval runs every Hugging Face model with.

So the same numbers come out as for the plain language model where the weights are the same: what
is ours here is where the model and its tokenizer come from, and the chat format.
"""

import copy
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from lm_eval.models.huggingface import HFLM

from owl2.engine.engine import Engine
from owl2.errors import InputError


class Owl2Text(HFLM):
    """A checkpoint, or an engine that is there already, for lm-eval.

    Args:
        pretrained: a directory, a hub id, or an engine; with an engine, `device`, `dtype` and
            `quantize` are its own.
        device: default: cuda, else mps, else cpu; of several processes each has its own.
        batch_size: prompts at a time, or "auto".
        add_bos_token: None: as the tokenizer does it, which for LLaMA's is ``<s>``, once (SPEC
            1.5), for SmolLM2's nothing.
        hflm: what else lm-eval's `hf` model takes about computing: `max_length`, `truncation`,
            `softmax_dtype`, `logits_cache`, `prefix_token_id`, `mixed_precision_dtype`.

    Raises:
        InputError: what cannot be loaded; an argument that there is not.
    """

    def __init__(
        self,
        pretrained: str | Engine,
        device: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = 64,
        add_bos_token: bool | None = None,
        **hflm: Any,
    ) -> None:
        if unknown := sorted(hflm.keys() - _OPTIONS):
            names = "pretrained, device, dtype, quantize, batch_size, max_batch_size, add_bos_token"
            raise InputError(
                f"model_args: there is no {', '.join(unknown)}. There are: {names}, "
                f"{', '.join(sorted(_OPTIONS))}."
            )
        # lm-eval's command line says so where the user says nothing, and its own `hf` model then
        # takes what there is.
        if device == "cuda:0" and not torch.cuda.is_available():
            device = None
        workers = Accelerator() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
        if isinstance(pretrained, Engine):
            engine = pretrained
        else:
            where = device if workers is None else workers.device
            chosen = None if dtype in (None, "auto") else dtype
            # Nothing is asked twice here, and what is kept would only take memory.
            engine = Engine.from_pretrained(
                pretrained, where, chosen, quantize=quantize, enable_prefix_caching=False
            )
        self.processor = engine.processor
        with quiet():
            super().__init__(
                pretrained=engine.model,
                # HFLM may give it a token for padding, and this one is the engine's.
                tokenizer=copy.deepcopy(engine.processor.tokenizer),
                backend="causal",
                batch_size=batch_size or 1,
                max_batch_size=max_batch_size,
                add_bos_token=add_bos_token,
                **{"max_length": engine.context_length, **hflm},
            )
        if workers is not None:
            self.accelerator = workers
            self._rank, self._world_size = workers.process_index, workers.num_processes

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **_: Any) -> None:
        self.tokenizer = tokenizer  # HFLM's own refuses classes that it does not know

    # -------------------------------------------------------------- chat (--apply_chat_template)

    def apply_chat_template(
        self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation in the checkpoint's own format.

        Raises:
            InputError: a system prompt where the format has none.
        """
        return str(
            self.processor.apply_chat_template(
                list(chat_history),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What lm-eval writes down: the template in use, None without one."""
        if isinstance(chat_template, str):
            raise InputError(
                f"There is no chat template {chat_template!r}: a checkpoint has one, which "
                "--apply_chat_template takes without a name."
            )
        return str(self.processor.chat_template) if chat_template else None

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # With a chat template lm-eval puts an option right after "ASSISTANT:", where training has
        # a space, which is part of the answer's first token.
        before, between = self._answers_place()
        if context.endswith(before) and not continuation.startswith(between):
            continuation = between + continuation
        ids: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return ids

    def _answers_place(self) -> tuple[str, str]:
        """What the chat format writes before an answer: (as the prompt's end, as its start)."""
        if not hasattr(self, "_place"):
            asked = [{"role": "user", "content": "?"}]
            said = [*asked, {"role": "assistant", "content": "!"}]
            turn, whole = map(str, self.processor.apply_chat_template([asked, said]))
            prompt = self.apply_chat_template(asked)
            self._place = (prompt[len(turn) :], whole[len(prompt) : whole.index("!", len(prompt))])
        return self._place


@contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's warnings of what is meant here, such as a model that is loaded already."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


_OPTIONS = {
    "logits_cache",
    "max_length",
    "mixed_precision_dtype",
    "prefix_token_id",
    "softmax_dtype",
    "truncation",
}
