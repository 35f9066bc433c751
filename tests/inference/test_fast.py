"""The decode step against the model's own forward: golden models, both ways of computing it."""

import copy

import pytest
import torch
from transformers import DynamicCache

from owl2 import Owl2ForConditionalGeneration
from owl2.inference.fast import FastDecoder, KeyValues
from owl2.inference.graphs import CompiledStep, Graphs
from owl2.inference.quantised import QuantisedLinear, quantise
from owl2.inference.steps import NativeStep, TorchStep

LENGTHS = [3, 7, 12]  # of the prompts, each in its own row


@pytest.fixture(params=["model_mha", "model_gqa", "model_wide", "no_mam"])
def model(request, golden_models):
    return golden_models(request.param)


@pytest.fixture(scope="module")
def golden_models():
    """Small models by name: golden weights, and shapes that they do not have."""
    kept = {}

    def make(name):
        if name not in kept:
            kept[name] = small_model(name)
        return copy.deepcopy(kept[name])

    return make


def small_model(name):
    from pathlib import Path

    golden = Path(__file__).parent.parent / "golden" / name
    if golden.exists():
        return Owl2ForConditionalGeneration.from_pretrained(golden, dtype=torch.float32).eval()
    config = Owl2ForConditionalGeneration.from_pretrained(
        golden.with_name("model_mha"), dtype=torch.float32
    ).config
    if name == "model_gqa":
        config.num_key_value_heads = 1
    else:
        config.use_mam = False
    torch.manual_seed(0)
    return Owl2ForConditionalGeneration(config).eval()


def filled(model, step=None):
    """A decoder with three prompts in its rows, the rows' ids, and all logits."""
    decoder = FastDecoder(model)
    decoder.by = step or decoder.by
    ids = torch.randint(3, 90, (3, 20), generator=torch.Generator().manual_seed(0))
    decoder.cache.reserve(3, 1)
    for row, length in enumerate(LENGTHS):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids[row : row + 1, :length], past_key_values=cache, use_cache=True)
        decoder.cache.reserve(3, length)
        keys = [layer.keys[0] for layer in cache.layers]
        decoder.cache.put(row, keys, [layer.values[0] for layer in cache.layers])
    with torch.no_grad():
        return decoder, ids, model(input_ids=ids).logits


def run(decoder, ids, steps=6):
    """Logits of the steps after each row's prompt: (3, steps, V)."""
    made = []
    for step in range(steps):
        positions = torch.tensor(LENGTHS) + step
        made.append(decoder.step(ids[torch.arange(3), positions], positions))
    return torch.stack(made, 1)


def expected(logits, steps=6):
    return torch.stack([logits[row, n : n + steps] for row, n in enumerate(LENGTHS)])


@pytest.mark.parametrize("step", [TorchStep(), NativeStep()], ids=["torch", "native"])
def test_steps_are_the_forwards(model, step):
    decoder, ids, logits = filled(model, step)
    torch.testing.assert_close(run(decoder, ids), expected(logits), atol=1e-4, rtol=0)


def test_bfloat16_is_as_close_to_float32_as_the_plain_model(golden_models):
    model = golden_models("model_wide")
    decoder, ids, exact = filled(model)
    del decoder
    decoder, ids, plain = filled(model.to(torch.bfloat16))
    ours = (run(decoder, ids).float() - expected(exact)).abs().mean()
    theirs = (expected(plain).float() - expected(exact)).abs().mean()
    assert 0 < ours < 1.2 * theirs


