"""MAM: each token uses the weights of its modality, and text never uses the visual weights."""

import re

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from owl2.checkpoints.hf_quantizer import quantize_model
from owl2.checkpoints.weight_names import module_name, released_name
from owl2.errors import ErrorCode
from owl2.model.modality import TEXT, VISUAL, Multiway, Routing
from owl2.model.variants import as_no_mam, with_separate_modules
from tests.errors import raises_input_error
from tests.model.conftest import make_modalities_differ
from tests.tiny import MEMBERS, PARTIAL_MAM, make_config, make_model

MULTIWAY = ("input_layernorm", "post_attention_layernorm", "self_attn.k_proj", "self_attn.v_proj")
LINEAR = "linear"
MODALITY = re.compile(r"\.multiway\.[01]\.")


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def visual_weights(model):
    return {n: p for n, p in model.named_parameters() if ".multiway.1." in n}


def spoil(model):
    """Set the visual weights to NaN, so that every result that depends on them is NaN."""
    with torch.no_grad():
        for weight in visual_weights(model).values():
            weight.fill_(torch.nan)


def test_each_token_uses_the_weights_of_its_modality():
    torch.manual_seed(0)
    multiway = Multiway(linear=lambda: nn.Linear(4, 6))
    states = torch.randn(2, 5, 4)
    types = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 1]])
    shapes = []
    for linear in multiway.pair(LINEAR):  # DeepSpeed has such hooks
        linear.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    mixed = [multiway(LINEAR, states, Routing.of(types, masked=masked)) for masked in (False, True)]
    assert shapes == [(5, 4), (5, 4), (2, 5, 4), (2, 5, 4)]
    for row in range(2):
        for place in range(5):
            expected = multiway[types[row, place]][LINEAR](states[row, place])
            for found in mixed:
                torch.testing.assert_close(found[row, place], expected)


@pytest.mark.parametrize("visual", [None, 4])
def test_split_and_join_with_gradients(visual):
    """Compared with indexing by a mask: values, order within a modality, gradients."""
    types = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]])
    states = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    routing = Routing.of(types, visual)
    assert routing.sizes == (6, 4)
    for part, wanted in zip(routing.split(states), (TEXT, VISUAL), strict=True):
        assert torch.equal(part, states[types == wanted])
    assert torch.equal(routing.join(routing.split(states), 2), states)

    def mixed(states):
        text, images = routing.split(states)
        return routing.join((text.sin(), images.exp()), 2)

    def masked(states):
        return torch.where(types[..., None] == VISUAL, states.exp(), states.sin())

    weights = torch.randn_like(states)
    found = torch.autograd.grad((mixed(states) * weights).sum(), states)
    expected = torch.autograd.grad((masked(states) * weights).sum(), states)
    assert torch.equal(*found, *expected)


def test_decoder_layer_equals_its_modules(tiny):
    """Splitting the tokens once gives the keys, values and gradients of separate projections."""
    attention = tiny.model.layers[0].self_attn
    routing = Routing.of(torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]]))
    found = []
    for at_once in (True, False):
        tiny.zero_grad()
        states = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(5))
        states.requires_grad_()
        for name in ("k_proj", "v_proj"):
            if at_once:
                projected = attention.multiway(name, states, routing, routing.split(states))
            else:
                rows = [
                    attention.multiway[m][name](token)
                    for token, m in zip(states.flatten(0, 1), [0, 1, 1, 0, 0, 0, 1, 1], strict=True)
                ]
                projected = torch.stack(rows).view(2, 4, -1)
            projected.square().sum().backward()
        found.append([states.grad, *(p.grad for p in attention.multiway.parameters())])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_batches_of_one_modality():
    multiway = Multiway(linear=lambda: nn.Linear(4, 4))
    states = torch.randn(2, 3, 4)
    with torch.no_grad():
        assert Routing.of(torch.zeros(2, 3, dtype=torch.long)) is None
    text, visual = multiway.pair(LINEAR)
    assert torch.equal(multiway(LINEAR, states), text(states))
    routing = Routing.of(torch.ones(2, 3, dtype=torch.long))
    torch.testing.assert_close(multiway(LINEAR, states, routing), visual(states))


