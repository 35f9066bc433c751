"""DocOwl1.5, DocOwl2 and mPLUG-Owl2.1: golden values, with the tolerances of golden/README.md."""

import pytest
import torch

from owl2.checkpoints.weight_names import released_name
from owl2.model.registry import MODEL_TYPES
from owl2.processing.anchor_crops import ANCHORS, select_grid
from tests.family import (
    FOLDER,
    SIBLINGS,
    load_cases,
    load_model,
    load_processor,
    make_cases,
    read_text,
    with_placeholders,
)
from tests.model.test_golden import NOISE, TOLERANCE, ZERO_GRADIENT

CASES = make_cases()
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
UNUSED = ("ln_q.weight", "ln_q.bias")


@each_case
def test_ids_and_positions(case):
    processor, ids = case.processor(), case.inputs()["input_ids"][0].tolist()
    assert with_placeholders(ids, processor) == case.text["ids"]
    assert len(ids) == case.text["positions"]
    config = load_model(case.sibling).config
    assert config.ntk_alpha(len(ids)) == case.text.get("ntk_alpha", 1)
    assert config.registry_key == SIBLINGS[case.sibling]


@each_case
def test_logits_and_greedy_tokens(case):
    model, inputs = load_model(case.sibling), case.inputs()
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    logits = case.expected.get("logits", case.expected.get("last_logits"))
    torch.testing.assert_close(output.logits[:, -logits.shape[1] :], logits, **TOLERANCE)
    for name, index in (("hidden.0", 0), ("hidden.1", 1), ("hidden.last", -1)):
        if name in case.expected:
            hidden = output.hidden_states[index]
            torch.testing.assert_close(hidden, case.expected[name], **TOLERANCE)
    answer = model.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=None)
    new = case.expected.get("new_tokens", torch.tensor([case.text.get("new_tokens", [])]))
    assert answer[:, inputs["input_ids"].shape[1] :].tolist() == new.tolist()


def test_pixels_of_crops():
    processor, cases = load_processor("docowl1_5").image_processor, load_cases("docowl1_5")
    for name in ("page", "strip", "square", "column"):
        pixels = processor(FOLDER / "docowl1_5" / "images" / f"{name}.png")
        assert set(pixels) == {"pixel_values"}
        torch.testing.assert_close(
            pixels["pixel_values"], cases[f"pixels.{name}"], rtol=0, atol=1e-6
        )
    page = load_processor("docowl2").image_processor(FOLDER / "docowl2" / "images" / "page1.png")
    expected = load_cases("docowl2")["one.pixels"]
    torch.testing.assert_close(page["pixel_values"], expected, rtol=0, atol=1e-6)
    assert page["image_grids"].tolist() == [[4, 3]]


@pytest.mark.parametrize("kind", ["resize", "pad"])
def test_pixels_of_owl2_1(kind):
    processor, cases = load_processor("mplug_owl2_1").image_processor, load_cases("mplug_owl2_1")
    prefix = {"resize": "pixels.", "pad": "padded_pixels."}[kind]
    for key, expected in cases.items():
        if key.startswith(prefix):
            file = FOLDER / "mplug_owl2_1" / "images" / f"{key.removeprefix(prefix)}.png"
            pixels = processor(file, image_policy=kind)["pixel_values"][0]
            torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


def test_grids_of_many_sizes():
    for key, table in read_text("docowl1_5")["anchors"].items():
        anchors, edge = key.split(".")
        grids = [select_grid(*size, int(edge), anchors) for size in table["sizes"]]
        assert [list(grid) for grid in grids] == table["rows_columns"]
    expected = read_text("docowl2")["anchors_rows_columns"]
    assert [list(grid) for grid in ANCHORS["grid_12"]] == expected


@pytest.mark.parametrize("kind", ["chat", "stage1", "plain"])
def test_texts_of_crops(kind):
    crops = {
        key.split(".")[1]: value
        for key, value in read_text("docowl1_5")["crops"].items()
        if key.startswith(f"{kind}.")
    }
    processor = load_processor("docowl1_5", kind)
    for name, expected in crops.items():
        file = FOLDER / "docowl1_5" / "images" / f"{name}.png"
        (text,), _ = processor.image_processor.expand_images([file])
        question = "Recognize text in the image."
        assert text + question in (expected["query"], expected["query"] + question)
        assert text.count("<|image|>") == len(expected["positions"])


