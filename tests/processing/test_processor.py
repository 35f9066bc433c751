"""Messages, prompts and images to model inputs; all golden prompts and labels."""

import json
import pickle
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from owl2.errors import ErrorCode, InputError
from owl2.processing.default_templates import CHAT_TEMPLATES
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.messages import user_message
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import Owl2Tokenizer
from tests.errors import raises_input_error
from tests.processing.samples import ask, equal_processors

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = range(len(json.loads((GOLDEN / "text" / "cases.json").read_text())["cases"]))
PLACES = 6


def golden_form(processor, values: list[int], ids: list[int]) -> list[int]:
    """Ids or labels with one entry for each image's places (the golden files' -200)."""
    short = []
    position = 0
    for is_image, run in groupby(ids, key=lambda id_: id_ == processor.image_token_id):
        length = len(list(run))
        part = values[position : position + length]
        if is_image:
            assert length % PLACES == 0 and len(set(part)) == 1
            part = [-200 if part[0] == processor.image_token_id else part[0]] * (length // PLACES)
        short += part
        position += length
    return short


def golden_messages(turns: list[dict], image) -> list[dict]:
    """The golden conversations as messages with the places of their images."""
    messages = []
    for turn in turns:
        text = turn["value"]
        if turn["from"] == "human":
            messages.append(user_message(text, [image] * text.count("<|image|>")))
        else:
            messages.append({"role": "assistant", "content": text})
    return messages


def test_line_break_of_training_is_saved_and_used_by_every_prompt(processor, image, tmp_path):
    question, training = ask(image, "What is it?"), ask(image, "What is it?", answer="A bus.")
    without = processor.encode(question).ids
    processor.image_newline = True
    processor.save_pretrained(tmp_path)
    again = Owl2Processor.from_pretrained(tmp_path)
    prompt = again.encode(question).ids
    assert prompt != without
    assert prompt == processor.encode(ask(image, "\nWhat is it?")).ids
    assert prompt == tuple(again.for_training(training)["input_ids"][0, : len(prompt)].tolist())
    text = again.apply_chat_template(question, add_generation_prompt=True)
    assert text == "USER: <|image|>\nWhat is it? ASSISTANT:"
    plain = Owl2Processor.from_pretrained(tmp_path, image_newline=False)
    assert plain.encode(question).ids == without
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_newline": "yes"}))
    with raises_input_error(ErrorCode.INVALID_CONFIG, file, "image_newline"):
        Owl2Processor.from_pretrained(tmp_path)


def test_images_precede_the_text_unless_the_setting_or_the_call_keeps_them(
    processor, image, tmp_path
):
    question, usual = ask("What is it?", image), ask(image, "What is it?")
    inside = processor.encode([user_message("What is it?<|image|>", [image])]).ids
    first = processor.encode(usual).ids
    assert processor.encode(question).ids == first != inside
    assert processor.encode(question, interleave_images=True).ids == inside
    assert processor.encode(question, unknown=1, messages=2).ids == first
    options = {"tokenize": True, "add_generation_prompt": True}
    for interleave, expected in ((None, first), (True, inside)):
        ids = processor.apply_chat_template(question, interleave_images=interleave, **options)
        assert ids == [list(expected)]
    for value in (True, False):
        processor.interleave_images = value
        processor.save_pretrained(tmp_path)
        again = Owl2Processor.from_pretrained(tmp_path)
        assert again.encode(question).ids == (inside if value else first)
        trained = again.for_training(ask("What is it?", image, answer="A bus."))["input_ids"]
        assert again.encode(question).ids == tuple(trained[0, : len(first)].tolist())
        other = Owl2Processor.from_pretrained(tmp_path, interleave_images=not value)
        assert other.encode(question).ids == (first if value else inside)
        assert again.encode(usual).ids == first
    prompt = "USER: What is it?<|image|> ASSISTANT:"
    assert processor(text=prompt, images=image)["input_ids"] == [list(inside)]
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"interleave_images": 1}))
    with raises_input_error(ErrorCode.INVALID_CONFIG, file, "interleave_images"):
        Owl2Processor.from_pretrained(tmp_path)


# ------------------------------------------------------------------ golden/text


@pytest.mark.parametrize("number", CASES)
def test_golden_prompts(processor, golden_text, image, number):
    case = golden_text["cases"][number]
    images = [image] * case["full_prompt"].count("<|image|>")
    for form in ("full", "open"):
        inputs = processor(text=case[f"{form}_prompt"], images=images)
        ids = inputs["input_ids"][0]
        assert golden_form(processor, ids, ids) == case[f"{form}_ids"]
    messages = golden_messages(case["conversation"], image)
    opened = processor.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=True)
    assert opened == inputs["input_ids"]
    assert processor.apply_chat_template(messages) == case["full_prompt"]


