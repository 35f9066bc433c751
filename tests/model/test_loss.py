"""The loss: over labeled tokens only, always finite; gradients with and without checkpointing."""

import pytest
import torch
from torch.nn import functional as F

from owl2.model import loss as loss_module
from owl2.model.loss import next_token_loss, shift
from tests.model.conftest import make_modalities_differ
from tests.tiny import ONE_LAYER, make_model


@pytest.fixture
def batch(image_inputs):
    ids = image_inputs["input_ids"]
    labels = torch.where(ids == 40, -100, ids)
    labels[:, :6] = -100
    return image_inputs | {"labels": labels}


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_loss_is_the_mean_over_labeled_tokens():
    logits = torch.randn(2, 5, 7)
    labels = torch.tensor([[3, -100, 2, 6, -100], [-100, -100, -100, -100, 1]])
    # (0, 0) has no previous position, so the labels 2, 6 and 1 remain.
    terms = [
        F.cross_entropy(logits[row, position - 1], labels[row, position])
        for row, position in ((0, 2), (0, 3), (1, 4))
    ]
    torch.testing.assert_close(next_token_loss(logits, shift(labels)), sum(terms) / 3)
    for count in (6, torch.tensor(6)):
        torch.testing.assert_close(next_token_loss(logits, shift(labels), count), sum(terms) / 6)


def test_16_bit_logits_give_a_float32_loss():
    logits = torch.randn(1, 4, 7).to(torch.bfloat16)
    labels = torch.tensor([[1, 2, 3, 4]])
    loss = next_token_loss(logits, shift(labels))
    assert loss.dtype == torch.float32
    assert loss == next_token_loss(logits.float(), shift(labels))


def test_model_loss_and_num_items_in_batch(tiny, batch):
    output = tiny(**batch)
    expected = next_token_loss(output.logits, shift(batch["labels"]))
    torch.testing.assert_close(output.loss, expected)
    labeled = int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(
        tiny(**batch, num_items_in_batch=2 * labeled).loss, expected / 2, rtol=1e-5, atol=0
    )


def test_batch_without_labels_has_loss_0_and_finite_gradients(tiny, batch):
    for count in (None, 0, torch.tensor(0)):
        tiny.zero_grad()
        labels = torch.full_like(batch["labels"], -100)
        loss = tiny(**batch | {"labels": labels}, num_items_in_batch=count).loss
        assert loss.item() == 0
        loss.backward()
        assert all(not gradient.any() for gradient in gradients(tiny).values())
        assert all(torch.isfinite(gradient).all() for gradient in gradients(tiny).values())


def test_without_labels_there_is_no_loss(tiny, image_inputs):
    assert tiny(**image_inputs).loss is None


def test_images_and_text_give_every_parameter_a_gradient(tiny, batch):
    tiny(**batch).loss.backward()
    assert gradients(tiny).keys() == dict(tiny.named_parameters()).keys()
    # Mathematically zero: the key biases of the abstractor do not change a softmax.
    still = {n for n, g in gradients(tiny).items() if g.abs().max() < 1e-9}
    assert all(name.endswith("attention.key.bias") for name in still), still


def test_text_gives_no_gradient_to_visual_weights(tiny):
    """Those of the decoder get zeros, because DDP requires that every process uses them."""
    ids = torch.tensor([[1, 5, 6, 7]])
    tiny(input_ids=ids, labels=ids).loss.backward()
    found = gradients(tiny)
    assert not any("vision_model" in name or "visual_abstractor" in name for name in found)
    visual = [gradient for name, gradient in found.items() if ".multiway.1." in name]
    assert visual
    assert not any(gradient.any() for gradient in visual)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")  # 5.16 has no other name
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_activation_checkpointing_does_not_change_gradients(batch, reentrant, attention):
    results = []
    for checkpointed in (False, True):
        model = make_model(attn_implementation=attention).train()
        make_modalities_differ(model)
        runs = count_runs(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch, use_cache=False).loss.backward()
        results.append(gradients(model))
        assert runs == dict.fromkeys(runs, 2 if checkpointed else 1)
    plain, recomputed = results
    assert plain.keys() == recomputed.keys()
    for name, gradient in recomputed.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-6, atol=1e-7, msg=name)


