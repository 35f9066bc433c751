"""The decoder in 8 or 4 bits, by bitsandbytes; the vision encoder and the abstractor stay whole.

Images pass through those first, and they are a twentieth of the released model: rounding them
would cost much and save little. Only the Linears in the decoder's layers are rounded.
"""

import importlib.util
import logging

import torch
from transformers import BitsAndBytesConfig

from owl2.errors import InputError

BITS = ("8bit", "4bit")
KEPT = ["model.vision_model", "model.visual_abstractor", "lm_head"]


def quantization_config(bits: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """How to load a base model in so many bits: `from_pretrained(quantization_config=...)`.

    Args:
        bits: one of `BITS`.
        compute_dtype: of the arithmetic with 4-bit weights.

    Raises:
        InputError: bitsandbytes is not installed, or no such number of bits.
    """
    if bits not in BITS:
        raise InputError(f"quantize is {bits!r}; it must be one of {', '.join(BITS)}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"quantize={bits} needs bitsandbytes, which is not installed: "
            "pip install 'owl2-vlm[quant]'"
        )
    # It says at every product in 8 bits that bfloat16 goes through float16, its usual way.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEPT)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",  # QLoRA's: levels as a normal distribution needs them
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=KEPT,  # read for 4 bits, too
    )
