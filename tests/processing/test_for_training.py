"""Labels of training: they decode to the answers; truncation; samples without labels."""

from itertools import groupby
from pathlib import Path

import pytest
import torch
from rich.console import Console

from owl2.errors import ErrorCode
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.labeling import show_labels
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import Owl2Tokenizer
from tests.errors import raises_input_error
from tests.processing.samples import CHATML, ask

PLACES = 6
ANSWERS = [
    "Bus",
    "  kept?  ",
    "一只猫头鹰站在树枝上。🦉",
    "```python\nprint(f(1))\n```",
    "</s> x",
    "12\n\n",
]


@pytest.mark.parametrize("kind", ["llama", "tiny", "byte level"])
@pytest.mark.parametrize("template", ["default", "ChatML"])
def test_labels_decode_to_exactly_the_answers(kind, template, llama, tiny_file, byte_level, image):
    tokenizer = {"llama": llama, "tiny": Owl2Tokenizer(tiny_file), "byte level": byte_level}[kind]
    chat_template = CHATML if template == "ChatML" else None
    processor = Owl2Processor(Owl2ImageProcessor(28), tokenizer, chat_template, PLACES)
    space, end = ("", "<|im_end|>") if template == "ChatML" else (" ", tokenizer.eos_token)
    for answer in ANSWERS:
        messages = [*ask(image, "What is it?", answer=answer), *ask("And now?", answer="A cat.")]
        batch = processor.for_training(messages)
        assert {key: tuple(value.shape) for key, value in batch.items()} == {
            **dict.fromkeys(
                ("input_ids", "attention_mask", "mm_token_type_ids", "labels"),
                (1, batch["input_ids"].shape[1]),
            ),
            "pixel_values": (1, 3, 28, 28),
        }
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        learned = labels != -100
        assert (labels[learned] == ids[learned]).all()
        assert not learned[batch["mm_token_type_ids"][0].bool()].any()
        runs = [
            [place for place, _ in run]
            for is_learned, run in groupby(enumerate(learned.tolist()), lambda item: item[1])
            if is_learned
        ]
        texts = [tokenizer.decode(ids[run]) for run in runs]
        expected = [f"{space}{answer}{end}", f"{space}A cat.{end}"]
        if kind != "byte level":  # SentencePiece drops the first space of what it decodes
            expected = [text.removeprefix(" ") for text in expected]
        assert texts == expected
        # The prompt of inference is the beginning of the sample of training.
        prompt = processor.apply_chat_template(
            messages[:3], add_generation_prompt=True, tokenize=True
        )[0]
        assert ids[: len(prompt)].tolist() == prompt and runs[1][0] == len(prompt)


def test_text_only_sample_and_image_only_turn(processor, image):
    batch = processor.for_training(ask("Hi", answer="Hello."))
    assert "pixel_values" not in batch and not batch["mm_token_type_ids"].any()
    batch = processor.for_training(ask(image, answer="A bus."))
    assert batch["pixel_values"].shape == (1, 3, 56, 56)


def test_max_length_truncates_on_the_right(processor, image):
    messages = ask(image, "What is it?", answer="A red bus.")
    whole = processor.for_training(messages)
    length = whole["input_ids"].shape[1]
    cut = processor.for_training(messages, max_length=length - 2)
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "labels"):
        assert torch.equal(cut[key], whole[key][:, : length - 2])
    assert torch.equal(
        processor.for_training(messages, max_length=length)["labels"], whole["labels"]
    )
    prompt = int((whole["labels"] == -100).sum())
    nothing = processor.for_training(messages, max_length=prompt)
    assert (nothing["labels"] == -100).all()  # the data side counts it and leaves it out
    end = 5 + PLACES  # <s> USER : ▁ and the image
    assert int(whole["mm_token_type_ids"].nonzero()[-1][1]) == end - 1
    assert processor.for_training(messages, max_length=end)["input_ids"].shape == (1, end)
    with raises_input_error(ErrorCode.TOO_LONG, length, end):
        processor.for_training(messages, max_length=end - 1)


def test_an_end_token_in_an_answer_is_learned_once(processor):
    expected = processor.for_training([*ask("Hi", answer="red"), *ask("And?", answer="blue")])
    turns = [*ask("Hi", answer="red</s>"), *ask("And?", answer="blue </s> </s>\n")]
    batch = processor.for_training(turns)
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    assert batch["labels"].tolist() == expected["labels"].tolist()
    inside = processor.for_training(ask("Hi", answer="red</s>blue"))["input_ids"]
    assert int((inside == processor.tokenizer.eos_token_id).sum()) == 2
    with raises_input_error(ErrorCode.EMPTY_MESSAGE, "</s>"):
        processor.for_training(ask("Hi", answer=" </s>"))


def test_an_answer_without_loss_has_no_labels(processor):
    turns = [*ask("Hi", answer="red"), *ask("And?", answer="blue")]
    expected = processor.for_training(turns)
    turns[1]["loss"] = False
    batch = processor.for_training(turns)
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    labels, without = expected["labels"], batch["labels"]
    kept = without != -100
    assert processor.decode(without[kept].tolist()) == "blue</s>"
    assert torch.equal(labels[kept], without[kept])
    turns[3]["loss"] = False
    assert (processor.for_training(turns)["labels"] == -100).all()


def test_samples_without_labels_are_rejected(processor, llama_file, image):
    with raises_input_error(ErrorCode.INVALID_ROLE):
        processor.for_training(ask("Hi"))
    with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, "1 <|image|>", "0 image"):
        processor.for_training(ask("<|image|>Hi", answer="x"))
    with raises_input_error(ErrorCode.MISSING_IMAGE, "gone.png"):
        processor.for_training(ask(Path("gone.png"), answer="x"))
    processor.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with raises_input_error(ErrorCode.NO_LABELS, "{% generation %}"):
        processor.for_training(ask("Hi", answer="x"))
    processor.chat_template = None
    with raises_input_error(ErrorCode.INVALID_TYPE, None):
        processor.for_training(ask("Hi", answer="x"))
    processor.chat_template = CHATML
    processor.tokenizer = Owl2Tokenizer(llama_file)
    processor.tokenizer.eos_token = None
    with raises_input_error(ErrorCode.MISSING_VALUE, "eos_token"):
        processor.for_training(ask("Hi", answer="x"))


def test_colored_labels_equal_the_mask(processor, image):
    messages = [*ask(image, "What?", answer="A  bus."), *ask("Sure?", answer="Yes 🦉")]
    shown = show_labels(processor, messages)
    expected = "<s>USER: <|image|>×6What? ASSISTANT: A  bus.</s>USER: Sure? ASSISTANT: Yes 🦉</s>"
    assert shown.plain == expected
    bright = [shown.plain[s.start : s.end] for s in shown.spans if s.style == "bold green"]
    assert bright == [" A  bus.</s>", " Yes 🦉</s>"]
    assert {str(s.style) for s in shown.spans} == {"dim", "bold green"}
    console = Console(force_terminal=True, width=200, color_system="standard")
    with console.capture() as capture:
        console.print(shown)
    assert "\x1b[1;32m A  bus.</s>" in capture.get()