@pytest.mark.parametrize("number", CASES)
def test_golden_labels(processor, golden_text, image, number):
    case = golden_text["cases"][number]["train"]
    batch = processor.for_training(golden_messages(case["sources"], image))
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert golden_form(processor, ids, ids) == case["input_ids"]
    assert golden_form(processor, labels, ids) == case["labels"]


# ------------------------------------------------------------------ prompts


def test_inputs_of_a_batch(processor, image):
    other = Image.new("RGB", (8, 8), (0, 255, 0))
    prompts = [
        "USER: no image ASSISTANT:",
        "<|image|>a",
        "USER: <|image|> and <|image|> ASSISTANT:",
    ]
    inputs = processor(
        text=prompts, images=[image, other, image], padding=True, return_tensors="pt"
    )
    length = inputs["input_ids"].shape[1]
    assert all(inputs[key].shape == (3, length) for key in ("attention_mask", "mm_token_type_ids"))
    assert all(
        inputs[key].dtype == torch.int64
        for key in ("input_ids", "attention_mask", "mm_token_type_ids")
    )
    assert inputs["mm_token_type_ids"].sum(1).tolist() == [0, PLACES, 2 * PLACES]
    assert (inputs["mm_token_type_ids"] == (inputs["input_ids"] == 32000)).all()
    assert inputs["pixel_values"].shape == (3, 3, 56, 56)
    alone = processor(text=prompts[2], images=[other, image], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"][1:], alone["pixel_values"])
    assert "pixel_values" not in processor(text=prompts[0])


@pytest.mark.parametrize("side", ["left", "right", None])
def test_padding_side_does_not_change_rows(processor, image, side):
    prompts = ["one", "one two three four five", "<|image|>"]
    singles = [
        processor(text=prompt, images=[image] * prompt.count("<|image|>"))["input_ids"][0]
        for prompt in prompts
    ]
    batch = processor(text=prompts, images=image, padding="longest", padding_side=side)
    longest = max(map(len, singles))
    for row, mask, types, alone in zip(
        batch["input_ids"],
        batch["attention_mask"],
        batch["mm_token_type_ids"],
        singles,
        strict=True,
    ):
        empty = longest - len(alone)
        real = slice(0, len(alone)) if side == "right" else slice(empty, longest)
        assert row[real] == alone
        assert mask == [int(i in range(longest)[real]) for i in range(longest)]
        assert sum(types) == (PLACES if 32000 in alone else 0)
        assert [id_ for id_, m in zip(row, mask, strict=True) if not m] == [0] * empty


def test_padding_to_a_length(processor):
    batch = processor(text=["one", "one two"], padding="max_length", max_length=9)
    assert [len(row) for row in batch["input_ids"]] == [9, 9]
    batch = processor(text=["one", "one two"], padding=True, pad_to_multiple_of=8)
    assert [len(row) for row in batch["input_ids"]] == [8, 8]
    longer = processor(text="one two", padding="max_length", max_length=2)
    assert len(longer["input_ids"][0]) == 3  # as in transformers, without `truncation`
    with raises_input_error(ErrorCode.INVALID_VALUE, "left"):
        processor(text="one", padding="left")
    with raises_input_error(ErrorCode.INVALID_VALUE, "both"):
        processor(text=["one", "one two"], padding=True, padding_side="both")
    with raises_input_error(ErrorCode.INVALID_VALUE, "padding=True"):
        processor(text=["one", "one two"], return_tensors="pt")


def test_bos_is_added_once(processor):
    assert processor(text="<s>USER: a")["input_ids"] == processor(text="USER: a")["input_ids"]
    assert processor(text="USER: a")["input_ids"][0].count(1) == 1
    assert 1 not in processor(text="USER: a", add_special_tokens=False)["input_ids"][0]


@pytest.mark.parametrize("form", ["flat", "nested", "nested with None", "array", "tensor"])
def test_images_of_a_batch_come_in_several_forms(processor, form):
    images = np.random.default_rng(0).integers(0, 256, (2, 9, 9, 3), dtype=np.uint8)
    first, second = images
    images = {
        "flat": [first, second],
        "nested": [[], [first, second]],
        "nested with None": [None, [first, second]],
        "array": images,
        "tensor": torch.from_numpy(images),
    }[form]
    inputs = processor(text=["none", "<|image|><|image|>"], images=images)
    expected = processor.image_processor([first, second])["pixel_values"]
    assert torch.equal(inputs["pixel_values"], expected)


@pytest.mark.parametrize(
    ("text", "images", "counts"),
    [
        ("<|image|>", None, ["1 <|image|>", "0 image"]),
        ("none", [1], ["0 <|image|>", "1 image"]),
        ("<|image|><|image|>", [1], ["2 <|image|>", "1 image"]),
        (["<|image|>", "a"], [1, 2], ["1 <|image|>", "2 image"]),
        (["<|image|>", "a"], [[], [1]], ["Prompt 1 of 2", "1 <|image|>", "0 image"]),
        (["<|image|>", "a"], [[1]], ["2 prompts", "1 prompts"]),
    ],
)
def test_wrong_image_count_raises(processor, text, images, counts):
    with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, *counts):
        processor(text=text, images=images)


