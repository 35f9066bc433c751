"""Streamed pieces: joined they are the answer, whatever the characters; ends and errors."""

import random
import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from owl2.errors import InputError
from owl2.inference.engine import _byte_ids
from owl2.inference.streaming import stream_tokens, text_pieces


def decoder(tokenizer):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True).strip()


def streams():
    return [thread for thread in threading.enumerate() if thread.name == "owl2-stream"]


def test_joined_pieces_are_the_answer(shared_engine, conversations):
    for seed, one in enumerate(conversations):
        for options in ({}, {"temperature": 3.0, "seed": seed}):
            pieces = list(shared_engine.stream(one, max_new_tokens=12, **options))
            assert "".join(pieces) == shared_engine.chat(one, max_new_tokens=12, **options)
            assert all(pieces)


def test_pieces_come_while_the_model_runs(engine, conversations):
    steps = []
    engine.model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    seen = [len(steps) for _ in engine.stream(conversations[0], max_new_tokens=40)]
    assert len(seen) > 5
    assert seen[0] < 40


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
        assert "".join(text_pieces(ids, decode)) == decode(ids)


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
    assert "".join(text_pieces(ids, decode, open_ids)) == decode(ids)
    assert "".join(text_pieces(ids, decode)) != decode(ids), "the case needs no care"


def test_leaving_early_ends_the_generation(engine, conversations):
    steps = []
    engine.model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    stream = engine.stream(conversations[0], max_new_tokens=90)
    next(stream)
    stream.close()
    assert not streams()
    assert len(steps) < 90
    assert engine.chat(conversations[0], max_new_tokens=3)


def test_input_is_checked_before_the_first_piece(shared_engine):
    with pytest.raises(InputError, match="empty"):
        shared_engine.stream([{"role": "user", "content": " "}])


def test_a_stream_never_begun_starts_nothing(engine, conversations):
    engine.model.lm_head.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    engine.stream(conversations[0])
    assert not streams()


def test_errors_of_the_thread_are_raised_where_the_pieces_are_read():
    def generate(streamer, stop):
        streamer.put(torch.tensor([[1, 2]]))
        streamer.put(torch.tensor([7]))
        raise RuntimeError("out of memory")

    tokens = stream_tokens(generate)
    assert next(tokens) == 7
    with pytest.raises(RuntimeError, match="out of memory"):
        next(tokens)
    assert not streams()
