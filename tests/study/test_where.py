"""Where the modality-adaptive module acts: attention by layer, distances, replaced weights."""

import json

import numpy as np
import pytest
import torch
from arms import make_arm
from PIL import Image
from study import ModelChanges
from where import (
    QUESTIONS,
    attention_shares,
    replace_keys_and_values,
    weight_distances,
    where_it_acts,
)

from owl2 import Engine, Owl2ForConditionalGeneration
from owl2.attention import collect_attention
from tests.model.conftest import make_modalities_differ
from tests.tiny import make_model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A directory with three questions about images of random pixels."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for index, question in enumerate(("what is this?", "is it red?", "a circle?")):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "question": question, "answers": ["red", "a"]})
    (folder / QUESTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def engine(tiny_checkpoint):
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    make_modalities_differ(engine.model)
    return engine


def questions_of(data):
    return [json.loads(line) for line in (data / QUESTIONS).read_text().splitlines()]


@pytest.mark.parametrize("use_mam", [True, False])
def test_shares_are_means_over_questions_tokens_and_heads(engine, data, use_mam):
    questions = questions_of(data)
    shares = attention_shares(engine, questions, data, use_mam=use_mam)
    expected = []
    for question in questions:
        image = {"type": "image", "image": Image.open(data / question["image"])}
        parts = [image, {"type": "text", "text": question["question"]}]
        maps = collect_attention(
            engine,
            engine.processor,
            [{"role": "user", "content": parts}],
            answer="red",
            layers=[0, 1],
            use_mam=use_mam,
        )
        [span] = [span for span in maps.spans if span.kind == "image"]
        on_image = maps.attention[..., span.start : span.end].sum(-1)  # (layers, heads, tokens)
        expected.append(on_image.mean((1, 2)))
    assert shares["image"] == pytest.approx(np.mean(expected, 0).tolist(), abs=1e-6)
    for layer in zip(*shares.values(), strict=True):
        assert sum(layer) == pytest.approx(1, abs=1e-5)


def test_questions_are_taken_at_equal_distances(engine, data):
    found = where_it_acts(engine, data, 1)
    first = attention_shares(engine, questions_of(data)[:1], data)
    assert found["attention"] == first
    assert found.keys() == {"attention", "attention_text_weights", "distance"}
    assert found["attention_text_weights"]["image"] != pytest.approx(first["image"], abs=1e-4)


def test_distances():
    model = make_model(mam_modules=["post_attention_layernorm", "v_proj"])
    assert weight_distances(model) == {
        "post_attention_layernorm": [0.0, 0.0],
        "v_proj": [0.0, 0.0],
    }
    with torch.no_grad():
        layer = model.model.layers[1]
        layer.multiway[1]["post_attention_layernorm"].weight.fill_(1.5)  # text: 1
        layer.self_attn.multiway[1]["v_proj"].weight.mul_(3)
    found = weight_distances(model)
    assert found["post_attention_layernorm"] == pytest.approx([0, 0.5])
    assert found["v_proj"] == pytest.approx([0, 2])


def test_replaced_keys_and_values(tiny_checkpoint, tmp_path):
    """The norms for images stay; a model without own K and V for images is not written."""
    engine = Engine.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    make_modalities_differ(engine.model)
    source = tmp_path / "source"
    engine.model.save_pretrained(source)
    engine.processor.save_pretrained(source)
    assert replace_keys_and_values(source, tmp_path / "replaced")
    found = Owl2ForConditionalGeneration.from_pretrained(tmp_path / "replaced")
    assert found.config.separate_modules == ("input_layernorm", "post_attention_layernorm")
    expected = engine.model
    with torch.no_grad():
        for layer in expected.model.layers:
            for linears in ("k_proj", "v_proj"):
                text, visual = layer.self_attn.multiway.pair(linears)
                visual.weight.copy_(text.weight)
    image = found.config.image_token_id
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[1, 5, *[image] * 3, 9, 11]])
    with torch.no_grad():
        logits, wanted = (m(input_ids=ids, pixel_values=pixels).logits for m in (found, expected))
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    for names in ([], ["input_layernorm"]):
        other = tmp_path / f"arm{len(names)}"
        make_arm(tiny_checkpoint, ModelChanges(mam_modules=names), other, 0)
        assert not replace_keys_and_values(other, tmp_path / "no")
    assert not (tmp_path / "no").exists()
