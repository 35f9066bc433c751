"""The models of every suite: owl2's model types, and LLaVA as a reference.

A suite has one test class per subject, named after it: ``Owl2...``, ``Owl2_1...``, ``DocOwl...``,
``DocOwl2...``, and ``Llava...``. The summary (tests/peers/summary.py) compares their failures.

The scoring models and Co-Instruct have the model type, the classes and the tokenizer of
mPLUG-Owl2. Only their image policy differs, which the suite of image processors runs.
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
from owl2.model.registry import MODEL_TYPES
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import train_tokenizer
from tests.family import FOLDER
from tests.tiny import make_config

BATCH, TEXT_TOKENS, VOCABULARY = 7, 7, 99  # a batch of 7, as some of the tests require
# The model types of owl2 by subject.
MEMBERS = {
    "owl2": "mplug_owl2",
    "owl2_1": "mplug_owl2_1",
    "docowl": "mplug_docowl",
    "docowl2": "mplug_docowl2",
}
# The names of the subjects in the ids of tests, which the summary reads.
TITLES = {
    "owl2": "Owl2",
    "owl2_1": "Owl2_1",
    "docowl": "DocOwl",
    "docowl2": "DocOwl2",
    "llava": "Llava",
}
IMAGE_TOKENS = {**dict.fromkeys(MEMBERS, 3), "llava": 4}  # per image
# Options of the image processor of DocOwl for tests that require one square per image.
ONE_SQUARE = {"anchors": "grid_1", "add_global_img": False, "compress_pages": False}
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


def owl2_config(vocab_size=VOCABULARY, pad_token_id=1, member="mplug_owl2", **settings):
    sizes = {"intermediate_size": 37}
    if member == "mplug_owl2_1":
        sizes = {"intermediate_size": 74, "kv_channels": 8}
    return make_config(
        vocab_size=vocab_size,
        hidden_size=32,
        max_position_embeddings=512,
        pad_token_id=pad_token_id,
        vision={"num_hidden_layers": 2},
        member=member,
        **sizes | settings,
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
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return config, inputs | image_inputs(config, self.batch_size)


def image_inputs(config, count):
    """`pixel_values` of random images; for DocOwl2 of pages with two crops, and their grids."""
    visual = getattr(config, "visual_config", None)
    if visual is None or not visual.has_image_grids:
        return {"pixel_values": torch.rand(count, 3, 8, 8)}
    grids = torch.tensor([[1, 2]]).repeat(count, 1)
    return {"pixel_values": torch.rand(3 * count, 3, 8, 8), "image_grids": grids}


def write_checkpoints(directory):
    """A tiny model of each subject with its processor, in ``SUBJECT/llama``.

    The decoders are LLaMA layers, which PEFT's tests recognize by this name; that of mPLUG-Owl2.1
    is in ``owl2_1/llama`` as well, because the names of all subjects are the same. These tests have
    id 1 in their inputs, so it must not be the padding, whose embedding is zeros.
    """
    directory = Path(directory)
    (directory / "tokenizer").mkdir(parents=True)
    vocabulary = directory / "tokenizer" / "tokenizer.model"
    train_tokenizer(TEXTS, vocabulary, 320)
    for subject, member in MEMBERS.items():
        parts = MODEL_TYPES[member]
        has_own = parts.vocabulary_file != vocabulary.name
        own = FOLDER / "mplug_owl2_1" / "model" / parts.vocabulary_file
        tokenizer = parts.load("tokenizer")(own if has_own else vocabulary)
        pad = tokenizer.pad_token_id
        torch.manual_seed(0)
        config = owl2_config(len(tokenizer), pad_token_id=pad, member=member)
        model = Owl2ForConditionalGeneration(config)
        model.save_pretrained(directory / subject / "llama")
        Owl2Processor(
            parts.load("image_processor")(8, **parts.image_options),
            tokenizer,
            chat_template=parts.chat_template,
            num_image_tokens=IMAGE_TOKENS[subject],
            interleave_images=parts.interleave_images,
        ).save_pretrained(directory / subject / "llama")

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
    """Path of the checkpoint of a key of `TITLES`."""
    return str(checkpoints() / subject / "llama")
