"""Rows of token ids to a batch, with the options of transformers' tokenizers.

B rows, S tokens of the longest row.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from owl2.errors import ErrorCode, InputError

_PADDING = ("padding", "padding_side", "max_length", "pad_to_multiple_of")
_OPTIONS = {
    *_PADDING,
    *("add_special_tokens", "truncation", "return_attention_mask", "return_tensors", "verbose"),
}


def make_batch(
    rows: list[list[int]],
    options: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    start_ids: list[int],
    image_token_id: int,
) -> dict[str, Any]:
    """`input_ids` and `attention_mask` (B,S).

    Args:
        options: `text_kwargs` of a processor. `truncation` removes tokens on the tokenizer's
            `truncation_side`, after the `start_ids`.

    Raises:
        InputError: Truncation would remove a part of an image, or a requested option has no effect.
    """
    if unsupported := [name for name in options.keys() - _OPTIONS if options[name]]:
        raise InputError(
            f"{', '.join(unsupported)} cannot be requested: call the tokenizer.",
            ErrorCode.UNSUPPORTED,
        )
    if options.get("truncation") not in (None, False, "do_not_truncate"):
        keep = len(start_ids) if tokenizer.truncation_side == "left" else None
        limit = options.get("max_length") or tokenizer.model_max_length
        rows = [truncate_text(row, limit, image_token_id, keep) for row in rows]
    layout: Any = {name: options.get(name) for name in _PADDING}
    layout["padding"] = layout["padding"] or False
    layout["return_attention_mask"] = options.get("return_attention_mask") is not False
    return dict(tokenizer.pad({"input_ids": rows}, **layout))


def truncate_text(
    ids: list[int], limit: int, image_token_id: int, keep: int | None = None
) -> list[int]:
    """At most `limit` ids, without the last ones, or without those after the first `keep`.

    Raises:
        InputError: This would remove a part of an image.
    """
    excess = max(0, len(ids) - limit)
    start = len(ids) - excess if keep is None else keep
    if image_token_id in ids[start : start + excess]:
        end = len(ids) - ids[::-1].index(image_token_id)
        raise InputError(
            f"max_length {limit} would remove a part of an image: the text has {len(ids)} tokens, "
            f"and its last image ends at token {end}. Use fewer images, less text, or a larger "
            "max_length.",
            ErrorCode.TOO_LONG,
        )
    return ids[:start] + ids[start + excess :]
