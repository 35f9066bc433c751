"""The model `owl2` of lm-eval: text only, with the code of the model `hf` of lm-eval.

With the same weights the scores equal those of the plain language model. This class loads the model
and its tokenizer, and adds the chat format.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from owl2.engine.engine import Engine
from owl2.errors import ErrorCode, InputError
from owl2.eval.adapters import load_engine
from owl2.registry import look_up

# Arguments of `HFLM` that `LmEvalModel` passes on.
HFLM_ARGUMENTS = (
    "logits_cache", "max_length", "mixed_precision_dtype", "prefix_token_id", "softmax_dtype",
    "truncation",
)  # fmt: skip
ARGUMENTS = ("pretrained", "dtype", "quantize", "add_bos_token", *HFLM_ARGUMENTS)


class LmEvalModel(HFLM):
    """A checkpoint or an engine for lm-eval.

    Args:
        pretrained: A directory, a hub id, or an engine. `device`, `dtype` and `quantize` are for
            the first two.
        device: Default: cuda, mps or cpu; each of several processes uses its own GPU.
        batch_size: Prompts per batch, or "auto".
        add_bos_token: None: as the tokenizer does, which is one ``<s>`` for LLaMA (Specification
            §1.5).
        hflm: Other arguments of `HFLM`, see `HFLM_ARGUMENTS`.

    Raises:
        InputError: The checkpoint cannot be loaded; an argument is unknown.
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
        for name in hflm:
            look_up("argument in model_args", name, dict.fromkeys(ARGUMENTS))
        # The default of the command line of lm-eval, also on machines without a GPU.
        if device == "cuda:0" and not torch.cuda.is_available():
            device = None
        dtype = None if dtype == "auto" else dtype
        # No prompt occurs twice, so a prefix cache would only take memory.
        options = {"quantize": quantize, "enable_prefix_caching": False}
        engine, processes = load_engine(pretrained, device, dtype, **options)
        self.processor = engine.processor
        with quiet():
            super().__init__(
                pretrained=engine.model,
                # A copy, as HFLM may set a padding token.
                tokenizer=copy.deepcopy(engine.processor.tokenizer),
                backend="causal",
                batch_size=batch_size or 1,
                max_batch_size=max_batch_size,
                add_bos_token=add_bos_token,
                **{"max_length": engine.context_length, **hflm},
            )
        if processes is not None:
            self.accelerator = processes
            self._rank, self._world_size = processes.process_index, processes.num_processes

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **_: Any) -> None:
        self.tokenizer = tokenizer  # that of HFLM rejects unknown classes

    # -------------------------------------------------------------- chat (--apply_chat_template)

    def apply_chat_template(
        self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation in the chat format of the checkpoint.

        Raises:
            InputError: The format has no system prompt, and there is one.
        """
        return str(
            self.processor.apply_chat_template(
                list(chat_history),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template in use, for the results of lm-eval; None without one."""
        if isinstance(chat_template, str):
            raise InputError(
                f"There is no chat template {chat_template!r}. Use --apply_chat_template without a "
                "name for that of the checkpoint.",
                ErrorCode.UNKNOWN_NAME,
            )
        return str(self.processor.chat_template) if chat_template else None

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # With a chat template lm-eval appends an option directly to "ASSISTANT:". In training a
        # space follows, which is part of the first token of the answer.
        end, separator = self._answer_position()
        if context.endswith(end) and not continuation.startswith(separator):
            continuation = separator + continuation
        ids: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return ids

    @cache  # noqa: B019 - one model per process
    def _answer_position(self) -> tuple[str, str]:
        """The end of a prompt before an answer, and the text between it and the answer."""
        question = [{"role": "user", "content": "?"}]
        conversation = [*question, {"role": "assistant", "content": "!"}]
        turn, complete = map(str, self.processor.apply_chat_template([question, conversation]))
        prompt = self.apply_chat_template(question)
        separator = complete[len(prompt) : complete.index("!", len(prompt))]
        return prompt[len(turn) :], separator


@contextmanager
def quiet() -> Iterator[None]:
    """Disable warnings of lm-eval that do not apply, such as that of a model that is loaded."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
