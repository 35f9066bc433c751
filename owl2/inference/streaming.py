"""Tokens as they are made → pieces of text that, joined, are the whole answer.

::

    thread: model.generate ──streamer──► queue ──► token ids ──► text that later tokens leave as is
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

# What the next token may change: bytes of a character that is not complete decode to U+FFFD, and
# white space at the end of an answer is dropped.
_UNSETTLED = re.compile(r"[\s\ufffd]+\Z")


class StopWhenAsked(StoppingCriteria):
    """Ends generation after the step in which `asked` is set."""

    def __init__(self, asked: Event) -> None:
        self.asked = asked

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.BoolTensor:
        asked = torch.full((len(input_ids),), self.asked.is_set(), device=input_ids.device)
        return asked.bool()  # type: ignore[return-value]  # torch types it as any Tensor


class _ToQueue(BaseStreamer):
    """Puts every new token id into a queue; the prompt, which comes first, is left out."""

    def __init__(self, queue: SimpleQueue) -> None:
        self.queue = queue
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self.is_prompt:
            self.is_prompt = False
        else:
            for token in value.flatten().tolist():
                self.queue.put(token)

    def end(self) -> None:
        pass


def stream_tokens(generate: Callable[[BaseStreamer, StoppingCriteria], Any]) -> Iterator[int]:
    """Token ids of one answer while `generate` runs in a thread.

    An exception in the thread is raised here. Closing the iterator (or Ctrl-C while waiting for a
    token) ends the generation after the step it is in.
    """
    queue: SimpleQueue = SimpleQueue()
    stop = Event()

    def work() -> None:
        end: BaseException | None = None
        try:
            generate(_ToQueue(queue), StopWhenAsked(stop))
        except BaseException as error:  # whatever it is, it is raised where the tokens are awaited
            end = error
        queue.put((end,))

    thread = Thread(target=work, name="owl2-stream", daemon=True)
    thread.start()
    try:
        while isinstance(item := queue.get(), int):
            yield item
        if item[0] is not None:
            raise item[0]
    finally:
        stop.set()
        thread.join()


def text_pieces(
    tokens: Iterable[int],
    decode: Callable[[list[int]], str],
    open_ids: Collection[int] = (),
) -> Iterator[str]:
    """Pieces of text, none empty, whose concatenation is `decode` of all tokens.

    Args:
        decode: ids to text without white space around it.
        open_ids: tokens after which the text so far may still change as a whole (the bytes of
            tokenizers that decode a run of them at once).
    """
    ids: list[int] = []
    sent = 0
    for token in tokens:
        ids.append(token)
        if token in open_ids:
            continue
        text = _UNSETTLED.sub("", decode(ids))
        if len(text) > sent:
            yield text[sent:]
            sent = len(text)
    if rest := decode(ids)[sent:]:
        yield rest
