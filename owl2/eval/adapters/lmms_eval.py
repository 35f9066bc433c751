"""The model `owl2` of lmms-eval.

``python -m lmms_eval --model owl2 --model_args pretrained=DIR --tasks mme --batch_size 16``

::

    request ──doc_to_visual──► images ┐
            ──text with <image>───────┴──► messages ──Engine──► text, or a loss

lmms-eval 0.7.3 has two peculiarities: its log-likelihoods are losses, of which the lowest wins, and
a pair (loss, is greedy) has to be wrapped in a `GenerationResult`.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import ImageFile
from tqdm import tqdm

from owl2.data.sample import Message
from owl2.engine.engine import MAX_NUM_SEQS, Engine
from owl2.engine.offline import output_all
from owl2.errors import ErrorCode, InputError
from owl2.eval.adapters import load_engine
from owl2.eval.adapters.requests import load_visuals, sampling_kwargs, to_messages, truncate
from owl2.registry import look_up

_LOG = logging.getLogger(__name__)


ARGUMENTS = (
    "pretrained", "device", "dtype", "quantize", "image_policy", "max_new_tokens", "max_frames"
)  # fmt: skip


class LmmsEvalModel(lmms):
    """A checkpoint for tasks of lmms-eval: generation and likelihoods, images and video frames.

    Args:
        pretrained: A directory, a hub id, or an engine.
        device: Default: cuda, mps or cpu; each of several processes uses its own GPU.
        dtype: As in `Engine.from_pretrained`.
        batch_size: Requests, or options of a question, per batch; or "auto".
        max_batch_size: The value for "auto".
        max_new_tokens: For tasks without a value.
        max_frames: Number of evenly spaced frames per video.
        options: `quantize` and `image_policy`, as in `Engine.from_pretrained`.

    Attributes:
        invalid: Errors of invalid requests by "TASK SPLIT NUMBER". Their response is empty, and
            they are logged.

    Raises:
        InputError: The checkpoint cannot be loaded; an argument is unknown.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | Engine,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int = MAX_NUM_SEQS,
        max_new_tokens: int = 256,
        max_frames: int = 8,
        **options: Any,
    ) -> None:
        super().__init__()
        for name in options:
            look_up("argument in model_args", name, dict.fromkeys(ARGUMENTS))
        # lmms-eval sets it globally; half of a truncated image would be gray.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        self.engine, processes = load_engine(pretrained, device, dtype, **options)
        self.engine.processor.image_processor.alpha = "drop"  # as the authors' scripts
        if processes is not None:
            self.accelerator = processes
            self._rank, self._world_size = processes.process_index, processes.num_processes
        self.device = self.engine.model.device
        self.batch_size = max_batch_size if batch_size == "auto" else int(batch_size)
        self.max_new_tokens = max_new_tokens
        self.max_frames = max_frames
        self.invalid: dict[str, str] = {}

    # -------------------------------------------------------------- generation

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The responses in the order of the requests, truncated at the stop strings `until`."""
        responses = [""] * len(requests)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="owl2") as bar:
            for options, until, indices in self._batches(requests):
                messages: dict[int, list[Message]] = {}
                for index in indices:
                    try:
                        messages[index] = self._messages(requests[index])
                    except InputError as error:
                        self._add_invalid(requests[index], error)
                outputs = output_all(self.engine, messages.values(), self.batch_size, **options)
                for index, output in zip(messages, outputs, strict=True):
                    if isinstance(output, InputError):
                        self._add_invalid(requests[index], output)
                    else:
                        responses[index] = truncate(output.text, until)
                bar.update(len(indices))
        return responses

    def _batches(
        self, requests: Sequence[Instance]
    ) -> Iterator[tuple[dict[str, Any], list[str], list[int]]]:
        """(options, until, indices) of requests with equal options and similar lengths."""
        groups: dict[str, tuple[dict[str, Any], list[str], list[int]]] = {}
        for index, request in enumerate(requests):
            options, until = sampling_kwargs(request.args[1], self.max_new_tokens)
            group = groups.setdefault(repr((options, until)), (options, until, []))
            if not request.metadata.get("__padding_only__"):
                group[2].append(index)
        for options, until, indices in groups.values():
            # A sampled response has its own seed, so that it is the same in any batch.
            size = 1 if options["do_sample"] else self.batch_size
            indices.sort(key=lambda index: -len(requests[index].args[0]))
            for start in range(0, len(indices), size):
                batch = indices[start : start + size]
                seed = {"seed": int(requests[batch[0]].args[3])} if options["do_sample"] else {}
                yield {**options, **seed}, until, batch

    # -------------------------------------------------------------- likelihoods

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """The loss of each continuation: the negative sum of the log-probabilities of its tokens.

        The end of the answer is not included, as options of a question are usually not complete
        answers. Whether a continuation is the greedy response is computed for prompts with one
        continuation only. An invalid request has an infinite loss.
        """
        losses = [(math.inf, False)] * len(requests)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(requests):
            if len(request.args) != 6:
                raise InputError(
                    "acc_mutual_info needs answers without a question and takes the highest "
                    "likelihood, which is a loss here. Remove it from the metrics of the task.",
                    ErrorCode.UNSUPPORTED,
                )
            context, _, _, *document = request.args
            groups.setdefault((context, *document), []).append(index)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="owl2") as bar:
            for indices in groups.values():
                try:
                    scored = self._score([requests[index] for index in indices])
                except InputError as error:
                    self._add_invalid(requests[indices[0]], error)
                else:
                    for index, loss in zip(indices, scored, strict=True):
                        losses[index] = loss
                bar.update(len(indices))
        return [GenerationResult(loss) for loss in losses]

    def _score(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """The losses of continuations of the same prompt."""
        messages = self._messages(requests[0])
        given = [request.args[1] for request in requests]
        texts = [text(self._document(requests[0])) if callable(text) else text for text in given]
        choices = [str(text).strip() for text in texts]  # the chat format adds the space
        scores = self.engine.score(messages, choices, include_end=False, batch_size=self.batch_size)
        is_greedy = False
        if len(choices) == 1:
            text = self.engine.chat(messages, max_new_tokens=len(choices[0]), do_sample=False)
            is_greedy = text.startswith(choices[0])
        return [(-score, is_greedy) for score in scores]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported: tasks whose next question depends on an answer."""
        raise InputError(
            "The model owl2 does not support tasks with several rounds (multi_round).",
            ErrorCode.UNSUPPORTED,
        )

    # -------------------------------------------------------------- requests

    def _document(self, request: Instance) -> Any:
        index, task, split = request.args[-3:]
        return self.task_dict[task][split][index]

    def _messages(self, request: Instance) -> list[Message]:
        """The user message of a request. Raises `InputError` if its images cannot be read."""
        context, doc_to_visual = request.args[0], request.args[2]
        try:
            visuals = doc_to_visual(self._document(request)) if doc_to_visual is not None else []
            return to_messages(str(context), load_visuals(visuals or [], self.max_frames))
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError as well
            raise InputError(f"An image is invalid: {error}", ErrorCode.BROKEN_IMAGE) from error

    def _add_invalid(self, request: Instance, error: InputError) -> None:
        index, task, split = request.args[-3:]
        name = f"{task} {split} {index}"
        self.invalid[name] = str(error)
        _LOG.warning("owl2: %s is invalid and has an empty response: %s", name, error)
