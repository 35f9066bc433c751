"""Packed batches give the same loss and gradients as padded batches."""

import json
from itertools import accumulate

import pytest
import torch
from transformers.masking_utils import create_causal_mask
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from owl2.data.collate import collate
from owl2.data.packing import pack
from owl2.train.parallelize import enable_checkpointing
from owl2.train.run import train
from owl2.train.trainer import Owl2Trainer
from tests.tiny import make_config, make_model
from tests.train.runs import quiet, read_jsonl, weights
from tests.train.tiny import RandomSamples

LONGEST = 24  # two of the other samples fit into a row


def samples(with_images=True):
    """Samples with and without images, of different lengths."""
    items = []
    for number, images in enumerate([with_images, False, with_images, False, with_images]):
        sample = RandomSamples(1, images=images).sample_of(number)
        item = {key: sample[key][None] for key in ("input_ids", "labels")}
        item["attention_mask"] = torch.ones_like(item["input_ids"])
        item["mm_token_type_ids"] = (item["input_ids"] == 40).long()
        if images:
            item["pixel_values"] = sample["pixel_values"][None]
        items.append(item)
    text = torch.randint(3, 40, (1, LONGEST), generator=torch.Generator().manual_seed(9))
    item = {"input_ids": text, "labels": text.clone()}
    item |= {"attention_mask": torch.ones_like(text), "mm_token_type_ids": torch.zeros_like(text)}
    return [*items, item]


def loss_and_gradients(batch, attn_implementation="sdpa", checkpointed=False, **settings):
    """The loss of a batch, and the gradients by name."""
    settings |= {"initializer_range": 0.4, "attn_implementation": attn_implementation}
    model = make_model(**settings).train()
    assert model.config._attn_implementation == attn_implementation
    with torch.no_grad():  # they start as copies, which would hide a wrong routing
        for name, parameter in model.named_parameters():
            if "multiway.1" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if checkpointed:
        enable_checkpointing(model)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        if gradient is None:
            assert other[1][name] is None
            continue
        # The gradient of the abstractor's key biases is 0 up to rounding (about 1e-8).
        allowed = max(1e-5 * float(gradient.abs().max()), 1e-6)
        torch.testing.assert_close(other[1][name], gradient, rtol=0, atol=allowed, msg=name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("use_mam", [True, False])
@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("with_images", [True, False])
def test_packed_loss_and_gradients_equal_padded_ones(attention, use_mam, one_row, with_images):
    items = samples(with_images)
    packed = pack(items, 0, one_row)
    assert len(packed["input_ids"]) == (1 if one_row else 3)
    padded = collate(items, 0)
    assert_same(
        loss_and_gradients(padded, attention, use_mam=use_mam),
        loss_and_gradients(packed, attention, use_mam=use_mam),
    )


def test_attention_across_samples_would_change_the_loss():
    items = samples()
    packed = pack(items, 0)
    loss, _ = loss_and_gradients(collate(items, 0))
    packed["position_ids"] = torch.arange(packed["input_ids"].shape[1]).expand_as(
        packed["input_ids"]
    )
    assert loss_and_gradients(packed)[0] != pytest.approx(loss, rel=1e-3)


def test_checkpointing_does_not_change_packed_gradients():
    packed = pack(samples(), 0)
    assert_same(loss_and_gradients(packed), loss_and_gradients(packed, checkpointed=True))


def mask_of(attention, **inputs):
    config = make_config()
    config._attn_implementation = attention
    embeddings = torch.zeros(*inputs["position_ids"].shape, config.hidden_size)
    return create_causal_mask(
        config=config, inputs_embeds=embeddings, attention_mask=None, past_key_values=None, **inputs
    )


# PyTorch has the backward pass of flex attention on GPUs only. On a CPU the mask and the loss are
# compared, without compilation, which takes a minute.


def test_flex_attention_mask_equals_sdpa_mask():
    positions = pack(samples(), 0)["position_ids"]
    dense = mask_of("sdpa", position_ids=positions)[:, 0]
    with torch.compiler.set_stance("force_eager"):
        flex = mask_of("flex_attention", position_ids=positions)
    rows, width = positions.shape
    columns = torch.arange(width)
    visible = flex.mask_mod(
        torch.arange(rows)[:, None, None], torch.tensor(0), columns[:, None], columns[None]
    )
    assert torch.equal(visible, dense)
    assert not torch.equal(visible[-1], torch.tril(visible.new_ones(width, width)))


def test_flex_attention_loss_equals_padded_loss():
    items = samples()
    batches = {"sdpa": collate(items, 0), "flex_attention": pack(items, 0)}
    losses = []
    for attention, batch in batches.items():
        model = make_model(initializer_range=0.4, attn_implementation=attention).eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            losses.append(model(**batch, use_cache=False).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_flash_attention_gets_the_lengths_of_the_samples():
    """transformers derives them from the positions in a batch of one row."""
    items = samples()
    positions = pack(items, 0, one_row=True)["position_ids"]
    lengths = sorted((item["input_ids"].shape[1] for item in items), reverse=True)
    (ends, _), (longest, _) = prepare_fa_kwargs_from_position_ids(positions)
    assert ends.tolist() == [0, *accumulate(lengths)]
    assert longest == lengths[0]


# ------------------------------------------------------------------ complete runs


def lines(result):
    return read_jsonl(result.output / "log.jsonl")


@pytest.fixture
def mixed(world, tmp_path):
    """Images with conversations, and texts of different lengths."""
    rows = []
    for number in range(20):
        turns = [
            {"from": "human", "value": "what is this " * (1 + number % 9)},
            {"from": "gpt", "value": "red " * (1 + number % 4) + "blue"},
        ]
        rows.append({"conversations": turns})
    (tmp_path / "text.json").write_text(json.dumps(rows), encoding="utf-8")
    return [{"file": str(world / "data.json")}, {"file": str(tmp_path / "text.json")}]


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_packed_run_equals_padded_run(recipe, tmp_path, mixed, accumulation):
    """Up to rounding, which AdamW amplifies less with a large epsilon."""
    settings = {
        "data": mixed,
        "max_length": 150,
        "batch_size": 8,
        "logging_steps": 1,
        "adam_epsilon": 1e-3,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": True,
    }
    padded = train(recipe(output=str(tmp_path / "padded"), **settings), quiet())
    packed = train(recipe(output=str(tmp_path / "packed"), packing=True, **settings), quiet())
    for one, other in zip(lines(padded), lines(packed), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert other["samples"] == one["samples"]
    assert lines(padded)[-1]["loss"] < lines(padded)[0]["loss"] / 1.1
    start, one, other = (weights(path) for path in (recipe().model, padded.model, packed.model))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=2e-5, msg=name)
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 1e-2


def test_packed_batches_have_fewer_rows(recipe, mixed, monkeypatch):
    shapes = []
    step = Owl2Trainer.training_step

    def spy(self, model, inputs, *args, **kwargs):
        shapes.append(tuple(inputs["input_ids"].shape))
        assert "attention_mask" not in inputs
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Owl2Trainer, "training_step", spy)
    train(recipe(data=mixed, max_length=150, batch_size=8, packing=True), quiet())
    assert sum(rows for rows, _ in shapes) < 0.8 * 8 * len(shapes)
    assert max(width for _, width in shapes) <= 150
