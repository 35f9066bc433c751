"""Time to score images: `ImageScorer` and the procedure of the authors' scripts.

    python recipes/scoring/benchmark.py --size bench
    python recipes/scoring/benchmark.py --model q-future/one-align --images photos/

The authors' scripts process one image at a time. The image is padded at its full size, CLIP's
processor resizes it, the model computes the logits of all positions with eager attention, and five
of them are used. Their code and pyiqa load the weights in float16, even on a CPU. Both procedures
use the same images and the same weights in the same dtype. `--dtypes` selects the dtypes.
CPU times are those of all threads.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from owl2.bench.baseline import as_baseline
from owl2.bench.presets import BenchModel
from owl2.engine.engine import Engine
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import Owl2Tokenizer, train_tokenizer
from owl2.scoring.methods import METHODS
from owl2.scoring.scorer import ImageScorer

PHOTO_SIZE = 1024, 768  # of KonIQ
LEVELS = METHODS["q-align"].labels
REPEATS = 3
DTYPES = "float32", "bfloat16", "float16"
BASELINE_IMAGES = {"float16": 1}  # one by one, so that few are enough


def write_photos(folder: Path, count: int) -> list[Path]:
    """JPEG files of smooth noise, which take as long to decode as photos."""
    files = []
    for index in range(count):
        noise = np.random.RandomState(index).randint(0, 256, (96, 128, 3), dtype=np.uint8)
        files.append(folder / f"{index}.jpg")
        Image.fromarray(noise).resize(PHOTO_SIZE, Image.Resampling.BICUBIC).save(files[-1])
    return files


def load_engine(model: str | None, size: str | None, dtype: str) -> Engine:
    """The engine of a checkpoint, or of random weights with a small tokenizer."""
    if model is not None:
        return Engine.from_pretrained(model, "cpu", dtype)
    weights = BenchModel(size=size, device="cpu", dtype=dtype).load()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.model")
        text = f"USER: How would you rate the quality of this image? ASSISTANT: {' '.join(LEVELS)}"
        train_tokenizer([text] * 5, path, 320)
        tokenizer = Owl2Tokenizer(path)
    config = weights.config
    config.image_token_id = len(tokenizer)  # in the vocabulary of the weights
    images = Owl2ImageProcessor(config.image_size, "pad")
    sizes = config.num_image_tokens, config.image_token_id
    processor = Owl2Processor(images, tokenizer, None, *sizes)
    return Engine(weights, processor, enable_prefix_caching=True)


def authors_way(engine: Engine, scorer: ImageScorer) -> Callable[[Sequence[Path]], list[float]]:
    """A function that scores files one by one, with the weights of the engine."""
    baseline, processor, dtype = as_baseline(engine.model), engine.processor, engine.model.dtype
    edge = processor.image_processor.edge
    clip = CLIPImageProcessor(size={"shortest_edge": edge}, crop_size=edge)
    fill = tuple(int(value * 255) for value in clip.image_mean)
    ids = torch.tensor([processor.prompt_ids(scorer.prompt())])
    levels = [processor.prompt_ids(level)[1] for level in LEVELS]
    weights = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=dtype)

    @torch.inference_mode()
    def score(file: Path) -> float:
        image = Image.open(file).convert("RGB")
        longer = max(image.size)
        square = Image.new("RGB", (longer, longer), fill)
        square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
        pixels = clip(square, return_tensors="pt")["pixel_values"].to(dtype)
        logits = baseline(input_ids=ids, pixel_values=pixels).logits[:, -1]
        return float((logits[0, levels].softmax(-1) @ weights).item())

    def score_all(files: Sequence[Path]) -> list[float]:
        # Their code multiplies in the dtype of the weights, also without instructions for it.
        names = "cpu_supports_bf16", "cpu_supports_fp16"
        with patch.multiple("owl2.runtime", **{name: lambda: True for name in names}):
            return [score(file) for file in files]

    return score_all


def seconds(
    function: Callable[[Sequence[Path]], object], files: Sequence[Path], repeats: int = REPEATS
) -> tuple[float, float]:
    """The median wall and CPU times of some runs, per image."""
    times = []
    for _ in range(repeats):
        start, cpu = time.perf_counter(), time.process_time()
        function(files)
        times.append((time.perf_counter() - start, time.process_time() - cpu))
    wall, cpu = map(statistics.median, zip(*times, strict=True))
    return wall / len(files), cpu / len(files)


def print_row(name: str, times: tuple[float, float], baseline: tuple[float, float]) -> None:
    """Print milliseconds and how many times as fast as the baseline, for wall and CPU times."""
    cells = [
        f"{one * 1e3:>9.1f}{base / one:>8.2f}x" for one, base in zip(times, baseline, strict=True)
    ]
    print(f"{name:<36}{''.join(cells)}", flush=True)


def compare(engine: Engine, files: Sequence[Path], sizes: Sequence[int], repeats: int) -> None:
    """Print a row for the authors' way, and one for each batch size of ours."""
    scorer, dtype = ImageScorer(engine, "q-align"), str(engine.model.dtype).removeprefix("torch.")
    authors, count = authors_way(engine, scorer), BASELINE_IMAGES.get(dtype, 4)
    first = zip(scorer.score(files[:count]), authors(files[:count]), strict=True)  # not measured
    difference = max(abs(one.score - other) for one, other in first)
    baseline = seconds(authors, files[:count], repeats)
    print_row(f"one by one, all logits, {dtype}", baseline, baseline)
    for size in sizes:

        def ours(files: Sequence[Path], size: int = size) -> object:
            engine.clear_cache()  # of image features
            return scorer.score(files, batch_size=size)

        own = seconds(ours, files[: max(size, count)], repeats)
        print_row(f"ImageScorer, batch {size}, {dtype}", own, baseline)
    print(f"largest difference of scores: {difference:.1e}", flush=True)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", help="a scoring model")
    parser.add_argument("--size", default="bench", help="random weights: see `owl2 bench --help`")
    parser.add_argument("--images", type=Path, help="a folder with images")
    parser.add_argument("--count", type=int, default=16, help="number of images")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=REPEATS, help="measured runs of each way")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=DTYPES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = (
            sorted(options.images.iterdir())[: options.count]
            if options.images
            else write_photos(Path(folder), options.count)
        )
        print(f"{'ms per image':<36}{'wall':>9}{'':>9}{'CPU':>9}")
        for dtype in options.dtypes:
            engine = load_engine(options.model, options.size, dtype)
            compare(engine, files, options.batch_sizes, options.repeats)


if __name__ == "__main__":
    main()
