"""Rows with videos: each is the row with its sampled frames as images."""

import json
from random import Random

import pytest
import torch

from owl2.data.collate import encode_sample
from owl2.data.json_dataset import JsonDataset
from owl2.data.sample import InvalidSample
from owl2.data.validate.validator import SampleValidator
from owl2.errors import ErrorCode
from owl2.processing.processor import Owl2Processor
from owl2.processing.video import frames_per_second, load_video
from tests.errors import raises_input_error
from tests.videos import make_video

COUNT = 3


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return Owl2Processor.from_pretrained(tiny_checkpoint, num_frames=COUNT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A video `clips/x.mp4`, its frames `clips/0.png`, ..., and an image `a.png`."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "clips").mkdir()
    make_video(folder / "clips" / "x.mp4")
    for number, frame in enumerate(load_video(folder / "clips" / "x.mp4", COUNT)):
        frame.save(folder / "clips" / f"{number}.png")
    frame.save(folder / "a.png")
    return folder


FRAMES = [f"clips/{number}.png" for number in range(COUNT)]
VIDEO = "clips/x.mp4"


def llava(question, **keys):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
    return {"conversations": turns, **keys}


def chat(content, **keys):
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    return {"messages": turns, **keys}


def read(folder, row):
    path = folder / "rows.json"
    path.write_text(json.dumps([row]))
    return JsonDataset(path)[0]


IMAGES = "<image>" * COUNT
TEXT = {"type": "text", "text": "what?"}
PARTS = [{"type": "image", "path": name} for name in FRAMES]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # LLaVA-Video writes <image>, others write <video>, mPLUG-Owl2's files <|...|>.
        (llava("<image>\nwhat?", video=VIDEO), llava(f"{IMAGES}\nwhat?", images=FRAMES)),
        (llava("<video>\nwhat?", video=VIDEO), llava(f"{IMAGES}\nwhat?", images=FRAMES)),
        (llava("<|video|>what?", video=[VIDEO]), llava(f"{IMAGES}\nwhat?", images=FRAMES)),
        (llava("what?\n<video>", videos=[VIDEO]), llava(f"{IMAGES}\nwhat?", images=FRAMES)),
        (
            llava("<video><video>\nwhat?", videos=[VIDEO] * 2),
            llava(f"{IMAGES * 2}\nwhat?", images=FRAMES * 2),
        ),
        (
            llava("<image> or <video>?", image="a.png", video=VIDEO),
            llava(f"<image> or {IMAGES}?", images=["a.png", *FRAMES]),
        ),
        # ms-swift, LlamaFactory.
        (
            chat("<video>what?", videos=[VIDEO]),
            chat(f"{IMAGES}what?", images=FRAMES),
        ),
        (
            {"query": "<video>what?", "response": "yes", "videos": [VIDEO]},
            {"query": f"{IMAGES}what?", "response": "yes", "images": FRAMES},
        ),
        # transformers, Qwen, OpenAI.
        (chat([{"type": "video", "path": VIDEO}, TEXT]), chat([*PARTS, TEXT])),
        (chat([{"type": "video", "video": VIDEO}, TEXT]), chat([*PARTS, TEXT])),
        (chat([{"video": VIDEO}, TEXT]), chat([*PARTS, TEXT])),
        (chat([{"type": "video"}, TEXT], video=VIDEO), chat([*PARTS, TEXT])),
        (
            chat([{"type": "video_url", "video_url": {"url": VIDEO}}, TEXT]),
            chat([*PARTS, TEXT]),
        ),
        (
            chat([{"type": "video", "path": VIDEO, "num_frames": COUNT}, TEXT]),
            chat([*PARTS, TEXT]),
        ),
        ({"video": VIDEO, "caption": "yes"}, chat(PARTS)),
    ],
    ids=lambda row: json.dumps(row)[:60],
)
def test_row_with_a_video_is_the_row_with_its_frames(folder, processor, row, expected):
    features = encode_sample(read(folder, row), processor)
    frames = encode_sample(read(folder, expected), processor)
    assert not isinstance(features, InvalidSample), features
    assert features.keys() == frames.keys()
    for key, value in features.items():
        assert torch.equal(value, frames[key]), key
    assert len(features["pixel_values"]) >= COUNT


