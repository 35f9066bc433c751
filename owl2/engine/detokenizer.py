"""Tokens as they are made → text that will not change, up to where it is to stop.

What was given out, joined, is the whole answer: its tokens decoded at once, up to a stop string,
without white space around it.
"""

from collections.abc import Callable, Collection, Sequence

# What bytes decode to while they are no whole character.
_BROKEN = "\ufffd"
# Tokens that are decoded again for each new one. Decoding all of them takes longer with each.
_WINDOW = 32


class TextStream:
    """One answer's text, token by token.

    Args:
        decode: ids to text, with the white space around it.
        open_ids: tokens after which the text so far may still change as a whole (the bytes of
            tokenizers that decode a run of them at once).
        stop: texts that end the answer; they and what follows are not part of it.

    Attributes:
        text: all so far, also what may still change or turn out to be behind the end.
        cut: the place in `text` where a stop string begins; None: there is none.
        given: up to where `text` was given out, the white space before it included.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        open_ids: Collection[int] = (),
        stop: Sequence[str] = (),
    ) -> None:
        self.text = ""
        self.cut: int | None = None
        self.given = 0
        self._decode = decode
        self._open_ids = open_ids
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._searched = 0
        # `text` is what came before the window and what its tokens add to their first one's text.
        self._window: list[int] = []
        self._before, self._skipped = "", 0

    @property
    def settled(self) -> int:
        """How much of `text` will not change, whatever comes."""
        return len(self.text.rstrip(_BROKEN))

    def add(self, token: int) -> str:
        """Take a token that is not the end; give out what text is certain, perhaps none."""
        self._window.append(token)
        if token in self._open_ids:
            return ""
        self._read()
        end = self._find_stop(self.settled)
        if self.cut is None:
            end = self._possible_stop(end)
            self._move_window()
        return self._give(end)

    def finish(self) -> str:
        """Give out the rest: no token follows."""
        if self.cut is None:
            self._read()
            self._find_stop(len(self.text))
        return self._give(len(self.text) if self.cut is None else self.cut)

    def _read(self) -> None:
        if self._window:
            self.text = self._before + self._decode(self._window)[self._skipped :]

    def _move_window(self) -> None:
        """Begin a new window with the last token if its text does not hang on those before it."""
        last = self._window[-1:]
        if len(self._window) < _WINDOW or self.settled < len(self.text):
            return
        if _BROKEN not in (alone := self._decode(last)):
            self._before, self._skipped, self._window = self.text, len(alone), last

    def _find_stop(self, end: int) -> int:
        """Look for stop strings before `end`: the place of the one that was whole first, or `end`.

        As if the text had come letter by letter: it does not matter how tokens cut it.
        """
        begin = max(0, self._searched - self._longest + 1)
        self._searched = end
        places = [(self.text.find(stop, begin, end), len(stop)) for stop in self._stop]
        found = [(place + length, place) for place, length in places if place >= 0]
        if not found:
            return end
        self.cut = min(found)[1]
        return self.cut

    def _possible_stop(self, end: int) -> int:
        """From where on the text before `end` may be the beginning of a stop string."""
        for begin in range(max(0, end - self._longest + 1), end):
            tail = self.text[begin:end]
            if any(stop.startswith(tail) for stop in self._stop):
                return begin
        return end

    def _give(self, end: int) -> str:
        """What is new before `end`, but for white space at the answer's end or beginning."""
        end = len(self.text[:end].rstrip())
        if end <= self.given:
            return ""
        begin, self.given = self.given, end
        new = self.text[begin:end]
        return new if self.text[:begin].strip() else new.lstrip()
