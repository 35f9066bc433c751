"""Media that the row parser does not read are refused; other unknown keys are allowed."""

import json

import pytest

from owl2.data.json_dataset import JsonDataset
from owl2.errors import ErrorCode
from owl2.processing.message_parts import content_to_text
from owl2.processing.messages import parse_messages
from tests.errors import raises_input_error


def row(question="what?", answer="red", **keys):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | keys


def read(tmp_path, content):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([content]))
    return JsonDataset(path)[0]


def messages(*contents, **keys):
    roles = ("user", "assistant")
    return {
        "messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    } | keys


KEYS = (
    "image_path Image IMAGE img imgs imgPath image-url ImageURL image_file imageFileName imagepath "
    "picture photos screenshot input_image image_1 query_img 图片路径 image_base64"
)


@pytest.mark.parametrize("key", KEYS.split())
def test_other_keys_of_an_image_are_refused_with_the_known_one(tmp_path, key):
    with raises_input_error(ErrorCode.UNKNOWN_NAME, repr(key), "'image'"):
        read(tmp_path, row(**{key: "x"}))
    with raises_input_error(ErrorCode.UNKNOWN_NAME, repr(key), "'images'"):
        read(tmp_path, messages("what?", "red", **{key: ["x"]}))


@pytest.mark.parametrize(
    ("key", "code"),
    [
        *((key, ErrorCode.UNKNOWN_NAME) for key in ("Video", "video_path", "vid", "视频")),
        *((key, ErrorCode.UNSUPPORTED) for key in ("audio", "audios", "音频")),
    ],
)
@pytest.mark.parametrize("question", ["what?", "<video>\nwhat?"])
def test_other_keys_of_videos_and_sounds_are_refused(tmp_path, key, code, question):
    needles = (repr(key), "'video'") if code is ErrorCode.UNKNOWN_NAME else (repr(key),)
    with raises_input_error(code, *needles):
        read(tmp_path, row(question, **{key: "x"}))
    with raises_input_error(code, *needles):
        read(tmp_path, row(f"<image>{question}", image="a.png", **{key: "x"}))


@pytest.mark.parametrize(
    "content",
    [
        row(file="a.png"),
        row(media_files=["x"]),
        row(assets=["a.mp4"]),
        row(data="data:image/png;base64,AAAA"),
        row("<image>", image="a.png", image2="b.png"),
        row("<image>", image="a.png", depth_image="b.png"),
        row(image_id=7),
        row(has_image=True),
        row(meta={"file": "a.png"}),
        row(extra=[{"frames": ["a.jpg"]}]),
        {
            "conversations": [
                row()["conversations"][0] | {"image": "a.png"},
                row()["conversations"][1],
            ]
        },
        messages([{"type": "text", "text": "what?", "image": "a.png"}], "red"),
        messages([{"type": "image", "image": "a.png", "image2": "b.png"}], "red"),
    ],
    ids=str,
)
def test_other_names_of_media_are_refused(tmp_path, content):
    with raises_input_error(ErrorCode.UNKNOWN_NAME):
        read(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "unused"),
    [
        (row(id="000.jpg", model="gpt-4", task_name="qa"), ("id", "model", "task_name")),
        (row(median=3, audience="all", framework="x", imagination="yes"), None),
        (row(image=None, img="", videos=[], has_image=False), ("img", "has_image")),
        (row("<image>", image="a.png", image_id=7, image_url="https://x.org/a"), None),
        (row("<image>", image="a.png", width=3, num_images=1, video_id="v"), None),
    ],
    ids=str,
)
def test_other_keys_are_allowed_and_reported(tmp_path, content, unused):
    sample = read(tmp_path, content)
    expected = unused or tuple(k for k in content if k not in ("conversations", "image"))
    assert sample.unused_keys == expected


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (row("<video>\nwhat?"), ErrorCode.UNSUPPORTED),
        (row("what?\n<audio>"), ErrorCode.UNSUPPORTED),
        (row("<image_1> what?"), ErrorCode.UNSUPPORTED),
        (row("<|vision_start|>what?"), ErrorCode.UNSUPPORTED),
        (row("<image>\nand <video>", image="a.png"), ErrorCode.UNSUPPORTED),
        (row("<image>\nand <img>", image="a.png"), ErrorCode.UNSUPPORTED),
        (row("<img>b.png</img><image>", image="a.png"), ErrorCode.CONFLICT),
        (row("<image_1>", image="a.png"), ErrorCode.IMAGE_COUNT_MISMATCH),
        (messages("<image>what?", "red"), ErrorCode.IMAGE_COUNT_MISMATCH),
        (row("<|video|>\nwhat?"), ErrorCode.IMAGE_COUNT_MISMATCH),
        (row("<video><video>\nwhat?", video="a.mp4"), ErrorCode.IMAGE_COUNT_MISMATCH),
        (row("<image>\nwhat?", video="a.mp4", image="a.png"), ErrorCode.IMAGE_COUNT_MISMATCH),
        (row("<video>\nwhat?", video="a.mp4", videos=["a.mp4"]), ErrorCode.CONFLICT),
        (messages([{"type": "video", "video": "a", "path": "b"}], "red"), ErrorCode.CONFLICT),
        (messages([{"type": "audio", "audio": "a.wav"}], "red"), ErrorCode.UNKNOWN_NAME),
    ],
    ids=str,
)
def test_markers_that_are_not_read_are_refused(tmp_path, content, code):
    with raises_input_error(code):
        read(tmp_path, content)


MARKERS = (
    "<Image> <IMAGE/> <image_0> <image_start> <im_patch> <IMG_CONTEXT> <image_soft_token> [IMG] "
    "<start_of_image> <|vision_start|> <|media|> <|image_1|> <|audio_bos|> <VIDEO> <audio>"
)


@pytest.mark.parametrize("marker", MARKERS.split())
def test_markers_of_other_models_are_refused(tmp_path, marker):
    for content in (row(f"{marker}\nwhat?"), row(f"<image>\nIs {marker} red?", image="a.png")):
        with raises_input_error(ErrorCode.UNSUPPORTED, marker):
            read(tmp_path, content)


@pytest.mark.parametrize(
    "question",
    [
        "Why is <img> empty in my page?",
        "[IMG]https://example.org/logo[/IMG] in BBCode",
        "docker run <image_name>",
        "<|im_start|>user",
        "Is <Image> a component of React?",
        '<img src="a.png"> is <video> or <video controls></video>?',
        "<video>\n<source src='a.mp4'></video>",
        "<img>alt</img>",
        "<image><url>logo</url></image> in RSS?",
        "<picture>x</picture>",
    ],
)
def test_html_in_text_only_data_is_text(tmp_path, question):
    sample = read(tmp_path, row(question, answer="Use <img> and <video>."))
    parsed = parse_messages(sample.messages)
    assert not parsed.images
    assert content_to_text(parsed.turns[0]["content"]) == question


def test_html_in_the_answer_of_an_image_is_text(tmp_path):
    sample = read(tmp_path, row("<image>Write HTML.", '<img src="a.png"><video>', image="a.png"))
    assert len(parse_messages(sample.messages).images) == 1
