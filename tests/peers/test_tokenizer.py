"""TokenizerTesterMixin of transformers."""

import shutil
import unittest

from tests.test_tokenization_common import TokenizerTesterMixin
from transformers import LlamaTokenizer

from owl2.processing.qwen_tokenizer import QwenTokenizer
from owl2.processing.tokenizer import Owl2Tokenizer
from tests.peers.subjects import checkpoint


class TokenizerSuite(TokenizerTesterMixin):
    subject: str

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        shutil.copytree(checkpoint(cls.subject), cls.tmpdirname, dirs_exist_ok=True)


class Owl2TokenizerTest(TokenizerSuite, unittest.TestCase):
    subject, tokenizer_class = "owl2", Owl2Tokenizer


class Owl2_1TokenizerTest(TokenizerSuite, unittest.TestCase):
    subject, tokenizer_class = "owl2_1", QwenTokenizer


class LlavaTokenizerTest(TokenizerSuite, unittest.TestCase):
    subject, tokenizer_class = "llava", LlamaTokenizer
