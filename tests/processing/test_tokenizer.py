"""Ids equal SentencePiece, offsets, decoding, saved files."""

import json
import pickle

import pytest
import sentencepiece
from transformers import AutoTokenizer

from owl2.errors import ErrorCode
from owl2.processing.tokenizer import (
    Owl2Tokenizer,
    encode,
    encode_with_offsets,
    start_ids,
    train_tokenizer,
)
from tests.errors import raises_input_error
from tests.processing.samples import TEXTS

STRINGS = [
    "USER: What is the capital of France? ASSISTANT:",
    "  runs   of    spaces  ",
    " ",
    "\n\n\tdef f(x):\n    return x + 1",
    "一只猫头鹰站在树枝上。🦉 and é",
    "no-break space and \u200d joiner",
    "<|im_start|>user <0x41> s>",
]


@pytest.fixture
def model(llama_file) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(llama_file))


# (SentencePiece writes "▁" for a space, so one in the text comes back as a space.)
@pytest.mark.parametrize("text", [*STRINGS, "a ▁ b"])
def test_ids_equal_sentencepiece(llama, model, text):
    assert encode(llama, text) == model.encode(text)
    assert llama(text)["input_ids"] == [1, *model.encode(text)]
    assert llama(text, add_special_tokens=False)["input_ids"] == model.encode(text)


def test_control_tokens_split_the_text(llama, model):
    text = "one </s>  two<s><unk> three</s>"
    expected = [*model.encode("one "), 2, *model.encode("  two"), 1, 0, *model.encode(" three"), 2]
    assert encode(llama, text) == encode_with_offsets(llama, text)[0] == expected
    assert llama(text)["input_ids"] == [1, *expected]
    assert llama.decode(expected) == text


@pytest.mark.parametrize("text", [*STRINGS, "a</s> b</s>🦉</s>", "<s> x"])
def test_offsets_cover_the_text(llama, text):
    ids, offsets = encode_with_offsets(llama, text)
    assert ids == encode(llama, text)
    assert len(ids) == len(offsets)
    position = 0
    for begin, end in offsets:
        assert begin == position <= end  # no gap, no overlap
        position = end
    assert position == len(text)
    for id_, (begin, end) in zip(ids, offsets, strict=True):
        piece = llama.convert_ids_to_tokens(id_)
        if not piece.startswith("<") and begin < end:
            assert piece.replace("▁", " ").endswith(text[begin:end])


@pytest.mark.parametrize("text", [*STRINGS, "a</s> b</s>🦉</s>"])
def test_decoding_inverts_encoding(llama, text):
    ids = llama(text)["input_ids"]
    assert llama.decode(ids) == "<s>" + text
    assert llama.batch_decode([ids], skip_special_tokens=True) == [text.replace("</s>", "")]


def test_decoded_answer_has_no_leading_space(llama):
    prompt, whole = "Where? ASSISTANT:", "Where? ASSISTANT: On  the mat.</s>"
    answer = encode(llama, whole)[len(encode(llama, prompt)) :]
    assert llama.decode(answer, skip_special_tokens=True) == "On  the mat."
    # A stream shows what is new at every step: what was shown is never taken back.
    shown = ""
    for count in range(1, len(answer) + 1):
        text = llama.decode(answer[:count], skip_special_tokens=True)
        assert text.startswith(shown)
        shown = text


def test_offsets_of_byte_tokens(llama):
    ids = encode(llama, "a🦉")
    assert llama.decode(ids[:-1]).startswith("a\ufffd")
    assert llama.decode(ids) == "a🦉"


def test_invalid_ids_are_rejected(llama):
    with raises_input_error(ErrorCode.INVALID_VALUE, 32001, 31999):
        llama.decode([5, 32001])
    with raises_input_error(ErrorCode.INVALID_VALUE, -100):
        llama.decode([-100, 5])


def test_padding_is_marked(llama):
    batch = llama(["one", "one two three four"], padding=True)
    assert llama.pad_token_id == 0
    assert batch["input_ids"][0][0] == 0
    assert batch["attention_mask"][0] == [0, 0, 0, 1, 1]
    assert "token_type_ids" not in batch


@pytest.mark.parametrize("legacy", [None, True, False])
def test_legacy_decides_the_ids_after_a_control_token(tmp_path, llama_file, legacy):
    """As LlamaTokenizer of transformers 4.36: the second turn's `USER:` has no "▁" in front."""
    tokenizer = Owl2Tokenizer(llama_file, legacy=legacy)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(llama_file))
    assert tokenizer("USER: a")["input_ids"] == [1, *sp.encode("USER: a")]
    for text in ("USER:", " USER:", "  b\n", "🦉", "\n\n"):
        expected = sp.encode(text)
        if legacy is False:
            expected = sp.encode("\n" + text)[2:]  # a line break never merges
        whole = f"a</s>{text}</s>"
        ids, offsets = tokenizer.encode_with_offsets(whole)
        assert ids == [*sp.encode("a"), 2, *expected, 2]
        assert [whole[start:end] for start, end in offsets[-1:]] == ["</s>"]
        assert "".join(whole[start:end] for start, end in offsets) == whole
        assert tokenizer(whole)["input_ids"] == [1, *ids]
        assert tokenizer.decode([1, *ids]) == f"<s>{whole}"
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["legacy"] is (legacy is not False)
    again = Owl2Tokenizer.from_pretrained(tmp_path)
    assert again("a</s>USER:")["input_ids"] == tokenizer("a</s>USER:")["input_ids"]


