"""Several samples in one row, kept apart: the layout of a batch without padding.

::

    samples    AAAAA  BBB  CC  DD                lengths 5, 3, 2, 2
    padded     AAAAA                             4 rows of 5: 20 places for 12 tokens
               BBB..
               CC...
               DD...
    packed     AAAAA          position_ids 01234     3 rows of 5: 15 places
               BBBCC                       01201
               DD...                       01012

Nothing but the layout differs: positions begin anew with each sample, and where they do,
transformers' masks (and flash attention's variable lengths) begin a new sequence. That holds only
without an `attention_mask` and without a cache, so a packed batch has no mask, and padding at a
row's end is a sequence of its own, without labels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from owl2.constants import IGNORE_INDEX


def first_fit_decreasing(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Places in `lengths`, in rows of at most `room` together; at most 11/9 of the fewest + 1.

    The longest comes first, and each goes to the first row with room for it (Johnson, 1973). One
    that is longer than `room` has a row to itself.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        length = lengths[place]
        row = next((number for number, free in enumerate(left) if free >= length), None)
        if row is None:
            row = len(rows)
            rows.append([])
            left.append(room)
        rows[row].append(place)
        left[row] -= length
    return rows


def pack(
    features: Sequence[dict[str, Any]], pad_token_id: int, one_row: bool = False
) -> dict[str, torch.Tensor]:
    """Features of samples → a batch of R rows as long as the longest sample; or one row of all.

    Longer rows would waste no less, and a dense mask's attention costs the square of their length.

    Returns:
        `input_ids`, `mm_token_type_ids`, `labels` and `position_ids`, all (R,S), S the longest
        row; `pixel_values` (N,3,H,W) in the order in which the rows show them, absent if there is
        no image. A sample's first label is -100: what stands before it is another sample.
    """
    lengths = [item["input_ids"].shape[1] for item in features]
    rows = first_fit_decreasing(lengths, sum(lengths) if one_row else max(lengths))
    width = max(sum(lengths[place] for place in row) for row in rows)
    batch = {
        key: pad_sequence(
            [torch.cat([features[place][key][0] for place in row]) for row in rows],
            batch_first=True,
            padding_value=value,
        )
        for key, value in (
            ("input_ids", pad_token_id),
            ("mm_token_type_ids", 0),
            ("labels", IGNORE_INDEX),
        )
    }
    batch["position_ids"] = torch.stack(
        [_positions([lengths[place] for place in row], width) for row in rows]
    )
    batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, IGNORE_INDEX)
    shown = [features[place] for row in rows for place in row]
    pixels = [item["pixel_values"] for item in shown if "pixel_values" in item]
    return batch | ({"pixel_values": torch.cat(pixels)} if pixels else {})


def _positions(lengths: Sequence[int], width: int) -> torch.Tensor:
    """(width,): 0, 1, … for each of the lengths, and for what is left of the row."""
    rest = width - sum(lengths)
    return torch.cat([torch.arange(length) for length in (*lengths, rest)])
