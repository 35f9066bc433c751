"""Small videos for tests."""

import numpy as np
import pytest
from PIL import Image

SHADES = [8 * number for number in range(30)]  # of the frames


def make_video(path, shape=(32, 32), is_left_white=False, shades=SHADES, has_sound=False):
    """Write a video with ten frames a second, with key frames and B-frames; returns its path."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        sound = container.add_stream("aac", rate=8000, layout="mono") if has_sound else None
        stream.height, stream.width = shape
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 2_000_000
        stream.codec_context.gop_size = 10
        stream.codec_context.max_b_frames = 0 if path.suffix == ".avi" else 2
        for shade in shades:
            image = Image.new("RGB", stream_size(shape), (0 if is_left_white else shade,) * 3)
            if is_left_white:
                image.paste("white", (0, 0, shape[1] // 2, shape[0]))
            for packet in stream.encode(av.VideoFrame.from_image(image)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
        if sound is not None:
            samples = np.zeros((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
            frame.sample_rate, frame.pts = 8000, 0
            for packet in [*sound.encode(frame), *sound.encode()]:
                container.mux(packet)
    return path


def make_gif(path, shades=SHADES):
    """Write an animation with ten frames a second; returns its path."""
    frames = [Image.new("L", (32, 32), shade) for shade in shades]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    return path


def stream_size(shape):
    return shape[1], shape[0]
