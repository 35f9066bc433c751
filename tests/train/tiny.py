"""Batches of random ids and pixels for the model of `tests.tiny`; what the pictures show."""

import torch
from torch.utils.data import Dataset

COLOURS = ("red", "green", "blue", "white")
QUESTION = "what is this"
ROWS = 24


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
