"""The golden values of the authors' implementation, with the tolerances of golden/README.md."""

import pytest
import torch

from owl2.checkpoints.weight_names import released_name
from tests.model.golden import inputs_of, load_model

TOLERANCE = {"rtol": 0, "atol": 1e-4}
# Mathematically zero: a bias of the keys adds the same value to all scores of a query, which does
# not change the softmax. The golden and the computed values are rounding errors around 1e-8.
ZERO_GRADIENT = "crossattention.attention.key.bias"
NOISE = 1e-7


def run(model, cases, case, **options):
    with torch.no_grad():
        return model(**inputs_of(cases, case, model.config), **options)


def check_hidden_states(output, cases, case):
    assert len(output.hidden_states) == sum(key.startswith(f"{case}.hidden.") for key in cases)
    for i, hidden in enumerate(output.hidden_states):
        torch.testing.assert_close(hidden, cases[f"{case}.hidden.{i}"], **TOLERANCE)


@pytest.mark.parametrize("case", ["text", "image"])
def test_logits_and_hidden_states(golden_model, cases, case):
    output = run(golden_model, cases, case, output_hidden_states=True)
    torch.testing.assert_close(output.logits, cases[f"{case}.logits"], **TOLERANCE)
    check_hidden_states(output, cases, case)


@pytest.mark.slow  # compilation to C++ takes a minute
@pytest.mark.parametrize("case", ["text", "image", "two_images"])
def test_compiled_logits(golden_name, cases, case):
    torch.compiler.reset()
    model = load_model(golden_name)
    model.forward = torch.compile(model.forward)
    logits = run(model, cases, case).logits
    torch.testing.assert_close(logits, cases[f"{case}.logits"], **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("return_logits", [True, False])
def test_compiled_training(golden_name, cases, return_logits):
    torch.compiler.reset()
    model = load_model(golden_name).train()
    forward = torch.compile(model.forward)
    output = forward(**inputs_of(cases, "train", model.config), return_logits=return_logits)
    torch.testing.assert_close(output.loss, cases["train.loss"][0], **TOLERANCE)
    output.loss.backward()
    check_gradients(model, cases)


def test_vision_and_abstractor(golden_model, cases):
    with torch.no_grad():
        features = golden_model.get_image_features(cases["image.pixel_values"])
    torch.testing.assert_close(features.last_hidden_state, cases["image.vision"], **TOLERANCE)
    torch.testing.assert_close(features.pooler_output, cases["image.abstractor"], **TOLERANCE)


def test_attention_maps(golden_name, cases):
    model = load_model(golden_name, attn_implementation="eager")
    maps = run(model, cases, "image", output_attentions=True).attentions
    assert len(maps) == model.config.num_hidden_layers
    for i, attention in enumerate(maps):
        torch.testing.assert_close(attention, cases[f"image.attention.{i}"], **TOLERANCE)
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


def test_two_images_in_order(golden_model, cases):
    logits = run(golden_model, cases, "two_images").logits
    torch.testing.assert_close(logits, cases["two_images.logits"], **TOLERANCE)


@pytest.mark.parametrize("case", ["generate_text", "generate_image"])
def test_greedy_tokens(golden_model, cases, case):
    inputs = inputs_of(cases, case, golden_model.config)
    answer = golden_model.generate(**inputs, max_new_tokens=24, do_sample=False)
    new = answer[:, inputs["input_ids"].shape[1] :]
    # The answer of one case ends with </s> after 5 tokens.
    torch.testing.assert_close(new, cases[f"{case}.new_tokens"], rtol=0, atol=0)


def test_training(golden_name, cases):
    for attention in ("eager", "sdpa"):
        model = load_model(golden_name, attn_implementation=attention).train()
        inputs = inputs_of(cases, "train", model.config)
        output = model(**inputs)
        torch.testing.assert_close(output.loss, cases["train.loss"][0], **TOLERANCE)
        # The two implementations mask padding differently, so its logits are not compared.
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(output.logits[real], cases["train.logits"][real], **TOLERANCE)
        output.loss.backward()
        check_gradients(model, cases)
        model.zero_grad()
        in_chunks = model(**inputs, return_logits=False)
        torch.testing.assert_close(in_chunks.loss, cases["train.loss"][0], **TOLERANCE)
        in_chunks.loss.backward()
        check_gradients(model, cases)


def check_gradients(model, cases):
    prefix = "train.grad."
    parameters = {released_name(name): weight for name, weight in model.named_parameters()}
    assert parameters.keys() == {k.removeprefix(prefix) for k in cases if k.startswith(prefix)}
    for name, parameter in parameters.items():
        expected = cases[prefix + name]
        error = (parameter.grad - expected).abs().max().item()
        if name.endswith(ZERO_GRADIENT):
            assert expected.abs().max() < NOISE
            assert error < 2 * NOISE, name
        else:
            largest = expected.abs().max().item()
            assert largest > 100 * NOISE
            assert error <= 1e-4 * largest, f"{name}: off by {error}, the largest is {largest}"
