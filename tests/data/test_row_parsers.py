import base64
import json
from pathlib import Path
from random import Random

import pytest

from owl2.data.json_dataset import JsonDataset
from owl2.data.row_parsers import image_reader, parse_row
from owl2.errors import ErrorCode, InputError
from owl2.processing.image_io import load_image
from owl2.processing.message_parts import content_to_text
from owl2.processing.messages import order_images, parse_messages
from tests.data.rows import IMAGE, human, lines, llava, question, texts
from tests.errors import raises_input_error

USER = {"role": "user", "content": "what?"}
ANSWER = {"role": "assistant", "content": "red"}
TEXT = {"type": "text", "text": "what?"}
URL = {"type": "image_url", "image_url": {"url": "a.png"}}
GOLDEN = Path(__file__).parents[1] / "golden" / "text" / "cases.json"


def images(sample) -> list[str]:
    return [str(image) for image in parse_messages(sample.messages).images]


@pytest.mark.parametrize(
    ("content", "row", "prompt"),
    [
        ([URL, TEXT], {}, "<|image|>what?"),
        ([TEXT, URL], {}, "<|image|>what?"),
        ([TEXT, {"type": "image"}], {"images": ["a.png"]}, "<|image|>what?"),
        ("what?<image>", {"images": ["a.png"]}, "what?<|image|>"),
        ("<image>what?", {"images": ["a.png"]}, "<|image|>what?"),
        (
            [{"type": "text", "text": "a<image>b"}, URL],
            {"images": ["b.png"]},
            "a<|image|>b<|image|>",
        ),
    ],
)
@pytest.mark.parametrize("keeps", [False, True])
def test_images_precede_the_text_unless_it_marks_them(content, row, prompt, keeps):
    message = {"role": "user", "content": content} | ({"interleave_images": True} if keeps else {})
    answer = {"role": "assistant", "content": "A bus."}
    sample = parse_row({"messages": [message, answer], **row}, "row", image_reader(Path()))
    turn = order_images(parse_messages(sample.messages), interleave_images=False).turns[0]
    if keeps and isinstance(content, list) and content[0] == TEXT:
        prompt = "what?<|image|>"
    assert content_to_text(turn["content"]) == prompt
    assert not sample.unused_keys


# ------------------------------------------------------------------ LLaVA's JSON


def golden_cases() -> list[dict]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("case", golden_cases())
def test_text_equals_the_authors_training_code(case, tmp_path):
    row = {"conversations": case["conversation"]}
    if any("<|image|>" in turn["value"] for turn in case["conversation"]):
        row["image"] = "a.png"
    (sample,) = JsonDataset(llava(tmp_path / "chat.json", row))
    assert texts(sample) == [turn["value"] for turn in case["train"]["sources"]]


@pytest.mark.parametrize("mark", ["<image>", "<|image|>"])
@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("M\nwhat?", "<|image|>\nwhat?"),
        ("  what? \n M ", "<|image|>\nwhat?"),
        ("is M red?", "<|image|>\nis  red?"),
        (" M ", "<|image|>"),
    ],
)
def test_a_single_image_comes_first(tmp_path, mark, value, text):
    path = llava(tmp_path / "chat.json", human(value.replace("M", mark), "a.png"))
    assert texts(JsonDataset(path)[0]) == [text, "yes"]


def test_several_images_of_a_turn_keep_their_positions(tmp_path):
    path = llava(tmp_path / "chat.json", human(" A: <image> B: <image>", ["a.png", "b.png"]))
    (sample,) = JsonDataset(path)
    assert texts(sample)[0] == "A: <|image|> B: <|image|>"
    assert images(sample) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


def test_images_of_several_turns_keep_their_order(tmp_path):
    row = human("<image>one", ["a.png", "b.png"])
    row["conversations"] += human("two<image>")["conversations"]
    (sample,) = JsonDataset(llava(tmp_path / "chat.json", row))
    assert texts(sample) == ["<|image|>\none", "yes", "<|image|>\ntwo", "yes"]
    assert images(sample) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


