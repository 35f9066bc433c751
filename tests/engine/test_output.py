"""Completions: chunks, finish reasons, log-probabilities, n answers, stop strings."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from owl2.engine.detokenizer import token_texts
from owl2.engine.engine import Engine
from owl2.errors import ErrorCode
from owl2.processing.tokenizer import encode
from tests.engine.conftest import ask, caching_engine, model_inputs
from tests.errors import raises_input_error

TOKENS = 12
SAMPLED = {"temperature": 3.0, "seed": 5}


def joined(logprobs):
    """The texts and the bytes of the tokens that are part of the answer."""
    parts = [own for own in logprobs if own.bytes]
    return "".join(own.text for own in parts), b"".join(bytes(own.bytes) for own in parts)


def join_chunks(completion):
    """The text of each answer, and its last chunk; checks the invariants of chunks."""
    texts, last = {}, {}
    for chunk in completion:
        assert chunk.index not in last or last[chunk.index].finish_reason is None
        assert chunk.text or chunk.finish_reason
        assert chunk.num_tokens > (last[chunk.index].num_tokens if chunk.index in last else 0)
        texts[chunk.index] = texts.get(chunk.index, "") + chunk.text
        last[chunk.index] = chunk
    assert all(chunk.finish_reason for chunk in last.values())
    return texts, last


# ------------------------------------------------------------------ one answer, in several ways


@pytest.mark.parametrize("options", [{}, SAMPLED, SAMPLED | {"seed": 8}], ids=str)
def test_chat_chunks_and_outputs_agree(shared_engine, conversations, options):
    options = {"max_new_tokens": TOKENS} | options
    for one in conversations:
        answer = shared_engine.chat(one, **options)
        streamed = list(shared_engine.stream(one, **options))
        assert "".join(streamed) == answer
        assert all(streamed)
        texts, last = join_chunks(shared_engine.complete(one, **options))
        assert texts == {0: answer}
        [output] = shared_engine.complete(one, **options).outputs()
        assert output == replace(last[0], text=answer)
        assert output.logprobs == ()


def test_finish_reasons(engine, conversations):
    [output] = engine.complete(conversations[0], max_new_tokens=TOKENS, top_logprobs=0).outputs()
    assert (output.finish_reason, output.num_tokens) == ("length", TOKENS)
    ids = [own.id for own in output.logprobs]
    assert len(ids) == TOKENS
    fourth = next(
        id_ for position, id_ in enumerate(ids) if position >= 3 and id_ not in ids[:position]
    )
    position = ids.index(fourth)
    engine.model.generation_config.eos_token_id = fourth
    engine = Engine(engine.model, engine.processor)
    for limit, reason in ((TOKENS, "stop"), (position + 1, "stop"), (position, "length")):
        [answer] = engine.complete(conversations[0], max_new_tokens=limit, top_logprobs=0).outputs()
        count = min(limit, position + 1)
        assert (answer.finish_reason, answer.num_tokens) == (reason, count)
        assert [own.id for own in answer.logprobs] == ids[:count]
        assert answer.text == engine.chat(conversations[0], max_new_tokens=limit)


def test_concurrent_completions_equal_those_alone(shared_engine, conversations):
    def complete(number):
        return shared_engine.complete(
            conversations[number % 12],
            max_new_tokens=TOKENS,
            n=1 + number % 3,
            stop=["r", "e"][: number % 2],
            top_logprobs=None if number % 4 else 3,
            **(SAMPLED if number % 5 else {}),
        ).outputs()

    alone = [complete(number) for number in range(24)]
    with ThreadPoolExecutor(24) as threads:
        concurrent = list(threads.map(complete, range(24)))
    for one, other in zip(alone, concurrent, strict=True):
        assert [(a.text, a.finish_reason, a.num_tokens) for a in one] == [
            (b.text, b.finish_reason, b.num_tokens) for b in other
        ]
        for a, b in zip(one, other, strict=True):
            assert [own.id for own in a.logprobs] == [own.id for own in b.logprobs]
            assert [own.logprob for own in a.logprobs] == pytest.approx(
                [own.logprob for own in b.logprobs], abs=1e-4
            )


# ------------------------------------------------------------------ log-probabilities


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_p": 0.9, "seed": 2}], ids=str)
def test_logprobs_are_those_of_the_forward(shared_engine, conversations, options):
    model = shared_engine.model
    for one in conversations[:3]:
        completion = shared_engine.complete(one, max_new_tokens=6, top_logprobs=20, **options)
        [answer] = completion.outputs()
        ids = torch.tensor([[own.id for own in answer.logprobs]])
        inputs = model_inputs(shared_engine, one)
        prompt = inputs.pop("input_ids")
        inputs = {key: value for key, value in inputs.items() if key == "pixel_values"}
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, ids], 1), **inputs).logits[0]
        expected = logits[prompt.shape[1] - 1 : -1].log_softmax(-1)
        for own, row in zip(answer.logprobs, expected, strict=True):
            assert own.logprob == pytest.approx(row[own.id].item(), abs=1e-4)
            best = row.topk(20)
            assert [top.id for top in own.top] == best.indices.tolist()
            assert [top.logprob for top in own.top] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert all(top.top == () for top in own.top)
        if not options:
            assert all(own.top[0].id == own.id for own in answer.logprobs)


def test_number_of_top_logprobs(shared_engine, conversations):
    def logprobs(**options):
        completion = shared_engine.complete(conversations[2], max_new_tokens=4, **options)
        return completion.outputs()[0].logprobs

    assert logprobs() == ()
    none, three = logprobs(top_logprobs=0), logprobs(top_logprobs=3)
    assert [one.top for one in none] == [()] * 4
    assert [len(own.top) for own in three] == [3] * 4
    assert [(a.id, a.logprob) for a in none] == [(b.id, b.logprob) for b in three]


def test_bytes_of_the_tokens_come_with_their_text(shared_engine, conversations):
    options = {"max_new_tokens": 40, "top_logprobs": 0, "temperature": 3.0}
    for seed, one in enumerate(conversations):
        text, scores = "", []
        for chunk in shared_engine.complete(one, seed=seed, **options):
            assert joined(chunk.logprobs)[0] == chunk.text
            text += chunk.text
            scores += chunk.logprobs
        assert joined(scores) == (text, text.encode())
        assert text


def test_excluded_tokens_are_not_reported(engine, conversations):
    with torch.no_grad():
        bias = torch.full((engine.model.config.vocab_size,), float("-inf"))
        bias[100:105] = 0
        engine.model.lm_head.bias = torch.nn.Parameter(bias)
    [answer] = engine.complete(conversations[0], max_new_tokens=2, top_logprobs=20).outputs()
    assert [len(own.top) for own in answer.logprobs] == [5, 5]


def test_token_texts_of_sentencepiece(shared_engine):
    tokenizer = shared_engine.processor.tokenizer
    texts = token_texts(tokenizer)
    ids = encode(tokenizer, "a 你好 🦉")
    assert b"".join(texts(id_)[1] for id_ in ids).decode().strip() == "a 你好 🦉"
    assert texts(tokenizer.convert_tokens_to_ids("<0xE4>")) == ("\\xe4", b"\xe4")
    assert texts(tokenizer.eos_token_id) == ("</s>", b"")
    assert texts(len(tokenizer) + 5) == ("", b"")


def test_token_texts_of_byte_level_tokenizers():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: id_ for id_, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.add_tokens(["<image part>"])
    texts = token_texts(tokenizer)
    text = "a\x00b 你好 \x7f\xa0\xad🦉\n"
    ids = tokenizer.encode(text)
    assert b"".join(texts(id_)[1] for id_ in ids).decode() == text
    assert {texts(id_)[1] for id_ in range(256)} == {bytes([byte]) for byte in range(256)}
    assert texts(256) == ("<image part>", b"<image part>")


# ------------------------------------------------------------------ n answers


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_n_answers_use_consecutive_seeds(shared_engine, conversations, enable_prefix_caching):
    for one in conversations[:4]:
        engine = Engine(
            shared_engine.model,
            shared_engine.processor,
            enable_prefix_caching=enable_prefix_caching,
        )
        texts, _ = join_chunks(engine.complete(one, n=5, max_new_tokens=TOKENS, **SAMPLED))
        assert engine.stats().num_prefills == 1
        alone = [
            engine.chat(one, max_new_tokens=TOKENS, **SAMPLED | {"seed": SAMPLED["seed"] + index})
            for index in range(5)
        ]
        assert [texts[index] for index in range(5)] == alone
        assert len(set(alone)) > 2


def test_chunks_of_n_answers_alternate(shared_engine, conversations):
    completion = shared_engine.complete(conversations[0], n=3, max_new_tokens=30, **SAMPLED)
    order = [chunk.index for chunk in completion]
    first = {index: order.index(index) for index in range(3)}
    last = {index: len(order) - 1 - order[::-1].index(index) for index in range(3)}
    assert max(first.values()) < min(last.values())


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_more_answers_than_rows(shared_engine, conversations, enable_prefix_caching):
    engine = caching_engine(shared_engine, enable_prefix_caching=enable_prefix_caching)
    options = {"max_new_tokens": TOKENS, **SAMPLED}
    expected = engine.complete(conversations[1], n=7, **options).outputs()
    engine.core.max_num_seqs = 3
    with engine.complete(conversations[0], max_new_tokens=60) as other:
        next(other)
        outputs = engine.complete(conversations[1], n=7, **options).outputs()
    assert [output.text for output in outputs] == [output.text for output in expected]


# ------------------------------------------------------------------ stop strings


def cut_at(text, stops):
    """The text before the first complete stop string, and whether there is one."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))].strip(), True
    return text.strip(), False


