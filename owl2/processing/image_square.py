"""Squares of images, for the model."""

from collections.abc import Sequence

from PIL import Image

from owl2.processing.image_io import ImagePolicy

# A square is computed in bands of rows, which fit into the cache of a processor, or beyond the
# second size one channel at a time.
BAND_PIXELS, CHANNEL_PIXELS = 2**18, 2**24
MAX_CROPPED_RATIO = 4  # of the edges of an image that is resized completely before it is cropped


def to_square(
    image: Image.Image,
    edge: int,
    policy: ImagePolicy,
    mean: Sequence[float],
    resample: int = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Convert an image to the square for the model, with the edge in pixels.

    Args:
        policy: For images that are not square: "resize" stretches them to a square of the longer
            edge, "pad" centers them in a square filled with the mean color, "crop" keeps the
            central square (the processor of CLIP).
        mean: Of each channel, between 0 and 1.
    """
    longer = max(image.size)
    is_landscape = image.width > image.height
    if image.width == image.height:
        return image if longer == edge else image.resize((edge, edge), resample)
    if policy == "crop":
        return _crop(image, edge, resample)
    if policy == "resize" and is_landscape and image.mode == "RGB" and longer**2 > CHANNEL_PIXELS:
        # The columns are stretched before the rows are resized: one channel at a time.
        channels = [to_square(one, edge, policy, mean, resample) for one in image.split()]
        return Image.merge("RGB", channels)
    # Pillow resizes each row, then each column. Here the rows are resized in bands, so that the
    # complete square is not required. The pixels are equal to those of resizing the square.
    color = tuple(int(value * 255) for value in mean) if policy == "pad" else 0
    rows = Image.new(image.mode, (edge, longer), color)
    above = (longer - image.height) // 2 if policy == "pad" else 0
    height = max(1, BAND_PIXELS // longer)
    if image.mode in ("LA", "RGBA") or (policy == "resize" and is_landscape):
        height = longer  # for alpha, because Pillow converts the mode in each step
    for top in range(above // height * height, above + image.height, height):
        bottom = min(top + height, longer)
        if policy == "resize":
            band = image.crop((0, top, image.width, min(bottom, image.height)))
            band = band.resize((longer, bottom - top), resample)
        else:
            band = Image.new(image.mode, (longer, bottom - top), color)
            band.paste(image, ((longer - image.width) // 2, above - top))
        if bottom - top == longer:  # the complete square
            return band if longer == edge else band.resize((edge, edge), resample)
        rows.paste(band.resize((edge, bottom - top), resample), (0, top))
    return rows if longer == edge else rows.resize((edge, edge), resample)


def _crop(image: Image.Image, edge: int, resample: int) -> Image.Image:
    """The central square of an image whose shorter edge is resized to `edge`."""
    shorter, longer = sorted(image.size)
    length = int(edge * longer / shorter)
    width, height = (length, edge) if image.width > image.height else (edge, length)
    left, top = (width - edge) // 2, (height - edge) // 2
    if longer <= MAX_CROPPED_RATIO * shorter:
        return image.resize((width, height), resample).crop((left, top, left + edge, top + edge))
    # Of an image of any length, only the square is computed. The pixels next to it, as far as the
    # widest filter reaches, are kept. Pillow resizes images of more than 1:100 in another order.
    x, y = image.width / width, image.height / height
    margin = int(4 * max(x, y, 1)) + 1
    x_start, y_start = max(0, int(left * x) - margin), max(0, int(top * y) - margin)
    x_end, y_end = int((left + edge) * x) + margin, int((top + edge) * y) + margin
    part = image.crop((x_start, y_start, min(x_end, image.width), min(y_end, image.height)))
    box = (left * x - x_start, top * y - y_start)
    return part.resize((edge, edge), resample, box=(*box, box[0] + edge * x, box[1] + edge * y))


def resize(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """As `Image.resize` of Pillow 13, in every version of Pillow.

    Pillow resizes the rows and then the columns, and rounds in between. Since version 13 it starts
    with the columns if the height decreases by more than twice as many pixels as the width.
    """
    width, height = size
    if image.mode in ("LA", "RGBA"):  # Pillow converts the mode in each step
        return image.resize(size, resample)
    is_column_first = 0 < image.height - height > 2 * (image.width - width)
    between = (image.width, height) if is_column_first else (width, image.height)
    return image.resize(between, resample).resize(size, resample)
