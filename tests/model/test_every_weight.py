"""A batch without images that uses every weight: equal loss, and no missing gradients."""

import pytest
import torch

from tests.model.conftest import make_modalities_differ
from tests.tiny import PARTIAL_MAM, make_model

IDS = torch.tensor([[1, 5, 9, 11], [1, 7, 0, 0]])
MASK = (IDS != 0).long()
LABELS = IDS.masked_fill(IDS == 0, -100)


def filled(**settings):
    model = make_model(**settings)
    make_modalities_differ(model)
    return model


def gradients(model):
    model.zero_grad(set_to_none=True)
    output = model(input_ids=IDS, attention_mask=MASK, labels=LABELS)
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", [{}, {"use_mam": False}, *PARTIAL_MAM], ids=str)
def test_text_batch_gives_the_same_loss_and_gradients(settings):
    model = filled(**settings)
    plain, before = gradients(model)
    model.model.run_all_branches = True
    every, after = gradients(model)
    torch.testing.assert_close(every.logits, plain.logits)
    torch.testing.assert_close(every.loss, plain.loss)
    unused = {name for name, gradient in before.items() if gradient is None}
    assert any("vision_model" in name for name in unused)
    assert not any(".multiway." in name for name in unused)
    for name, gradient in after.items():
        if name in unused or ".multiway.1." in name:
            assert not gradient.any(), name  # zeros, and not None
        else:
            torch.testing.assert_close(gradient, before[name], msg=name)


def test_image_path_has_gradients_without_images():
    model = filled()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_model" in name or ".multiway.1." in name)
    model.model.run_all_branches = True
    _, found = gradients(model)
    assert found
    assert all(gradient is not None and not gradient.any() for gradient in found.values())


def test_batch_with_images_is_unchanged():
    model = filled()
    inputs = {
        "input_ids": torch.tensor([[1, 40, 40, 40, 5]]),
        "pixel_values": torch.randn(1, 3, 8, 8),
    }
    before = model(**inputs).logits
    model.model.run_all_branches = True
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize(
    ("mam", "layer"), [(True, "Owl2DecoderLayer"), (False, "LlamaDecoderLayer")]
)
def test_no_split_modules_are_classes_of_the_model(mam, layer):
    model = make_model(use_mam=mam)
    assert set(model._no_split_modules) == {layer, "VisionLayer", "AbstractorLayer"}
    classes = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= classes