def test_stop_strings_end_the_answer_and_are_excluded(shared_engine, conversations):
    source = random.Random(4)
    cuts = 0
    for seed, one in enumerate(conversations * 2):
        options = {"max_new_tokens": 20, "temperature": 3.0, "seed": seed}
        [full] = shared_engine.complete(one, **options).outputs()
        begins = [source.randrange(len(full.text) - 1) for _ in range(2)]
        stops = [full.text[begin : begin + source.randrange(1, 7)] for begin in begins]
        stops = [stop for stop in stops if "\ufffd" not in stop] + ["this is not there"]
        expected, is_cut = cut_at(full.text, stops)
        cuts += is_cut and bool(expected)
        text, logprobs = "", []
        for chunk in shared_engine.complete(one, stop=stops, top_logprobs=0, **options):
            text += chunk.text
            logprobs += chunk.logprobs
            assert expected.startswith(text)
        assert text == expected
        assert chunk.finish_reason == ("stop" if is_cut else full.finish_reason)
        assert joined(logprobs) == (text, text.encode())
        assert shared_engine.chat(one, stop=stops, **options) == expected
        assert "".join(shared_engine.stream(one, stop=stops, **options)) == expected
    assert cuts > 12


def test_stop_strings_in_a_batch(shared_engine, conversations):
    options = {"max_new_tokens": 20, "stop": "e"}
    alone = [shared_engine.chat(one, **options) for one in conversations]
    assert shared_engine.batch(conversations, **options) == alone
    assert not any("e" in text for text in alone)
    full = shared_engine.batch(conversations, max_new_tokens=20)
    assert alone == [cut_at(text, ["e"])[0] for text in full]
    assert alone != full
    sampled = shared_engine.chat(conversations[0], **options, **SAMPLED)
    assert shared_engine.batch(conversations[:3], **options, **SAMPLED)[0] == sampled


