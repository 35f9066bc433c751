"""Streamed pieces: joined they are the answer, whatever the characters; ends and errors."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from owl2.engine.detokenizer import TextStream
from owl2.engine.engine import _byte_ids
from owl2.errors import InputError


def decoder(tokenizer):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def spelling(parts):
    """A decoder for which token i is part i."""
    return lambda ids: "".join(parts[id_] for id_ in ids)


def text_pieces(ids, decode, open_ids=()):
    """What is given out for each of the ids, and at the end; none empty."""
    stream = TextStream(decode, open_ids)
    pieces = [*map(stream.add, ids), stream.finish()]
    return [piece for piece in pieces if piece]


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
    for length in [*range(14)] * 12 + [33, 70, 150] * 12:
        pool = source.choice([bytes_, everything])
        ids = source.choices(pool, k=length)
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


def test_a_long_answer_is_not_decoded_again_and_again(shared_engine):
    tokenizer = shared_engine.processor.tokenizer
    ids = tokenizer.encode_exact("yes, a blue circle 你好 🦉 and so on " * 50)
    decoded = []

    def decode(some):
        decoded.append(len(some))
        return tokenizer.decode(some)

    assert "".join(text_pieces(ids, decode)) == tokenizer.decode(ids).strip()
    assert max(decoded) < 50 < len(ids) / 10


@pytest.mark.parametrize(
    ("stops", "left"),
    [
        (["cd"], "ab"),
        (["bcd", "c"], "ab"),  # the one that is whole first
        (["bcd", "d"], "a"),  # whole at once: the longer one
        ([" ef"], "abcd"),
        (["\n"], "abcd ef"),
        (["f\n\ng"], "abcd e"),
        (["abcd"], ""),
        (["h", "ij"], "abcd ef\n\ng"),
        (["i"], "abcd ef\n\ngh"),
        (["gha", "hh", "x"], "abcd ef\n\ngh"),
    ],
)
def test_stop_strings_across_tokens(stops, left):
    text = "abcd ef\n\ngh"
    ways = ([text], list(text), ["abc", "d ", "ef\n", "\ng", "h"], ["ab", "cd e", "f\n\ng", "h"])
    for parts in ways:
        stream = TextStream(spelling(parts), (), stops)
        given = ""
        for number in range(len(parts)):
            given += stream.add(number)
            if stream.cut is not None:
                break
        assert given + stream.finish() == left
        assert (stream.cut is not None) == (left != text)


def test_what_may_begin_a_stop_string_waits():
    letters = "one END two EN three"
    stream = TextStream(spelling(letters), (), ["ENDE", "EN three and"])
    given = [stream.add(number) for number in range(len(letters))]
    assert "".join(given[:7]) == "one"
    assert given[7] == " END"
    assert "".join(given) == "one END two"
    assert stream.finish() == " EN three"


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
