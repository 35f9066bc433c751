"""Base64 as clients and files write it. Does not import torch, as `image_io`."""

import base64
import string

# Clients percent-encode no other characters. `unquote` takes ten seconds for a large body.
_ESCAPES = {f"%{ord(char):02X}": char for char in "+/=" + string.whitespace}
_ESCAPES |= {escape.lower(): char for escape, char in _ESCAPES.items()}


def decode_base64(text: str) -> bytes:
    """The bytes of base64 in the standard or the URL-safe alphabet.

    White space, missing padding, and percent-encoding are accepted.

    Raises:
        ValueError: The text is not base64.
    """
    if "%" in text:
        for escape, char in _ESCAPES.items():
            text = text.replace(escape, char)
    data = text.encode("ascii").translate(None, string.whitespace.encode())
    if b"-" in data or b"_" in data:
        if b"+" in data or b"/" in data:
            raise ValueError("it mixes the standard and the URL-safe alphabet")
        data = data.translate(bytes.maketrans(b"-_", b"+/"))
    return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