def test_gradients_of_a_modality_come_from_its_tokens():
    multiway = Multiway(linear=lambda: nn.Linear(4, 4, bias=False))
    states = torch.randn(1, 4, 4)
    routing = Routing.of(torch.tensor([[0, 1, 0, 1]]))
    multiway(LINEAR, states, routing)[0, [0, 2]].sum().backward()
    text, visual = multiway.pair(LINEAR)
    assert text.weight.grad.abs().sum() > 0
    assert visual.weight.grad.abs().sum() == 0


def test_visual_weights_start_as_copies():
    state = make_model(attention_bias=True).state_dict()
    visual = [name for name in state if ".multiway.1." in name]
    assert len(visual) == 2 * (4 + 2)  # two layers: two norms, K and V with their biases
    for name in visual:
        text = state[name.replace(".multiway.1.", ".multiway.0.")]
        assert torch.equal(state[name], text), name
        assert state[name].data_ptr() != text.data_ptr()


def test_weights_with_released_names_load_into_a_wrapper(tiny):
    """As FSDP, DDP and other modules contain the model. The metadata of torch is kept."""
    state = {f"module.{released_name(n)}": t + 1 for n, t in tiny.state_dict().items()}
    assert any(".multiway.1.weight" in name for name in state)
    wrapper = nn.ModuleDict({"module": tiny})
    wrapper.load_state_dict(state)
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(tensor, state[f"module.{released_name(name)}"])
    seen = {}
    tiny.norm = nn.Linear(1, 1)
    tiny.norm._version = 7
    tiny.norm.register_load_state_dict_pre_hook(lambda _, __, ___, own, *____: seen.update(own))
    tiny.load_state_dict(tiny.state_dict())
    assert seen == {"version": 7}


def test_names_of_multiway_weights():
    names = list(make_model().state_dict())
    multiway = {released_name(n).split(".multiway.")[0] for n in names if ".multiway." in n}
    assert multiway == {f"model.layers.{i}.{module}" for i in range(2) for module in MULTIWAY}
    assert [module_name(released_name(name)) for name in names] == names


def test_text_never_uses_visual_weights(tiny):
    ids = torch.tensor([[1, 5, 9, 11]])
    before = logits(tiny, input_ids=ids)
    spoil(tiny)
    assert torch.equal(logits(tiny, input_ids=ids), before)


def test_images_use_visual_weights(tiny, image_inputs):
    spoil(tiny)
    assert logits(tiny, **image_inputs).isnan().any()


@pytest.mark.parametrize("with_types", [True, False])
def test_decoding_after_an_image_never_uses_visual_weights(tiny, image_inputs, with_types):
    if with_types:
        types = (image_inputs["input_ids"] == 40).long()
        image_inputs["mm_token_type_ids"] = types
    new = torch.tensor([[3], [17], [4]])
    complete = image_inputs | {
        "input_ids": torch.cat([image_inputs["input_ids"], new.T], dim=1),
    }
    if with_types:
        complete["mm_token_type_ids"] = torch.cat([types, torch.zeros(1, 3).long()], dim=1)
    expected = logits(tiny, **complete)[:, -3:]
    with torch.no_grad():
        cache = tiny(**image_inputs, use_cache=True).past_key_values
    spoil(tiny)
    for step, token in enumerate(new):
        extra = {"mm_token_type_ids": torch.zeros(1, 1).long()} if with_types else {}
        step_logits = logits(tiny, input_ids=token[None], past_key_values=cache, **extra)
        torch.testing.assert_close(step_logits[0, 0], expected[0, step], rtol=0, atol=1e-5)


def test_without_mam_weights_have_llama_names():
    model = make_model(use_mam=False)
    decoder = {n for n in model.state_dict() if not n.startswith(("model.visi", "model.visual"))}
    llama = LlamaForCausalLM(make_config())
    assert decoder == set(llama.state_dict())


