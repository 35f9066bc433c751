"""Decode steps and prefill equal the model's own forward, with golden models and other shapes."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from owl2 import Owl2ForConditionalGeneration
from owl2.checkpoints.hf_quantizer import quantize_model
from owl2.engine.backends.native import ops
from owl2.engine.backends.weight_only_quantization import QuantizedLinear
from owl2.engine.kv_cache import StaticKVCache
from owl2.engine.model_runner import ModelRunner
from owl2.engine.prompt_state import PromptChunk, PromptState
from owl2.engine.running_batch import RunningBatch
from owl2.processing.prepared_prompt import PreparedPrompt

pytestmark = pytest.mark.usefixtures("three_threads")
LENGTHS = [3, 7, 12]  # of the prompts, each in its own row
GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(params=["model_mha", "model_gqa", "two_heads", "no_mam", "norms", "keys_values"])
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
    if (GOLDEN / name).exists():
        return Owl2ForConditionalGeneration.from_pretrained(
            GOLDEN / name, dtype=torch.float32
        ).eval()
    config = Owl2ForConditionalGeneration.from_pretrained(
        GOLDEN / "model_mha", dtype=torch.float32
    ).config
    if name == "model_gqa":
        config.num_key_value_heads = 1
    elif name == "two_heads":  # the kernels need this width for bfloat16
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, 32
    elif name == "no_mam":
        config.use_mam = False
    else:
        norms, projections = config.mam_module_names[:2], config.mam_module_names[2:]
        config.mam_modules = norms if name == "norms" else projections
    torch.manual_seed(0)
    return Owl2ForConditionalGeneration(config).eval()


def filled(model, use_kernels=None):
    """A runner with three prompts in its rows, the ids of the rows, and all logits."""
    runner = ModelRunner(model)
    if use_kernels is not None:
        runner.uses_cpu_kernels = use_kernels
    ids = torch.randint(3, 90, (3, 20), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(LENGTHS):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids[row : row + 1, :length], past_key_values=cache, use_cache=True)
        runner.cache.reserve(3, length)
        layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
        runner.cache.write(row, layers)
    with torch.no_grad():
        return runner, ids, model(input_ids=ids).logits


def decode(runner, ids, steps=6):
    """Logits of the steps after each row's prompt: (3, steps, V)."""
    logits = []
    for step in range(steps):
        positions = torch.tensor(LENGTHS) + step
        logits.append(runner.decode(ids[torch.arange(3), positions], positions))
    return torch.stack(logits, 1)


def expected(logits, steps=6):
    return torch.stack([logits[row, n : n + steps] for row, n in enumerate(LENGTHS)])


@pytest.mark.parametrize(
    ("use_kernels", "attention"), [(False, "sdpa"), (False, "eager"), (True, "sdpa")]
)
def test_decode_equals_the_forward(model, use_kernels, attention):
    model.set_attn_implementation(attention)
    runner, ids, logits = filled(model, use_kernels)
    torch.testing.assert_close(decode(runner, ids), expected(logits), atol=1e-4, rtol=0)


def test_bfloat16_is_as_close_to_float32_as_the_forward(golden_models):
    model = golden_models("two_heads")
    exact = filled(model)[2]
    runner, ids, plain = filled(model.to(torch.bfloat16))
    assert runner.uses_cpu_kernels
    ours = (decode(runner, ids).float() - expected(exact)).abs().mean()
    theirs = (expected(plain).float() - expected(exact)).abs().mean()
    assert 0 < ours < 1.2 * theirs


