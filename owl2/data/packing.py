"""Sample packing: several samples in one row of a batch, without attention between them.

::

    samples    AAAAA  BBB  CC  DD                lengths 5, 3, 2, 2
    padded     AAAAA                             4 rows of 5: 20 positions for 12 tokens
               BBB..
               CC...
               DD...
    packed     AAAAA          position_ids 01234     3 rows of 5: 15 positions
               BBBCC                       01201
               DD...                       01012

Only the layout differs. The positions restart with each sample, and where they do, transformers'
masks (and flash attention's variable lengths) start a new sequence. That requires that there is no
`attention_mask` and no cache. So a packed batch has no mask, and the padding at the end of a row is
a sequence without labels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from owl2.constants import IGNORE_INDEX

# Of scored samples, see `owl2.data.score_labels`.
SCORE_FEATURES = ("level_positions", "level_probs", "gt_scores", "stds")


def first_fit_decreasing(lengths: Sequence[int], capacity: float) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `capacity`; at most 11/9 of the optimum + 1 rows.

    The longest comes first, and each goes to the first row with enough space (Johnson, 1973). A
    length above `capacity` gets its own row.
    """
    rows: list[list[int]] = []
    free: list[float] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((row for row, space in enumerate(free) if space >= lengths[i]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(capacity)
        rows[row].append(i)
        free[row] -= lengths[i]
    return rows


def pack(
    features: Sequence[dict[str, Any]], pad_token_id: int, one_row: bool = False
) -> dict[str, torch.Tensor]:
    """Packs samples into R rows as long as the longest sample, or into one row.

    Longer rows would not reduce the padding, and attention with a dense mask costs the square of
    their length.

    Returns:
        `input_ids`, `mm_token_type_ids`, `labels` and `position_ids`, all (R,S), S of the longest
        row; `pixel_values` (N,3,H,W) in the order of the rows, absent without images. The first
        label of each sample is -100, because the preceding token belongs to another sample.
    """
    lengths = [item["input_ids"].shape[1] for item in features]
    rows = first_fit_decreasing(lengths, sum(lengths) if one_row else max(lengths))
    width = max(sum(lengths[i] for i in row) for row in rows)
    batch = pad_rows([[features[i] for i in row] for row in rows], pad_token_id)
    del batch["attention_mask"]
    batch["position_ids"] = torch.stack([_positions([lengths[i] for i in r], width) for r in rows])
    batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, IGNORE_INDEX)
    return batch


def pad_rows(
    rows: Sequence[Sequence[dict[str, Any]]], pad_token_id: int
) -> dict[str, torch.Tensor]:
    """The samples of each row one after the other, padded on the right to the longest row.

    Returns:
        `input_ids` (padded with `pad_token_id`), `attention_mask` (0), `mm_token_type_ids` (0) and
        `labels` (-100), all (R,S); `pixel_values` (N,3,H,W), and `image_grids` of some models, in
        the order of the rows, absent without images; the `SCORE_FEATURES` of the scored samples.
    """
    padding = {
        "input_ids": pad_token_id,
        "attention_mask": 0,
        "mm_token_type_ids": 0,
        "labels": IGNORE_INDEX,
    }
    batch = {
        key: pad_sequence(
            [torch.cat([item[key][0] for item in row]) for row in rows],
            batch_first=True,
            padding_value=value,
        )
        for key, value in padding.items()
    }
    for key in ("pixel_values", "image_grids", *SCORE_FEATURES):
        if parts := [item[key] for row in rows for item in row if key in item]:
            batch[key] = torch.cat(parts)
    return batch


def _positions(lengths: Sequence[int], width: int) -> torch.Tensor:
    """(width,): 0, 1, ... for each length, and for the rest of the row."""
    rest = width - sum(lengths)
    return torch.cat([torch.arange(length) for length in (*lengths, rest)])
