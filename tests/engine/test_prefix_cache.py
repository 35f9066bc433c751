"""Cached answers equal uncached ones; the caches are bounded, and cleared with the weights."""

import copy
import random

import pytest
import torch

from owl2.engine.engine import Engine
from owl2.engine.prefix_cache import (
    PrefixCache,
    TensorCache,
    common_prefix_length,
    weights_version,
)
from owl2.processing.prepared_prompt import pixel_digest
from tests.engine.conftest import ask, caching_engine, random_image

TOKENS = 8


@pytest.fixture
def cached(shared_engine):
    """An engine that caches even the shortest prefixes."""
    return caching_engine(shared_engine)


class Counter:
    """What an engine has computed since the last call."""

    def __init__(self, engine):
        self._engine = engine
        self._before = engine.stats()

    def __call__(self):
        before, self._before = self._before, self._engine.stats()
        return (
            self._before.num_prefill_tokens - before.num_prefill_tokens,
            self._before.num_encoded_images - before.num_encoded_images,
        )


@pytest.fixture
def count(cached):
    """A function: prompt tokens and images that were computed since its last call."""
    return Counter(cached)


def answers(engine, conversations):
    return [engine.chat(one, max_new_tokens=TOKENS) for one in conversations]


def num_tokens(engine, messages):
    return len(engine.encode(messages).ids)


def test_cached_answers_equal_uncached_ones(any_engine, conversations):
    expected, cached = answers(any_engine, conversations), caching_engine(any_engine)
    for _ in range(2):
        assert answers(cached, conversations) == expected
        assert cached.batch(conversations[::-1], max_new_tokens=TOKENS)[::-1] == expected
    streamed = ["".join(cached.stream(one, max_new_tokens=TOKENS)) for one in conversations]
    assert streamed == expected


def test_a_second_question_computes_only_its_own_tokens(shared_engine, cached, count):
    image = random_image(1)
    first, second = ask("what is this?", image), ask("what color is it?", image)
    cached.chat(first, max_new_tokens=2)
    assert count() == (num_tokens(cached, first), 1)
    expected = shared_engine.chat(second, max_new_tokens=TOKENS)
    assert cached.chat(second, max_new_tokens=TOKENS) == expected
    tokens, images = count()
    assert images == 0
    # The start token, "USER: ", the image and " what" at least are cached.
    assert tokens < num_tokens(cached, second) - 5


def test_the_prefix_cache_alone_saves_the_encoder(shared_engine):
    cached = caching_engine(shared_engine, image_cache_bytes=0)
    count = Counter(cached)
    for text, images, encoded in (
        ("what is this?", (1, 2), 2),
        ("and what color?", (1, 2), 0),
        ("and what color?", (1, 3), 1),
    ):
        cached.chat(ask(text, *map(random_image, images)), max_new_tokens=2)
        assert count()[1] == encoded


def test_the_image_cache_alone_saves_the_encoder(shared_engine):
    cached = caching_engine(shared_engine, prefix_cache_bytes=0)
    count = Counter(cached)
    cached.chat(ask("what is this?", random_image(1)), max_new_tokens=2)
    assert count()[1] == 1
    both = ask("red?", random_image(2), random_image(1))
    cached.batch([ask("no"), both], max_new_tokens=2)
    assert count()[1] == 1


def test_one_pixel_makes_another_image(shared_engine, cached, count):
    one, other = random_image(1, (8, 8)), random_image(1, (8, 8))
    other.putpixel((3, 3), tuple(255 - value for value in other.getpixel((3, 3))))
    questions = [ask("what?", one), ask("what?", other)]
    assert answers(cached, questions) == answers(shared_engine, questions)
    assert count()[1] == 2
    assert cached.score(questions[1], ["red"])[0] == pytest.approx(
        shared_engine.score(questions[1], ["red"])[0], abs=1e-5, rel=1e-6
    )
    assert cached.score(questions[0], ["red"]) != cached.score(questions[1], ["red"])