def test_a_stopped_answer_frees_its_row(engine, conversations, batch_sizes):
    texts = [output.text for output in engine.complete(conversations[0], n=4, **SAMPLED).outputs()]
    stop = next(text[20:24] for text in texts if sum(text[20:24] in other for other in texts) == 1)
    batch_sizes.clear()
    outputs = engine.complete(conversations[0], n=4, stop=stop, **SAMPLED).outputs()
    stopped = [output for output in outputs if output.finish_reason == "stop"]
    assert 0 < len(stopped) < 4
    assert batch_sizes.count(4 - len(stopped)) > 2


def test_an_empty_string_is_no_stop_string(shared_engine, conversations):
    assert shared_engine.chat(conversations[0], stop="", max_new_tokens=2)


# ------------------------------------------------------------------ invalid input


@pytest.mark.parametrize("options", [{"n": 2}, {"top_logprobs": 1}], ids=str)
def test_chat_takes_no_options_of_complete(shared_engine, conversations, options):
    with pytest.raises(TypeError, match=next(iter(options))):
        shared_engine.chat(conversations[0], **options)


@pytest.mark.parametrize("method", ["complete", "stream"])
def test_input_is_checked_before_the_first_chunk(shared_engine, method):
    with raises_input_error(ErrorCode.EMPTY_MESSAGE):
        getattr(shared_engine, method)(ask(" "))


def test_weights_shared_among_processes(engine, conversations):
    options = {"max_new_tokens": TOKENS, "stop": ["e"], **SAMPLED}
    expected = engine.complete(conversations[1], n=3, **options).outputs()
    engine.core = None
    assert engine.complete(conversations[1], n=3, **options).outputs() == expected
    assert engine.batch(conversations[1:2], **options) == [expected[0].text]
    closed = engine.complete(conversations[1])
    closed.close()
    assert list(closed) == []
