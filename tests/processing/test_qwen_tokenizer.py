"""The tokenizer of mPLUG-Owl2.1: tiktoken's merges, files, and the ends of answers."""

import base64
import json
from itertools import pairwise

import pytest

from owl2 import Owl2Processor
from owl2.errors import ErrorCode
from owl2.processing.qwen_tokenizer import QWEN_FILE, SPECIAL_TOKENS, QwenTokenizer
from tests.errors import raises_input_error
from tests.family import FOLDER, load_processor

MODEL = FOLDER / "mplug_owl2_1" / "model"


@pytest.fixture(scope="module")
def tokenizer():
    return QwenTokenizer.from_pretrained(MODEL)


def ranks():
    pairs = map(bytes.split, (MODEL / QWEN_FILE).read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def merged(text):
    """The ids of a piece of text by the definition: the pair with the lowest rank first."""
    table, parts = ranks(), [bytes([byte]) for byte in text.encode()]
    while True:
        pairs = [(table.get(one + two), at) for at, (one, two) in enumerate(pairwise(parts))]
        found = [pair for pair in pairs if pair[0] is not None]
        if not found:
            return [table[part] for part in parts]
        at = min(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.mark.parametrize("text", ["Describe", " picture", "图片里", "aaaaa", " two", "ASSISTANT"])
def test_ids_are_those_of_the_merges(tokenizer, text):
    assert tokenizer.encode(text, add_special_tokens=False) == merged(text)


@pytest.mark.parametrize("text", ["It's 12 cats.\n\n  你好 🦉\t</s>", "  a  b ", "\r\n\r\nÉ"])
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_token_id is None
    assert tokenizer.eos_token_id == len(ranks())


def test_special_tokens_follow_the_ranks(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(ranks()), len(ranks()) + 208))


def test_saved_tokenizer_has_added_tokens(tmp_path):
    processor = Owl2Processor.from_pretrained(MODEL)
    processor.tokenizer.add_tokens(["<new>"])
    processor.save_pretrained(tmp_path)
    assert (tmp_path / QWEN_FILE).read_bytes() == (MODEL / QWEN_FILE).read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "QWenTokenizer"
    assert not {"vocab", "merges", "backend"} & config.keys()
    again = QwenTokenizer.from_pretrained(tmp_path)
    text = "a<|image|><new> b"
    assert again.encode(text) == processor.tokenizer.encode(text)
    assert len(again) == len(processor.tokenizer)


def test_ends_of_answers():
    """`</s>` as characters in a prompt, and the end token in training."""
    processor = load_processor("mplug_owl2_1")
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert prompt == "USER: a ASSISTANT: b</s>USER: c ASSISTANT:"
    assert processor.tokenizer.eos_token_id not in processor.encode(turns).ids
    row = [*turns, {"role": "assistant", "content": "d"}]
    labels = processor.for_training(row)["labels"][0].tolist()
    assert labels.count(processor.tokenizer.eos_token_id) == 2


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"not base64!", ErrorCode.UNREADABLE_FILE),
        (b"YQ== 0\n", ErrorCode.UNREADABLE_FILE),  # not all bytes
        (b"YQ== x\n", ErrorCode.UNREADABLE_FILE),
        (None, ErrorCode.FILE_NOT_FOUND),
    ],
)
def test_invalid_files(tmp_path, content, code):
    file = tmp_path / QWEN_FILE
    if content is not None:
        file.write_bytes(content)
    with raises_input_error(code, file):
        QwenTokenizer(file)
