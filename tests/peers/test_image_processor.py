"""ImageProcessingTestMixin of transformers."""

import unittest

from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from owl2.processing.image_processing import Owl2ImageProcessor


class Tester(ImageProcessingTester):
    """Images of random sizes, and the options and output size of a subject's processor."""

    def __init__(self, parent):
        super().__init__(parent)
        self.image_processing_classes = {"pil": parent.processor_class}

    def prepare_image_processor_dict(self):
        return dict(self.parent.options)

    def expected_output_image_shape(self, images):
        return self.num_channels, 18, 18


class Owl2ImageProcessorTest(ImageProcessingTestMixin, unittest.TestCase):
    processor_class = Owl2ImageProcessor
    options = {"size": {"shortest_edge": 18}, "crop_size": {"height": 18, "width": 18}}
    image_processor_tester_class = Tester


class LlavaImageProcessorTest(ImageProcessingTestMixin, unittest.TestCase):
    processor_class = LlavaImageProcessorPil
    options = {"size": {"shortest_edge": 20}, "crop_size": {"height": 18, "width": 18}}
    image_processor_tester_class = Tester
