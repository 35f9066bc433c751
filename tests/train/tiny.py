"""Small data for training: files with a checkpoint, random samples, common settings."""

import json

import torch
from PIL import Image

from owl2.data.collate import Batch
from owl2.data.mixture import MixtureDataset, MixtureSource
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import Owl2Tokenizer, train_tokenizer
from tests.tiny import make_model

COLORS = ("red", "green", "blue", "white")
QUESTION = "what is this"
ROWS = 24
# The common settings of small runs on a CPU.
SMALL_RUN = {
    "stage": 2,
    "image_size": None,
    "augment": "none",
    "batch_size": 4,
    "warmup_steps": 2,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
    "dataloader_num_workers": 0,
    "dtype": "float32",
    "logging_steps": 2,
}


def write_rows(file, answers, images):
    """Write questions with these answers; `images(number)` is the path of an image or None.

    An answer is a text, or a dict with other keys of the row as well.
    """
    rows = []
    for number, item in enumerate(answers):
        image, answer, others = images(number), item, {}
        if isinstance(item, dict):
            others = dict(item)
            answer = others.pop("answer")
        question = QUESTION if image is None else f"<image>\n{QUESTION}"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        row = {} if image is None else {"image": str(image)}
        rows.append(row | others | {"conversations": turns})
    file.write_text(json.dumps(rows), encoding="utf-8")


def make_world(
    folder, answers, image_size=8, num_image_tokens=3, texts=None, vocab_size=300, **sizes
):
    """Write `data.json`, with a question about an image of one color for each answer, and `start`,
    an untrained checkpoint. `texts`: of the tokenizer; default: about colors."""
    for number in range(len(answers)):
        Image.new("RGB", (10, 10), COLORS[number % len(COLORS)]).save(folder / f"{number}.png")
    write_rows(folder / "data.json", answers, lambda number: f"{number}.png")
    start = folder / "start"
    start.mkdir()
    texts = texts or [f"USER: \n{QUESTION} ASSISTANT: {color}" for color in COLORS]
    train_tokenizer(texts * 10, start / "tokenizer.model", vocab_size)
    tokenizer = Owl2Tokenizer(str(start / "tokenizer.model"))
    model = make_model(**{"vocab_size": len(tokenizer)} | sizes)
    model.save_pretrained(start)
    Owl2Processor(
        Owl2ImageProcessor(image_size),
        tokenizer,
        num_image_tokens=num_image_tokens,
        image_token_id=model.config.image_token_id,
    ).save_pretrained(start)


class RandomSamples(MixtureDataset):
    """Samples of an image and random text of different lengths, which depend on the epoch."""

    def __init__(self, count, images=True):
        super().__init__([MixtureSource(range(count))], processor=None)
        self.images = images

    def __getitem__(self, index):
        return self.sample_of(index.row, index.epoch)

    def sample_of(self, index, epoch=0):
        source = torch.Generator().manual_seed(1000 * epoch + index)
        text = torch.randint(3, 40, (4 + index % 5,), generator=source)
        image = torch.full((3,), 40) if self.images else torch.tensor([], dtype=torch.long)
        ids = torch.cat([torch.tensor([1]), image, text])
        labels = ids.clone()
        labels[: 1 + len(image) + index % 3] = -100
        pixels = torch.randn(3, 8, 8, generator=source) if self.images else None
        return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def collate(samples):
    """A `Batch` of the samples, as `Collator` returns it."""
    batch = pad(samples)
    tokens = int(batch["attention_mask"].sum())
    return Batch(batch, len(samples), tokens, len(batch.get("pixel_values", ())), [])


def pad(samples):
    longest = max(len(sample["input_ids"]) for sample in samples)

    def fill(key, value):
        rows = [sample[key] for sample in samples]
        return torch.stack(
            [torch.cat([row, row.new_full((longest - len(row),), value)]) for row in rows]
        )

    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    batch = {
        "input_ids": fill("input_ids", 0),
        "labels": fill("labels", -100),
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
    }
    pixels = [s["pixel_values"] for s in samples if s["pixel_values"] is not None]
    if pixels:
        batch["pixel_values"] = torch.stack(pixels)
    return batch