def test_vision_encoder_and_connector():
    cases = load_cases("docowl1_5")
    with torch.no_grad():
        output = load_model("docowl1_5").get_image_features(cases["pixels.page"][:2])
    torch.testing.assert_close(output.last_hidden_state, cases["page.vision"], **TOLERANCE)
    torch.testing.assert_close(output.pooler_output, cases["page.reduced"], **TOLERANCE)
    cases, grids = load_cases("docowl2"), torch.tensor([[4, 3]])
    with torch.no_grad():
        output = load_model("docowl2").get_image_features(cases["one.pixels"], grids)
    torch.testing.assert_close(output.pooler_output, cases["one.features"], **TOLERANCE)
    cases = load_cases("mplug_owl2_1")
    with torch.no_grad():
        output = load_model("mplug_owl2_1").get_image_features(cases["pixels.wide"][None])
    torch.testing.assert_close(output.last_hidden_state, cases["image.vision"], **TOLERANCE)
    torch.testing.assert_close(output.pooler_output, cases["image.abstractor"], **TOLERANCE)


def training_rows(sibling):
    """The conversations of the golden training step."""
    rows = read_text(sibling)["train"]
    for row in [row for row in rows if row.get("version", "v1") == "v1"]:
        names = row.get("pictures", [row.get("picture")])
        files = [FOLDER / sibling / "images" / f"{name}.png" for name in names]
        question = row.get("question", row.get("prompt", "")[6:].removesuffix(" ASSISTANT:"))
        parts = [{"type": "image", "image": file} for file in files]
        text = {"type": "text", "text": question.replace("<|image|>", "")}
        yield [
            {"role": "user", "content": [*parts, text]},
            {"role": "assistant", "content": row["answer"].strip()},
        ]


@pytest.mark.parametrize("sibling", ["docowl1_5", "mplug_owl2_1"])
def test_training_step(sibling):
    from owl2.data.collate import collate
    from owl2.processing.default_templates import CHAT_TEMPLATES

    cases, processor = load_cases(sibling), load_processor(sibling)
    if sibling == "docowl1_5":
        processor = type(processor).from_pretrained(
            FOLDER / sibling / "model", chat_template=CHAT_TEMPLATES["v1"]
        )
    samples = [processor.for_training(row) for row in training_rows(sibling)]
    batch = collate(samples, 0)
    for row, ids in enumerate(cases["train.input_ids"].tolist()):
        length = int(cases["train.attention_mask"][row].sum())
        own = samples[row]["input_ids"][0].tolist()
        assert with_placeholders(own, processor) == ids[:length]
        labels = [label for label in cases["train.labels"][row].tolist() if label != -100]
        assert [label for label in batch["labels"][row].tolist() if label != -100] == labels
    model = type(load_model(sibling)).from_pretrained(
        FOLDER / sibling / "model", dtype=torch.float32
    )
    output = model.train()(**batch)
    torch.testing.assert_close(output.loss, cases["train.loss"][0], rtol=0, atol=1e-5)
    output.loss.backward()
    prefixes = MODEL_TYPES[model.config.registry_key].weight_names
    parameters = {}
    for name, parameter in model.named_parameters():
        name = released_name(name)
        for released, own in reversed(prefixes):
            if name.startswith(own):
                name = released + name.removeprefix(own)
                break
        parameters[name] = parameter
    expected = {k.removeprefix("train.grad."): v for k, v in cases.items() if ".grad." in k}
    assert len(expected) > 50
    for name, gradient in expected.items():
        if name.endswith((ZERO_GRADIENT, *UNUSED)):
            continue
        largest = gradient.abs().max().item()
        # Zero where the last layer has no label.
        assert largest == 0 or largest > 100 * NOISE, name
        error = (parameters[name].grad - gradient).abs().max().item()
        assert error <= 1e-4 * largest, f"{name}: off by {error}, the largest is {largest}"
