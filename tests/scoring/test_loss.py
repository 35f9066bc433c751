"""Golden values of the pair loss of DeQA-Score."""

import pytest
import torch

from owl2.checkpoints.weight_names import released_name
from owl2.errors import ErrorCode
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.scoring.loss import PairLossConfig, level_positions, pair_loss, side_loss
from tests.errors import raises_input_error
from tests.model.golden import expand
from tests.scoring.golden import FAMILY, load_cases, read
from tests.scoring.test_golden_training import ZERO_GRADIENT

TEXT = read("deqa_score", "text.json")


@pytest.fixture(scope="module")
def model():
    path = FAMILY / "deqa_score" / "model"
    return Owl2ForConditionalGeneration.from_pretrained(path, dtype="float32").train()


@pytest.fixture(scope="module")
def cases():
    return load_cases("deqa_score")


@pytest.fixture(scope="module")
def outputs(model, cases):
    """The logits and labels of both sides."""
    return {side: forward(model, cases, side) for side in "AB"}


def forward(model, cases, side):
    case, config = f"pair.{side}", model.config
    ids, mask = cases[f"{case}.input_ids"], cases[f"{case}.attention_mask"]
    pixels = [cases[f"pixels.{image}"] for image in TEXT["pair"][f"item_{side}"]["pictures"]]
    logits = model(
        input_ids=expand(ids, ids, config, fill=config.image_token_id),
        attention_mask=expand(mask, ids, config).long(),
        pixel_values=torch.stack(pixels),
    ).logits
    return logits, expand(cases[f"{case}.labels"], ids, config, fill=-100)


def side(outputs, cases, name, config):
    probabilities = cases[f"pair.{name}.level_probs"]
    ids = TEXT["level_prefix_ids"], TEXT["level_ids"]
    return side_loss(*outputs[name], probabilities, *ids, config)


def total(outputs, cases, config):
    sides = [side(outputs, cases, name, config) for name in "AB"]
    mos, stds = (
        tuple(cases[f"pair.{name}.{key}"] for name in "AB") for key in ("gt_scores", "stds")
    )
    return pair_loss(*sides, mos, stds, config)


def test_parts_of_the_loss(outputs, cases):
    for name in "AB":
        found = side(outputs, cases, name, PairLossConfig())
        for value, key in (
            (found.next_token, "next_token_loss"),
            (found.cross_entropy, "cross_entropy_without_the_level"),
            (found.kl, "kl"),
            (found.outside, "in_level_loss"),
            (found.scores, "predicted_scores"),
            (found.stds, "predicted_stds"),
        ):
            expected = cases[f"pair.{name}.{key}"]
            torch.testing.assert_close(value.reshape(expected.shape), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", list(TEXT["pair"]["variants"]))
def test_variants(outputs, cases, variant):
    case = TEXT["pair"]["variants"][variant]
    loss = total(outputs, cases, PairLossConfig(**case["options"]))
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)


@pytest.mark.parametrize("variant", list(TEXT["single"]["variants"]))
def test_single_rows(outputs, cases, variant):
    case = TEXT["single"]["variants"][variant]
    config = PairLossConfig(**case["options"])
    loss = config.weight_next_token * side(outputs, cases, "A", config).next_token
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)


def test_gradients(model, cases):
    config = PairLossConfig.from_config(model.config)
    assert config == PairLossConfig()
    outputs = {name: forward(model, cases, name) for name in "AB"}
    loss = total(outputs, cases, config)
    torch.testing.assert_close(loss, cases["pair.loss"][0], rtol=0, atol=1e-5)
    loss.backward()
    gradients = {released_name(name): weight.grad for name, weight in model.named_parameters()}
    for key, expected in cases.items():
        name = key.removeprefix("pair.grad.")
        if name != key and not name.endswith(ZERO_GRADIENT):
            error = (gradients[name] - expected).abs().max()
            assert error <= 1e-4 * expected.abs().max(), name


def test_answer_without_a_level():
    labels = torch.tensor([[-100, 1, 2, 3], [-100, 1, 9, 3]])
    assert level_positions(labels[:1], [1, 2]).tolist() == [3]
    with raises_input_error(ErrorCode.NO_LABELS):
        level_positions(labels, [1, 2])
