"""Frames of videos: which are decoded, from which sources, and within which limits."""

import base64
import errno
import gc
import io
import struct
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from owl2.errors import ErrorCode
from owl2.processing.image_io import load_image
from owl2.processing.video import VideoLimits, frames_per_second, load_video, sample_frames
from tests.errors import raises_input_error
from tests.videos import SHADES, make_gif, make_video


def shades(frames):
    return [round(float(np.asarray(load_image(frame)).mean())) for frame in frames]


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    """Three seconds with ten frames a second, key frames every ten frames and B-frames."""
    return make_video(tmp_path_factory.mktemp("video") / "x.mp4")


@pytest.mark.parametrize("form", ["path", "str", "bytes", "url", "data", "base64"])
def test_sources_of_a_video(mp4, form):
    data = mp4.read_bytes()
    text = base64.b64encode(data).decode()
    sources = {
        "path": mp4,
        "str": str(mp4),
        "bytes": data,
        "url": mp4.as_uri(),
        "data": f"data:video/mp4;base64,{text}",
        "base64": text,
    }
    expected = [SHADES[index] for index in (3, 11, 18, 26)]
    assert shades(load_video(sources[form], 4)) == pytest.approx(expected, abs=4)
    assert shades(sample_frames(sources[form], 4)) == shades(load_video(mp4, 4))


@pytest.mark.parametrize("count", [1, 2, 7, 30, 31])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_skipped_frames_do_not_change_the_others(tmp_path, count, suffix):
    """Decoding starts at the key frame before a wanted frame."""
    video = make_video(tmp_path / f"x.{suffix}")
    every = load_video(video, len(SHADES))
    chosen = [every[(2 * number + 1) * len(SHADES) // (2 * count)] for number in range(count)]
    assert [image.tobytes() for image in load_video(video, count)] == [
        image.tobytes() for image in chosen
    ]


def test_one_frame_a_second(mp4):
    expected = [SHADES[index] for index in (0, 10, 20)]
    assert shades(frames_per_second(mp4)) == pytest.approx(expected, abs=4)


@pytest.mark.parametrize("quarter_turns", [0, 1, 2, 3])
def test_rotation_of_a_phone_is_applied(tmp_path, quarter_turns):
    """The matrix of an MP4 file rotates the frame clockwise."""
    path = make_video(tmp_path / "x.mp4", shape=(32, 64), is_left_white=True)
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarter_turns]
    data = path.read_bytes()
    start = data.index(b"tkhd") + 4 + 40  # after 4 bytes of version and 36 of times and volume
    matrix = struct.pack(">9i", *(cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30))
    path.write_bytes(data[:start] + matrix + data[start + len(matrix) :])
    frame = load_video(path, 1)[0]
    assert frame.size == ((64, 32), (32, 64))[quarter_turns % 2]
    white = np.asarray(frame.convert("L")) > 128
    edges = [white[:, 0], white[0], white[:, -1], white[-1]]  # left, top, right, bottom
    assert [bool(edge.mean() > 0.9) for edge in edges] == [
        side == quarter_turns for side in range(4)
    ]


@pytest.mark.parametrize(
    ("limits", "needle"),
    [
        ({"max_frames": 29}, "29"),
        ({"max_seconds": 2.5}, "2.5"),
        ({"max_pixels": 32 * 32 - 1}, "32×32"),
    ],
)
@pytest.mark.parametrize("kind", ["mp4", "gif"])
def test_limits_of_a_video(tmp_path, limits, needle, kind):
    make = {"mp4": make_video, "gif": make_gif}[kind]
    video = make(tmp_path / f"x.{kind}")
    with raises_input_error(ErrorCode.IMAGE_TOO_LARGE, needle):
        load_video(video, 2, limits=VideoLimits(**limits))
    assert len(load_video(video, 2, limits=VideoLimits(32 * 32, 3, 30))) == 2


def test_playlist_is_not_followed(tmp_path, mp4):
    """FFmpeg would open the file or the URL that a playlist names."""
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{mp4.as_uri()}\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.mp4").write_text(playlist)
    concat = f"ffconcat version 1.0\nfile '{mp4}'\n"
    for data in (tmp_path / "list.mp4", playlist.encode(), concat.encode()):
        with raises_input_error(ErrorCode.BROKEN_IMAGE, ""):
            load_video(data, 1)


@pytest.mark.parametrize("data", [b"", b"GIF8", b"no video" * 100])
def test_file_that_is_no_video(data):
    with raises_input_error(ErrorCode.BROKEN_IMAGE, str(len(data))):
        load_video(data, 1)


def test_image_in_a_folder_of_frames_is_corrupt(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    first, second = frames_per_second(tmp_path)
    assert load_image(first).size == (4, 4)
    with raises_input_error(ErrorCode.BROKEN_IMAGE, "2.png"):
        load_image(second)


def test_folder_of_frames_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(*_):  # tests may run as root, who can list every folder
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with raises_input_error(ErrorCode.UNREADABLE_FILE, tmp_path):
        frames_per_second(tmp_path)


def test_image_is_no_video():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    with raises_input_error(ErrorCode.BROKEN_IMAGE, ""):
        load_video(buffer.getvalue(), 1)


def test_missing_file(tmp_path):
    with raises_input_error(ErrorCode.MISSING_IMAGE, "x.mp4"):
        load_image(sample_frames(tmp_path / "x.mp4", 2)[1])


def test_frames_are_freed_with_their_video(mp4):
    """Without a collection of reference cycles, which can be late in training."""
    frames = sample_frames(mp4, 2)
    load_image(frames[0])
    video = weakref.ref(frames[0].video)
    gc.disable()
    try:
        del frames
        assert video() is None
    finally:
        gc.enable()


def test_list_and_array_of_frames_are_used_as_they_are():
    frames = [Image.new("RGB", (4, 4), (shade,) * 3) for shade in (10, 20, 30)]
    assert shades(sample_frames(frames, 2)) == [10, 20, 30]
    assert shades(sample_frames(np.stack([np.asarray(frame) for frame in frames]))) == [10, 20, 30]
    with raises_input_error(ErrorCode.MISSING_IMAGE, ""):
        sample_frames([])


@pytest.mark.parametrize("count", [0, -1, 4097, 2.0, True, "8"])
def test_invalid_number_of_frames(tmp_path, count):
    with raises_input_error(ErrorCode.INVALID_VALUE, repr(count)):
        sample_frames(tmp_path / "x.gif", count)
