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
from transformers.convert_slow_tokenizer import bytes_to_unicode

from owl2.processing.tokenizer import Owl2Tokenizer

_REPLACEMENT = "\ufffd"  # an incomplete character decodes to it
_BYTE = re.compile(r"<0x([0-9A-F]{2})>\Z")
_SPACE = "\u2581"  # SentencePiece's space


class IncrementalDetokenizer:
    """The text of one answer.

    Args:
        decode: Ids to text, with the white space around it.
        open_ids: Tokens after which all of the text may still change: the byte tokens of
            tokenizers that decode a run of them together.
        stop: Strings that end the answer and are not part of it.
        align_to_tokens: Release the text of complete tokens only.
        prefix: The token before the answer, if the answer continues its text and keeps the white
            space around it.

    Attributes:
        text: The text that no further token changes, including what follows a stop string.
        stop_position: Where a stop string begins in `text`, or None.
        num_released: Characters of `text` that were released, with the white space before them.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        open_ids: Collection[int] = (),
        stop: Sequence[str] = (),
        align_to_tokens: bool = False,
        prefix: int | None = None,
    ) -> None:
        self.text = ""
        self.stop_position: int | None = None
        self.num_released = 0
        self._decode = decode
        self._open_ids = open_ids
        self._stop = stop
        self._max_stop_length = max(map(len, stop), default=0)
        # Where tokens end in `text`, after the released part.
        self._token_ends: list[int] | None = [] if align_to_tokens else None
        # The last tokens, decoded together, and how many of their characters `text` has.
        self._window: list[int] = [] if prefix is None else [prefix]
        self._num_decoded = 0 if prefix is None else len(decode(self._window))
        self._is_stripped = prefix is None

    @property
    def begin(self) -> int:
        """Where the answer begins in `text`."""
        return len(self.text) - len(self.text.lstrip()) if self._is_stripped else 0

    def add(self, token: int) -> str:
        """Add a token other than the end token; returns the released text, which may be empty."""
        self._window.append(token)
        if token in self._open_ids:
            return ""
        decoded = self._decode(self._window)
        if decoded.endswith(_REPLACEMENT):
            return ""
        self._extend(decoded)
        # The text of the next token may depend on this one, but not on earlier ones.
        alone = self._decode([token])
        if alone and _REPLACEMENT not in alone:
            self._window, self._num_decoded = [token], len(alone)
        return self._release(self._end_of_safe_text())

    def finish(self) -> str:
        """Release the rest of the text."""
        if self.stop_position is None and self._window:
            self._extend(self._decode(self._window))
        return self._release(len(self.text))

    def _extend(self, decoded: str) -> None:
        """Append the new part of the window's text, and search it for stop strings.

        Of several, the one that is complete first ends the answer. The result does not depend on
        how tokens divide the text.
        """
        begin = max(0, len(self.text) - self._max_stop_length + 1)
        self.text += decoded[self._num_decoded :]
        self._num_decoded = len(decoded)
        positions = [(self.text.find(stop, begin), len(stop)) for stop in self._stop]
        found = [(position + length, position) for position, length in positions if position >= 0]
        self.stop_position = min(found)[1] if found else None

    def _end_of_safe_text(self) -> int:
        """Where the text begins that may become a stop string or end the answer as white space."""
        end = len(self.text)
        for begin in range(max(0, end - self._max_stop_length + 1), end):
            if any(stop.startswith(self.text[begin:]) for stop in self._stop):
                end = begin
                break
        if self._token_ends is None or self.stop_position is not None:
            return end
        token_ends = (*self._token_ends, len(self.text))
        self._token_ends = [position for position in token_ends if position > self.num_released]
        possible = (position for position in self._token_ends if position <= end)
        return max((one for one in possible if not self.text[one - 1].isspace()), default=0)

    def _release(self, end: int) -> str:
        """The new text before `end` or a stop string, without white space around the answer."""
        if self.stop_position is not None:
            end = self.stop_position
        if self._is_stripped:
            end = len(self.text[:end].rstrip())
        if end <= self.num_released:
            return ""
        begin, self.num_released = self.num_released, end
        return self.text[max(begin, self.begin) : end]


def token_texts(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], tuple[str, bytes]]:
    """A function from a token to its text and its UTF-8 bytes; each token is converted once.

    Special tokens have their name and no bytes. In the text, bytes that are not a complete
    character are written as `\\xe4`.
    """
    special = frozenset(tokenizer.all_special_ids)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # In byte-level tokenizers, such as GPT-2's, each letter of a token stands for a byte.
    is_byte_level = backend is not None and "ByteLevel" in repr(backend.decoder)
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}

    @cache
    def convert(token: int) -> tuple[str, bytes]:
        if token >= len(tokenizer):  # the model's vocabulary may be larger
            return "", b""
        name: Any = tokenizer.convert_ids_to_tokens(token)  # annotated as for several ids
        if token in special:
            return str(name), b""
        if byte := _BYTE.match(name):
            data = bytes([int(byte[1], 16)])
        elif token in tokenizer.added_tokens_decoder:
            data = name.encode()
        elif is_byte_level:
            data = bytes(byte_of[letter] for letter in name)
        else:
            data = name.replace(_SPACE, " ").encode()
        return data.decode(errors="backslashreplace"), data

    return convert


def open_byte_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Byte tokens of tokenizers that decode a run of them together.

    A later byte can then change the text of earlier ones. SentencePiece itself does not do this.
    """
    if isinstance(tokenizer, Owl2Tokenizer):
        return frozenset()
    vocabulary = tokenizer.get_vocab()
    names = (f"<0x{byte:02X}>" for byte in range(256))
    return frozenset(vocabulary[name] for name in names if name in vocabulary)
