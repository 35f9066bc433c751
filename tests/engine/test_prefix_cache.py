"""What is kept changes no answer, is found by content, bounded, and forgotten with the weights."""

import copy

import pytest
import torch

from owl2.engine.engine import Engine
from owl2.engine.prefix_cache import Features, Prefixes, common, digest, weights_mark
from tests.engine.conftest import ask, image

TOKENS = 8


@pytest.fixture
def keeping(shared_engine):
    """An engine that keeps what it can, down to the shortest starts."""
    engine = Engine(
        copy.deepcopy(shared_engine.model), shared_engine.processor, enable_prefix_caching=True
    )
    engine.runner.reader.prefixes.shortest = 2
    return engine


@pytest.fixture
def encoded(keeping):
    """How many images the vision encoder took at each call."""
    calls = []
    keeping.model.model.vision_model.register_forward_hook(
        lambda module, inputs, output: calls.append(len(inputs[0]))
    )
    return calls


@pytest.fixture
def computed(keeping, monkeypatch):
    """How many positions of each prompt were computed."""
    calls = []
    reader = keeping.runner.reader
    read = reader.read

    def counted(prompts, *where):
        calls.extend(prompt.rest for prompt in prompts)
        return read(prompts, *where)

    monkeypatch.setattr(reader, "read", counted)
    return calls


def answers(engine, conversations):
    return [engine.chat(one, max_new_tokens=TOKENS) for one in conversations]


def test_answers_are_those_without_any_cache(shared_engine, keeping, conversations):
    expected = answers(shared_engine, conversations)
    for _ in range(2):
        assert answers(keeping, conversations) == expected
        assert keeping.batch(conversations[::-1], max_new_tokens=TOKENS)[::-1] == expected
    streamed = ["".join(keeping.stream(one, max_new_tokens=TOKENS)) for one in conversations]
    assert streamed == expected


def test_a_second_question_pays_for_its_own_tokens(shared_engine, keeping, encoded, computed):
    first, second = ask("what is this?", image(1)), ask("what colour has it?", image(1))
    keeping.chat(first, max_new_tokens=2)
    assert encoded == [1]
    del computed[:]
    assert keeping.chat(second, max_new_tokens=TOKENS) == shared_engine.chat(
        second, max_new_tokens=TOKENS
    )
    assert encoded == [1]
    whole = keeping.processor.apply_chat_template(second, add_generation_prompt=True, tokenize=True)
    # Start token, "USER: ", three of the image and " what" at least are the first question's.
    assert computed[0] < len(whole[0]) - 5


def test_the_prefix_alone_saves_the_encoder(keeping, encoded):
    reader = keeping.runner.reader
    keeping.chat(ask("what is this?", image(1), image(2)), max_new_tokens=2)
    reader.features.clear()
    keeping.chat(ask("and what colour?", image(1), image(2)), max_new_tokens=2)
    assert encoded == [2]
    keeping.chat(ask("and what colour?", image(1), image(3)), max_new_tokens=2)
    assert encoded == [2, 1], "only the second image is new"


def test_features_alone_save_the_encoder(keeping, encoded):
    keeping.runner.reader.prefixes.limit = 0
    keeping.chat(ask("what is this?", image(1)), max_new_tokens=2)
    keeping.batch([ask("no"), ask("red?", image(2), image(1))], max_new_tokens=2)
    assert encoded == [1, 1]


def test_one_pixel_makes_another_image(shared_engine, keeping, encoded):
    one, other = image(1, (8, 8)), image(1, (8, 8))
    other.putpixel((3, 3), tuple(255 - value for value in other.getpixel((3, 3))))
    questions = [ask("what?", one), ask("what?", other)]
    assert answers(keeping, questions) == answers(shared_engine, questions)
    assert encoded == [1, 1]
    assert keeping.score(questions[1], ["red"])[0] == pytest.approx(
        shared_engine.score(questions[1], ["red"])[0], abs=1e-5, rel=1e-6
    )
    assert keeping.score(questions[0], ["red"]) != keeping.score(questions[1], ["red"])


def test_a_dialogue_of_four_turns(shared_engine, keeping, encoded, computed):
    def dialogue(engine):
        messages, said = [], []
        for question in ("what is this?", "is it red?", "and now?", "no"):
            messages += ask(question, *([] if messages else [image(4)]))
            said.append(engine.chat(messages, max_new_tokens=6))
            messages.append({"role": "assistant", "content": said[-1] or "no"})
        return said, messages[:-1]

    expected, _ = dialogue(shared_engine)
    said, messages = dialogue(keeping)
    assert said == expected
    assert encoded == [1]
    whole = keeping.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True
    )
    assert computed[-1] < len(whole[0]) / 2


@pytest.mark.parametrize("limit", [1, 3_000, 20_000])
def test_tiny_bounds_evict_all_the_time(shared_engine, keeping, conversations, limit):
    reader = keeping.runner.reader
    reader.prefixes.limit, reader.features.limit = limit, limit // 10
    expected = answers(shared_engine, conversations)
    assert answers(keeping, conversations) == expected
    assert keeping.batch(conversations, max_new_tokens=TOKENS) == expected
    assert reader.prefixes.bytes <= limit
    assert reader.features.bytes <= limit // 10


def test_scores_use_what_is_kept(shared_engine, keeping, encoded, conversations):
    choices = ["red", "a blue circle", "no"]
    for messages in conversations[:4]:
        keeping.chat(messages, max_new_tokens=2)
    before = len(encoded)
    for messages in conversations[:4]:
        for _ in range(2):
            assert keeping.score(messages, choices) == pytest.approx(
                shared_engine.score(messages, choices), abs=1e-5, rel=1e-6
            )
    assert len(encoded) == before