@pytest.mark.parametrize("text", [None, [], 5, ["a", 5]])
def test_text_must_be_a_string_or_a_list(processor, text):
    with pytest.raises((InputError, TypeError)):
        processor(text=text)


def test_keyword_groups_are_those_of_transformers(processor, image):
    """Flat and nested options; an unknown one is ignored with a warning, as in transformers."""
    prompts = {"text": ["<|image|>a", "b"], "images": [image], "return_tensors": "pt"}
    layout = {"padding": "max_length", "max_length": 12, "padding_side": "right"}
    pixels = {"do_normalize": False, "image_policy": "pad"}
    flat = processor(**prompts, **layout, **pixels, videos=None, paddding=True)
    prompts["common_kwargs"] = {"return_tensors": prompts.pop("return_tensors")}
    nested = processor(**prompts, text_kwargs=layout, images_kwargs=pixels)
    assert flat.keys() == nested.keys()
    assert all(torch.equal(flat[key], nested[key]) for key in flat)
    assert flat["input_ids"].shape == (2, 12) and flat["attention_mask"][1, -1] == 0
    expected = processor.image_processor(image, **pixels)["pixel_values"]
    assert torch.equal(flat["pixel_values"], expected)
    assert torch.equal(processor(images=image, **pixels)["pixel_values"], expected)
    few = processor(text="a", return_attention_mask=False, return_mm_token_type_ids=False)
    assert few.keys() == {"input_ids"}
    (offset,) = processor(**prompts, padding=True, return_text_replacement_offsets=True)[
        "text_replacement_offsets"
    ][0]
    assert (offset["span"], offset["new_span"]) == ((0, 9), (0, 9 * PLACES))
    counts = processor._get_num_multimodal_tokens(image_sizes=[(8, 8), (9, 2)])
    assert counts.num_image_tokens == [PLACES, PLACES]
    with raises_input_error(ErrorCode.INVALID_VALUE, "padding", "two times"):
        processor(text="a", padding=True, text_kwargs={"padding": False})
    with raises_input_error(ErrorCode.UNSUPPORTED, "return_offsets_mapping"):
        processor(text="a", return_offsets_mapping=True)
    with raises_input_error(ErrorCode.UNSUPPORTED, "audio"):
        processor(text="a", audio=[image])


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_removes_text_but_no_image(llama_file, image, side):
    tokenizer = Owl2Tokenizer(llama_file, truncation_side=side)
    processor = Owl2Processor(Owl2ImageProcessor(56), tokenizer, num_image_tokens=PLACES)
    prompts = ["one two three <|image|> four five six"]
    (ids,) = processor(text=prompts, images=image)["input_ids"]
    options = {"text": prompts, "images": image, "truncation": True}
    (short,) = processor(**options, max_length=len(ids) - 2)["input_ids"]
    assert short == (ids[:1] + ids[3:] if side == "left" else ids[:-2])
    assert processor(**options, max_length=len(ids))["input_ids"] == [ids]
    with raises_input_error(ErrorCode.TOO_LONG, "max_length 4", len(ids)):
        processor(**options, max_length=4)


# ------------------------------------------------------------------ messages


