"""Token ids to text, one token at a time.

The text of an answer is its ids decoded together, up to the first stop string, without leading and
trailing white space. The detokenizer releases a part of it as soon as no further token can change
it.
"""

import re
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from owl2.processing.tokenizer import Owl2Tokenizer

_REPLACEMENT = "\ufffd"  # an incomplete character decodes to it
_WINDOW = 32  # tokens that are decoded again for each new one
_BYTE = re.compile(r"<0x([0-9A-F]{2})>\Z")
_SPACE = "\u2581"  # SentencePiece's space


class IncrementalDetokenizer:
    """The text of one answer.

    Args:
        decode: Ids to text, with the white space around it.
        open_ids: Tokens after which all of the text may still change: the byte tokens of
            tokenizers that decode a run of them together.
        stop: Strings that end the answer and are not part of it.

    Attributes:
        text: Everything so far, including parts that may change or follow a stop string.
        stop_position: Where a stop string begins in `text`, or None.
        num_released: Characters of `text` that were released, with the white space before them.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        open_ids: Collection[int] = (),
        stop: Sequence[str] = (),
    ) -> None:
        self.text = ""
        self.stop_position: int | None = None
        self.num_released = 0
        self._decode = decode
        self._open_ids = open_ids
        self._stop = stop
        self._max_stop_length = max(map(len, stop), default=0)
        self._num_searched = 0
        # `text` is the text before the window, and what the window's tokens add to its first one.
        self._window: list[int] = []
        self._before, self._skip = "", 0

    @property
    def num_final(self) -> int:
        """Characters of `text` that no further token changes."""
        return len(self.text.rstrip(_REPLACEMENT))

    def add(self, token: int) -> str:
        """Add a token other than the end token; returns the released text, which may be empty."""
        self._window.append(token)
        if token in self._open_ids:
            return ""
        self._decode_window()
        end = self._find_stop(self.num_final)
        if self.stop_position is None:
            end = self._possible_stop(end)
            self._advance_window()
        return self._release(end)

    def finish(self) -> str:
        """Release the rest of the text."""
        if self.stop_position is None:
            self._decode_window()
            self._find_stop(len(self.text))
        return self._release(len(self.text) if self.stop_position is None else self.stop_position)

    def _decode_window(self) -> None:
        if self._window:
            self.text = self._before + self._decode(self._window)[self._skip :]

    def _advance_window(self) -> None:
        """Start a new window with the last token if its text does not depend on earlier tokens."""
        last = self._window[-1:]
        if len(self._window) < _WINDOW or self.num_final < len(self.text):
            return
        if _REPLACEMENT not in (alone := self._decode(last)):
            self._before, self._skip, self._window = self.text, len(alone), last

    def _find_stop(self, end: int) -> int:
        """The position of the stop string that is complete first, or `end` if there is none.

        The result does not depend on how tokens divide the text.
        """
        begin = max(0, self._num_searched - self._max_stop_length + 1)
        self._num_searched = end
        positions = [(self.text.find(stop, begin, end), len(stop)) for stop in self._stop]
        found = [(position + length, position) for position, length in positions if position >= 0]
        if not found:
            return end
        self.stop_position = min(found)[1]
        return self.stop_position

    def _possible_stop(self, end: int) -> int:
        """The position from which the text before `end` may be the start of a stop string."""
        for begin in range(max(0, end - self._max_stop_length + 1), end):
            tail = self.text[begin:end]
            if any(stop.startswith(tail) for stop in self._stop):
                return begin
        return end

    def _release(self, end: int) -> str:
        """The new text before `end`, without white space at the start and end of the answer."""
        end = len(self.text[:end].rstrip())
        if end <= self.num_released:
            return ""
        begin, self.num_released = self.num_released, end
        new = self.text[begin:end]
        return new if self.text[:begin].strip() else new.lstrip()


class TokenTexts:
    """The text and the bytes of single tokens; each token is converted once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._known: dict[int, tuple[str, bytes]] = {}

    def find(self, token: int) -> tuple[str, bytes]:
        """A token's text and its UTF-8 bytes; special tokens have their name and no bytes.

        In the text, bytes that are not a complete character are written as `\\xe4`.
        """
        if token not in self._known:
            self._known[token] = self._convert(token)
        return self._known[token]

    def _convert(self, token: int) -> tuple[str, bytes]:
        if token >= len(self._tokenizer):  # the model's vocabulary may be larger
            return "", b""
        name: Any = self._tokenizer.convert_ids_to_tokens(token)  # annotated as for several ids
        if token in self._special:
            return str(name), b""
        if byte := _BYTE.match(name):
            data = bytes([int(byte[1], 16)])
        elif token in self._tokenizer.added_tokens_decoder:
            data = name.encode()
        elif _is_byte_level(self._tokenizer):
            letters = _byte_letters()
            data = bytes(letters[letter] for letter in name)
        else:
            data = name.replace(_SPACE, " ").encode()
        return data.decode(errors="backslashreplace"), data


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the letters of its tokens stand for bytes, as in GPT-2."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in repr(backend.decoder)


@cache
def _byte_letters() -> dict[str, int]:
    """GPT-2's letters: printable Latin-1 bytes are themselves, the others follow from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


def open_byte_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Byte tokens of tokenizers that decode a run of them together.

    A later byte can then change the text of earlier ones. SentencePiece itself does not do this.
    """
    if isinstance(tokenizer, Owl2Tokenizer):
        return frozenset()
    vocabulary = tokenizer.get_vocab()
    names = (f"<0x{byte:02X}>" for byte in range(256))
    return frozenset(vocabulary[name] for name in names if name in vocabulary)
