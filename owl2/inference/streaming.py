"""Tokens as they are made → pieces of text that, joined, are the whole answer."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator

# What the next token may change: bytes of a character that is not complete decode to U+FFFD, and
# white space at the end of an answer is dropped.
_UNSETTLED = re.compile(r"[\s\ufffd]+\Z")


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