@pytest.mark.parametrize("legacy", [True, None])
def test_round_trip(tmp_path, llama, llama_file, legacy):
    llama.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == llama_file.read_bytes()
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer"
    path.write_text(json.dumps({**config, "legacy": legacy, "pad_token": None}))
    again = Owl2Tokenizer.from_pretrained(tmp_path)
    for text in [*STRINGS, "a</s> b"]:
        assert again(text)["input_ids"] == llama(text)["input_ids"] == [1, *encode(again, text)]
    assert (again.pad_token, len(again)) == ("<unk>", 32001)
    (tmp_path / "again").mkdir()
    again.save_pretrained(tmp_path / "again")
    llama.save_pretrained(tmp_path)
    assert (tmp_path / "again/tokenizer_config.json").read_text() == path.read_text()


def test_llama_tokenizer_loads_the_saved_files(tmp_path, llama):
    llama.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__.startswith("LlamaTokenizer")
    assert theirs("A red bus.")["input_ids"] == llama("A red bus.")["input_ids"]


def test_saving_does_not_need_the_original_file(tmp_path, tiny_file):
    copy = tmp_path / "tokenizer.model"
    copy.write_bytes(tiny_file.read_bytes())
    tokenizer = Owl2Tokenizer(copy)
    copy.unlink()
    tokenizer.save_pretrained(tmp_path)
    assert copy.read_bytes() == tiny_file.read_bytes()


def test_added_tokens_survive(tmp_path, llama_file):
    llama = Owl2Tokenizer(llama_file)
    llama.add_tokens(["<|box|>"], special_tokens=True)
    ids = encode(llama, "a<|box|> b")
    assert ids[1] == 32000 and len(llama) == 32001
    assert llama.decode(ids) == "a<|box|> b"
    llama.save_pretrained(tmp_path)
    again = Owl2Tokenizer.from_pretrained(tmp_path)
    assert encode(again, "a<|box|> b") == ids and len(again) == 32001


def test_workers_can_pickle_it(llama):
    again = pickle.loads(pickle.dumps(llama))
    assert encode(again, "a  b</s>") == encode(llama, "a  b</s>")


def test_bad_files(tmp_path):
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "gone"):
        Owl2Tokenizer(tmp_path / "gone")
    (tmp_path / "text").write_text("no model")
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "text"):
        Owl2Tokenizer(tmp_path / "text")


# ------------------------------------------------------------------ other tokenizers


def test_fast_tokenizer_returns_ids_and_offsets(byte_level):
    text = "What colour  is the circle?<|im_end|> é"
    ids, offsets = encode_with_offsets(byte_level, text)
    assert ids == encode(byte_level, text) == byte_level(text)["input_ids"]
    assert "".join(text[begin:end] for begin, end in offsets).startswith("What colour  is")
    assert encode_with_offsets(byte_level, "") == ([], [])
    assert start_ids(byte_level) == []


def test_start_ids(llama, llama_file):
    assert start_ids(llama) == [1]
    assert start_ids(Owl2Tokenizer(llama_file, add_bos_token=False)) == []


def test_tokenizer_without_offsets_is_rejected(byte_level, monkeypatch):
    monkeypatch.setattr(type(byte_level), "is_fast", False)
    with raises_input_error(ErrorCode.UNSUPPORTED, "tokenizer.json"):
        encode_with_offsets(byte_level, "text")


# ------------------------------------------------------------------ one's own


def test_trained_with_llamas_conventions(tiny_file):
    tokenizer = Owl2Tokenizer(tiny_file)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    assert len(tokenizer) == 320
    for text in [*TEXTS, *STRINGS]:
        ids = tokenizer(text)["input_ids"]
        assert 0 not in ids  # bytes stand in for what it never saw
        assert tokenizer.decode(ids) == "<s>" + text
    assert len(encode(tokenizer, "12")) == 3  # "▁", "1", "2"


def test_training_is_quiet_and_gives_the_same_file(tmp_path, capfd):
    sizes = [train_tokenizer(TEXTS, tmp_path / name, 300) for name in ("a/one.model", "two.model")]
    assert sizes == [300, 300]
    assert (tmp_path / "a/one.model").read_bytes() == (tmp_path / "two.model").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "two.model"]
    assert capfd.readouterr() == ("", "")


def test_few_texts_give_fewer_pieces(tmp_path):
    size = train_tokenizer(TEXTS, tmp_path / "m", 100_000)
    assert 300 < size < 1000
    assert len(Owl2Tokenizer(tmp_path / "m")) == size


def test_training_that_cannot_be(tmp_path, capfd):
    with raises_input_error(ErrorCode.INVALID_VALUE, "vocab_size 200"):
        train_tokenizer(TEXTS, tmp_path / "m", 200)
    with raises_input_error(ErrorCode.INVALID_VALUE, "vocab_size 400"):
        train_tokenizer([], tmp_path / "m", 400)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")
