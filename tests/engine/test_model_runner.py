"""The decode step against the model's own forward: golden models, both ways of computing it."""

import copy

import pytest
import torch
from owl2.engine.backends.cuda_graphs import CompiledStep, Graphs
from owl2.engine.backends.steps import NativeStep, TorchStep
from transformers import DynamicCache

from owl2 import Owl2ForConditionalGeneration
from owl2.engine.backends.weight_only_quantization import QuantizedLinear, quantize
from owl2.engine.model_runner import FastDecoder, KeyValues
from owl2.engine.prefill import Reader

pytestmark = pytest.mark.usefixtures("three_threads")
LENGTHS = [3, 7, 12]  # of the prompts, each in its own row


@pytest.fixture(params=["model_mha", "model_gqa", "two_heads", "no_mam"])
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
    elif name == "two_heads":  # as wide as the kernels need them for bfloat16
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, 32
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
    model = golden_models("two_heads")
    decoder, ids, exact = filled(model)
    del decoder
    decoder, ids, plain = filled(model.to(torch.bfloat16))
    assert isinstance(decoder.by, NativeStep)
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
    quantize(model, name)
    kinds = [type(module).__name__ for module in model.model.layers.modules()]
    assert "QuantizedLinear" in kinds
    assert isinstance(model.lm_head, QuantizedLinear)
    assert model.lm_head.bits == 8
    assert not any(isinstance(m, QuantizedLinear) for m in model.model.vision_model.modules())
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


def test_heads_that_the_kernels_do_not_take(golden_models):
    model = golden_models("model_wide")  # 8 wide
    decoder, ids, logits = filled(model)
    assert not decoder.takes_prompts
    torch.testing.assert_close(run(decoder, ids), expected(logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["model_mha", "model_gqa", "no_mam"])
@pytest.mark.parametrize("limit", [1, 1000], ids=["parts", "one call"])
def test_several_texts_at_once_are_the_forwards(golden_models, name, limit, monkeypatch):
    monkeypatch.setattr("owl2.engine.backends.native.ops.MOST_TOKENS", limit)
    model = golden_models(name)
    decoder, ids, logits = filled(model)
    rows = torch.cat([torch.full((20 - n,), row) for row, n in enumerate(LENGTHS)])
    positions = torch.cat([torch.arange(n, 20) for n in LENGTHS])
    mixed = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    rows, positions = rows[mixed], positions[mixed]
    last = torch.stack([((rows == r) & (positions == 19)).nonzero()[0, 0] for r in range(3)])
    with torch.no_grad():
        hidden = model.model.embed_tokens(ids[rows, positions])
    ours = decoder.fill(hidden, rows, positions, 0, last)
    torch.testing.assert_close(ours, logits[:, -1], atol=1e-4, rtol=0)
    # What it has kept is what steps would have: the next token follows.
    token = torch.tensor([5, 6, 7])
    with torch.no_grad():
        longer = model(input_ids=torch.cat([ids, token[:, None]], 1)).logits[:, -1]
    step = decoder.step(token, torch.full((3,), 20))
    torch.testing.assert_close(step, longer, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["model_mha", "model_gqa", "two_heads", "no_mam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_with_images_are_the_forwards(golden_models, name, dtype):
    exact = golden_models(name)
    model = golden_models(name).to(dtype)
    image, places = exact.config.image_token_id, exact.config.num_image_tokens
    chance = torch.Generator().manual_seed(2)
    words = torch.randint(3, 90, (40,), generator=chance).tolist()
    image = [image] * places
    prompts = [
        ([*words[:5], *image, *words[5:9]], 1),
        (words[9:21], 0),
        ([*image, words[21], *image], 2),
    ]
    size = exact.config.image_size
    pixels = [torch.randn(n, 3, size, size, generator=chance) if n else None for _, n in prompts]
    expected, plain = [], []
    for made, whose in ((expected, exact), (plain, model)):
        for (ids, _), own in zip(prompts, pixels, strict=True):
            with torch.no_grad():
                given = None if own is None else own.to(whose.dtype)
                made.append(whose(torch.tensor([ids]), given).logits[0, -1].float())
    reader = Reader(model, 0, 0)
    begun = [reader.begin(ids, own) for (ids, _), own in zip(prompts, pixels, strict=True)]
    decoder = FastDecoder(model)
    with torch.no_grad():
        ours = reader.read(begun, decoder, 1).float()
    if dtype == torch.float32:
        assert decoder.takes_prompts
        torch.testing.assert_close(ours, torch.stack(expected), atol=1e-4, rtol=0)
        return
    ours_off, theirs_off = (
        (got - torch.stack(expected)).abs().mean() for got in (ours, torch.stack(plain))
    )
    assert 0 < ours_off < 1.2 * theirs_off


def test_weights_of_two_dtypes_are_not_read_as_one(golden_models):
    model = golden_models("model_mha")
    _, _, logits = filled(model)
    decoder, ids, _ = filled(model)
    down = model.model.layers[0].mlp.down_proj.to(torch.float64)
    down.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    down.register_forward_hook(lambda module, inputs, output: output.float())
    torch.testing.assert_close(run(decoder, ids, 2), expected(logits, 2), atol=1e-4, rtol=0)