def test_without_mam_equals_mam_with_equal_weights(image_inputs):
    plain = make_model(use_mam=False).eval()
    make_modalities_differ(plain)  # random weights; this model has no modalities
    twice = make_model().eval()
    state = plain.state_dict()
    for module in MULTIWAY:
        for i in range(2):
            name = f"model.layers.{i}.{module}"
            weight = state.pop(f"{name}.weight")
            state |= {f"{name}.multiway.{m}.weight": weight for m in (TEXT, VISUAL)}
    twice.load_state_dict(state)
    expected = logits(plain, **image_inputs)
    torch.testing.assert_close(logits(twice, **image_inputs), expected, rtol=0, atol=1e-5)
    text = torch.tensor([[1, 5, 9]])
    assert torch.equal(logits(twice, input_ids=text), logits(plain, input_ids=text))
    spoiled = image_inputs | {"pixel_values": image_inputs["pixel_values"].flip(0)}
    assert not torch.allclose(logits(plain, **spoiled), expected)


@pytest.mark.parametrize("settings", PARTIAL_MAM, ids=str)
def test_partial_mam_equals_mam_with_equal_weights(settings, image_inputs):
    """Logits, text logits, and gradients: those of a shared weight are sums over its copies."""
    model = make_model(**settings).eval()
    make_modalities_differ(model)
    full = with_separate_modules(model, model.config.mam_module_names)
    assert full.config.mam_modules is None
    found = []
    for one in (model, full):
        output = one(**image_inputs, labels=image_inputs["input_ids"])
        output.loss.backward()
        found.append((output.logits, {n: p.grad for n, p in one.named_parameters()}))
    (ours, gradients), (expected, copies) = found
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    for name, gradient in gradients.items():
        if name in copies:
            wanted = copies[name]
        else:
            wanted = sum(copies[key] for key in copies if MODALITY.sub(".", key) == name)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5, msg=name)
    text = torch.tensor([[1, 5, 9]])
    assert torch.equal(logits(model, input_ids=text), logits(full, input_ids=text))
    assert not torch.allclose(logits(as_no_mam(model), **image_inputs), ours, atol=1e-3)


@pytest.mark.parametrize("settings", PARTIAL_MAM, ids=str)
def test_names_of_partial_mam(settings, tmp_path):
    model = make_model(**settings)
    make_modalities_differ(model)
    separate = settings["mam_modules"]
    found = {m for m in MULTIWAY if m.rpartition(".")[2] in separate}
    names = [released_name(name) for name in model.state_dict()]
    for module in MULTIWAY:
        keys = {name for name in names if name.startswith(f"model.layers.1.{module}.")}
        expected = [f".multiway.{m}" for m in (TEXT, VISUAL)] if module in found else [""]
        assert keys == {f"model.layers.1.{module}{end}.weight" for end in expected}
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.separate_modules == tuple(separate)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("member", MEMBERS)
def test_variants_share_text_weights_and_copy_visual_ones(member):
    model = make_model(member=member)
    make_modalities_differ(model)
    names = model.config.mam_module_names
    plain = as_no_mam(model)
    assert plain.config.separate_modules == () and plain.config.model_type == member
    again = with_separate_modules(plain, names)
    assert again.config.separate_modules == names
    state, copied = model.state_dict(), again.state_dict()
    assert list(copied) == list(state)
    for name, tensor in copied.items():
        text = state[name.replace(".multiway.1.", ".multiway.0.")]
        assert torch.equal(tensor, text), name
        assert (tensor.data_ptr() == text.data_ptr()) == (".multiway.1." not in name), name


def test_a_quantized_model_has_no_variants():
    model = make_model()
    quantize_model(model, "8bit")
    with raises_input_error(ErrorCode.UNSUPPORTED):
        as_no_mam(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"head_dim": 6},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"use_mam": False},
        *PARTIAL_MAM,
    ],
)
def test_text_logits_are_bit_identical_to_a_llama(settings):
    """Options of LLaMA that the released model does not use, such as grouped queries."""
    model = make_model(**settings).eval()
    make_modalities_differ(model)
    config = make_config(**settings).to_dict()
    llama = LlamaForCausalLM(LlamaForCausalLM.config_class(**config)).eval()
    state = {n.replace(".multiway.0.", "."): t for n, t in model.state_dict().items()}
    llama.load_state_dict({name: state[name] for name in llama.state_dict()})
    ids = torch.tensor([[1, 5, 9, 11, 30, 2], [1, 7, 7, 0, 0, 3]])
    assert torch.equal(logits(model, input_ids=ids), logits(llama, input_ids=ids))
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    masked = [logits(m, input_ids=ids, attention_mask=mask) for m in (model, llama)]
    assert torch.equal(*masked)
