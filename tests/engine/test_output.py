"""Completions: pieces, why they end, log-probabilities, n answers, stop strings, who leaves."""

import random
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from owl2.engine.engine import MAX_BATCH, Engine
from owl2.engine.prefill import Reader
from owl2.engine.token_text import TokenTexts
from owl2.errors import InputError
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from tests.engine.conftest import ask, image
from tests.tiny import make_model

TOKENS = 12
TASKS = Path("/proc/self/task")
WILD = {"temperature": 3.0, "seed": 5}


@pytest.fixture
def read(monkeypatch):
    """The prompts that any model computes, a list of lengths each time, as a list that grows."""
    made = []
    whole = Reader.read

    def counted(self, prompts, decoder, first):
        made.append([prompt.rest for prompt in prompts])
        return whole(self, prompts, decoder, first)

    monkeypatch.setattr(Reader, "read", counted)
    return made


def letters(text):
    """Of a text, or of tokens: without white space and broken characters."""
    if not isinstance(text, str):
        text = b"".join(bytes(score.bytes) for score in text).decode(errors="ignore")
    return "".join(text.replace("\ufffd", "").split())


def pieces_of(completion):
    """The joined text of each answer, and its last piece; checks what holds of all pieces."""
    texts, last = {}, {}
    for piece in completion:
        assert piece.index not in last or last[piece.index].finish_reason is None
        assert piece.text or piece.finish_reason
        assert piece.tokens > (last[piece.index].tokens if piece.index in last else 0)
        texts[piece.index] = texts.get(piece.index, "") + piece.text
        last[piece.index] = piece
    assert all(piece.finish_reason for piece in last.values())
    return texts, last


# ------------------------------------------------------------------ one answer, in several ways


@pytest.mark.parametrize("options", [{}, WILD, WILD | {"seed": 8}], ids=str)
def test_all_ways_to_ask_agree(shared_engine, conversations, options):
    options = {"max_new_tokens": TOKENS} | options
    for one in conversations:
        answer = shared_engine.chat(one, **options)
        texts, last = pieces_of(shared_engine.complete(one, **options))
        assert texts == {0: answer}
        [whole] = shared_engine.complete(one, **options).whole()
        assert whole.text == answer
        assert (whole.tokens, whole.finish_reason) == (last[0].tokens, last[0].finish_reason)
        assert whole.scores == ()


def test_why_an_answer_ends(engine, conversations):
    [whole] = engine.complete(conversations[0], max_new_tokens=TOKENS, top_logprobs=0).whole()
    assert (whole.finish_reason, whole.tokens) == ("length", TOKENS)
    ids = [score.id for score in whole.scores]
    assert len(ids) == TOKENS
    fourth = next(id_ for place, id_ in enumerate(ids) if place >= 3 and id_ not in ids[:place])
    place = ids.index(fourth)
    engine.model.generation_config.eos_token_id = fourth
    engine = Engine(engine.model, engine.processor)
    for limit, reason in ((TOKENS, "stop"), (place + 1, "stop"), (place, "length")):
        [answer] = engine.complete(conversations[0], max_new_tokens=limit, top_logprobs=0).whole()
        made = min(limit, place + 1)
        assert (answer.finish_reason, answer.tokens) == (reason, made)
        assert [score.id for score in answer.scores] == ids[:made]
        assert answer.text == engine.chat(conversations[0], max_new_tokens=limit)


def test_the_context_ends_an_answer(engine, conversations):
    completion = engine.complete(conversations[1], max_new_tokens=50)
    ids = engine.processor.apply_chat_template(
        conversations[1], add_generation_prompt=True, tokenize=True
    )[0]
    assert completion.prompt_tokens == len(ids)
    engine.model.config.max_position_embeddings = len(ids) + 3
    [answer] = engine.complete(conversations[1], max_new_tokens=50).whole()
    assert (answer.finish_reason, answer.tokens) == ("length", 3)


def test_beside_many_others_as_alone(shared_engine, conversations):
    def whole(number):
        return shared_engine.complete(
            conversations[number % 12],
            max_new_tokens=TOKENS,
            n=1 + number % 3,
            stop=["r", "e"][: number % 2],
            top_logprobs=None if number % 4 else 3,
            **(WILD if number % 5 else {}),
        ).whole()

    alone = [whole(number) for number in range(24)]
    with ThreadPoolExecutor(24) as threads:
        together = list(threads.map(whole, range(24)))
    for one, other in zip(alone, together, strict=True):
        assert [(a.text, a.finish_reason, a.tokens) for a in one] == [
            (b.text, b.finish_reason, b.tokens) for b in other
        ]
        for a, b in zip(one, other, strict=True):
            assert [score.id for score in a.scores] == [score.id for score in b.scores]
            assert [score.logprob for score in a.scores] == pytest.approx(
                [score.logprob for score in b.scores], abs=1e-4
            )


