"""The tests that PEFT runs for each decoder model, with text and with image inputs."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from tests import test_decoder_models as source
from tests.peers.subjects import checkpoint, checkpoints

source.PEFT_DECODER_MODELS_TO_TEST[:] = ["llama"]  # relative to the subject's directory


class PeftSuite(source.TestDecoderModels):
    """PEFT's tests of a subject. Tests of models on the hub are excluded."""

    transformers_class = AutoModelForImageTextToText
    subject: str
    num_image_tokens = 0  # of the image in each input; 0 for text inputs

    @pytest.fixture(autouse=True)
    def use_checkpoints(self, monkeypatch):
        monkeypatch.chdir(checkpoints() / self.subject)

    def _test_generate_pos_args(self, *args, **kwargs):
        self.num_image_tokens = 0  # the test passes ids without images
        super()._test_generate_pos_args(*args, **kwargs)

    def _test_passing_input_embeds_works(self, *args, **kwargs):
        self.num_image_tokens = 0  # the test passes embeddings of ids without images
        super()._test_passing_input_embeds_works(*args, **kwargs)

    def prepare_inputs_for_testing(self):
        inputs = super().prepare_inputs_for_testing()
        if self.num_image_tokens:
            image_token_id = AutoConfig.from_pretrained(checkpoint(self.subject)).image_token_id
            image = torch.full((2, self.num_image_tokens), image_token_id)
            inputs = {
                "input_ids": torch.cat([image, inputs["input_ids"]], 1),
                "attention_mask": torch.cat([torch.ones_like(image), inputs["attention_mask"]], 1),
                "pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8),
            }
        return inputs


class TestOwl2Text(PeftSuite):
    subject = "owl2"


class TestLlavaText(PeftSuite):
    subject = "llava"


class TestOwl2Images(PeftSuite):
    subject, num_image_tokens = "owl2", 3


class TestLlavaImages(PeftSuite):
    subject, num_image_tokens = "llava", 4


del PeftSuite  # not collected
