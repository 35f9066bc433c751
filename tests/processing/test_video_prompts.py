"""A video is the sequence of its sampled frames: equal ids, pixels and labels."""

import numpy as np
import pytest
import torch
from PIL import Image

from owl2.errors import ErrorCode
from owl2.processing.messages import parse_messages, user_message
from owl2.processing.processor import Owl2Processor
from owl2.processing.video import load_video
from tests.errors import raises_input_error
from tests.videos import make_gif, make_video

IMAGE = Image.new("RGB", (8, 8), "red")


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return Owl2Processor.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("video") / "x.mp4")


def parts(frames):
    return [{"type": "image", "image": frame} for frame in frames]


def text(value):
    return {"type": "text", "text": value}


def user(*content, **keys):
    return {"role": "user", "content": list(content), **keys}


def same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(torch.as_tensor(first[key]), torch.as_tensor(second[key])), key


def same_prompt(first, second):
    assert first.ids == second.ids
    assert first.image_digests == second.image_digests
    assert torch.equal(first.pixel_values, second.pixel_values)


ANSWER = {"role": "assistant", "content": "yes"}
SYSTEM = {"role": "system", "content": "no"}
# A video and its frames stand for "V" in a list of parts.
LAYOUTS = {
    "first": [user("V", text("what is this?"))],
    "last": [user(text("what is this?"), "V")],
    "interleaved": [user(text("yes"), "V", text("no"), interleave_images=True)],
    "with an image": [user(parts([IMAGE])[0], "V", text("what?"))],
    "two videos": [user("V", "V", text("what?"))],
    "system": [SYSTEM, user("V", text("what?"))],
    "history": [user("V", text("what?")), ANSWER, user(text("is"), "V")],
    "alone": [user("V")],
}


def filled(layout, content):
    return [
        turn
        if isinstance(turn["content"], str)
        else {
            **turn,
            "content": [
                one for part in turn["content"] for one in (content if part == "V" else [part])
            ],
        }
        for turn in layout
    ]


@pytest.mark.parametrize("newline", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_video_is_its_frames(tiny_checkpoint, video, layout, newline):
    processor = Owl2Processor.from_pretrained(tiny_checkpoint, image_newline=newline, num_frames=3)
    frames = filled(layout, parts(load_video(video, 3)))
    messages = filled(layout, [{"type": "video", "path": str(video)}])
    same_prompt(processor.encode(messages), processor.encode(frames))
    same(processor.for_training([*messages, ANSWER]), processor.for_training([*frames, ANSWER]))
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    tokenized = processor.apply_chat_template(messages, **options)
    same(tokenized, processor.apply_chat_template(frames, **options))
    prompt = processor.apply_chat_template(messages, tokenize=False)
    parsed = parse_messages(messages)
    assert prompt.count("<|video|>") == len(parsed.videos)
    videos = [video.source for video in parsed.videos]
    called = processor(
        text=prompt, images=list(parsed.images) or None, videos=videos, return_tensors="pt"
    )
    same(called, tokenized)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "video": "V"},
        {"type": "video", "path": "V"},
        {"type": "video", "url": "U"},
        {"type": "video_url", "video_url": {"url": "U"}},
        {"type": "video_url", "video_url": "U"},
        {"type": "video", "video": "frames"},
    ],
    ids=str,
)
def test_forms_of_a_video_part(processor, video, part):
    frames = load_video(video, 2)
    values = {"V": str(video), "U": video.as_uri(), "frames": frames}

    def fill(value):
        if isinstance(value, dict):
            return {key: fill(one) for key, one in value.items()}
        return values.get(value, value)

    given = processor.encode([user({**fill(part), "num_frames": 2}, text("what?"))])
    same_prompt(given, processor.encode([user(*parts(frames), text("what?"))]))


@pytest.mark.parametrize(
    ("question", "images"),
    [("what?", 0), ("what?", 1), ("yes <|video|> no", 0), ("<|video|> or <|image|>?", 1)],
)
def test_user_message_with_videos(processor, video, question, images):
    frames = load_video(video, 2)
    message = user_message(question, [IMAGE] * images, [video], num_frames=2)
    is_marked = "<|video|>" in question
    order = [*frames, IMAGE] if is_marked else [*[IMAGE] * images, *frames]
    expected = user_message(
        question.replace("<|video|>", "<|image|><|image|>"), order[: 2 + images]
    )
    same_prompt(processor.encode([message]), processor.encode([expected]))
    assert [part["type"] for part in message["content"]].count("video") == 1


def test_placeholders_and_videos_of_a_question_must_fit(video):
    for question, images, videos in (
        ("<|video|>?", [], []),
        ("<|video|>?", [], [video, video]),
        ("<|image|>?", [IMAGE], [video]),
    ):
        with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, "<|video|>", len(videos)):
            user_message(question, images, videos)


