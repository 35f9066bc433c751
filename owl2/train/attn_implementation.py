"""How a recipe's attention is computed: whether this machine can, and how packed rows must lie.

eager, sdpa          everywhere; packed samples are kept apart by a dense mask, (rows, S, S)
flex_attention       a block-sparse mask; PyTorch learns through it on a GPU only
flash_attention_2    no mask: lengths that vary, of one row; GPU, bfloat16, the package
"""

import importlib.util

import torch
from transformers.utils.import_utils import is_flash_attn_2_available

from owl2.data.collate import Layout
from owl2.errors import InputError
from owl2.train.recipe import Recipe


def require_attention(recipe: Recipe) -> None:
    """Refuse what this machine cannot compute, before weights are read.

    Raises:
        InputError: no GPU, no flash-attn, or a precision that it does not have.
    """
    if recipe.attn_implementation not in ("flash_attention_2", "flex_attention"):
        return
    has_cuda = torch.cuda.is_available()
    if not has_cuda:
        raise InputError(
            f"attention: {recipe.attn_implementation} trains on a GPU only; set attn_implementation=sdpa"
        )
    if recipe.attn_implementation == "flex_attention":
        return
    # transformers takes the one or the other.
    if not is_flash_attn_2_available() and importlib.util.find_spec("kernels") is None:
        raise InputError(
            "attention: flash_attention_2 needs the package flash-attn (pip install flash-attn); "
            "or set attn_implementation=sdpa"
        )
    if recipe.resolve_dtype("cuda") != "bfloat16":
        raise InputError("attention: flash_attention_2 computes in bfloat16; set precision to it")


def layout(recipe: Recipe) -> Layout:
    """How the samples of a batch lie in its rows."""
    if not recipe.packing:
        return "padded"
    # Flash attention keeps samples apart in a batch of one row only.
    return "one row" if recipe.attn_implementation == "flash_attention_2" else "packed"
