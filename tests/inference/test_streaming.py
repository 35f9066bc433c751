"""Streamed pieces: joined they are the answer, whatever the characters; ends and errors."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from owl2.errors import InputError
from owl2.inference.engine import _byte_ids
from owl2.inference.streaming import TextStream


def decoder(tokenizer):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def text_pieces(ids, decode, open_ids=(), stop=()):
    """What is given out for each of the ids, and at the end; none empty."""
    stream = TextStream(decode, open_ids, stop)
    pieces = []
    for id_ in ids:
        if stream.cut is None:
            pieces.append(stream.add(id_))
    return [piece for piece in (*pieces, stream.finish()) if piece]


def test_joined_pieces_are_the_answer(shared_engine, conversations):
    for seed, one in enumerate(conversations):
        for options in ({}, {"temperature": 3.0, "seed": seed}):
            pieces = list(shared_engine.stream(one, max_new_tokens=12, **options))
            assert "".join(pieces) == shared_engine.chat(one, max_new_tokens=12, **options)
            assert all(pieces)


def test_pieces_come_while_the_model_runs(engine, conversations, steps):
    seen = [len(steps) for _ in engine.stream(conversations[0], max_new_tokens=40)]
    assert len(seen) > 5
    assert seen[0] < 30


def test_whole_characters_only(shared_engine):
    tokenizer = shared_engine.processor.tokenizer
    text = "a 你好 🦉👩‍🚀 é\n\n  end ő"
    ids = tokenizer.encode_exact(text)
    assert len(ids) > len(text), "no character is made of several tokens"
    pieces = list(text_pieces(ids, decoder(tokenizer)))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)


def test_any_tokens_at_all(shared_engine):
    tokenizer = shared_engine.processor.tokenizer
    decode = decoder(tokenizer)
    source = random.Random(1)
    bytes_ = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(256)]
    everything = range(len(tokenizer))
    for _ in range(200):
        pool = source.choice([bytes_, everything])
        ids = source.choices(pool, k=source.randrange(14))
        assert "".join(text_pieces(ids, decode)) == decode(ids).strip()


def test_tokenizers_that_decode_runs_of_bytes_at_once():
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"x": 256, "<unk>": 257}
    inner = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    decode = decoder(tokenizer)

    class Holder:
        pass

    holder = Holder()
    holder.tokenizer = tokenizer
    open_ids = _byte_ids(holder)
    assert len(open_ids) == 256
    ids = [256, 0x41, 0xFF, 256, 0xC3, 0xA9, 256]  # a valid byte that an invalid one spoils
    assert "".join(text_pieces(ids, decode, open_ids)) == decode(ids).strip()
    assert "".join(text_pieces(ids, decode)) != decode(ids), "the case needs no care"


def test_leaving_early_ends_the_generation(engine, conversations, steps):
    stream = engine.stream(conversations[0], max_new_tokens=90)
    next(stream)
    stream.close()
    assert engine.chat(conversations[0], max_new_tokens=3)
    assert len(steps) < 80
    # Of the steps since then, none was for the stream.
    assert steps[-2:] == [1, 1]


def test_input_is_checked_before_the_first_piece(shared_engine):
    with pytest.raises(InputError, match="empty"):
        shared_engine.stream([{"role": "user", "content": " "}])


def test_a_stream_never_begun_starts_nothing(engine, conversations):
    engine.model.lm_head.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    engine.stream(conversations[0])
