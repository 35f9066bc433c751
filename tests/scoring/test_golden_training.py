"""Golden values of training: ids, labels, loss and gradients of OneAlign and Co-Instruct."""

import pytest
import torch

from owl2.checkpoints.weight_names import released_name
from owl2.data.row_parsers import parse_row
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.processor import Owl2Processor
from tests.scoring.golden import FAMILY, image_files, load_cases, read, with_placeholders

IGNORED = -100
ZERO_GRADIENT = "crossattention.attention.key.bias"  # as in tests/model/test_golden.py


def rows():
    for name in ("one_align", "deqa_score"):
        for index, case in enumerate(read(name, "text.json")["train"]):
            case["row"] = case.get("row") or case["conversations"]
            if case["row"][0]["value"].count("<|image|>") == 1:
                version = case["version"]
                yield pytest.param(name, version, case, id=f"{name}-{version}-{index}")


@pytest.mark.parametrize(("name", "version", "case"), list(rows()))
def test_ids_and_labels_of_rows(name, version, case):
    """As `owl2 train` reads them: a row of LLaVA's JSON, and the processor of the checkpoint."""
    model = FAMILY / name / "model"
    processor = Owl2Processor.from_pretrained(model, chat_template=version, image_newline=True)
    [file] = image_files(name, [case.get("picture", "wide")])
    row = {"image": "x.png", "conversations": case["row"]}
    sample = parse_row(row, "row", lambda _: {"type": "image", "path": str(file)})
    batch = processor.for_training(sample.messages)
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    image = processor.image_token_id
    assert with_placeholders(ids, image) == case["input_ids"]
    kept = [
        label
        for before, id_, label in zip([0, *ids], ids, labels, strict=False)
        if (before, id_) != (image, image)
    ]
    assert kept == case["labels"]


@pytest.mark.parametrize(
    ("name", "images", "counts"),
    [
        ("one_align", ["wide", "tall", "frame0", "frame1", "frame2"], [1, 1, 3]),
        ("co_instruct", ["wide", "tall", "large"], [1, 1, 1]),
    ],
)
def test_training_step(name, images, counts):
    """One step; the third row of OneAlign is a video of three frames at one placeholder."""
    cases, model = load_cases(name), FAMILY / name / "model"
    model = Owl2ForConditionalGeneration.from_pretrained(model, dtype="float32").train()
    processor = Owl2Processor.from_pretrained(FAMILY / name / "model")
    image, size, unused = processor.image_token_id, processor.num_image_tokens, iter(counts)
    ids, labels = [], []
    for own_ids, own_labels, mask in zip(
        *(cases[f"train.{key}"].tolist() for key in ("input_ids", "labels", "attention_mask")),
        strict=True,
    ):
        ids.append([])
        labels.append([])
        for id_, label, is_real in zip(own_ids, own_labels, mask, strict=True):
            if is_real:
                count = size * next(unused) if id_ == -200 else 1
                ids[-1] += [image if id_ == -200 else id_] * count
                labels[-1] += [label] * count
    width = max(map(len, ids))
    paddings = [width - len(row) for row in ids]
    output = model(
        input_ids=torch.tensor([r + [0] * n for r, n in zip(ids, paddings, strict=True)]),
        attention_mask=torch.tensor(
            [[1] * len(r) + [0] * n for r, n in zip(ids, paddings, strict=True)]
        ),
        labels=torch.tensor([r + [IGNORED] * n for r, n in zip(labels, paddings, strict=True)]),
        pixel_values=processor.image_processor(image_files(name, images))["pixel_values"],
    )
    torch.testing.assert_close(output.loss, cases["train.loss"][0], rtol=0, atol=1e-5)
    output.loss.backward()
    gradients = {released_name(key): weight.grad for key, weight in model.named_parameters()}
    checked = 0
    for key, expected in cases.items():
        part = key.removeprefix("train.grad.")
        if part != key and not part.endswith(ZERO_GRADIENT):
            error = (gradients[part] - expected).abs().max()
            assert error <= 1e-4 * expected.abs().max(), part
            checked += 1
    assert checked > 100
