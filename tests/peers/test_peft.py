"""The tests that PEFT runs for each decoder model, with text and with image inputs."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from tests import test_decoder_models as source
from tests.peers.subjects import IMAGE_TOKENS, checkpoint, checkpoints

source.PEFT_DECODER_MODELS_TO_TEST[:] = ["llama"]  # relative to the subject's directory


def skip_beft(config_cls, model_id, config_kwargs):
    """PEFT skips the tests of merging for LLaMA with all methods. Only BEFT needs a bias."""
    if config_cls is source.BeftConfig:
        pytest.skip("the layers have no bias")


source.check_beft_config = skip_beft
# The tests for a sibling: those that run its decoder. A class has over a thousand tests.
DECODER_TESTS = (
    *("test_save_pretrained", "test_merge_layers", "test_mixed_adapter_batches", "test_generate"),
    *("test_training_decoders", "test_training_decoders_gradient_checkpointing"),
    *("test_training_prompt_learning_tasks", "test_disable_adapter"),
    "test_passing_input_embeds_works",
)


class PeftSuite(source.TestDecoderModels):
    """PEFT's tests of a subject. Tests of models on the hub are excluded."""

    transformers_class = AutoModelForImageTextToText
    subject: str
    has_images = False
    selected_tests = ()  # names; (): all

    @pytest.fixture(autouse=True)
    def use_checkpoints(self, monkeypatch):
        monkeypatch.chdir(checkpoints() / self.subject)

    def _test_generate_pos_args(self, *args, **kwargs):
        self.has_images = False  # the test passes ids without images
        super()._test_generate_pos_args(*args, **kwargs)

    def _test_passing_input_embeds_works(self, *args, **kwargs):
        self.has_images = False  # the test passes embeddings of ids without images
        super()._test_passing_input_embeds_works(*args, **kwargs)

    def prepare_inputs_for_testing(self):
        inputs = super().prepare_inputs_for_testing()
        if self.has_images:
            image_token_id = AutoConfig.from_pretrained(checkpoint(self.subject)).image_token_id
            image = torch.full((2, IMAGE_TOKENS[self.subject]), image_token_id)
            inputs = {
                "input_ids": torch.cat([image, inputs["input_ids"]], 1),
                "attention_mask": torch.cat([torch.ones_like(image), inputs["attention_mask"]], 1),
                "pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8),
            }
        return inputs


class TestOwl2Text(PeftSuite):
    subject = "owl2"


class TestOwl2_1Text(PeftSuite):  # the version is in the name
    subject, selected_tests = "owl2_1", DECODER_TESTS


class TestLlavaText(PeftSuite):
    subject = "llava"


class TestOwl2Images(PeftSuite):
    subject, has_images = "owl2", True


class TestOwl2_1Images(PeftSuite):
    subject, has_images, selected_tests = "owl2_1", True, DECODER_TESTS


class TestLlavaImages(PeftSuite):
    subject, has_images = "llava", True


del PeftSuite  # not collected
