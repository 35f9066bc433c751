"""The two models of every suite: owl2, and LLaVA as a reference.

A suite has one test class per subject, named after it: ``Owl2...`` and ``Llava...``. The summary
(tests/peers/summary.py) compares their failures.
"""

import atexit
import functools
import tempfile
from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import Owl2Tokenizer, train_tokenizer
from tests.tiny import make_config

BATCH, TEXT_TOKENS, VOCABULARY = 7, 7, 99  # a batch of 7, as some of the tests require
TEXTS = ["USER: what is this? ASSISTANT: a red circle", "lower newer, lowest!", "你好 🦉"] * 5
LLAVA_IMAGE_TOKEN = "<image>"
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}"
    "{% endgeneration %}{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def owl2_config(vocab_size=VOCABULARY, pad_token_id=1, **settings):
    return make_config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=37,
        max_position_embeddings=512,
        pad_token_id=pad_token_id,
        vision={"num_hidden_layers": 2},
        **settings,
    )


def llava_config(vocab_size=VOCABULARY, image_token_id=0, pad_token_id=1):
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
    )
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token_id,
        image_seq_length=4,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )


class SubjectTester:
    """The `model_tester` of transformers' mixins: sizes, a configuration, and inputs with images.

    Args:
        make_config: Creates the configuration of the subject.
        num_image_tokens: Image tokens per image.
    """

    is_training = True
    batch_size = BATCH
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    vocab_size = VOCABULARY
    pad_token_id = 1
    num_channels, image_size = 3, 8

    def __init__(self, parent, make_config, num_image_tokens, attention=None):
        self.parent = parent
        self.make_config = make_config
        self.attention = attention
        self.num_image_tokens = num_image_tokens
        self.seq_length = self.encoder_seq_length = TEXT_TOKENS + num_image_tokens

    def get_config(self):
        config = self.make_config()
        if self.attention:
            config._attn_implementation = self.attention
        return config

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        ids = torch.randint(2, VOCABULARY - 1, (self.batch_size, self.seq_length))
        ids[:, : self.num_image_tokens] = config.image_token_id
        shape = (self.batch_size, self.num_channels, self.image_size, self.image_size)
        inputs = {
            "pixel_values": torch.rand(shape),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }
        return config, inputs


def write_checkpoints(directory):
    """A tiny owl2 and a tiny LLaVA with processors, in ``owl2/llama`` and ``llava/llama``.

    Both decoders are LLaMA layers, which PEFT's tests recognize by this name. These tests have id 1
    in their inputs, so it must not be the padding, whose embedding is zeros.
    """
    directory = Path(directory)
    (directory / "tokenizer").mkdir(parents=True)
    train_tokenizer(TEXTS, directory / "tokenizer" / "tokenizer.model", 320)
    tokenizer = Owl2Tokenizer(directory / "tokenizer" / "tokenizer.model")
    torch.manual_seed(0)
    model = Owl2ForConditionalGeneration(owl2_config(len(tokenizer), pad_token_id=0))
    model.save_pretrained(directory / "owl2" / "llama")
    processor = Owl2Processor(Owl2ImageProcessor(8), tokenizer, num_image_tokens=3)
    processor.save_pretrained(directory / "owl2" / "llama")

    tokenizer = LlamaTokenizer.from_pretrained(directory / "tokenizer", pad_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": [LLAVA_IMAGE_TOKEN]})
    image_id = tokenizer.convert_tokens_to_ids(LLAVA_IMAGE_TOKEN)
    model = LlavaForConditionalGeneration(llava_config(len(tokenizer), image_id, pad_token_id=0))
    model.save_pretrained(directory / "llava" / "llama")
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    ).save_pretrained(directory / "llava" / "llama")


@functools.cache
def checkpoints():
    """`write_checkpoints` in a temporary directory of this process."""
    directory = tempfile.TemporaryDirectory(prefix="peers")
    atexit.register(directory.cleanup)
    write_checkpoints(directory.name)
    return Path(directory.name)


def checkpoint(subject):
    """Path of the checkpoint of "owl2" or "llava"."""
    return str(checkpoints() / subject / "llama")
