"""Speed of one layer of each part of the released model as a share of the machine's limits.

    python recipes/speed/layers.py --threads 2 --output runs/layers.json

The layers have random weights. The parts of the released size are the layers times their number
(`LAYERS`); embeddings and attention over longer prompts are not included. The products of the
attention of images count as products.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from cpu_products import fastest

from owl2.checkpoints.hf_quantizer import quantize_model
from owl2.engine.backends.native import build
from owl2.engine.backends.weight_only_quantization import set_activation_bits
from owl2.engine.model_runner import ModelRunner, NewTokens
from owl2.model.configuration import Owl2Config
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.runtime import select_dtype, tune_malloc

LAYERS = {"vision encoder": 24, "abstractor": 6, "decoder": 32}
FORMATS = {"16/32": (None, 16), "8": ("8bit", 16), "8, activations 8": ("8bit", 8)}
FORMATS |= {"4": ("4bit", 16), "4, activations 8": ("4bit", 8)}


def one_layer_model(dtype: torch.dtype) -> Owl2ForConditionalGeneration:
    """The released model with one layer in each part, and few embeddings."""
    parts = {
        "visual_model": {"num_hidden_layers": 1},
        "visual_abstractor": {"num_hidden_layers": 1},
    }
    config = Owl2Config(vocab_size=256, num_hidden_layers=1, visual_config=parts)
    torch.manual_seed(0)
    return Owl2ForConditionalGeneration._from_config(config, dtype=dtype).eval()


def linear_sizes(module: torch.nn.Module) -> int:
    """The number of weights of the Linears."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))


def attention_flops(queries: int, keys: int, width: int) -> int:
    """FLOPs of the scores and of the weighted sums of attention."""
    return 2 * 2 * queries * keys * width


def cases(
    dtype: torch.dtype,
) -> Iterator[tuple[str, str, str, Callable[[], object], float, float]]:
    """Part, format, tokens, a function, its FLOPs in matrix products, and bytes of its weights."""
    model = one_layer_model(dtype)
    vision, abstractor = model.model.vision_model, model.model.visual_abstractor
    size = model.config.visual_config.visual_model.image_size
    pixels = torch.randn(1, 3, size, size).to(dtype)
    with torch.inference_mode():
        features = vision(pixels)
    tokens = features.shape[1]
    width = model.config.visual_config.visual_model.hidden_size
    flops = 2 * tokens * linear_sizes(vision) + attention_flops(tokens, tokens, width)
    yield "vision encoder", "16/32", str(tokens), lambda: vision(pixels), flops, 0
    queries = model.config.num_image_tokens
    # Keys and values are those of the image and of the queries.
    sizes = model.config.visual_config.visual_abstractor
    context = 2 * sizes.hidden_size * sizes.encoder_hidden_size
    flops = 2 * (queries * linear_sizes(abstractor) + tokens * context)
    flops += attention_flops(queries, tokens + queries, sizes.hidden_size)
    shape = f"{queries} of {tokens}"
    yield "abstractor", "16/32", shape, lambda: abstractor(features), flops, 0
    weights = linear_sizes(model.model.layers[0].self_attn) + linear_sizes(
        model.model.layers[0].mlp
    )
    if hasattr(model.model.layers[0].self_attn, "multiway"):
        weights -= 2 * model.config.hidden_size * model.config.hidden_size  # those for images
    for name, (bits, activation_bits) in FORMATS.items():
        if bits is not None:
            model = one_layer_model(dtype)
            quantize_model(model, bits)
            set_activation_bits(model, activation_bits)
        runner = ModelRunner(model)
        per_weight = {None: dtype.itemsize, "8bit": 1, "4bit": 0.5 + 4 / 64}[bits]

        def step(count: int, length: int, runner: ModelRunner = runner) -> Callable[[], object]:
            prompts = [NewTokens(row, 0, [5] * length) for row in range(count)]
            return lambda: runner.forward(prompts)

        for count, length in ((1, 1), (16, 1), (1, 129), (1, 1024)):
            flops = 2 * count * length * weights
            shape = f"{count} x {length}"
            yield "decoder", name, shape, step(count, length), flops, weights * per_weight


def main() -> None:
    """Print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", help="default: the best for this CPU")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument(
        "--cpu-time", action="store_true", help="with one thread, if others use the machine"
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    tune_malloc()  # as loading a model does
    torch.set_num_threads(args.threads)
    dtype = select_dtype(torch.device("cpu"), args.dtype)
    clock = time.process_time if args.cpu_time else time.perf_counter
    square, values = torch.randn(1024, 1024).to(dtype), torch.zeros(2**26)
    multiply = partial(torch.nn.functional.linear, square, square)
    matmul = 2 * 1024**3 / fastest(multiply, seconds=args.seconds, clock=clock)
    read_limit = values.nbytes / fastest(values.sum, seconds=1, clock=clock)
    print(
        f"kernels: {build.description()}; {args.threads} threads; {dtype}: "
        f"{matmul / 1e9:.0f} GFLOP/s, {read_limit / 1e9:.1f} GB/s"
    )
    print("| part | bits | tokens | ms per layer | ms of the part | products | memory |")
    print("|---|---|---|--:|--:|--:|--:|")
    rows = []
    with torch.inference_mode():
        for part, name, tokens, function, flops, read in cases(dtype):
            best = fastest(function, seconds=args.seconds, clock=clock)
            shares = [100 * flops / best / matmul, 100 * read / best / read_limit]
            row = [part, name, tokens, best * 1e3, best * 1e3 * LAYERS[part], *shares]
            rows.append(row)
            print(
                "| {} | {} | {} | {:.2f} | {:.0f} | {:.0f} % | {:.0f} % |".format(*row), flush=True
            )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
