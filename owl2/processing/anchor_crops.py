"""Pages to crops, and the text that names them (Model family §8.3, §8.4, §9).

::

    page (w, h) ──select_grid──► rows r, columns c
    page ──resize to the edge──► the whole page
    page ──resize to c·edge x r·edge, cut──► r · c crops, row by row
    <|image|> ──► <global_img><|image|><crop_img_row0_col0><|image|>...   (DocOwl1.5)
    <|image|> ──► <img 1><|image|>                                        (DocOwl2)
"""

from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch
from PIL import Image

from owl2.errors import ErrorCode, InputError
from owl2.processing.image_processing import Owl2ImageProcessor, Owl2ImageProcessorKwargs
from owl2.processing.image_square import resize
from owl2.processing.message_parts import IMAGE_TOKEN

Grid = tuple[int, int]  # rows and columns

_GRID_4 = ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (1, 4), (4, 1))
_GRID_9 = (
    *(*_GRID_4, (1, 5), (5, 1), (1, 6), (6, 1), (2, 3), (3, 2), (1, 7), (7, 1)),
    *((4, 2), (2, 4), (1, 8), (8, 1), (3, 3), (1, 9), (9, 1)),
)


def _grids_up_to(crops: int, longest: int) -> tuple[Grid, ...]:
    """All grids with at most this many crops, and at most `longest` in a row or column."""
    sides = range(1, longest + 1)
    grids = [grid for grid in product(sides, sides) if grid[0] * grid[1] <= crops]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])))


# The order decides between grids that fit equally well.
ANCHORS: dict[str, tuple[Grid, ...]] = {
    "grid_1": ((1, 1),),
    "grid_4": _GRID_4,
    "grid_9": _GRID_9,
    "grid_12": _grids_up_to(12, 12),
    "grid_20": _grids_up_to(20, 11),
}


@lru_cache(maxsize=1024)
def select_grid(width: int, height: int, edge: int, anchors: str) -> Grid:
    """The rows and columns of crops for an image of this size in pixels.

    The shape of the grid decides, and of equal shapes the size. The arithmetic is in float32,
    because ties depend on it.

    Args:
        edge: Of a crop, in pixels.
        anchors: A name in `ANCHORS`.
    """
    rows, columns = np.array(ANCHORS[anchors], dtype=np.int64).T
    grid_width, grid_height = columns * edge, rows * edge
    ratio = np.float32(height) / np.float32(width)
    same_shape_height = (ratio * grid_width.astype(np.float32)).astype(np.int64)
    shape = _overlap(grid_width, same_shape_height, grid_width, grid_height)
    size = _overlap(np.int64(width), np.int64(height), grid_width, grid_height)
    best = int(np.argmax(shape * np.float32(100) + size))
    return int(rows[best]), int(columns[best])


def _overlap(width: Any, height: Any, grid_width: np.ndarray, grid_height: np.ndarray) -> Any:
    """Intersection over union in float32 of boxes with a common corner."""
    shared = np.minimum(width, grid_width) * np.minimum(height, grid_height)
    union = width * height + grid_width * grid_height - shared
    return shared.astype(np.float32) / (union.astype(np.float32) + np.float32(1e-5))


class CropImageProcessorKwargs(Owl2ImageProcessorKwargs, total=False):
    """The options of `Owl2ImageProcessor` and those of crops."""

    anchors: str | None
    add_global_img: bool | None
    add_textual_crop_indicator: bool | None
    compress_pages: bool | None


class CropImageProcessor(Owl2ImageProcessor):
    """Pages to the pixels of several crops each.

    Args:
        anchors: The grids to choose from, a name in `ANCHORS`.
        add_global_img: The whole page precedes its crops. DocOwl1.5-stage1 has only crops.
        add_textual_crop_indicator: Texts before the crops name their places.
        compress_pages: The model compresses the crops of a page to one image (DocOwl2). The result
            then contains `image_grids` (N, 2), rows and columns.
    """

    valid_kwargs = CropImageProcessorKwargs
    anchors = "grid_9"
    add_global_img = add_textual_crop_indicator = True
    compress_pages = False
    makes_crops = True
    saved_options = (
        *Owl2ImageProcessor.saved_options,
        *("anchors", "add_global_img", "add_textual_crop_indicator", "compress_pages"),
    )

    @property
    def model_input_names(self) -> list[str]:  # type: ignore[override]  # depends on an option
        return ["pixel_values", *(["image_grids"] if self.compress_pages else [])]

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # the same options by name
        if (anchors := kwargs.get("anchors")) not in ANCHORS:
            raise InputError(
                f"anchors is {anchors!r}; choose from {', '.join(ANCHORS)}.",
                ErrorCode.INVALID_VALUE,
            )
        if kwargs["compress_pages"] and not kwargs["add_global_img"]:
            raise InputError(
                "compress_pages requires add_global_img: the whole page has the places of the "
                "embeddings.",
                ErrorCode.CONFLICT,
            )
        return super()._standardize_kwargs(**kwargs)

    def expand_images(self, images: list[Any]) -> tuple[list[str], list[Any]]:
        """See `Owl2ImageProcessor.expand_images`. Images are decoded, because sizes are needed."""
        if self.compress_pages:
            numbers = range(1, len(images) + 1)
            indicators = [f"<img {number}>" for number in numbers]
            if not self.add_textual_crop_indicator:
                indicators = [""] * len(images)
            return [indicator + IMAGE_TOKEN for indicator in indicators], images
        decoded = [self.load(source, index, images) for index, source in enumerate(images)]
        return [self._crop_text(*self.grid_of(*image.size)) for image in decoded], decoded

    def _crop_text(self, rows: int, columns: int) -> str:
        places = [f"<crop_img_row{r}_col{c}>" for r in range(rows) for c in range(columns)]
        if self.add_global_img:
            places.insert(0, "<global_img>")
        if not self.add_textual_crop_indicator:
            return IMAGE_TOKEN * len(places)
        return "".join(place + IMAGE_TOKEN for place in places)

    def grid_of(self, width: int, height: int) -> Grid:
        """See `select_grid`."""
        return select_grid(width, height, self.edge, self.anchors)

    def count_squares(self, width: int, height: int) -> tuple[int, int]:
        """See `Owl2ImageProcessor.count_squares`."""
        rows, columns = self.grid_of(width, height)
        squares = rows * columns + self.add_global_img
        return (1 if self.compress_pages else squares), squares

    def make_squares(self, image: Image.Image, edge: int, options: Any) -> list[Image.Image]:
        """See `Owl2ImageProcessor.make_squares`."""
        resample = options["resample"]
        rows, columns = select_grid(*image.size, edge, options["anchors"])
        page = resize(image, (columns * edge, rows * edge), resample)
        crops = [
            page.crop((c * edge, r * edge, (c + 1) * edge, (r + 1) * edge))
            for r in range(rows)
            for c in range(columns)
        ]
        if options["add_global_img"]:
            crops.insert(0, resize(image, (edge, edge), resample))
        return crops

    def describe_squares(
        self, sizes: list[tuple[int, int]], edge: int, options: Any
    ) -> dict[str, torch.Tensor]:
        """`image_grids` (N, 2) if the model compresses pages."""
        if not options["compress_pages"]:
            return {}
        grids = [select_grid(*size, edge, options["anchors"]) for size in sizes]
        return {"image_grids": torch.tensor(grids, dtype=torch.long).reshape(-1, 2)}
