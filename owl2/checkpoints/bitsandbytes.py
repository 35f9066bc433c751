"""Loads the decoder in 8 or 4 bits with bitsandbytes.

Only the linear layers of the decoder are quantized. The vision encoder and the abstractor are a
twentieth of the released model: quantizing them would save little memory and cost accuracy.
"""

import logging

import torch
from transformers import BitsAndBytesConfig

from owl2.errors import require_package

SKIPPED_MODULES = ["model.vision_model", "model.visual_abstractor", "lm_head"]


def bitsandbytes_config(bits: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """The `quantization_config` argument of `from_pretrained`.

    Args:
        bits: "8bit" or "4bit".
        compute_dtype: Dtype of the arithmetic with 4-bit weights.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    require_package("bitsandbytes", f"quantize={bits}", "quant")
    # It logs at every 8-bit product that bfloat16 is converted to float16, as usual.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=SKIPPED_MODULES)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",  # as in QLoRA: levels for normally distributed weights
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=SKIPPED_MODULES,  # applies to 4 bits as well
    )
