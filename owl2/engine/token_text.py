"""One token by itself: its text, and the bytes that it stands for."""

import re
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>\Z")
_SPACE = "\u2581"  # SentencePiece's sign for a space


class TokenTexts:
    """What a tokenizer's tokens stand for, each looked up once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._known: dict[int, tuple[str, bytes]] = {}

    def find(self, token: int) -> tuple[str, bytes]:
        """A token's text and its bytes of UTF-8; none for special tokens, whose text is their name.

        Bytes that are no whole character stand as `\\xe4` in the text.
        """
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def _read(self, token: int) -> tuple[str, bytes]:
        if token >= len(self._tokenizer):  # the model may have room for more
            return "", b""
        name: Any = self._tokenizer.convert_ids_to_tokens(token)  # typed as if there were several
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
    """Whether its tokens are written in letters that stand for bytes, as GPT-2's are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in repr(backend.decoder)


@cache
def _byte_letters() -> dict[str, int]:
    """GPT-2's letters: bytes that are printable in Latin-1 stand for themselves, the others, in
    their order, are the letters from 256 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }
