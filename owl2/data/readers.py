"""Files of conversations → Samples.

::

    .json   LLaVA's: [{"image": "a.png", "conversations": [{"from": "human", "value": ...}, ...]}]
    .jsonl  a line a conversation: {"messages": [{"role": "user", "content": ...}, ...]}

Every row is looked at when the file is read; a bad one raises with the file and the row. Pictures
are opened only when a sample is used.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from owl2.data.sample import Message, Sample, checked
from owl2.errors import InputError

# LLaVA's files write the first, the authors of mPLUG-Owl2 the second.
_PICTURE_MARK = re.compile(r"<image>|<\|image\|>")
_LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def read_file(path: str | Path, image_root: str | Path | None = None) -> list[Sample]:
    """A `.json` or `.jsonl` file → its Samples, by the rule of its ending.

    `image_root`: the directory that picture paths in the file start from; default: the file's own.

    Raises:
        InputError: no such file, another ending, not JSON, no row in it, or a bad row (names it).
    """
    reader = _reader(path)
    if reader is None:
        raise InputError(
            f"{path}: the ending must be .json (LLaVA's format) or .jsonl (messages in each line)."
        )
    return reader(path, image_root)


def is_sample_file(name: str) -> bool:
    """Whether `read_file` knows the ending of this name."""
    return _reader(name) is not None


def read_llava_json(path: str | Path, image_root: str | Path | None = None) -> list[Sample]:
    """LLaVA's JSON → Samples, with the text as the authors' training code normalises it (SPEC 1.5).

    A turn with one picture becomes the picture, a line break, and the stripped text, wherever the
    mark stood. With several pictures in a turn the marks stay where they are, because the words
    between tell which is which. A turn without pictures stays as it is, spaces included.

    Raises:
        InputError: see `read_file`.
    """
    path = Path(path)
    root = _image_root(path, image_root)
    text = _read_text(path)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} must hold a list of conversations, with one at least.")
    return [
        checked(Sample(_llava_messages(row, root, source), source))
        for row, source in ((row, f"{path}, row {n}") for n, row in enumerate(rows, start=1))
    ]


def read_messages_jsonl(path: str | Path, image_root: str | Path | None = None) -> list[Sample]:
    """Lines of `{"messages": [...]}`, in transformers' message format, → Samples.

    The text is taken as it is. In a picture part, `path` and `image` hold a path (relative ones
    start from `image_root`), a URL or a data-URI; `base64` holds the picture itself.

    Raises:
        InputError: see `read_file`.
    """
    path = Path(path)
    root = _image_root(path, image_root)
    samples = [
        checked(Sample(_with_root(_messages(row, source), root), source))
        for row, source in _json_lines(path)
    ]
    if not samples:
        raise InputError(f"{path} has no line with messages.")
    return samples


Reader = Callable[[str | Path, str | Path | None], list[Sample]]


def _reader(name: str | Path) -> Reader | None:
    readers: dict[str, Reader] = {".json": read_llava_json, ".jsonl": read_messages_jsonl}
    return readers.get(Path(name).suffix.lower())


def _image_root(path: Path, image_root: str | Path | None) -> Path:
    root = path.parent if image_root is None else Path(image_root)
    if not root.is_dir():
        raise InputError(f"{root}, where the pictures of {path} should be, is not a directory.")
    return root


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file in UTF-8: {error}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _json_lines(path: Path) -> Iterator[tuple[Any, str]]:
    # Not splitlines: it also splits at characters that JSON allows inside a string.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            source = f"{path}, line {number}"
            try:
                yield json.loads(line), source
            except (ValueError, RecursionError) as error:
                raise InputError(f"{source}: not JSON: {error}") from error


# ------------------------------------------------------------------ LLaVA's rows


def _llava_messages(row: Any, root: Path, source: str) -> list[Message]:
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise InputError(f"{source}: a row must be an object with a list 'conversations'.")
    pictures = _llava_pictures(row.get("image"), root, source)
    turns = [_llava_turn(turn, source) for turn in row["conversations"]]
    marked = sum(len(_PICTURE_MARK.findall(text)) for _, text in turns)
    if marked != len(pictures):
        raise InputError(
            f"{source}: the text marks {marked} pictures with <image>, and 'image' names "
            f"{len(pictures)}; these must be the same."
        )
    unused = iter(pictures)
    return [{"role": role, "content": _llava_content(text, unused)} for role, text in turns]


def _llava_pictures(given: Any, root: Path, source: str) -> list[Message]:
    names = [] if given is None else given if isinstance(given, list) else [given]
    if not all(isinstance(name, str) and name for name in names):
        raise InputError(f"{source}: 'image' must be a path or a list of paths, not {given!r:.80}.")
    return [_picture(name, root) for name in names]


def _llava_turn(turn: Any, source: str) -> tuple[str, str]:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise InputError(f"{source}: a turn must be an object with 'from' and a string 'value'.")
    role = turn.get("from")
    if not isinstance(role, str) or role not in _LLAVA_ROLES:
        raise InputError(f"{source}: a turn is from {role!r}; it must be from 'human' or 'gpt'.")
    return _LLAVA_ROLES[role], turn["value"]


def _llava_content(text: str, pictures: Iterator[Message]) -> str | list[Message]:
    """The text of a turn → its content; takes as many of `pictures` as the text marks."""
    pieces = _PICTURE_MARK.split(text)
    if len(pieces) == 1:
        return text
    if len(pieces) == 2:
        words = "".join(pieces).strip()
        pieces = ["", f"\n{words}" if words else ""]
    else:
        pieces = [pieces[0].lstrip(), *pieces[1:-1], pieces[-1].rstrip()]
    parts: list[Message] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append(next(pictures))
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


# ------------------------------------------------------------------ rows of messages


def _messages(row: Any, source: str) -> list[Any]:
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        return row["messages"]
    hint = " Rows with 'conversations' (LLaVA's) belong in a .json file." * (
        isinstance(row, dict) and "conversations" in row
    )
    raise InputError(f"{source}: a line must be an object with a list 'messages'.{hint}")


def _with_root(messages: list[Any], root: Path) -> list[Message]:
    """The messages with relative picture paths made to start from `root`; the rest untouched."""
    return [
        message | {"content": [_part_with_root(part, root) for part in message["content"]]}
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _part_with_root(part: Any, root: Path) -> Any:
    if not isinstance(part, dict) or part.get("type") != "image":
        return part
    for key in ("path", "image"):
        if isinstance(part.get(key), str):
            rest = {name: value for name, value in part.items() if name != key}
            return rest | _picture(part[key], root)
    return part


def _picture(name: str, root: Path) -> Message:
    if name.startswith(("http://", "https://", "data:")):
        return {"type": "image", "url": name}
    return {"type": "image", "path": str(root / name)}
