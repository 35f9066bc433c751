"""`<|image|>` as a token of the tokenizer: its id, its files, and added tokens."""

import json
import shutil
from itertools import pairwise
from threading import Thread

import pytest
import torch
from transformers import AutoTokenizer, TextIteratorStreamer

from owl2.errors import ErrorCode
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import Owl2Tokenizer, add_image_token, encode
from tests.errors import raises_input_error

PROMPT = "USER: <|image|>one</s> two<|image|>\nthree ASSISTANT:"


@pytest.fixture(params=["llama", "not legacy", "byte level"])
def processor(request, llama_file, byte_level):
    """With an image of 6 tokens and its own tokenizer, which a test may change."""
    if request.param == "byte level":
        tokenizer = byte_level
    else:
        tokenizer = Owl2Tokenizer(llama_file, legacy=request.param == "llama")
    return Owl2Processor(Owl2ImageProcessor(56), tokenizer, num_image_tokens=6)


def test_image_token_is_a_special_token(processor, image):
    tokenizer, id_ = processor.tokenizer, processor.image_token_id
    assert id_ == tokenizer.vocab_size == len(tokenizer) - 1
    assert tokenizer.get_vocab()["<|image|>"] == tokenizer.convert_tokens_to_ids("<|image|>") == id_
    assert (tokenizer.image_token, tokenizer.image_token_id) == ("<|image|>", id_)
    ids = processor(text=PROMPT, images=[image, image])["input_ids"][0]
    assert ids.count(id_) == 12
    # The tokenizer alone gives the same prompt, with one token for each image.
    short = [own for before, own in pairwise([None, *ids]) if (before, own) != (id_, id_)]
    assert tokenizer(PROMPT)["input_ids"] == short
    start = "<s>" if ids[0] == 1 else ""
    expected = start + PROMPT.replace("<|image|>", "<|image|>" * 6)
    assert tokenizer.decode(ids) == tokenizer.batch_decode([ids])[0] == expected
    assert processor.decode(ids) == start + PROMPT
    plain = expected.replace("<|image|>", "")
    plain = plain.replace("<s>", "").replace("</s>", "") if start else plain
    assert tokenizer.decode(ids, skip_special_tokens=True) == plain
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    thread = Thread(target=lambda: [streamer.put(torch.tensor(ids)), streamer.end()])
    thread.start()
    assert "".join(streamer) == plain
    thread.join()


def test_added_tokens_follow_the_image_token(processor, image, tmp_path):
    tokenizer, id_ = processor.tokenizer, processor.image_token_id
    before = processor(text=PROMPT, images=[image, image])["input_ids"]
    assert tokenizer.add_tokens(["<|box|>", "<|point|>"]) == 2
    assert tokenizer.convert_tokens_to_ids(["<|box|>", "<|point|>"]) == [id_ + 1, id_ + 2]
    assert processor(text=PROMPT, images=[image, image])["input_ids"] == before
    processor.save_pretrained(tmp_path)
    again = Owl2Processor.from_pretrained(tmp_path)
    for other in (again.tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(other) == id_ + 3 == len(tokenizer)
        assert other.convert_tokens_to_ids(["<|image|>", "<|point|>"]) == [id_, id_ + 2]
        assert other.image_token_id == id_ and id_ in other.all_special_ids
        assert (
            other("a b<|image|><|box|>")["input_ids"]
            == tokenizer("a b<|image|><|box|>")["input_ids"]
        )
    assert again.image_token_id == id_
    assert again(text=PROMPT, images=[image, image])["input_ids"] == before


@pytest.mark.parametrize(
    ("added", "config", "expected"),
    [
        ([], None, 32000),
        ([], {}, 32000),
        (["<pad>"], None, 32001),  # many copies of LLaMA-2
        (["<pad>"], {"vocab_size": 32001}, 32001),
        (["a1", "a2", "a3"], {"vocab_size": 32003}, 32003),  # resized by an earlier version
        ([], {"vocab_size": 32064}, 32064),
        ([], {"vocab_size": 32003, "image_token_id": 32000}, 32000),
    ],
)
def test_earlier_files_keep_their_image_token_id(
    tmp_path, llama_file, image, added, config, expected
):
    tokenizer = Owl2Tokenizer(llama_file)
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(tmp_path)
    processor = Owl2Processor(Owl2ImageProcessor(56), Owl2Tokenizer(llama_file), num_image_tokens=6)
    processor.save_pretrained(tmp_path / "full")
    for name in ("preprocessor_config.json", "processor_config.json"):
        shutil.copy(tmp_path / "full" / name, tmp_path)
    if config is not None:
        queries = {"visual_abstractor": {"num_learnable_queries": 5}}
        content = {"model_type": "mplug_owl2", "visual_config": queries} | config
        (tmp_path / "config.json").write_text(json.dumps(content))
    loaded = Owl2Processor.from_pretrained(tmp_path)
    assert loaded.image_token_id == expected == len(loaded.tokenizer) - 1
    assert loaded.tokenizer.convert_tokens_to_ids(added) == [*range(32000, 32000 + len(added))]
    ids = loaded(text="A <|image|> bus", images=image)["input_ids"][0]
    sentencepiece = Owl2Tokenizer(llama_file)
    assert ids == [1, *encode(sentencepiece, "A "), *[expected] * 6, *encode(sentencepiece, " bus")]
    loaded.save_pretrained(tmp_path / "again")
    assert Owl2Processor.from_pretrained(tmp_path / "again").image_token_id == expected
    assert AutoTokenizer.from_pretrained(tmp_path / "again").image_token_id == expected


@pytest.mark.parametrize("token_id", [5, 32000, 32002])
def test_another_id_is_rejected(llama_file, token_id):
    tokenizer = Owl2Tokenizer(llama_file)
    assert add_image_token(tokenizer, 32001) == 32001
    with raises_input_error(ErrorCode.INVALID_VALUE, token_id, 32001):
        add_image_token(tokenizer, token_id)
