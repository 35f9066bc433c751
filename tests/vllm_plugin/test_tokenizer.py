"""The tokenizer for vLLM gives the ids of the processor, also after copies and pickling."""

import copy
import pickle
import shutil

import pytest

from tests.engine.conftest import random_image

pytestmark = pytest.mark.vllm

PROMPTS = ["USER: what is this? ASSISTANT:", "a  b   c\n\n d", " x", "你好 🦉</s>", "<s>a<s>", ""]


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    from owl2.vllm_plugin.tokenizer import Owl2PromptTokenizer

    return Owl2PromptTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def processor(checkpoint):
    from owl2.processing.processor import Owl2Processor

    return Owl2Processor.from_pretrained(checkpoint)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_text_ids_equal_the_processor(tokenizer, processor, prompt):
    assert tokenizer.encode(prompt) == processor(text=prompt)["input_ids"][0]
    assert tokenizer(prompt)["input_ids"] == tokenizer.encode(prompt)
    assert tokenizer([prompt, "b"])["input_ids"] == [
        tokenizer.encode(prompt),
        tokenizer.encode("b"),
    ]


def test_an_image_is_one_id_between_text_segments(tokenizer, processor):
    prompt = "USER: <|image|>a  red<|image|><|image|> circle"
    ids = processor(text=prompt, images=[[random_image(1)] * 3])["input_ids"][0]
    place, count = processor.image_token_id, processor.num_image_tokens
    expanded = [
        id_ for id_ in tokenizer.encode(prompt) for _ in range(count if id_ == place else 1)
    ]
    assert expanded == ids


def test_a_chat_has_one_start_token(tokenizer, processor):
    chat = [{"role": "user", "content": [{"type": "text", "text": "what is this?"}]}]
    options = {"chat_template": processor.chat_template, "add_generation_prompt": True}
    text = tokenizer.apply_chat_template(conversation=chat, tokenize=False, **options)
    expected = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)[0]
    for add_special_tokens in (True, False):
        assert tokenizer.encode(text, add_special_tokens=add_special_tokens) == expected
    assert tokenizer.apply_chat_template(conversation=chat, **options) == expected


@pytest.mark.parametrize(
    "content", ["<|image|>Hi", [{"type": "image"}, {"type": "text", "text": "Hi"}]]
)
def test_a_chat_has_the_line_break_of_training(checkpoint, processor, tmp_path, content):
    from owl2.processing.processor import Owl2Processor
    from owl2.vllm_plugin.tokenizer import Owl2PromptTokenizer

    shutil.copytree(checkpoint, tmp_path / "model")
    Owl2Processor.from_pretrained(checkpoint, image_newline=True).save_pretrained(
        tmp_path / "model"
    )
    tokenizer = Owl2PromptTokenizer.from_pretrained(tmp_path / "model")
    options = {"chat_template": processor.chat_template, "tokenize": False}
    chat = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(conversation=chat, **options)
    assert text.endswith("USER: <|image|>\nHi")


def test_no_start_token_without_special_tokens(tokenizer):
    assert tokenizer.encode("red", add_special_tokens=False) == tokenizer.encode("red")[1:]


def test_truncation_side(checkpoint):
    from owl2.vllm_plugin.tokenizer import Owl2PromptTokenizer

    for side, part in (("left", slice(-4, None)), ("right", slice(None, 4))):
        tokenizer = Owl2PromptTokenizer.from_pretrained(checkpoint, truncation_side=side)
        complete = tokenizer.encode("what is this?")
        assert tokenizer.encode("what is this?", truncation=True, max_length=4) == complete[part]


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))]
)
def test_copies_are_equal(tokenizer, again):
    copied = again(tokenizer)
    prompt = "USER: <|image|>a  red"
    assert copied.encode(prompt) == tokenizer.encode(prompt)
    assert copied.name_or_path == tokenizer.name_or_path
    assert copied.max_token_id == tokenizer.max_token_id < copied.encode("<|image|>")[-1]


@pytest.fixture(scope="module")
def fast_checkpoint(tmp_path_factory, checkpoint):
    """A checkpoint with another kind of tokenizer: byte-level BPE without a start token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from owl2.processing.image_processing import Owl2ImageProcessor
    from owl2.processing.processor import Owl2Processor

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["what is this? a red circle"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    directory = tmp_path_factory.mktemp("fast")
    processor = Owl2Processor(Owl2ImageProcessor(8), tokenizer, num_image_tokens=3)
    processor.save_pretrained(directory)
    return directory


def test_a_fast_tokenizer_of_another_family(fast_checkpoint):
    from vllm.tokenizers.hf import maybe_make_thread_pool

    from owl2.processing.processor import Owl2Processor
    from owl2.vllm_plugin.tokenizer import Owl2PromptTokenizer

    processor = Owl2Processor.from_pretrained(fast_checkpoint)
    tokenizer = Owl2PromptTokenizer.from_pretrained(fast_checkpoint)
    # vLLM copies a fast tokenizer for each thread.
    pooled = maybe_make_thread_pool(copy.copy(tokenizer), 2)
    for prompt in PROMPTS:
        ids = processor(text=prompt)["input_ids"][0]
        assert tokenizer.encode(prompt) == pooled.encode(prompt) == ids
        assert tokenizer.decode(ids) == prompt
    place = processor.image_token_id
    assert pooled.encode("a<|image|>a").count(place) == 1
    assert tokenizer.max_token_id < place
