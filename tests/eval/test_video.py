"""Frames of videos: which ones, and decoded no earlier than needed."""

import sys

import pytest
from PIL import Image

from owl2.errors import InputError
from owl2.eval.video import Frame, frames_of, named, spread
from owl2.processing.image_io import load_image

GREYS = [0, 40, 80, 120, 160, 200]


@pytest.fixture
def gif(tmp_path):
    """Six frames of 0.5 s, each of another grey."""
    frames = [Image.new("L", (8, 8), grey) for grey in GREYS]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=500)
    return tmp_path / "x.gif"


def greys(frames):
    return [load_image(frame).getpixel((4, 4))[0] for frame in frames]


@pytest.mark.parametrize(
    ("total", "count", "places"),
    [(10, 4, [1, 3, 6, 8]), (4, 4, [0, 1, 2, 3]), (1, 3, [0, 0, 0]), (3, 1, [1])],
)
def test_frames_are_the_middles_of_equal_parts(total, count, places):
    assert spread(total, count) == places


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    for number in range(1, 13):
        Image.new("L", (4, 4), 20 * number).save(tmp_path / f"frame_{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    assert [path.name for path in frames_of(tmp_path, 4)] == [
        f"frame_{number}.png" for number in (2, 5, 8, 11)
    ]
    assert len(frames_of(tmp_path, 12)) == 12


def test_a_folder_without_images_gives_none(tmp_path):
    assert frames_of(tmp_path, 4) == []


def test_a_gifs_frames_are_what_they_are_in_it(gif):
    assert greys(frames_of(gif, 3)) == pytest.approx([GREYS[1], GREYS[3], GREYS[5]], abs=2)
    assert greys(frames_of(gif, 6)) == pytest.approx(GREYS, abs=2)


def test_a_segment_has_its_own_frames(gif):
    assert greys(frames_of(gif, 2, (0.9, 2.1))) == pytest.approx([GREYS[2], GREYS[4]], abs=2)
    # Between two frames, and after the end: the nearest.
    assert greys(frames_of(gif, 1, (0.6, 0.8))) == pytest.approx([GREYS[1]], abs=2)
    assert greys(frames_of(gif, 1, (9.0, 12.0))) == pytest.approx([GREYS[5]], abs=2)


def test_nothing_is_decoded_before_a_image_is_opened(tmp_path):
    broken = tmp_path / "broken.gif"
    broken.write_bytes(b"GIF89a")
    first = frames_of(broken, 2)[0]
    assert str(first) == f"{broken}, frame 1 of 2"
    with pytest.raises(InputError, match=r"The video .*broken\.gif cannot be decoded"):
        load_image(first)


def test_a_video_is_decoded_once(gif):
    first, second = frames_of(gif, 2)
    load_image(first)
    gif.unlink()
    assert greys([second]) == pytest.approx([GREYS[4]], abs=2)


def test_other_files_need_av_and_say_so_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "x.mp4").write_bytes(b"")
    with pytest.raises(InputError, match=r"x\.mp4: the package av is needed.*a folder"):
        frames_of(tmp_path / "x.mp4", 4)


@pytest.fixture
def film(tmp_path):
    """Two seconds, ten frames each, that grow brighter."""
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


def test_a_film_is_decoded_by_av(film):
    assert greys(frames_of(film, 4)) == pytest.approx([20, 70, 120, 170], abs=6)
    assert greys(frames_of(film, 2, (1.0, 1.9))) == pytest.approx([120, 170], abs=6)


def test_a_film_that_is_cut_off_gives_what_it_has(film):
    data = film.read_bytes()
    film.write_bytes(data[: (data.index(b"movi") + len(data)) // 2])
    seen = greys(frames_of(film, 4))
    assert len(seen) == 4 and seen == sorted(seen) and seen[0] < seen[-1] < 190


def test_a_film_that_is_none_is_said(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "x.mp4").write_bytes(b"no film" * 100)
    with pytest.raises(InputError, match="cannot be decoded"):
        load_image(frames_of(tmp_path / "x.mp4", 1)[0])


def test_frames_are_told_apart_by_what_they_are_of(gif):
    assert Frame(gif, 1, 2) == Frame(gif, 1, 2) != Frame(gif, 1, 2, (0.0, 1.0))


@pytest.mark.parametrize("segment", [None, (0.0, 1.25)])
def test_a_frame_is_found_again_by_its_name(gif, segment):
    frame = frames_of(gif, 3, segment)[1]
    assert named(str(frame)) == frame
    assert named(str(gif)) == str(gif)
