"""The scheduler without a model: the chunks of prompts in each step."""

import math

import torch

from owl2.engine.prefix_cache import PrefixCache, TensorCache
from owl2.engine.prompt_state import PromptState
from owl2.engine.sampling_params import SamplingParams
from owl2.engine.scheduler import Request, Scheduler
from owl2.processing.prepared_prompt import PreparedPrompt

IMAGE_TOKEN, NUM_IMAGE_TOKENS = 40, 3
IMAGE = [IMAGE_TOKEN] * NUM_IMAGE_TOKENS
GREEDY = SamplingParams()
TOKENS = 6


def make_prompt(ids, num_images=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(num_images, 3, 8, 8, generator=generator) if num_images else None
    return PreparedPrompt.from_ids(ids, pixels, IMAGE_TOKEN, NUM_IMAGE_TOKENS)


def text_ids(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 40, (count,), generator=generator).tolist()


def make_request(prompt, index=0, max_tokens=TOKENS):
    return Request(PromptState(prompt), GREEDY, max_tokens, (), torch.device("cpu"), index)


class Simulation:
    """A scheduler whose chunks are computed without a model.

    Attributes:
        finished: The step in which each prompt was complete.
    """

    def __init__(self, budget, min_prefix_tokens=4, max_num_seqs=100):
        self.prefixes = PrefixCache(2**20, min_prefix_tokens)
        self.scheduler = Scheduler(self.prefixes, TensorCache(0), budget)
        self.max_num_seqs = max_num_seqs
        self.running = []
        self.finished = {}
        self.steps = 0

    def submit(self, *prompts):
        requests = [make_request(prompt) for prompt in prompts]
        self.scheduler.add(requests)
        return requests[0].prompt if len(requests) == 1 else [one.prompt for one in requests]

    def step(self):
        self.steps += 1
        requests, chunks = self.scheduler.schedule(
            self.running, lambda count, _: count <= self.max_num_seqs, self.store_prefix
        )
        for request in requests:
            request.is_prefilling = True
            self.running.append(request)
        tokens = 0
        for prompt, end, images in chunks:
            tokens += end - prompt.num_computed_tokens
            for index in images:
                prompt.image_embeddings[index] = torch.zeros(0)
            prompt.num_computed_tokens = end
            if not prompt.num_new_tokens:
                self.finished[prompt] = self.steps
                self.store_prefix(prompt, end)
        self.running = [one for one in self.running if one.prompt.num_new_tokens]
        return tokens, chunks

    def store_prefix(self, prompt, length):
        self.prefixes.add(prompt.key[:length], [torch.zeros(2, 1, length, 1)])


def test_a_long_prompt_gets_half_of_the_budget():
    simulation = Simulation(budget=16)
    long = simulation.submit(make_prompt(text_ids(100, 1)))
    for number in range(13):
        simulation.submit(*(make_prompt(text_ids(8, 10 * number + i)) for i in range(3)))
        tokens, _ = simulation.step()
        assert tokens == 16
    assert simulation.finished[long] == math.ceil(100 / 8)
    while simulation.scheduler.waiting or simulation.running:
        simulation.step()
    assert len(simulation.finished) == 40


def test_equal_prompts_are_complete_in_the_order_of_arrival():
    simulation = Simulation(budget=10)
    prompts = simulation.submit(*(make_prompt(text_ids(20, seed)) for seed in range(6)))
    while len(simulation.finished) < 6:
        simulation.step()
    assert [simulation.finished[prompt] for prompt in prompts] == sorted(
        simulation.finished[prompt] for prompt in prompts
    )
    assert simulation.steps == 12


def test_decoding_requests_take_their_part_of_the_budget():
    for count, expected in ((5, 35), (35, 10)):
        prompt = make_prompt(text_ids(90, count))
        running = [make_request(make_prompt([1, 2])) for _ in range(count)]
        scheduler = Simulation(budget=40).scheduler
        scheduler.add([make_request(prompt)])
        _, [chunk] = scheduler.schedule(running, lambda *_: True, lambda *_: None)
        assert chunk.end == expected


def test_images_are_encoded_as_the_budget_allows():
    simulation = Simulation(budget=8)
    prompt = simulation.submit(make_prompt([1, *IMAGE, 2, *IMAGE, *IMAGE, 3], 3))
    images = []
    while prompt not in simulation.finished:
        _, [chunk] = simulation.step()
        images.append(list(chunk.images))
    # A token, an image twice, a token; the second image is encoded one step before its tokens.
    assert images == [[0], [1, 2], [2]]


def test_an_image_larger_than_the_budget():
    simulation = Simulation(budget=2)
    prompt = simulation.submit(make_prompt([*IMAGE, 3], 1))
    for _ in range(3):
        simulation.step()
    assert simulation.finished == {prompt: 3}


def test_a_prompt_waits_only_for_the_prefix_that_it_shares():
    simulation = Simulation(budget=10)
    shared = text_ids(12)
    first = simulation.submit(make_prompt([*shared, *text_ids(60, 1)]))
    second = simulation.submit(make_prompt([*shared, 38, 38, 38]))
    other = simulation.submit(make_prompt(text_ids(4, 9)))
    simulation.step()
    assert simulation.finished == {other: 1}
    assert second.num_computed_tokens == 0
    assert first.num_computed_tokens == 6
    simulation.step()
    simulation.step()
    assert second.num_computed_tokens >= 12 > 0
    assert simulation.finished[second] == 3
    assert first not in simulation.finished


def test_short_prompts_do_not_delay_a_prefix_that_the_first_prompt_waits_for():
    simulation = Simulation(budget=16)
    shared = text_ids(60)
    first, second = (make_request(make_prompt([*shared, one])) for one in (38, 39))
    simulation.scheduler.add([first])
    simulation.step()
    first.prompt.arrival, second.prompt.arrival = 3, 2  # as after a restart of the second
    simulation.scheduler.add([second])
    for number in range(8):
        simulation.submit(*(make_prompt(text_ids(8, 10 * number + i)) for i in range(3)))
        simulation.step()
    assert {first.prompt, second.prompt} <= simulation.finished.keys()


def test_no_request_overtakes_one_that_does_not_fit():
    simulation = Simulation(budget=50, max_num_seqs=2)
    prompts = simulation.submit(*(make_prompt(text_ids(60 - 9 * i, i)) for i in range(4)))
    _, chunks = simulation.step()
    assert {chunk.prompt for chunk in chunks} == set(prompts[:2])