def test_folder_of_frames_is_a_video(folder, processor):
    features = encode_sample(read(folder, llava("<video>\nwhat?", video="clips")), processor)
    frames = encode_sample(read(folder, llava(f"{IMAGES}\nwhat?", images=FRAMES)), processor)
    assert torch.equal(features["pixel_values"], frames["pixel_values"])


@pytest.mark.parametrize("video", [VIDEO, "clips"])
def test_all_frames_of_a_video_are_augmented_alike(folder, processor, video):
    drawn = []

    def augment(image, rng):
        drawn.append(rng.random())
        return image

    sample = read(folder, llava("<video><image><video>", videos=[video] * 2, image="a.png"))
    features = encode_sample(sample, processor, augmentation=augment, rng=Random(0))
    assert torch.equal(features["pixel_values"], encode_sample(sample, processor)["pixel_values"])
    image, first, second = drawn[0], drawn[1 : COUNT + 1], drawn[COUNT + 1 :]
    assert len(second) == COUNT
    assert [len(set(first)), len(set(second))] == [1, 1]
    assert len({first[0], image, second[0]}) == 3


def test_broken_video_is_an_invalid_sample(folder, processor):
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    sample = read(folder, llava("<video>", video="broken.mp4"))
    invalid = encode_sample(sample, processor)
    assert (invalid.code, "broken.mp4" in invalid.reason) == (ErrorCode.BROKEN_IMAGE, True)
    missing = encode_sample(read(folder, llava("<video>", video="no.mp4")), processor)
    assert missing.code is ErrorCode.MISSING_IMAGE


def test_validation_counts_frames_and_finds_broken_videos(folder, processor):
    stats = SampleValidator(processor).validate(read(folder, llava("<video>", video=VIDEO)))
    assert (stats.images, stats.sizes) == (COUNT, ((32, 32),) * COUNT)
    missing = SampleValidator(processor).validate(read(folder, llava("<video>", video="no.mp4")))
    assert missing.code is ErrorCode.MISSING_IMAGE


@pytest.mark.parametrize(
    "row", [llava("what?", video=VIDEO), llava("<video><video>", video=VIDEO), llava("<|video|>")]
)
def test_placeholders_and_videos_of_a_row_must_fit(folder, row):
    with raises_input_error(ErrorCode.IMAGE_COUNT_MISMATCH, "video"):
        read(folder, row)


@pytest.mark.parametrize(
    "row",
    [
        llava("How good is it?\n<|image|>", image=VIDEO),  # as in Q-Align's files
        llava("<image>\nHow good is it?", image=VIDEO),
        chat(
            [
                {"type": "video", "path": VIDEO, "num_frames": "per_second"},
                {"type": "text", "text": "\nHow good is it?"},
            ]
        ),
    ],
    ids=["Q-Align", "LLaVA", "part"],
)
def test_one_frame_a_second_at_a_single_placeholder(folder, processor, row):
    """The ids and pixels of `ImageScorer`, with F x (K+1) image tokens in one place."""
    features = encode_sample(read(folder, row), processor)
    frames = list(frames_per_second(folder / VIDEO))
    assert len(frames) == 3  # of 30 at 10 frames a second
    torch.testing.assert_close(
        features["pixel_values"], processor.image_processor(frames)["pixel_values"]
    )
    single = processor.prompt_ids("USER: <|image|>\nHow good is it? ASSISTANT:")
    image, count = processor.image_token_id, processor.num_image_tokens
    start = single.index(image)
    expected = single[:start] + [image] * 3 * count + single[start + count :]
    assert features["input_ids"][0, : len(expected)].tolist() == expected
    assert (features["labels"][0, : len(expected)] == -100).all()