def test_conversation_of_four_turns(shared_engine, cached):
    def conversation(engine, count=lambda: None):
        messages, texts, counts = [], [], []
        for question in ("what is this?", "is it red?", "and now?", "no"):
            messages += ask(question, *([] if messages else [random_image(4)]))
            texts.append(engine.chat(messages, max_new_tokens=6))
            counts.append(count())
            messages.append({"role": "assistant", "content": texts[-1] or "no"})
        return texts, counts, num_tokens(engine, messages[:-1])

    expected, _, _ = conversation(shared_engine)
    texts, counts, length = conversation(cached, Counter(cached))
    assert texts == expected
    assert [images for _, images in counts] == [1, 0, 0, 0]
    assert counts[-1][0] < length / 2


@pytest.mark.parametrize("limit", [1, 3_000, 20_000])
def test_small_limits_evict_entries(shared_engine, conversations, limit):
    cached = caching_engine(shared_engine, prefix_cache_bytes=limit, image_cache_bytes=limit // 10)
    expected = answers(shared_engine, conversations)
    assert answers(cached, conversations) == expected
    assert cached.batch(conversations, max_new_tokens=TOKENS) == expected
    assert cached.stats().prefix_cache_bytes <= limit
    assert cached.stats().image_cache_bytes <= limit // 10


def test_scores_use_the_caches(shared_engine, cached, count, conversations):
    choices = ["red", "a blue circle", "no"]
    for messages in conversations[:4]:
        cached.chat(messages, max_new_tokens=2)
    count()
    for messages in conversations[:4]:
        for _ in range(2):
            assert cached.score(messages, choices) == pytest.approx(
                shared_engine.score(messages, choices), abs=1e-5, rel=1e-6
            )
    assert count()[1] == 0


@pytest.mark.parametrize(
    ("is_cached", "change"),
    [
        (False, "data"),
        (False, "step"),
        (False, "load"),
        (True, "step"),
        (True, "load"),
        (True, "clear"),
    ],
)
def test_answers_follow_changes_of_the_weights(engine, cached, conversations, is_cached, change):
    tested, question = cached if is_cached else engine, conversations[2]
    tested.chat(question, max_new_tokens=TOKENS)
    if change == "step":
        for weight in tested.model.parameters():
            weight.grad = torch.randn_like(weight) * 0.1
        torch.optim.SGD(tested.model.parameters(), lr=1.0).step()
    elif change == "load":
        state = tested.model.state_dict()
        tested.model.load_state_dict({name: 0.8 * state[name] for name in state})
    else:
        for weight in tested.model.model.vision_model.parameters():
            weight.data *= -1.5
        if change == "clear":
            tested.clear_cache()
    new = Engine(copy.deepcopy(tested.model), tested.processor)
    assert tested.score(question, ["red"]) == pytest.approx(new.score(question, ["red"]), rel=1e-6)
    assert tested.chat(question, max_new_tokens=TOKENS) == new.chat(question, max_new_tokens=TOKENS)


def test_an_answer_that_began_before_a_change_is_not_cached(cached, gate):
    """Its keys and values depend on the weights before and after the change."""
    cached.model.config.max_position_embeddings = 10_000
    gate.free_steps = 30
    stream = cached.stream(ask("what is this? " * 2), max_new_tokens=9_000)
    next(stream)
    assert gate.reached.wait(20)
    with torch.no_grad():
        cached.model.lm_head.weight *= 0.5
    gate.open()
    cached.chat(ask("no"), max_new_tokens=1)
    stream.close()
    cached.chat(ask("no"), max_new_tokens=1)
    assert len(cached.stats().prefix_cache_keys) == 1


def test_by_default_an_engine_of_a_model_caches_nothing(engine, conversations):
    engine.batch(conversations, max_new_tokens=2)
    stats = engine.stats()
    assert stats.prefix_cache_bytes == stats.image_cache_bytes == 0


# ------------------------------------------------------------------ units


SIZE = 2 * 2 * 4 * 4  # bytes of a position: keys and values of 2 layers, 4 floats each


def filled(limit, *keys, min_tokens=2):
    prefixes = PrefixCache(limit, min_tokens)
    for key in keys:
        prefixes.add(key, [torch.zeros(2, 1, len(key), 4) for _ in range(2)])
    return prefixes


def test_find_returns_the_longest_common_prefix():
    entries = (1, 2, 3, 4), (1, 2, b"a", b"a", 5), (9, 9)
    prefixes = filled(10_000, *entries)
    assert prefixes.find((1, 2, b"a", b"a", 7))[1] == 4
    assert prefixes.find((1, 2, b"b", b"b", 7))[1] == 2
    tensors, shared = prefixes.find((1, 2, 3, 4))
    assert (tensors, shared) == (prefixes.get((1, 2, 3, 4)), 3)  # one token is to be computed
    assert prefixes.find((9, 9)) == (None, 0)
    assert prefixes.find((1, 3, 3)) == (None, 0)


def test_find_equals_a_search_of_all_entries():
    rng = random.Random(0)
    cache = PrefixCache(60 * 4, min_tokens=3)
    for _ in range(2000):
        key = tuple(rng.choices(range(3), k=rng.randint(1, 7)))
        prefixes = [(common_prefix_length(key, old), old) for old in cache.cached_keys]
        longest = min(max((length for length, _ in prefixes), default=0), len(key) - 1)
        found, length = cache.find(key)
        assert length == (longest if longest >= 3 else 0)
        assert (found is None) == (length == 0)
        is_prefix = any(old[: len(key)] == key for old in cache.cached_keys)
        assert cache.accepts(key) == (len(key) >= 3 and not is_prefix)
        if rng.random() < 0.5:
            cache.add(key, [torch.zeros(len(key))])
        if rng.random() < 0.01:
            cache.clear()
    assert cache.bytes == 4 * sum(map(len, cache.cached_keys)) <= 240


def test_a_longer_entry_replaces_its_prefix():
    prefixes = filled(10_000, (1, 2, 3), (1, 2, 3, 4), (1, 2), (1, 2, 5))
    assert prefixes.cached_keys == [(1, 2, 3, 4), (1, 2, 5)]
    assert prefixes.bytes == SIZE * (4 + 3)


def test_the_least_recently_used_prefix_is_evicted():
    prefixes = filled(2 * 3 * SIZE, (1, 1, 1), (2, 2, 2), min_tokens=1)
    prefixes.find((1, 1, 5))
    for key in ((3, 3, 3), (4,) * 7):  # the second exceeds the limit
        prefixes.add(key, [torch.zeros(2, 1, len(key), 4) for _ in range(2)])
        assert prefixes.cached_keys == [(1, 1, 1), (3, 3, 3)]


def test_the_least_recently_used_image_is_evicted():
    images = TensorCache(100)
    for name in (b"a", b"b"):
        images.add(name, [torch.zeros(12)])
    images.get(b"a")
    images.add(b"c", [torch.zeros(12)])
    assert images.cached_keys == [b"a", b"c"]
    assert images.get(b"b") is None
    assert images.bytes == 96


def test_common_prefix_length():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        one, other = (
            tuple(torch.randint(0, 2, (int(length),), generator=generator).tolist())
            for length in torch.randint(0, 9, (2,), generator=generator)
        )
        slow = 0
        while slow < min(len(one), len(other)) and one[slow] == other[slow]:
            slow += 1
        assert common_prefix_length(one, other) == slow


def test_digests_and_weights_versions():
    pixels = torch.rand(3, 8, 8)
    changed = pixels.clone()
    changed[2, 7, 7] += 1e-6
    assert pixel_digest(pixels) == pixel_digest(pixels.clone()) != pixel_digest(changed)
    assert pixel_digest(pixels.bfloat16()) == pixel_digest(pixels.bfloat16().clone())
    model = torch.nn.Linear(2, 2)
    versions = [weights_version(model)]
    with torch.no_grad():
        model.weight += 1
    versions.append(weights_version(model))
    model.bias = torch.nn.Parameter(torch.ones(2))
    versions.append(weights_version(model))
    assert len(set(versions)) == 3
    assert weights_version(model) == versions[-1]
    with torch.inference_mode():
        weights_version(torch.nn.Linear(2, 2))
