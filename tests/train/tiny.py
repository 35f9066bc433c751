"""A model of a few thousand numbers, and batches for it made of random ids and pixels."""

import torch
from torch.utils.data import Dataset

from owl2.model.configuration import Owl2Config
from owl2.model.owl2 import Owl2ForConditionalGeneration

VISION_BLOCKS = 3
COLOURS = ("red", "green", "blue", "white")
QUESTION = "what is this"
ROWS = 24


def make_config(vocab_size=40, **settings):
    return Owl2Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        visual_config={
            "visual_model": {
                "hidden_size": 8,
                "num_hidden_layers": VISION_BLOCKS,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "image_size": 8,
                "patch_size": 4,
            },
            "visual_abstractor": {
                "hidden_size": 8,
                "encoder_hidden_size": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 12,
                "num_learnable_queries": 2,
            },
        },
        **settings,
    )


def make_model(seed=0, **settings):
    torch.manual_seed(seed)
    return Owl2ForConditionalGeneration(make_config(**settings))


class RandomSamples(Dataset):
    """Samples of a picture and some random words, of different lengths; the epoch changes them."""

    def __init__(self, count, pictures=True):
        self.count = count
        self.pictures = pictures
        self.epoch = 0

    def __len__(self):
        return self.count

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        source = torch.Generator().manual_seed(1000 * self.epoch + index)
        words = torch.randint(3, 40, (4 + index % 5,), generator=source)
        image = torch.full((3,), 40) if self.pictures else torch.tensor([], dtype=torch.long)
        ids = torch.cat([torch.tensor([1]), image, words])
        labels = ids.clone()
        labels[: 1 + len(image) + index % 3] = -100
        pixels = torch.randn(3, 8, 8, generator=source) if self.pictures else None
        return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def collate(samples):
    longest = max(len(sample["input_ids"]) for sample in samples)

    def pad(key, value):
        rows = [sample[key] for sample in samples]
        return torch.stack(
            [torch.cat([row, row.new_full((longest - len(row),), value)]) for row in rows]
        )

    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    batch = {
        "input_ids": pad("input_ids", 0),
        "labels": pad("labels", -100),
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
    }
    pixels = [s["pixel_values"] for s in samples if s["pixel_values"] is not None]
    if pixels:
        batch["pixel_values"] = torch.stack(pixels)
    return batch