def test_weights_are_read_in_place(golden_models):
    model = golden_models("model_mha")
    runner, ids, _ = filled(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    logits = filled(model)[2]
    torch.testing.assert_close(decode(runner, ids, 1), expected(logits, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "bound"), [("8bit", 0.02), ("4bit", 0.25)])
def test_quantized_logits_are_close(golden_models, name, bound):
    model = golden_models("model_wide")
    unquantized = expected(filled(model)[2])
    quantize_model(model, name)
    assert any(isinstance(module, QuantizedLinear) for module in model.model.layers.modules())
    assert isinstance(model.lm_head, QuantizedLinear)
    assert model.lm_head.bits == 8
    vision = model.model.vision_model.modules()
    assert not any(isinstance(module, QuantizedLinear) for module in vision)
    runner, ids, plain = filled(model)
    ours = decode(runner, ids)
    scale = unquantized.std()
    assert (ours - expected(plain)).abs().max() < 2e-3 * scale
    assert (ours - unquantized).abs().mean() < bound * scale


def test_the_cache_grows_and_keeps_its_content():
    cache = StaticKVCache(2, 3, 4, torch.float32, torch.device("cpu"))
    cache.reserve(1, 5)
    layers = [torch.randn(2, 3, 5, 4) for _ in range(2)]
    cache.write(0, layers)
    cache.reserve(3, 300)
    _, rows, _, capacity, _ = cache.layers[1].shape
    assert rows >= 3
    assert capacity >= 300
    cache.copy_row(0, 2, 5)
    for row in (0, 2):
        assert all(map(torch.equal, cache.read(row, 5), layers))
    assert cache.position_bytes == 2 * 2 * 3 * 4 * 4


def test_heads_that_the_kernels_do_not_support(golden_models):
    model = golden_models("model_wide")  # heads of width 8
    runner, ids, logits = filled(model)
    assert not runner.uses_cpu_kernels
    torch.testing.assert_close(decode(runner, ids), expected(logits), atol=1e-4, rtol=0)


def prefill(model, prompts, first_row=0, use_kernels=True):
    """Logits after (ids, pixel_values) prompts, and the runner that computed them."""
    config = model.config
    states = [
        PromptState(
            PreparedPrompt.from_ids(ids, own, config.image_token_id, config.num_image_tokens)
        )
        for ids, own in prompts
    ]
    batch = RunningBatch(model, 0, 0)
    batch.runner.uses_cpu_kernels &= use_kernels
    return batch.prefill(states, first_row), batch.runner


@pytest.mark.parametrize("name", ["model_mha", "model_gqa", "no_mam"])
@pytest.mark.parametrize("limit", [1, 1000], ids=["operations", "one call"])
def test_prefill_of_text_equals_the_forward(golden_models, name, limit, monkeypatch):
    monkeypatch.setattr("owl2.engine.backends.native.ops.MAX_TOKENS", limit)
    model = golden_models(name)
    _, ids, logits = filled(model)
    rows = [ids[row, : n + 5].tolist() for row, n in enumerate(LENGTHS)]
    ours, runner = prefill(model, [(row, None) for row in rows])
    last = torch.stack([logits[row, n + 4] for row, n in enumerate(LENGTHS)])
    torch.testing.assert_close(ours, last, atol=1e-4, rtol=0)
    # The cache has what decode steps need.
    positions = torch.tensor(LENGTHS) + 5
    step = runner.decode(ids[torch.arange(3), positions], positions)
    next_logits = logits[torch.arange(3), positions]
    torch.testing.assert_close(step, next_logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("is_fast", [False, True])
def test_a_long_prompt_is_one_call_if_the_kernels_are_fast(golden_models, is_fast, monkeypatch):
    def is_fast_for(count, dtype):
        return is_fast or count <= ops.MAX_TOKENS

    calls, run = [], ops.decoder_layers
    monkeypatch.setattr(ops, "is_fast", is_fast_for)
    monkeypatch.setattr(ops, "decoder_layers", lambda *args: calls.append(args) or run(*args))
    exact = golden_models("two_heads")
    model = golden_models("two_heads").to(torch.bfloat16)
    ids = torch.randint(3, 90, (ops.MAX_TOKENS + 30,), generator=torch.Generator().manual_seed(0))
    ours, _ = prefill(model, [(ids.tolist(), None)])
    assert len(calls) == is_fast
    with torch.no_grad():
        expected = exact(input_ids=ids[None], logits_to_keep=1).logits[0]
    error = (ours.float() - expected).abs().max() / expected.abs().max()
    assert error < 2e-2


@pytest.mark.parametrize("use_kernels", [False, True], ids=["torch", "native"])
@pytest.mark.parametrize("name", ["model_mha", "model_gqa", "two_heads", "no_mam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_with_images_equals_the_forward(golden_models, name, dtype, use_kernels):
    exact = golden_models(name)
    model = golden_models(name).to(dtype)
    image = [exact.config.image_token_id] * exact.config.num_image_tokens
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(3, 90, (40,), generator=generator).tolist()
    size = exact.config.image_size

    def pixels(count):
        return torch.randn(count, 3, size, size, generator=generator)

    prompts = [
        ([*text[:5], *image, *text[5:9]], pixels(1)),
        (text[9:21], None),
        ([*image, text[21], *image], pixels(2)),
    ]
    references = []
    for reference in (exact, model):
        rows = []
        for ids, own in prompts:
            with torch.no_grad():
                images = None if own is None else own.to(reference.dtype)
                rows.append(reference(torch.tensor([ids]), images).logits[0, -1].float())
        references.append(torch.stack(rows))
    logits, runner = prefill(model, prompts, first_row=1, use_kernels=use_kernels)
    ours = logits.float()
    if dtype == torch.float32:
        assert runner.uses_cpu_kernels == use_kernels
        torch.testing.assert_close(ours, references[0], atol=1e-4, rtol=0)
        return
    our_error, plain_error = ((row - references[0]).abs().mean() for row in (ours, references[1]))
    assert 0 < our_error < 1.2 * plain_error


def test_weights_of_two_dtypes(golden_models):
    model = golden_models("model_mha")
    logits = filled(model)[2]
    runner, ids, _ = filled(model)
    down = model.model.layers[0].mlp.down_proj.to(torch.float64)
    down.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    down.register_forward_hook(lambda module, inputs, output: output.float())
    torch.testing.assert_close(decode(runner, ids, 2), expected(logits, 2), atol=1e-4, rtol=0)


def test_a_prompt_computed_alone_does_not_enlarge_the_cache_of_the_batch(golden_models):
    model = golden_models("model_mha")
    batch = RunningBatch(model, 0, 0)
    short, long = (PromptState(PreparedPrompt((5,) * length, None, (), ())) for length in (9, 90))
    batch.prefill([short], first_row=0)
    before = [layer.clone() for layer in batch.runner.cache.layers]
    steps = batch.prefill_alone(
        long, lambda prompt: PromptChunk(prompt, prompt.num_computed_tokens + 45)
    )
    next(steps)
    with pytest.raises(StopIteration) as end:
        next(steps)
    output = end.value.value
    assert output.cache.get_seq_length() == 90
    assert all(map(torch.equal, batch.runner.cache.layers, before))


def replace_layer(layers):
    layers[1] = copy.deepcopy(layers[1])
    layers[1].mlp.up_proj.weight.data.neg_()


def replace_parameter(layers):
    linear = layers[1].mlp.gate_proj
    linear.weight = torch.nn.Parameter(-linear.weight)


def replace_data(layers):
    weight = layers[1].self_attn.o_proj.weight
    weight.data = -weight.data


def replace_linear(layers):
    mlp = layers[1].mlp
    mlp.down_proj = QuantizedLinear(mlp.down_proj, 8)


def replace_norms(layers):
    layer = layers[1]
    layer.multiway = copy.deepcopy(layer.multiway)
    for parameter in layer.multiway.parameters():
        parameter.data.neg_()


def wrap_linear(layers):
    mlp = layers[1].mlp
    mlp.up_proj = torch.nn.Sequential(mlp.up_proj, torch.nn.Tanh())


@pytest.mark.parametrize(
    "change",
    [replace_layer, replace_parameter, replace_data, replace_linear, replace_norms, wrap_linear],
)
@torch.no_grad()
def test_runner_uses_the_current_modules(golden_models, change):
    model = golden_models("two_heads")
    runner = ModelRunner(model)
    tokens, positions = torch.tensor([5]), torch.tensor([0])
    before = runner.decode(tokens, positions)
    change(model.model.layers)
    after = runner.decode(tokens, positions)
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(after, ModelRunner(model).decode(tokens, positions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_the_kernels_does_not_depend_on_the_other_rows(golden_models, dtype):
    model = golden_models("two_heads").to(dtype)
    runner, ids, _ = filled(model)
    if not runner.uses_cpu_kernels:  # no compiler on this machine
        return
    tokens, positions = ids[range(3), LENGTHS], torch.tensor(LENGTHS)
    together = runner.decode(tokens, positions)
    for row, length in enumerate(LENGTHS):
        alone = ModelRunner(model)
        alone.cache.reserve(1, length)
        alone.cache.write(0, runner.cache.read(row, length))
        logits = alone.decode(tokens[row : row + 1], positions[row : row + 1])
        assert torch.equal(logits[0], together[row])