def test_weights_are_read_where_they_are(golden_models):
    model = golden_models("model_mha")
    decoder, ids, _ = filled(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    _, _, logits = filled(model)
    torch.testing.assert_close(run(decoder, ids, 1), expected(logits, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "bound"), [("8bit", 0.02), ("4bit", 0.25)])
def test_fewer_bits_are_near(golden_models, name, bound):
    model = golden_models("model_wide")
    whole = expected(filled(model)[2])
    quantise(model, name)
    kinds = [type(module).__name__ for module in model.model.layers.modules()]
    assert "QuantisedLinear" in kinds
    assert isinstance(model.lm_head, QuantisedLinear)
    assert model.lm_head.bits == 8
    assert not any(isinstance(m, QuantisedLinear) for m in model.model.vision_model.modules())
    decoder, ids, plain = filled(model)
    ours = run(decoder, ids)
    # The step and the forward have the same weights; these are near the whole ones.
    scale = whole.std()
    assert (ours - expected(plain)).abs().max() < 2e-3 * scale
    assert (ours - whole).abs().mean() < bound * scale


def test_the_cache_grows_and_keeps_what_it_has():
    cache = KeyValues(2, 3, 4, torch.float32, torch.device("cpu"))
    cache.reserve(1, 5)
    parts = [torch.randn(3, 5, 4) for _ in range(4)]
    cache.put(0, parts[:2], parts[2:])
    cache.reserve(3, 300)
    assert cache.rows >= 3
    assert cache.capacity >= 300
    cache.move(0, 2, 5)
    for row in (0, 2):
        keys, values = cache.take(row, 5)
        for ours, given in zip(keys + values, parts, strict=True):
            assert torch.equal(ours, given)
    assert cache.position_bytes == 2 * 2 * 3 * 4 * 4


def test_a_compiled_step_is_not_compiled_again_as_sequences_grow(golden_models):
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = golden_models("model_mha")
    decoder, ids, logits = filled(model, CompiledStep(backend=backend))
    torch.testing.assert_close(run(decoder, ids, 2), expected(logits, 2), atol=1e-4, rtol=0)
    compiled = len(made)
    assert compiled
    for position in range(14, 20):  # all three rows, longer and longer
        decoder.step(ids[:, position], torch.full((3,), position))
    assert len(made) == compiled


@pytest.mark.slow  # a compiler at work
def test_compiled_steps_are_the_forwards(golden_models):
    torch._dynamo.reset()
    decoder, ids, logits = filled(golden_models("model_gqa"), CompiledStep())
    torch.testing.assert_close(run(decoder, ids), expected(logits), atol=1e-4, rtol=0)


def test_what_cannot_be_compiled_runs_all_the_same(golden_models, capsys):
    def backend(graph, inputs):
        raise RuntimeError("no compiler here\nand more")

    torch._dynamo.reset()
    decoder, ids, logits = filled(golden_models("model_mha"), CompiledStep(backend=backend))
    torch.testing.assert_close(run(decoder, ids, 2), expected(logits, 2), atol=1e-4, rtol=0)
    said = capsys.readouterr().err
    assert said.startswith("owl2: not compiled, so slower: ")
    assert said.count("\n") == 1


def test_graphs_are_recorded_for_few_sizes():
    graphs = Graphs(lambda tokens, positions, length: tokens)
    assert [graphs.sizes(batch, 10, 4096)[0] for batch in (1, 2, 3, 16, 17)] == [1, 2, 4, 16, 32]
    assert [graphs.sizes(1, length, 700)[1] for length in (1, 256, 257, 650)] == [
        256,
        256,
        512,
        700,
    ]


@pytest.mark.parametrize("name", ["model_mha", "model_gqa", "no_mam"])
def test_a_short_text_is_a_step(golden_models, name):
    model = golden_models(name)
    decoder, ids, logits = filled(model)
    assert decoder.several > 1
    for row, start in enumerate(LENGTHS):
        ours = decoder.extend(row, ids[row, start:], start)
        torch.testing.assert_close(ours[0], logits[row, -1], atol=1e-4, rtol=0)
    # What it has kept is what steps would have: the next token follows.
    position = ids.shape[1]
    token = torch.tensor([5, 6, 7])
    with torch.no_grad():
        longer = model(input_ids=torch.cat([ids, token[:, None]], 1)).logits[:, -1]
    step = decoder.step(token, torch.full((3,), position))
    torch.testing.assert_close(step, longer, atol=1e-4, rtol=0)


def test_weights_of_two_dtypes_are_not_read_as_one(golden_models):
    model = golden_models("model_mha")
    _, _, logits = filled(model)
    decoder, ids, _ = filled(model)
    down = model.model.layers[0].mlp.down_proj.to(torch.float64)
    down.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    down.register_forward_hook(lambda module, inputs, output: output.float())
    torch.testing.assert_close(run(decoder, ids, 2), expected(logits, 2), atol=1e-4, rtol=0)
