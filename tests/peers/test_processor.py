"""ProcessorTesterMixin of transformers."""

import unittest

from tests.test_processing_common import ProcessorTesterMixin
from transformers import LlavaProcessor

from owl2.processing.processor import Owl2Processor
from tests.peers.subjects import IMAGE_TOKENS, ONE_SQUARE, checkpoint


class ProcessorSuite(ProcessorTesterMixin):
    subject: str

    @classmethod
    def setUpClass(cls):
        cls.model_id = checkpoint(cls.subject)
        super().setUpClass()

    @staticmethod
    def prepare_processor_dict():
        return {}


class Owl2ProcessorTest(ProcessorSuite, unittest.TestCase):
    subject, processor_class = "owl2", Owl2Processor

    def setUp(self):
        # These tests add a placeholder for a video, and a video only for a video processor.
        if self._testMethodName in (
            "test_processor_with_multiple_inputs",
            "test_replacement_offsets",
        ):
            self.video_token = ""
        super().setUp()

    @staticmethod
    def prepare_processor_dict():
        return {"num_image_tokens": IMAGE_TOKENS["owl2"]}


class Owl2_1ProcessorTest(Owl2ProcessorTest):
    subject = "owl2_1"


class DocOwlProcessorTest(Owl2ProcessorTest):
    subject = "docowl"
    # An image is up to ten crops with their names.
    images_text_kwargs_max_length = 1017
    images_text_kwargs_override_max_length = 1012
    images_unstructured_max_length = 976

    def get_processor(self, **options):
        processor = super().get_processor(**options)
        if "chat_template_image" in self._testMethodName:  # requires one square per image
            processor.image_processor = processor.image_processor.replace(**ONE_SQUARE)
        return processor

    @staticmethod
    def prepare_processor_dict():
        return Owl2ProcessorTest.prepare_processor_dict() | {"interleave_images": True}


class DocOwl2ProcessorTest(DocOwlProcessorTest):
    subject = "docowl2"


class LlavaProcessorTest(ProcessorSuite, unittest.TestCase):
    subject, processor_class = "llava", LlavaProcessor
