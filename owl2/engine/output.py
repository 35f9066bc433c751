"""Answers as a server gives them: piece by piece, with why they ended and how likely they were.

::

    Following: events of all answers ──► a TextStream each ──► Piece: text that will not change
"""

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from owl2.engine.detokenizer import TextStream
from owl2.engine.running_batch import Event
from owl2.engine.sampling import Logprobs as Score
from owl2.engine.token_text import TokenTexts
from owl2.errors import InputError

FinishReason = Literal["stop", "length"]

MOST_LOGPROBS = 20


@dataclass(frozen=True)
class TokenScore:
    """A token of an answer and its log-probability (natural logarithm, float32).

    Attributes:
        text: what the token stands for; bytes that are no whole character as `\\xe4`.
        bytes: of UTF-8; those of an answer's tokens, joined, are its text and the white space
            around it. Empty for tokens that are no text (the end token, whose text is its name).
        top: the likeliest tokens at its place, best first; their own `top` is empty.
    """

    id: int
    text: str
    bytes: list[int]
    logprob: float
    top: tuple["TokenScore", ...] = ()


@dataclass(frozen=True)
class Piece:
    """What is new of one of several answers.

    Attributes:
        index: which of them.
        text: it will not change; empty only in an answer's last piece.
        scores: of the tokens that begin in this text, if asked for; with the last piece also the
            end token's. None of what a stop string cut off.
        tokens: made for this answer so far, the end token included.
        finish_reason: in each answer's last piece: `stop`: an end token or a stop string;
            `length`: as many tokens as were asked for, or fit into the context.
    """

    index: int
    text: str
    scores: tuple[TokenScore, ...]
    tokens: int
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Answer:
    """One whole answer; as in `Piece`."""

    text: str
    finish_reason: FinishReason
    tokens: int
    scores: tuple[TokenScore, ...]


class Events(Protocol):
    """What `Following` is."""

    def __iter__(self) -> Iterator[Event]: ...

    def drop(self, number: int) -> None: ...

    def close(self) -> None: ...


class Completion(Iterator[Piece]):
    """Pieces of one answer or several, in the order in which they are made.

    The model runs when the first piece is asked for. One thread iterates; any may `close`. Also a
    context manager that closes.

    Attributes:
        prompt_tokens: of the prompt, K + 1 for each image.
    """

    def __init__(
        self, prompt_tokens: int, events: Events, answers: "Sequence[AnswerInMaking]"
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self._events = events
        self._pieces = _pieces(events, answers)
        self._closed = False

    def __next__(self) -> Piece:
        """Raises `InputError` for logits that are not finite; StopIteration also when closed."""
        piece = next(self._pieces)
        if self._closed:
            raise StopIteration
        return piece

    def __enter__(self) -> "Completion":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End it: rows become free before the next step, what waits never starts. From any thread;
        who iterates in another one gets no more pieces."""
        self._closed = True
        self._events.close()

    def whole(self) -> list[Answer]:
        """All answers, when they are whole.

        Raises:
            CancelledError: it was closed before.
        """
        pieces: dict[int, list[Piece]] = {}
        for piece in self:
            pieces.setdefault(piece.index, []).append(piece)
        if self._closed:
            raise CancelledError("the completion was closed before its answers were whole")
        return [_joined(pieces[index]) for index in sorted(pieces)]


def _joined(pieces: Sequence[Piece]) -> Answer:
    last = pieces[-1]
    assert last.finish_reason is not None  # all events came
    text = "".join(piece.text for piece in pieces)
    scores = tuple(score for piece in pieces for score in piece.scores)
    return Answer(text, last.finish_reason, last.tokens, scores)


class AnswerInMaking:
    """One of a completion's answers.

    Args:
        index: of its pieces.
        limit: tokens that it can have.
        ends: tokens that end it.
        stream: new.
    """

    def __init__(
        self,
        index: int,
        limit: int,
        ends: Collection[int],
        stream: TextStream,
        texts: TokenTexts,
    ) -> None:
        self._index = index
        self._limit = limit
        self._ends = ends
        self._stream = stream
        self._texts = texts
        self._tokens = 0
        # Scores that were not given out, and where in the text their tokens begin.
        self._due: list[tuple[int, TokenScore]] = []

    def take(self, event: Event) -> Piece | None:
        """A next token: what is new by it, if anything."""
        stream = self._stream
        self._tokens += 1
        begin = stream.settled
        is_end = event.token in self._ends
        text = "" if is_end else stream.add(event.token)
        if event.score is not None:
            self._due.append((begin, self._score(event.token, event.score)))
        is_last = is_end or stream.cut is not None or self._tokens == self._limit
        if is_last:
            text += stream.finish()
            stopped = is_end or stream.cut is not None
            return self._piece(text, stream.cut, "stop" if stopped else "length")
        return self._piece(text, stream.given, None) if text else None

    def _piece(self, text: str, end: int | None, reason: FinishReason | None) -> Piece:
        """With the scores of tokens that begin before `end`; None: all."""
        due = [score for begin, score in self._due if end is None or begin < end]
        self._due = self._due[len(due) :]
        return Piece(self._index, text, tuple(due), self._tokens, reason)

    def _score(self, token: int, score: Score) -> TokenScore:
        top = tuple(self._token_score(id_, logprob) for id_, logprob in score.top)
        return self._token_score(token, score.logprob, top)

    def _token_score(
        self, token: int, logprob: float, top: tuple[TokenScore, ...] = ()
    ) -> TokenScore:
        text, bytes_ = self._texts.find(token)
        return TokenScore(token, text, list(bytes_), logprob, top)


def _pieces(events: Events, answers: Sequence[AnswerInMaking]) -> Iterator[Piece]:
    """Not a method, so that it is closed with the last reference to its `Completion`."""
    try:
        for event in events:
            piece = answers[event.number].take(event)
            if piece is not None:
                if piece.finish_reason is not None:
                    events.drop(event.number)
                yield piece
    finally:
        events.close()


def check_request(n: int, most: int, stop: str | Sequence[str], top: int | None) -> list[str]:
    """The stop strings as a list.

    Raises:
        InputError: a number out of its range, a stop string that is none or empty.
    """
    if not 1 <= n <= most:
        raise InputError(f"n is {n}; it must be from 1 to {most}")
    if top is not None and not 0 <= top <= MOST_LOGPROBS:
        raise InputError(f"top_logprobs is {top}; it must be from 0 to {MOST_LOGPROBS}")
    texts = [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(text, str) and text for text in texts):
        raise InputError("stop must be texts, none of them empty")
    return texts