def count_runs(model):
    """Count the calls of one MLP of each part."""
    modules = {
        "vision": model.model.vision_model.encoder.layers[0].mlp,
        "abstractor": model.model.visual_abstractor.encoder.layers[0].crossattention.output.mlp,
        "decoder": model.model.layers[0].mlp,
    }
    runs = dict.fromkeys(modules, 0)

    def counter(name):
        def count(*_):
            runs[name] += 1

        return count

    for name, module in modules.items():
        module.register_forward_pre_hook(counter(name))
    return runs


def full_and_chunked(model, inputs, **options):
    """(loss, gradients) from the complete logits and from chunks."""
    results = []
    for return_logits in (True, False):
        model.zero_grad(set_to_none=True)
        output = model(**inputs, **options, return_logits=return_logits)
        assert (output.logits is None) != return_logits
        output.loss.backward()
        results.append((output.loss, gradients(model)))
    return results


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def one_layer(request):
    model = make_model(**ONE_LAYER, tie_word_embeddings=request.param).train()
    make_modalities_differ(model)
    return model


def labeled_at(batch, positions):
    labels = torch.full_like(batch["labels"], -100)
    labels[:, positions] = batch["input_ids"][:, positions]
    return batch | {"labels": labels}


@pytest.mark.parametrize("chunk", [1, 2, 3, 512])
@pytest.mark.parametrize("positions", [[5, 6, 10, 11], [11], [0], []])
@pytest.mark.parametrize("count", [None, 7, torch.tensor(3)])
def test_chunked_loss_equals_full_loss(monkeypatch, one_layer, batch, chunk, positions, count):
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    inputs = labeled_at(batch, positions)
    inputs["input_ids"] = inputs["input_ids"].repeat(2, 1)
    inputs["pixel_values"] = inputs["pixel_values"].repeat(2, 1, 1, 1)
    # Rows with different labels.
    none = torch.full_like(inputs["labels"], -100)
    inputs["labels"] = torch.cat([inputs["labels"], none.where(none == 0, inputs["labels"])])
    inputs["labels"][1, 6:] = -100
    (loss, plain), (chunked_loss, chunked) = full_and_chunked(
        one_layer, inputs, num_items_in_batch=count
    )
    assert loss.dtype == chunked_loss.dtype == torch.float32
    torch.testing.assert_close(chunked_loss, loss, rtol=1e-6, atol=1e-6)
    assert plain.keys() == chunked.keys()  # also that of lm_head, without labels
    for name, gradient in chunked.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-6, msg=name)


def test_chunked_loss_computes_logits_of_labeled_positions_only(monkeypatch, tiny, batch):
    monkeypatch.setattr(loss_module, "CHUNK", 2)
    seen = []
    tiny.lm_head.register_forward_hook(lambda _m, _i, logits: seen.append(tuple(logits.shape)))
    tiny(**labeled_at(batch, [5, 6, 11]), return_logits=False).loss.backward()
    assert seen[:2] == [(2, 40), (1, 40)]
    assert len(seen) == 4  # each chunk again in the backward pass
    with torch.no_grad():
        del seen[:]
        assert tiny(**image_alone(batch), return_logits=False).logits is None
        assert not seen


def image_alone(batch):
    return {name: batch[name] for name in ("input_ids", "pixel_values")}


def test_chunked_loss_with_autocast_and_accumulation(monkeypatch, tiny, batch):
    monkeypatch.setattr(loss_module, "CHUNK", 2)
    results = []
    for return_logits in (True, False):
        tiny.zero_grad(set_to_none=True)
        for positions in ([5, 6, 10], [11]):
            with torch.autocast("cpu", torch.bfloat16):
                inputs = labeled_at(batch, positions)
                output = tiny(**inputs, num_items_in_batch=4, return_logits=return_logits)
            assert output.loss.dtype == torch.float32
            output.loss.backward()
        results.append(gradients(tiny))
    plain, chunked = results
    for name, gradient in chunked.items():
        error = (gradient - plain[name]).abs().max()
        assert error <= 0.02 * plain[name].abs().max() + 1e-6, name


def test_chunked_loss_compiled(batch):
    torch.compiler.reset()
    tiny = make_model(**ONE_LAYER)
    make_modalities_differ(tiny)
    compiled = torch.compile(tiny, backend="eager")
    expected = tiny(**batch).loss
    loss = compiled(**batch, return_logits=False).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert gradients(tiny).keys() == dict(tiny.named_parameters()).keys()
