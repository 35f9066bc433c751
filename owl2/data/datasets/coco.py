"""The paths of COCO's images, which seven datasets use.

The images are published in two divisions with different file names: `train2014` and `val2014`,
`train2017` and `val2017`. `train2017` contains all of `train2014`; `val2014` is distributed over
both directories of 2017.
"""

from typing import Literal

from owl2.errors import ErrorCode, InputError

Year = Literal[2014, 2017]


def coco_image(number: int, directory: str) -> str:
    """The path of an image in COCO's archives; `directory`: `train2014`, `train2017`, ..."""
    prefix = f"COCO_{directory}_" if directory.endswith("2014") else ""
    return f"{directory}/{prefix}{number:012d}.jpg"


def coco_directory(split: str, year: Year) -> str:
    """The directory with the images of a split of 2014 in the archives of `year`.

    Raises:
        InputError: The validation split of 2014 in the directories of 2017.
    """
    if split == "val" and year == 2017:
        raise InputError(
            "coco=2017: the images of val2014 are distributed over train2017 and val2017; use the "
            "archive val2014",
            ErrorCode.UNSUPPORTED,
        )
    return f"{split}{year}"
