"""Names in the files of responses from which the images are found again.

A file, a URL and a frame of a video have a name. An image within the file of a benchmark (the
base64 of MMBench) has none: a small copy is saved in ``responses/images``. Its name is relative, so
that the directory of a run can be moved.
"""

import os
import sys
from pathlib import Path

from PIL import Image

from owl2.eval.samples import Response
from owl2.eval.video import VideoFrame, parse_frame
from owl2.processing.image_io import load_image
from owl2.processing.messages import parse_messages

FOLDER = "images"
COPY_SIZE = 320  # pixels of the longer edge of a copy


def image_names(response: Response, directory: Path) -> list[str]:
    """The names of the images of a response; saves copies of those without a name.

    Args:
        directory: That of the responses.
    """
    names = []
    images = parse_messages(response.sample.messages).images
    for image, digest in zip(images, response.image_digests, strict=True):
        is_data_uri = isinstance(image, str) and image.startswith("data:")
        if isinstance(image, (str, os.PathLike)) and not is_data_uri:
            names.append(str(image))
            continue
        path = directory / FOLDER / f"{digest}.jpg"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            copy = load_image(image, sys.maxsize)  # the model has accepted its size
            copy.thumbnail((COPY_SIZE, COPY_SIZE), Image.Resampling.BICUBIC)
            copy.save(path, quality=85)
        names.append(path.relative_to(directory).as_posix())
    return names


def find_image(name: str, directory: Path) -> VideoFrame | Path | str:
    """The image with a name that `image_names` returned, as `load_image` takes it."""
    copy = directory / name
    return copy if name.startswith(f"{FOLDER}/") and copy.is_file() else parse_frame(name)
