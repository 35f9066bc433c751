"""Quantization libraries through transformers' `quantization_config`.

docs/ecosystem.md describes HQQ and GPTQ.
"""

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    HqqConfig,
    QuantoConfig,
    TorchAoConfig,
)

import owl2  # noqa: F401  # registers the model
from tests.peers.subjects import IMAGE_TOKENS, TITLES, checkpoint, image_inputs

pytestmark = pytest.mark.peers


def torchao():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTIZATIONS = {
    "bitsandbytes8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes4": lambda: BitsAndBytesConfig(load_in_4bit=True),
    "torchao": torchao,
    "quanto": lambda: QuantoConfig(weights="int8"),
}


@pytest.mark.parametrize("name", QUANTIZATIONS)
@pytest.mark.parametrize("subject", TITLES, ids=TITLES.values())
def test_quantized_logits(subject, name):
    path = checkpoint(subject)
    plain = AutoModelForImageTextToText.from_pretrained(path)
    quantized = AutoModelForImageTextToText.from_pretrained(
        path, quantization_config=QUANTIZATIONS[name]()
    )
    image = [plain.config.image_token_id] * IMAGE_TOKENS[subject]
    inputs = {
        "input_ids": torch.tensor([[5, 6, *image, 7, 8, 9]]),
        **image_inputs(plain.config, 1),
    }
    with torch.no_grad():
        expected = plain(**inputs).logits.float()
        found = quantized(**inputs).logits.float()
    difference = (found - expected).norm() / expected.norm()
    assert 0 < difference < (0.3 if name == "bitsandbytes4" else 0.1)


@pytest.mark.parametrize("subject", ["owl2", "llava"], ids=["Owl2", "Llava"])
def test_hqq_is_refused_by_transformers(subject):
    """For every model; if a later version of transformers accepts it, add it to the cases."""
    with pytest.raises(NotImplementedError, match="HQQ is not available yet"):
        AutoModelForImageTextToText.from_pretrained(
            checkpoint(subject), quantization_config=HqqConfig(nbits=8)
        )