# ------------------------------------------------------------------ log-probabilities


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_p": 0.9, "seed": 2}], ids=str)
def test_log_probabilities_are_the_models_own(shared_engine, conversations, options):
    model, processor = shared_engine.model, shared_engine.processor
    for one in conversations[:3]:
        completion = shared_engine.complete(one, max_new_tokens=6, top_logprobs=20, **options)
        [answer] = completion.whole()
        ids = torch.tensor([[score.id for score in answer.scores]])
        inputs = processor.apply_chat_template(
            one, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        prompt = inputs.pop("input_ids")
        inputs = {key: value for key, value in inputs.items() if key == "pixel_values"}
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, ids], 1), **inputs).logits[0]
        expected = logits[prompt.shape[1] - 1 : -1].log_softmax(-1)
        for score, row in zip(answer.scores, expected, strict=True):
            assert score.logprob == pytest.approx(row[score.id].item(), abs=1e-4)
            best = row.topk(20)
            assert [top.id for top in score.top] == best.indices.tolist()
            assert [top.logprob for top in score.top] == pytest.approx(
                best.values.tolist(), abs=1e-4
            )
            assert all(top.top == () for top in score.top)
        if not options:
            assert all(score.top[0].id == score.id for score in answer.scores)


def test_as_many_scores_as_asked_for(shared_engine, conversations):
    def scores(**asked):
        completion = shared_engine.complete(conversations[2], max_new_tokens=4, **asked)
        return completion.whole()[0].scores

    assert scores() == ()
    own, three = scores(top_logprobs=0), scores(top_logprobs=3)
    assert [score.top for score in own] == [()] * 4
    assert [len(score.top) for score in three] == [3] * 4
    assert [(a.id, a.logprob) for a in own] == [(b.id, b.logprob) for b in three]


def test_bytes_of_the_tokens_are_the_text(shared_engine, conversations):
    for seed, one in enumerate(conversations):
        completion = shared_engine.complete(
            one, max_new_tokens=40, top_logprobs=0, temperature=3.0, seed=seed
        )
        [answer] = completion.whole()
        assert letters(answer.scores) == letters(answer.text) != ""


def test_scores_come_with_their_text(shared_engine, conversations):
    completion = shared_engine.complete(conversations[3], max_new_tokens=30, top_logprobs=1)
    text, scores = "", []
    for piece in completion:
        text += piece.text
        scores += piece.scores
        assert letters(scores).startswith(letters(text))
    assert text


def test_tokens_that_the_model_rules_out_are_not_reported(engine, conversations):
    with torch.no_grad():
        bias = torch.full((engine.model.config.vocab_size,), float("-inf"))
        bias[100:105] = 0
        engine.model.lm_head.bias = torch.nn.Parameter(bias)
    [answer] = engine.complete(conversations[0], max_new_tokens=2, top_logprobs=20).whole()
    assert [len(score.top) for score in answer.scores] == [5, 5]


def test_what_tokens_stand_for(shared_engine):
    texts = TokenTexts(shared_engine.processor.tokenizer)
    encode = shared_engine.processor.tokenizer.encode_exact
    assert (
        b"".join(texts.find(id_)[1] for id_ in encode("a 你好 🦉")).decode().strip() == "a 你好 🦉"
    )
    tokenizer = shared_engine.processor.tokenizer
    assert texts.find(tokenizer.convert_tokens_to_ids("<0xE4>")) == ("\\xe4", b"\xe4")
    assert texts.find(tokenizer.eos_token_id) == ("</s>", b"")
    assert texts.find(len(tokenizer) + 5) == ("", b"")


def test_what_tokens_of_byte_level_tokenizers_stand_for():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: id_ for id_, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.add_tokens(["<image part>"])
    texts = TokenTexts(tokenizer)
    text = "a\x00b 你好 \x7f\xa0\xad🦉\n"
    ids = tokenizer.encode(text)
    assert b"".join(texts.find(id_)[1] for id_ in ids).decode() == text
    assert {texts.find(id_)[1] for id_ in range(256)} == {bytes([byte]) for byte in range(256)}
    assert texts.find(256) == ("<image part>", b"<image part>")


# ------------------------------------------------------------------ n answers


@pytest.mark.parametrize("reuse", [True, False])
def test_n_answers_are_those_of_the_next_seeds(shared_engine, conversations, read, reuse):
    for one in conversations[:4]:
        engine = Engine(shared_engine.model, shared_engine.processor, reuse=reuse)
        del read[:]
        texts, _ = pieces_of(engine.complete(one, n=5, max_new_tokens=TOKENS, **WILD))
        assert [len(prompts) for prompts in read] == [1], "the prompt was computed more than once"
        alone = [
            engine.chat(one, max_new_tokens=TOKENS, **WILD | {"seed": WILD["seed"] + number})
            for number in range(5)
        ]
        assert [texts[number] for number in range(5)] == alone
        assert len(set(alone)) > 2