def test_a_model_in_training_never_answers_with_what_it_was(engine, keeping, conversations):
    """Whichever way weights are written, an engine over a live model follows."""
    question = conversations[2]
    for tested, ways in ((engine, ("data", "step", "load")), (keeping, ("step", "load", "forget"))):
        optimizer = torch.optim.SGD(tested.model.parameters(), lr=1.0)
        for way in ways:
            tested.chat(question, max_new_tokens=TOKENS)
            if way == "step":
                for weight in tested.model.parameters():
                    weight.grad = torch.randn_like(weight) * 0.1
                optimizer.step()
            elif way == "load":
                state = tested.model.state_dict()
                tested.model.load_state_dict({name: 0.8 * state[name] for name in state})
            else:
                for weight in tested.model.model.vision_model.parameters():
                    weight.data *= -1.5
                if way == "forget":
                    tested.forget()
            fresh = Engine(copy.deepcopy(tested.model), tested.processor)
            assert tested.score(question, ["red"]) == pytest.approx(
                fresh.score(question, ["red"]), rel=1e-6
            )
            assert tested.chat(question, max_new_tokens=TOKENS) == fresh.chat(
                question, max_new_tokens=TOKENS
            )


def test_an_answer_begun_before_a_change_is_not_kept(keeping):
    """Its keys and values are of both weights."""
    stream = keeping.stream(ask("what is this? " * 2), max_new_tokens=40)
    next(stream)
    with torch.no_grad():
        keeping.model.lm_head.weight *= 0.5
    keeping.chat(ask("no"), max_new_tokens=1)
    stream.close()
    keeping.chat(ask("no"), max_new_tokens=1)
    kept = [prefix.key for prefix in keeping.runner.reader.prefixes._kept]
    assert len(kept) == 1


def test_by_default_a_wrapped_model_keeps_nothing(engine, conversations):
    engine.batch(conversations, max_new_tokens=2)
    reader = engine.runner.reader
    assert reader.prefixes.bytes == reader.features.bytes == 0


# ------------------------------------------------------------------ the parts


def tensors(length, layers=2):
    return [torch.zeros(1, length, 4) for _ in range(layers)]


def kept(prefixes):
    return [prefix.key for prefix in prefixes._kept]


def test_prefixes_are_found_by_the_longest_common_start():
    prefixes = Prefixes(10_000, shortest=2)
    for key in ((1, 2, 3, 4), (1, 2, b"a", b"a", 5), (9, 9)):
        prefixes.add(key, tensors(len(key)), tensors(len(key)))
    assert prefixes.find((1, 2, b"a", b"a", 7))[1] == 4
    assert prefixes.find((1, 2, b"b", b"b", 7))[1] == 2
    found, shared = prefixes.find((1, 2, 3, 4))
    assert (found.key, shared) == ((1, 2, 3, 4), 3), "one token is left to compute"
    assert prefixes.find((9, 9)) == (None, 0)
    assert prefixes.find((1, 3, 3)) == (None, 0)


def test_a_longer_prefix_takes_the_place_of_its_start():
    prefixes = Prefixes(10_000, shortest=2)
    for key in ((1, 2, 3), (1, 2, 3, 4), (1, 2), (1, 2, 5)):
        prefixes.add(key, tensors(len(key)), tensors(len(key)))
    assert kept(prefixes) == [(1, 2, 3, 4), (1, 2, 5)]
    assert prefixes.bytes == sum(prefix.bytes for prefix in prefixes._kept)


def test_the_least_recently_used_goes_first():
    size = 2 * 2 * 4 * 4  # of a position: K and V of 2 layers, 4 floats each
    prefixes = Prefixes(2 * 3 * size, shortest=1)
    prefixes.add((1, 1, 1), tensors(3), tensors(3))
    prefixes.add((2, 2, 2), tensors(3), tensors(3))
    prefixes.find((1, 1, 5))
    prefixes.add((3, 3, 3), tensors(3), tensors(3))
    assert kept(prefixes) == [(1, 1, 1), (3, 3, 3)]
    prefixes.add((4,) * 7, tensors(7), tensors(7))
    assert kept(prefixes) == [(1, 1, 1), (3, 3, 3)], "larger than all room"
    features = Features(100)
    for name in (b"a", b"b"):
        features.add(name, torch.zeros(12))
    features.find(b"a")
    features.add(b"c", torch.zeros(12))
    assert features.find(b"b") is None
    assert features.find(b"a") is not None
    assert features.bytes == 96


def test_common_starts():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        one, other = (
            tuple(torch.randint(0, 2, (int(length),), generator=generator).tolist())
            for length in torch.randint(0, 9, (2,), generator=generator)
        )
        slow = 0
        while slow < min(len(one), len(other)) and one[slow] == other[slow]:
            slow += 1
        assert common(one, other) == slow


def test_digests_and_marks():
    pixels = torch.rand(3, 8, 8)
    changed = pixels.clone()
    changed[2, 7, 7] += 1e-6
    assert digest(pixels) == digest(pixels.clone()) != digest(changed)
    assert digest(pixels.bfloat16()) == digest(pixels.bfloat16().clone())
    model = torch.nn.Linear(2, 2)
    marks = [weights_mark(model)]
    with torch.no_grad():
        model.weight += 1
    marks.append(weights_mark(model))
    model.bias = torch.nn.Parameter(torch.ones(2))
    marks.append(weights_mark(model))
    assert len(set(marks)) == 3
    assert weights_mark(model) == marks[-1]
    with torch.inference_mode():
        weights_mark(torch.nn.Linear(2, 2))
