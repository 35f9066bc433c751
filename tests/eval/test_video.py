"""Frames of videos: their selection, and decoding on first use."""

import os
import sys

import pytest
from PIL import Image

from owl2.errors import ErrorCode, InputError
from owl2.eval.video import VideoFrame, frame_files, parse_frame
from owl2.processing.image_io import load_image
from owl2.processing.video import centers
from tests.errors import raises_input_error

GRAYS = [0, 40, 80, 120, 160, 200]


@pytest.fixture
def gif(tmp_path):
    """Six frames of 0.5 s, each of another gray."""
    frames = [Image.new("L", (8, 8), gray) for gray in GRAYS]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=500)
    return tmp_path / "x.gif"


def grays(frames):
    return [load_image(frame).getpixel((4, 4))[0] for frame in frames]


@pytest.mark.parametrize(
    ("total", "count", "indices"),
    [(10, 4, [1, 3, 6, 8]), (4, 4, [0, 1, 2, 3]), (1, 3, [0, 0, 0]), (3, 1, [1])],
)
def test_frames_are_the_centers_of_equal_parts(total, count, indices):
    assert centers(total, count) == indices


def test_frames_in_a_folder_are_ordered_by_number(tmp_path):
    for number in range(1, 13):
        Image.new("L", (4, 4), 20 * number).save(tmp_path / f"frame_{number}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    assert [path.name for path in frame_files(tmp_path, 4)] == [
        f"frame_{number}.png" for number in (2, 5, 8, 11)
    ]
    assert len(frame_files(tmp_path, 12)) == 12


def test_frames_in_a_folder_may_have_any_image_type(tmp_path):
    names = ["2.tif", "10.AVIF"]
    for name in (*names, "._2.tif", "notes.txt"):  # macOS writes the hidden one
        (tmp_path / name).touch()
    assert frame_files(tmp_path, 2) == [tmp_path / name for name in names]


def test_folder_without_images_has_no_frames(tmp_path):
    assert frame_files(tmp_path, 4) == []


def test_frames_of_a_gif(gif):
    assert grays(frame_files(gif, 3)) == pytest.approx([GRAYS[1], GRAYS[3], GRAYS[5]], abs=2)
    assert grays(frame_files(gif, 6)) == pytest.approx(GRAYS, abs=2)


def test_frames_of_a_segment(gif):
    assert grays(frame_files(gif, 2, (0.9, 2.1))) == pytest.approx([GRAYS[2], GRAYS[4]], abs=2)
    # Between two frames, and after the end: the nearest.
    assert grays(frame_files(gif, 1, (0.6, 0.8))) == pytest.approx([GRAYS[1]], abs=2)
    assert grays(frame_files(gif, 1, (9.0, 12.0))) == pytest.approx([GRAYS[5]], abs=2)


def test_frame_is_decoded_on_first_use(tmp_path):
    broken = tmp_path / "broken.gif"
    broken.write_bytes(b"GIF89a")
    first = frame_files(broken, 2)[0]
    assert str(first) == f"{broken}, frame 1 of 2"
    with pytest.raises(InputError) as error:
        load_image(first)
    assert "broken.gif" in str(error.value)


def test_video_is_decoded_once(gif):
    first, second = frame_files(gif, 2)
    load_image(first)
    gif.unlink()
    assert grays([second]) == pytest.approx([GRAYS[4]], abs=2)


def test_video_files_need_av(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "x.mp4").write_bytes(b"")
    with raises_input_error(ErrorCode.MISSING_DEPENDENCY, "x.mp4", "av"):
        frame_files(tmp_path / "x.mp4", 4)


@pytest.fixture
def movie(tmp_path):
    """Two seconds with ten frames per second of increasing brightness."""
    av = pytest.importorskip("av")
    path = tmp_path / "x.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(20):
            image = Image.new("RGB", (64, 64), (10 * number,) * 3)
            for packet in stream.encode(av.VideoFrame.from_image(image)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def test_video_is_decoded_by_av(movie):
    assert grays(frame_files(movie, 4)) == pytest.approx([20, 70, 120, 170], abs=6)
    assert grays(frame_files(movie, 2, (1.0, 1.9))) == pytest.approx([120, 170], abs=6)


def test_truncated_video_has_its_first_frames(movie):
    data = movie.read_bytes()
    movie.write_bytes(data[: (data.index(b"movi") + len(data)) // 2])
    seen = grays(frame_files(movie, 4))
    assert len(seen) == 4
    assert seen == sorted(seen)
    assert seen[0] < seen[-1] < 190


def test_file_that_is_not_a_video(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "x.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(InputError):
        load_image(frame_files(tmp_path / "x.mp4", 1)[0])


def test_named_pipe_is_no_video(tmp_path):
    os.mkfifo(tmp_path / "x.gif")
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "x.gif"):
        load_image(frame_files(tmp_path / "x.gif", 1)[0])


def test_frames_with_different_segments_are_different(gif):
    assert VideoFrame(gif, 1, 2) == VideoFrame(gif, 1, 2) != VideoFrame(gif, 1, 2, (0.0, 1.0))


@pytest.mark.parametrize("segment", [None, (0.0, 1.25)])
def test_name_of_a_frame_is_parsed(gif, segment):
    frame = frame_files(gif, 3, segment)[1]
    assert parse_frame(str(frame)) == frame
    assert parse_frame(str(gif)) == str(gif)