def test_image_paths_are_relative_to_the_root(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    path = llava(tmp_path / "chat.json", human("hi"), human("<image>", "deep/a.png"))
    samples = list(JsonDataset(path, root))
    assert images(samples[1]) == [str(root / "deep" / "a.png")]
    assert [sample.source for sample in samples] == [f"{path}, row 1", f"{path}, row 2"]


def test_urls_are_not_changed(tmp_path):
    path = llava(tmp_path / "chat.json", human("<image>", "https://example.org/a.png"))
    (sample,) = JsonDataset(path)
    assert images(sample) == ["https://example.org/a.png"]


# ------------------------------------------------------------------ messages


def test_messages_are_not_changed(tmp_path):
    content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": " spaces stay "}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    path = lines(tmp_path / "chat.jsonl", {"messages": messages, "id": 7})
    (sample,) = JsonDataset(path)
    assert texts(sample) == ["<|image|> spaces stay ", "yes"]
    assert images(sample) == [str(tmp_path / "a.png")]
    assert sample.source == f"{path}, line 1"


@pytest.mark.parametrize(
    ("part", "image"),
    [
        ({"path": "/abs/a.png"}, "/abs/a.png"),
        ({"image": "https://example.org/a.png"}, "https://example.org/a.png"),
        ({"url": "https://example.org/a.png"}, "https://example.org/a.png"),
        ({"image": "data:image/png;base64,AAAA"}, "data:image/png;base64,AAAA"),
    ],
)
def test_only_relative_paths_are_changed(tmp_path, part, image):
    content = [{"type": "image"} | part]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    (sample,) = JsonDataset(lines(tmp_path / "chat.jsonl", {"messages": messages}))
    assert images(sample) == [image]


def test_line_separators_inside_a_string_and_blank_lines(tmp_path):
    messages = [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c"}]
    path = tmp_path / "chat.jsonl"
    line = json.dumps({"messages": messages}, ensure_ascii=False)
    path.write_text(f"{line}\n\n{line}\n", encoding="utf-8")
    samples = list(JsonDataset(path))
    assert [sample.source for sample in samples] == [f"{path}, line 1", f"{path}, line 3"]
    assert texts(samples[0]) == ["a\u2028b", "c"]


def test_bare_image_parts_use_the_images_of_the_row(tmp_path):
    row = question(IMAGE, {"type": "text", "text": "or"}, IMAGE) | {"images": ["a.png", "b.png"]}
    (sample,) = JsonDataset(lines(tmp_path / "chat.jsonl", row))
    assert texts(sample) == ["<|image|>or<|image|>", "yes"]
    assert images(sample) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


# ------------------------------------------------------------------ both, and captions


def test_json_and_jsonl_accept_the_same_rows(tmp_path):
    rows = (human("<image>hi", "a.png"), question(IMAGE) | {"images": ["a.png"]})
    one = JsonDataset(llava(tmp_path / "chat.json", *rows))
    two = JsonDataset(lines(tmp_path / "chat.jsonl", *rows))
    assert [sample.messages for sample in one] == [sample.messages for sample in two]
    assert texts(one[0]) == ["<|image|>\nhi", "yes"]


OWL = (
    "The following is a conversation between a curious human and AI assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions.\n"
)
FORMATS = {
    "LlamaFactory": (
        {"messages": [USER | {"content": "<image>what?"}, ANSWER], "images": ["a.png"]},
        ["<|image|>what?", "red"],
    ),
    "LlamaFactory, ShareGPT's keys": (
        human("<image>what?", answer="red") | {"images": ["a.png"], "system": "Be kind."},
        ["Be kind.", "<|image|>\nwhat?", "red"],
    ),
    "LlamaFactory, Alpaca's keys": (
        {"instruction": "<image>what?", "input": "Be short.", "output": "red", "images": ["a.png"]},
        ["<|image|>what?\nBe short.", "red"],
    ),
    "ms-swift": (
        {
            "query": "<image>what?",
            "response": "red",
            "images": ["a.png"],
            "history": [["hi", "yes"]],
        },
        ["hi", "yes", "<|image|>what?", "red"],
    ),
    "Qwen-VL": (
        human("Picture 1: <img>a.png</img>\nwhat?", answer="red"),
        ["<|image|>\nwhat?", "red"],
    ),
    "Qwen-VL, in a part": (
        {"messages": [USER | {"content": [TEXT | {"text": "<img>a.png</img>what?"}]}, ANSWER]},
        ["<|image|>what?", "red"],
    ),
    "OpenAI": (
        {"messages": [USER | {"content": [URL, TEXT]}, ANSWER]},
        ["<|image|>what?", "red"],
    ),
    "DocOwl": (
        {
            "image": ["a.png"],
            "messages": [USER | {"content": "<|image|>what?"}, ANSWER],
            "task_name": "qa",
            "dataset_name": "doc",
        },
        ["<|image|>what?", "red"],
    ),
    "mPLUG-Owl": (
        {
            "image": ["a.png"],
            "text": f"{OWL}Human: <image>\nHuman: what?\nAI: red\nHuman: sure?\nAI: yes, red",
            "task_type": "llava_sft",
        },
        ["<|image|>\nwhat?", "red", "sure?", "yes, red"],
    ),
    "UReader": (
        {
            "image": ["a.png"],
            "prompt": "",
            "text": "",
            "system_instruction": "",
            "conversations": [
                {"from": "user", "value": "<image>"},
                {"from": "user", "value": "what?"},
                {"from": "assistant", "value": "red"},
            ],
            "task_type": "qa_sft",
        },
        ["<|image|>\nwhat?", "red"],
    ),
    "mPLUG-Owl, other system text": (
        {"image": "a.png", "text": "Be kind.\nHuman: <image>\nHuman: what?\nAI: red"},
        ["Be kind.", "<|image|>\nwhat?", "red"],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_known_formats_are_read_with_their_image(tmp_path, name):
    row, expected = FORMATS[name]
    (sample,) = JsonDataset(lines(tmp_path / "chat.jsonl", row))
    assert texts(sample) == expected
    assert images(sample) == [str(tmp_path / "a.png")]


def test_text_only_rows_of_mplug_owl_are_conversations(tmp_path):
    row = {"text": f"{OWL}Human: Write a word.\nAI: Word.\nHuman: Two.\nAI: Two\nwords."}
    (sample,) = JsonDataset(lines(tmp_path / "chat.jsonl", row))
    assert texts(sample) == ["Write a word.", "Word.", "Two.", "Two\nwords."]


def test_several_images_of_qwen_vl_keep_their_labels(tmp_path):
    text = "Picture 1: <img>a.png</img>\nPicture 2: <img>https://x.org/b</img>\nsame?"
    (sample,) = JsonDataset(lines(tmp_path / "chat.jsonl", human(text)))
    assert texts(sample)[0] == "Picture 1: <|image|>\nPicture 2: <|image|>\nsame?"
    assert images(sample) == [str(tmp_path / "a.png"), "https://x.org/b"]


def test_images_of_qwen_vl_need_no_file_name_extension(tmp_path):
    (sample,) = JsonDataset(lines(tmp_path / "chat.jsonl", human("<img>train/0001</img>what?")))
    assert images(sample) == [str(tmp_path / "train/0001")]


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_instruction"])
def test_a_system_text_is_a_message(tmp_path, key):
    rows = ({"messages": [USER, ANSWER]}, human("what?"), {"query": "what?", "response": "red"})
    rows += ({"image": "a.png", "caption": "red"},)
    for sample in JsonDataset(lines(tmp_path / "a.jsonl", *(row | {key: "Hi."} for row in rows))):
        assert sample.messages[0] == {"role": "system", "content": "Hi."}
        assert not sample.unused_keys


@pytest.mark.parametrize("image", ["", [], None])
def test_an_empty_image_is_none(tmp_path, image):
    rows = JsonDataset(lines(tmp_path / "a.jsonl", human("what?", "") | {"images": image}))
    assert texts(rows[0]) == ["what?", "yes"]


@pytest.mark.parametrize("key", ["loss", "weight"])
def test_an_answer_without_loss_is_marked(tmp_path, key):
    first, second = ANSWER | {key: 0}, ANSWER | {key: 1}
    row = {"messages": [USER, first, USER | {key: 0}, second]}
    (sample,) = JsonDataset(lines(tmp_path / "chat.jsonl", row))
    assert [message.get("loss", True) for message in sample.messages] == [True, False, True, True]
    row = {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", key: 0}]
    }
    (sample,) = JsonDataset(lines(tmp_path / "other.jsonl", row))
    assert sample.messages[1]["loss"] is False


@pytest.mark.parametrize(
    "turn", [USER | {"loss": True}, USER | {"weight": 1}, ANSWER | {"loss": 2}]
)
def test_other_loss_weights_are_refused(tmp_path, turn):
    turns = [turn, ANSWER] if turn["role"] == "user" else [USER, turn]
    with raises_input_error(ErrorCode.UNSUPPORTED):
        JsonDataset(lines(tmp_path / "chat.jsonl", {"messages": turns}))[0]


def test_base64_as_image_is_read_and_absent_from_messages(tmp_path):
    data = base64.b64encode(Random(0).randbytes(300_000)).decode()
    (sample,) = JsonDataset(lines(tmp_path / "a.jsonl", human("<image>", data)))
    (image,) = parse_messages(sample.messages).images
    assert image.endswith(data)
    with raises_input_error(ErrorCode.BROKEN_IMAGE) as caught:
        load_image(image)
    assert len(str(caught.value)) < 500
    for row in (
        human("<image>", [[data]]),
        human("what?") | {"picture": data},
        {"messages": data},
        {"conversations": [{"from": data, "value": "a"}]},
        human("<image>", f"{data}!"),
    ):
        rows = JsonDataset(lines(tmp_path / "b.jsonl", row))
        with pytest.raises(InputError) as caught:
            load_image(*parse_messages(rows[0].messages).images)
        assert len(str(caught.value)) < 500 and data[:60] not in str(caught.value)


def test_a_caption_becomes_the_answer(tmp_path):
    path = lines(tmp_path / "captions.jsonl", {"image": "a.png", "caption": " a red circle\n"})
    (sample,) = JsonDataset(path)
    assert texts(sample) == ["<|image|>", "a red circle"]
    assert images(sample) == [str(tmp_path / "a.png")]