def test_batch_of_prompts_with_videos(processor, video):
    """Videos of all prompts in one list, or in a list for each prompt."""
    frames = load_video(video, 2)
    prompts = ["a <|video|> b", "c", "<|video|><|video|> d <|image|>"]
    images = [None, None, [IMAGE]]
    options = {"padding": True, "return_tensors": "pt"}
    expected = processor(
        text=[prompt.replace("<|video|>", "<|image|>" * 2) for prompt in prompts],
        images=[frames, None, [*frames, *frames, IMAGE]],
        **options,
    )
    for videos in ([video] * 3, [[video], [], [video] * 2], [frames] * 3):
        for option in ({"num_frames": 2}, {"videos_kwargs": {"num_frames": 2}}):
            given = processor(text=prompts, images=images, videos=videos, **option, **options)
            same(given, expected)


def test_frames_without_text(processor, video):
    frames = load_video(video, 2)
    pixels = processor(images=frames, return_tensors="pt")
    same(processor(videos=video, num_frames=2, return_tensors="pt"), pixels)
    same(processor(videos=[frames], return_tensors="pt"), pixels)
    same(processor(videos=frames, return_tensors="pt"), pixels)


@pytest.mark.parametrize(
    ("arguments", "code", "needle"),
    [
        ({"text": "<|video|>"}, ErrorCode.IMAGE_COUNT_MISMATCH, "0 video"),
        ({"text": "a", "videos": ["V"]}, ErrorCode.IMAGE_COUNT_MISMATCH, "1 video"),
        ({"text": ["<|video|>"] * 2, "videos": [["V"]]}, ErrorCode.IMAGE_COUNT_MISMATCH, "video"),
        ({"text": "<|video|>", "videos": "V", "fps": 2}, ErrorCode.UNSUPPORTED, "fps"),
        ({"text": "<|video|>", "videos": "V", "num_frames": 0}, ErrorCode.INVALID_VALUE, "0"),
    ],
)
def test_invalid_videos_of_a_call(processor, video, arguments, code, needle):
    if "videos" in arguments:
        arguments = arguments | {"videos": str(video)}
    with raises_input_error(code, needle):
        processor(**arguments)


@pytest.mark.parametrize("form", ["file", "array"])
def test_bare_video_parts_take_the_videos_of_the_call(processor, video, form):
    messages = [user({"type": "video"}, text("what?"))]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "num_frames": 2}
    frames = load_video(video, 2)
    videos = [video] if form == "file" else np.stack(frames)
    given = processor.apply_chat_template(messages, videos=videos, **options)
    same(given, processor.apply_chat_template([user(*parts(frames), text("what?"))], **options))


@pytest.mark.parametrize(
    "content",
    [
        "what is <|video|>?",
        [{"type": "video"}, text("what?")],
        [{"type": "image", "image": IMAGE}, {"type": "video"}],
    ],
)
def test_video_without_a_source(processor, content):
    """A placeholder must not become text of the prompt."""
    messages = [{"role": "user", "content": content}]
    answer = {"role": "assistant", "content": "yes"}
    with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, "0 video"):
        processor.encode(messages)
    with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, "0 video"):
        processor.for_training([*messages, answer])


def test_assistant_mask_with_a_video(processor, video):
    options = {"return_assistant_tokens_mask": True, "tokenize": True, "return_dict": True}
    messages = [user({"type": "video", "path": str(video), "num_frames": 2}, text("what?")), ANSWER]
    frames = [user(*parts(load_video(video, 2)), text("what?")), ANSWER]
    given = processor.apply_chat_template(messages, **options)
    assert (
        given["assistant_masks"]
        == processor.apply_chat_template(frames, **options)["assistant_masks"]
    )
    assert sum(given["assistant_masks"][0])


def test_prompt_beyond_the_context_is_refused_before_decoding(processor, tmp_path):
    """The number of frames that fit is in the message. Three tokens are a frame."""
    broken = tmp_path / "broken.gif"
    broken.write_bytes(b"GIF89a")

    def prompt(count):
        return [user({"type": "video", "path": str(broken), "num_frames": count}, text("what?"))]

    text_ids = len(processor.encode([user(*parts([IMAGE]), text("what?"))]).ids) - 3
    context = text_ids + 3 * 5 + 1
    with raises_input_error(ErrorCode.TOO_LONG, context, "7 images", "5 fit"):
        processor.encode(prompt(7), context)
    with raises_input_error(ErrorCode.BROKEN_IMAGE, "broken.gif"):
        processor.encode(prompt(5), context)


def test_labels_are_computed_without_decoding(processor, tmp_path):
    messages = [user({"type": "video", "path": str(tmp_path / "x.gif")}, text("what?")), ANSWER]
    ids = processor.for_training(messages, return_pixel_values=False)["input_ids"]
    assert (ids == processor.image_token_id).sum() == 8 * processor.num_image_tokens


def test_number_of_frames_is_saved(processor, tiny_checkpoint, tmp_path):
    assert processor.num_frames == 8
    assert "num_frames" not in processor.to_dict()
    Owl2Processor.from_pretrained(tiny_checkpoint, num_frames=5).save_pretrained(tmp_path)
    assert Owl2Processor.from_pretrained(tmp_path).num_frames == 5


def test_animation_is_a_video(processor, tmp_path):
    gif = make_gif(tmp_path / "x.gif")
    given = processor.encode([user_message("what?", videos=[gif])])
    same_prompt(given, processor.encode([user_message("what?", load_video(gif))]))
