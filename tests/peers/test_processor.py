"""ProcessorTesterMixin of transformers."""

import unittest

from tests.test_processing_common import ProcessorTesterMixin
from transformers import LlavaProcessor

from owl2.processing.processor import Owl2Processor
from tests.peers.subjects import checkpoint


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


class LlavaProcessorTest(ProcessorSuite, unittest.TestCase):
    subject, processor_class = "llava", LlavaProcessor
