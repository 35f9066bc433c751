"""Released text, joined, is the decoded answer; stop strings; streams."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from owl2.engine.detokenizer import IncrementalDetokenizer, open_byte_ids
from owl2.processing.tokenizer import encode


def decoder(tokenizer):
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def spelling(parts):
    """A decoder for which token i is part i."""
    return lambda ids: "".join(parts[id_] for id_ in ids)


def released_texts(ids, decode, open_ids=()):
    """The released texts that are not empty."""
    stream = IncrementalDetokenizer(decode, open_ids)
    return [*filter(None, [*map(stream.add, ids), stream.finish()])]


def test_the_first_chunk_comes_before_the_last_token(engine, conversations, gate):
    gate.free_steps = 30
    stream = engine.stream(conversations[0], max_new_tokens=40)
    first = next(stream)  # while the gate blocks the last decode steps
    gate.open()
    rest = list(stream)
    assert len(rest) > 5
    assert first + "".join(rest) == engine.chat(conversations[0], max_new_tokens=40)


def test_only_complete_characters_are_released(shared_engine):
    tokenizer = shared_engine.processor.tokenizer
    text = "a 你好 🦉👩‍🚀 é\n\n  end ő"
    ids = encode(tokenizer, text)
    assert len(ids) > len(text)
    chunks = released_texts(ids, decoder(tokenizer))
    assert "".join(chunks) == text
    assert len(chunks) > 5
    assert not any("\ufffd" in chunk for chunk in chunks)


def test_random_tokens(shared_engine):
    tokenizer = shared_engine.processor.tokenizer
    decode = decoder(tokenizer)
    source = random.Random(1)
    bytes_ = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(256)]
    everything = range(len(tokenizer))
    for length in [*range(14)] * 12 + [33, 70, 150] * 12:
        pool = source.choice([bytes_, everything])
        ids = source.choices(pool, k=length)
        assert "".join(released_texts(ids, decode)) == decode(ids).strip()


def test_tokenizers_that_decode_runs_of_bytes_together():
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"x": 256, "<unk>": 257}
    inner = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    decode = decoder(tokenizer)

    open_ids = open_byte_ids(tokenizer)
    assert len(open_ids) == 256
    ids = [256, 0x41, 0xFF, 256, 0xC3, 0xA9, 256]  # an invalid byte changes the valid one
    assert "".join(released_texts(ids, decode, open_ids)) == decode(ids).strip()
    assert "".join(released_texts(ids, decode)) != decode(ids)


def test_long_answers_are_decoded_in_windows(shared_engine):
    tokenizer = shared_engine.processor.tokenizer
    ids = encode(tokenizer, "yes, a blue circle 你好 🦉 and so on " * 50)
    decoded = []

    def decode(some):
        decoded.append(len(some))
        return tokenizer.decode(some)

    assert "".join(released_texts(ids, decode)) == tokenizer.decode(ids).strip()
    assert max(decoded) < 50 < len(ids) / 10


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["cd"], "ab"),
        (["bcd", "c"], "ab"),  # the one that is complete first
        (["bcd", "d"], "a"),  # complete at the same token: the longer one
        ([" ef"], "abcd"),
        (["\n"], "abcd ef"),
        (["f\n\ng"], "abcd e"),
        (["abcd"], ""),
        (["h", "ij"], "abcd ef\n\ng"),
        (["i"], "abcd ef\n\ngh"),
        (["gha", "hh", "x"], "abcd ef\n\ngh"),
    ],
)
def test_stop_strings_across_tokens(stops, expected):
    text = "abcd ef\n\ngh"
    ways = ([text], list(text), ["abc", "d ", "ef\n", "\ng", "h"], ["ab", "cd e", "f\n\ng", "h"])
    for parts in ways:
        stream = IncrementalDetokenizer(spelling(parts), (), stops)
        released = ""
        for token in range(len(parts)):
            released += stream.add(token)
            if stream.stop_position is not None:
                break
        assert released + stream.finish() == expected
        assert (stream.stop_position is not None) == (expected != text)


def test_a_possible_stop_string_is_held_back():
    letters = "one END two EN three"
    stream = IncrementalDetokenizer(spelling(letters), (), ["ENDE", "EN three and"])
    released = [stream.add(token) for token in range(len(letters))]
    assert "".join(released[:7]) == "one"
    assert released[7] == " END"
    assert "".join(released) == "one END two"
    assert stream.finish() == " EN three"
