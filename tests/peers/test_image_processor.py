"""ImageProcessingTestMixin of transformers."""

import unittest

from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from owl2.processing.anchor_crops import CropImageProcessor
from owl2.processing.image_processing import Owl2ImageProcessor
from tests.peers.subjects import ONE_SQUARE


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


class Owl2PadImageProcessorTest(Owl2ImageProcessorTest):
    """The policy of the scoring models and of Co-Instruct."""

    options = Owl2ImageProcessorTest.options | {"image_policy": "pad"}


class DocOwlImageProcessorTest(Owl2ImageProcessorTest):
    processor_class = CropImageProcessor

    def setUp(self):
        if self._testMethodName.startswith("test_call_"):  # these require one square per image
            self.options = self.options | ONE_SQUARE
        super().setUp()


class DocOwl2ImageProcessorTest(DocOwlImageProcessorTest):
    options = Owl2ImageProcessorTest.options | {"anchors": "grid_12", "compress_pages": True}


class LlavaImageProcessorTest(ImageProcessingTestMixin, unittest.TestCase):
    processor_class = LlavaImageProcessorPil
    options = {"size": {"shortest_edge": 20}, "crop_size": {"height": 18, "width": 18}}
    image_processor_tester_class = Tester
