"""lmms-eval's model `owl2`:

``python -m lmms_eval --model owl2 --model_args pretrained=DIR --tasks mme --batch_size 16``

::

    request ──doc_to_visual──► images ┐
            ──words, <image> in them────┴──► messages ──Engine──► text, or a loss

Two of lmms-eval 0.7.3's own ways, which what is returned here follows: what it calls a likelihood
is a loss, of which the lowest wins; and a pair (loss, whether it is the greedy answer) is only
understood wrapped in a `GenerationResult`.
"""

import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import ImageFile
from tqdm import tqdm

from owl2.data.sample import Message
from owl2.engine.engine import MAX_NUM_SEQS, Engine
from owl2.errors import InputError
from owl2.eval.adapters.requests import ImageInput, cut, decoding, images_of, turn
from owl2.processing.image_processing import ImagePolicy

_LOG = logging.getLogger(__name__)


class Owl2Multimodal(lmms):
    """A checkpoint for lmms-eval's tasks: generation and likelihoods, images, videos as frames.

    Args:
        pretrained: a directory or a hub id, or an engine that is there already.
        device: default: cuda, else mps, else cpu; of several processes each has its own.
        dtype, quantize, image_policy: as `Engine.from_pretrained`.
        batch_size: requests at a time, options of a question at a time; or "auto".
        max_batch_size: what "auto" goes up to.
        max_new_tokens: where a task does not say.
        max_frames: of a video, evenly spaced.

    Attributes:
        broken: what could not be asked, by "TASK SPLIT NUMBER", and why. It is answered with
            nothing, and named in the log.

    Raises:
        InputError: what cannot be loaded; an argument that there is not.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | Engine,
        device: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        image_policy: ImagePolicy | None = None,
        batch_size: int | str = 1,
        max_batch_size: int = MAX_NUM_SEQS,
        max_new_tokens: int = 256,
        max_frames: int = 8,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise InputError(
                f"model_args: there is no {', '.join(unknown)}. There are: pretrained, device, "
                "dtype, quantize, image_policy, max_new_tokens, max_frames."
            )
        # lmms-eval sets it for all; an image that is cut short would be read as half grey.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self.accelerator = Accelerator()
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes
            device = str(self.accelerator.device)
        if isinstance(pretrained, Engine):
            self.engine = pretrained
        else:
            self.engine = Engine.from_pretrained(
                pretrained, device, dtype, quantize=quantize, image_policy=image_policy
            )
        self.device = self.engine.model.device
        self.batch_size = max_batch_size if batch_size == "auto" else int(batch_size)
        self.max_new_tokens = max_new_tokens
        self.max_frames = max_frames
        self.broken: dict[str, str] = {}

    # -------------------------------------------------------------- generation

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers in the requests' order, cut before the first of a task's `until`."""
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="owl2") as bar:
            for options, until, places in self._batches(requests):
                messages = {place: self._messages(requests[place]) for place in places}
                there = {place: turns for place, turns in messages.items() if turns is not None}
                for place, text in self._answer(requests, there, options):
                    answers[place] = cut(text, until)
                bar.update(len(places))
        return answers

    def _batches(
        self, requests: Sequence[Instance]
    ) -> Iterator[tuple[dict[str, Any], list[str], list[int]]]:
        """(options, until, places): alike in how they are decoded, and in length."""
        alike: dict[str, tuple[dict[str, Any], list[str], list[int]]] = {}
        for place, request in enumerate(requests):
            options, until = decoding(request.args[1], self.max_new_tokens)
            group = alike.setdefault(repr((options, until)), (options, until, []))
            if not request.metadata.get("__padding_only__"):
                group[2].append(place)
        for options, until, places in alike.values():
            # An answer that is drawn has a seed of its own, so that it is the same in any batch.
            size = 1 if options["do_sample"] else self.batch_size
            places.sort(key=lambda place: -len(requests[place].args[0]))
            for start in range(0, len(places), size):
                some = places[start : start + size]
                seed = {"seed": int(requests[some[0]].args[3])} if options["do_sample"] else {}
                yield {**options, **seed}, until, some

    def _answer(
        self,
        requests: Sequence[Instance],
        messages: dict[int, list[Message]],
        options: dict[str, Any],
    ) -> Iterable[tuple[int, str]]:
        try:
            return list(
                zip(messages, self.engine.batch([*messages.values()], **options), strict=True)
            )
        except InputError as error:
            if len(messages) > 1:  # one of them: all by themselves, so that the others are answered
                alone = ({place: turns} for place, turns in messages.items())
                return [pair for one in alone for pair in self._answer(requests, one, options)]
            [place] = messages
            self._leave_out(requests[place], error)
            return []

    # -------------------------------------------------------------- likelihoods

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Of each continuation its loss: the negative sum of its tokens' log-probabilities.

        An answer's end is not counted, as the options of a question are usually no whole answers.
        Whether it is the greedy answer is worked out where a prompt has one continuation; of
        several (options) it is said of none. Of what cannot be asked the loss is infinite.
        """
        losses = [(math.inf, False)] * len(requests)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, request in enumerate(requests):
            if len(request.args) != 6:
                raise InputError(
                    "acc_mutual_info asks for answers without a question, and takes the highest "
                    "of what are losses here: take it out of the task's metrics."
                )
            context, _, _, *document = request.args
            groups.setdefault((context, *document), []).append(place)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="owl2") as bar:
            for places in groups.values():
                first = requests[places[0]]
                messages = self._messages(first)
                if messages is not None:
                    choices = [self._continuation(requests[place]) for place in places]
                    try:
                        scored = self._scored(messages, choices)
                    except InputError as error:
                        self._leave_out(first, error)
                    else:
                        for place, loss in zip(places, scored, strict=True):
                            losses[place] = loss
                bar.update(len(places))
        return [GenerationResult(loss) for loss in losses]

    def _scored(self, messages: list[Message], choices: list[str]) -> list[tuple[float, bool]]:
        scores = self.engine.score(messages, choices, include_end=False, batch_size=self.batch_size)
        is_greedy = False
        if len(choices) == 1:
            said = self.engine.chat(messages, max_new_tokens=len(choices[0]), do_sample=False)
            is_greedy = said.startswith(choices[0])
        return [(-score, is_greedy) for score in scores]

    def _continuation(self, request: Instance) -> str:
        given = request.args[1]
        if callable(given):
            given = given(self._document(request))
        # The space before an answer is the chat format's, which writes it itself.
        return str(given).strip()

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered: a task whose next question depends on an answer."""
        raise InputError("The model owl2 has no tasks of several rounds (multi_round).")

    # -------------------------------------------------------------- requests

    def _document(self, request: Instance) -> Any:
        number, task, split = request.args[-3:]
        return self.task_dict[task][split][number]

    def _messages(self, request: Instance) -> list[Message] | None:
        """A user's turn; None where its images cannot be read."""
        context, to_images = request.args[0], request.args[2]
        try:
            found = to_images(self._document(request)) if to_images is not None else []
            images: list[ImageInput] = images_of(found or [], self.max_frames)
        except (OSError, SyntaxError, InputError) as error:  # Pillow raises SyntaxError, too
            self._leave_out(request, error)
            return None
        return turn(str(context), images)

    def _leave_out(self, request: Instance, error: Exception) -> None:
        number, task, split = request.args[-3:]
        name = f"{task} {split} {number}"
        self.broken[name] = str(error)
        _LOG.warning("owl2: %s cannot be asked and counts as not answered: %s", name, error)
