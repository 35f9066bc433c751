"""Rows of conversations, files of them, and the texts of their samples."""

import json
from pathlib import Path

from owl2.processing.message_parts import content_to_text
from owl2.processing.messages import parse_messages

IMAGE = {"type": "image"}


def llava(path: Path, *rows: object) -> Path:
    path.write_text(json.dumps(list(rows)), encoding="utf-8")
    return path


def human(value: str, image: object = None, answer: str = "yes") -> dict:
    row: dict = {"conversations": [{"from": "human", "value": value}]}
    row["conversations"].append({"from": "gpt", "value": answer})
    return row if image is None else row | {"image": image}


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def texts(sample) -> list[str]:
    return [content_to_text(turn["content"]) for turn in parse_messages(sample.messages).turns]


def question(*parts: object) -> dict:
    answer = {"role": "assistant", "content": "yes"}
    return {"messages": [{"role": "user", "content": list(parts)}, answer]}