def test_apply_chat_template_outputs(processor, image):
    batch = [ask(image, "What?"), ask("Hi")]
    options = {"add_generation_prompt": True}
    texts = processor.apply_chat_template(batch, **options)
    assert texts == ["USER: <|image|>What? ASSISTANT:", "USER: Hi ASSISTANT:"]
    options |= {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    inputs = processor.apply_chat_template(batch, **options)
    by_text = processor(text=texts, images=[image], padding=True, return_tensors="pt")
    assert inputs.keys() == by_text.keys()
    assert all(torch.equal(inputs[key], by_text[key]) for key in inputs)
    right = processor.apply_chat_template(batch, padding_side="right", **options)
    assert right["attention_mask"][1].tolist()[-1] == 0
    again = processor.apply_chat_template(batch, tools=None, documents=None, **options)
    assert all(torch.equal(inputs[key], again[key]) for key in inputs)
    options["processor_kwargs"] = {"padding": "max_length", "max_length": 40}
    del options["padding"]
    assert processor.apply_chat_template(batch, **options)["input_ids"].shape == (2, 40)
    without = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(without, images=[image], **options)
    assert inputs["pixel_values"].shape[0] == 1 and inputs["input_ids"].shape == (1, 40)


def test_system_messages_and_consecutive_messages_of_one_role(processor, image):
    system = {"role": "system", "content": "Be brief."}
    messages = [system, *ask(image), *ask("What?", answer="A bus."), *ask("And?")[:1], *ask("Why?")]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == (
        "USER: <|image|>Be brief.\nWhat? ASSISTANT: A bus.</s>USER: And?\nWhy? ASSISTANT:"
    )
    ids = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)[0]
    assert processor.encode(messages).ids == tuple(ids)
    processor.chat_template = CHAT_TEMPLATES["v1"]
    assert processor.apply_chat_template([system, *ask("Hi")]) == "Be brief. USER: Hi"
    continued = processor.apply_chat_template(
        ask("Hi", answer=[{"type": "text", "text": "It is"}]), continue_final_message=True
    )
    assert continued.endswith("USER: Hi ASSISTANT: It is")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "byte level"])
def test_assistant_masks_are_the_labels_of_training(kind, side, llama, byte_level, image):
    tokenizer = {"llama": llama, "byte level": byte_level}[kind]
    processor = Owl2Processor(Owl2ImageProcessor(28), tokenizer, None, PLACES)
    long = [*ask(image, "What?", answer="A  bus."), *ask("And?", answer="Yes")]
    inputs = processor.apply_chat_template(
        [long, ask("Hi", answer="Hello.")],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": side, "return_tensors": "pt"},
    )
    for row, messages in enumerate([long, ask("Hi", answer="Hello.")]):
        sample = processor.for_training(messages)
        is_token = inputs["attention_mask"][row].bool()
        mask = inputs["assistant_masks"][row].bool()
        assert torch.equal(inputs["input_ids"][row][is_token], sample["input_ids"][0])
        assert torch.equal(mask[is_token], sample["labels"][0] != -100)
        assert not mask[~is_token].any()


def test_several_templates(processor, tmp_path):
    processor.chat_template = {"default": "{{ messages[0].content }}", "loud": "{{ word }}!"}
    for one in (processor, None):
        one = one or Owl2Processor.from_pretrained(tmp_path)
        assert one.apply_chat_template(ask("a")) == "a"
        assert one.apply_chat_template(ask("a"), "loud", word="no") == "no!"
        assert one.encode(ask("a")).ids[0] == 1
        processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PWNED"):
        processor.chat_template = {"default": "a", "../PWNED": "b"}
        processor.save_pretrained(tmp_path / "other")


def test_image_without_a_source_is_counted(processor, image):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == "USER: <|image|>a ASSISTANT:"
    assert processor(text=prompt, images=image)["pixel_values"].shape[0] == 1
    with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, "1 <|image|>", "0 image"):
        processor.apply_chat_template(messages, tokenize=True)
    literal = ask(image, "<|image|> and <|image|>")
    with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, "3 <|image|>", "1 image"):
        processor.apply_chat_template(literal, tokenize=True)


# ------------------------------------------------------------------ ids → text


def test_decoding_prompts_with_images(processor, image):
    prompt = "USER: <|image|><|image|>one</s> two  ASSISTANT:"
    ids = processor(text=prompt, images=[image, image], return_tensors="pt")["input_ids"]
    assert processor.decode(ids[0]) == "<s>" + prompt
    assert processor.batch_decode(ids) == processor.decode(ids) == ["<s>" + prompt]
    assert processor.batch_decode([]) == []
    plain = processor.batch_decode(ids, skip_special_tokens=True)
    assert plain == ["USER: one two  ASSISTANT:"]
    assert processor.decode([1, 330]) == "<s>A" and processor.decode(330) == "A"
    assert processor.decode([]) == ""
    assert processor.post_process_image_text_to_text(ids) == plain


# ------------------------------------------------------------------ the object


def test_processor_can_be_pickled(processor, image):
    equal_processors(processor, pickle.loads(pickle.dumps(processor)), image)


def test_image_token_id_must_be_outside_the_vocabulary(llama):
    with raises_input_error(ErrorCode.INVALID_VALUE, 5, 32000):
        Owl2Processor(Owl2ImageProcessor(28), llama, image_token_id=5)