def test_pieces_of_n_answers_come_side_by_side(shared_engine, conversations):
    completion = shared_engine.complete(conversations[0], n=3, max_new_tokens=30, **WILD)
    order = [piece.index for piece in completion]
    first = {index: order.index(index) for index in range(3)}
    last = {index: len(order) - 1 - order[::-1].index(index) for index in range(3)}
    assert max(first.values()) < min(last.values())


@pytest.mark.parametrize("reuse", [True, False])
def test_more_answers_than_there_is_room_for(shared_engine, conversations, reuse):
    engine = Engine(shared_engine.model, shared_engine.processor, reuse=reuse)
    options = {"max_new_tokens": TOKENS, **WILD}
    expected = [answer.text for answer in engine.complete(conversations[1], n=7, **options).whole()]
    engine.runner._worker.max_batch = 3
    with engine.complete(conversations[0], max_new_tokens=60) as other:
        next(other)
        some = engine.complete(conversations[1], n=7, **options).whole()
    assert [answer.text for answer in some] == expected


# ------------------------------------------------------------------ stop strings


def cut_at(text, stops):
    """What is left of a text: by trying every beginning of it."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))].strip(), True
    return text.strip(), False


def test_stop_strings_end_the_answer_and_are_not_shown(shared_engine, conversations):
    source = random.Random(4)
    cuts = 0
    for seed, one in enumerate(conversations * 2):
        options = {"max_new_tokens": 20, "temperature": 3.0, "seed": seed}
        [whole] = shared_engine.complete(one, **options).whole()
        text = whole.text
        begins = [source.randrange(len(text) - 1) for _ in range(2)]
        stops = [text[begin : begin + source.randrange(1, 7)] for begin in begins]
        stops = [stop for stop in stops if "\ufffd" not in stop] + ["this is not there"]
        expected, is_cut = cut_at(text, stops)
        cuts += is_cut and bool(expected)
        completion = shared_engine.complete(one, stop=stops, top_logprobs=0, **options)
        given, scores = "", []
        for piece in completion:
            given += piece.text
            scores += piece.scores
            assert expected.startswith(given)
        assert given == expected
        assert piece.finish_reason == ("stop" if is_cut else whole.finish_reason)
        # Every token that is in the text has its score, and none that begins behind it.
        assert letters(scores).startswith(letters(given))
        assert not is_cut or len(letters(scores[:-1])) <= len(letters(given))
        # Each of them is an answer cut in the same place.
        assert shared_engine.chat(one, stop=stops, **options) == expected
        assert "".join(shared_engine.stream(one, stop=stops, **options)) == expected
    assert cuts > 12


def test_stop_strings_in_a_batch(shared_engine, conversations):
    options = {"max_new_tokens": 20, "stop": "e"}
    alone = [shared_engine.chat(one, **options) for one in conversations]
    assert shared_engine.batch(conversations, **options) == alone
    assert not any("e" in text for text in alone)
    whole = shared_engine.batch(conversations, max_new_tokens=20)
    assert alone == [cut_at(text, ["e"])[0] for text in whole]
    assert alone != whole
    seeds = [shared_engine.chat(one, **options, **WILD) for one in conversations[:1]]
    assert shared_engine.batch(conversations[:3], **options, **WILD)[:1] == seeds


def test_an_answer_that_stopped_leaves_its_row_to_others(engine, conversations, steps):
    texts = [answer.text for answer in engine.complete(conversations[0], n=4, **WILD).whole()]
    stop = next(text[20:24] for text in texts if sum(text[20:24] in other for other in texts) == 1)
    del steps[:]
    answers = engine.complete(conversations[0], n=4, stop=stop, **WILD).whole()
    ended = [answer for answer in answers if answer.finish_reason == "stop"]
    assert 0 < len(ended) < 4
    assert steps.count(4 - len(ended)) > 2


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [3]])
def test_stop_strings_that_are_none(shared_engine, conversations, stop):
    if stop == "":
        assert shared_engine.chat(conversations[0], stop=stop, max_new_tokens=2)
        return
    with pytest.raises(InputError, match="stop"):
        shared_engine.chat(conversations[0], stop=stop)


# ------------------------------------------------------------------ leaving


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_closed_by_another_thread_while_it_runs(engine, conversations):
    engine.model.config.max_position_embeddings = 100_000
    completion = engine.complete(conversations[0], max_new_tokens=90_000)
    made = []
    thread = threading.Thread(target=lambda: made.extend(completion))
    thread.start()
    wait_for(lambda: len(made) > 3)
    completion.close()
    thread.join(20)
    assert not thread.is_alive()
    wait_for(lambda: not engine.runner._worker._rows.active)
    assert made[-1].finish_reason is None
    assert list(completion) == []
    assert engine.chat(conversations[0], max_new_tokens=3)


def test_who_waits_for_a_whole_answer_is_told_that_it_is_closed(engine, conversations):
    engine.model.config.max_position_embeddings = 100_000
    completion = engine.complete(conversations[0], max_new_tokens=90_000)
    with ThreadPoolExecutor(1) as threads:
        answers = threads.submit(completion.whole)
        wait_for(lambda: engine.runner._worker._rows and engine.runner._worker._rows.active)
        completion.close()
        with pytest.raises(CancelledError):
            answers.result(20)
    with engine.complete(conversations[0]) as left:
        pass
    with pytest.raises(CancelledError):
        left.whole()


def test_what_is_closed_while_it_waits_never_starts(engine, conversations, read):
    engine.model.config.max_position_embeddings = 100_000
    engine.runner._worker.max_batch = 1
    running = engine.complete(conversations[0], max_new_tokens=90_000)
    waiting = engine.complete(conversations[4], max_new_tokens=5)
    made = []
    threads = [
        threading.Thread(target=lambda: made.extend(running)),
        threading.Thread(target=lambda: made.append(list(waiting))),
    ]
    threads[0].start()
    wait_for(lambda: made)
    threads[1].start()
    wait_for(lambda: engine.runner._worker._waiting)
    waiting.close()
    threads[1].join(20)
    assert [] in made
    running.close()
    threads[0].join(20)
    assert len(read) == 1


def test_left_early_or_forgotten_it_ends(engine, conversations, steps):
    with engine.complete(conversations[0], max_new_tokens=90) as completion:
        next(completion)
    assert list(completion) == []
    next(engine.complete(conversations[0], max_new_tokens=90))  # and nobody keeps it
    del steps[:]
    assert engine.chat(conversations[1], max_new_tokens=3)
    assert steps == [1, 1]


def test_never_begun_it_starts_nothing(engine, conversations, read):
    completion = engine.complete(conversations[0])
    completion.close()
    assert list(completion) == []
    engine.complete(conversations[0])
    assert read == []


# ------------------------------------------------------------------ threads of a server


@pytest.mark.skipif(not TASKS.exists(), reason="counts threads as Linux does")
def test_a_thread_that_asks_starts_no_threads_of_openmp(shared_engine):
    """Each thread that computes with torch gets some; with many, none has a core to itself."""
    model = make_model(vision={"image_size": 448, "patch_size": 14}, vocab_size=320)
    images = Owl2ImageProcessor(448)
    processor = Owl2Processor(images, shared_engine.processor.tokenizer, num_image_tokens=3)
    engine = Engine(model, processor)
    questions = [ask("what is this? " * 20, image(0, (300, 500)), image(1, (448, 448)))] * 4

    def threads_for(work):
        before, hold = len(list(TASKS.iterdir())), threading.Barrier(5)
        threads = [
            threading.Thread(target=lambda one=one: (work(one), hold.wait())) for one in questions
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: hold.n_waiting == 4)
        made = len(list(TASKS.iterdir())) - before
        hold.wait()
        for thread in threads:
            thread.join()
        return made

    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert threads_for(lambda one: engine.complete(one, temperature=1.0, seed=1)) == 4
        assert threads_for(lambda one: torch.ones(1000, 1000).add_(1)) > 4
    finally:
        torch.set_num_threads(usual)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": MAX_BATCH + 1}, str(MAX_BATCH)),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 21}, "20"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_out_of_range(shared_engine, conversations, options, named):
    with pytest.raises(InputError, match=named):
        shared_engine.complete(conversations[0], **options)


def test_input_is_checked_before_the_first_piece(shared_engine):
    with pytest.raises(InputError, match="empty"):
        shared_engine.complete(ask(" ", image(1)))


def test_logits_that_are_not_finite(broken, conversations):
    completion = broken.complete(conversations[1], n=2, top_logprobs=2)
    with pytest.raises(InputError, match="not finite"):
        next(completion)
    assert list(completion) == []
    with pytest.raises(InputError, match="not finite"):
        broken.complete(conversations[1]).whole()


def test_weights_shared_among_processes(engine, conversations):
    """Then `generate` makes the answers, whole."""
    options = {"max_new_tokens": TOKENS, "stop": ["e"], **WILD}
    expected = engine.complete(conversations[1], n=3, **options).whole()
    engine.runner = None
    assert engine.complete(conversations[1], n=3, **options).whole() == expected
    assert engine.batch(conversations[1:2], **options) == [expected[0].text]
    with pytest.raises(InputError, match="top_logprobs"):
        engine.complete(conversations[1], top_logprobs=1)
    closed = engine.complete(conversations[1])
    closed.close()
    assert list(closed) == []
