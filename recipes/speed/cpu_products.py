"""Speed of matrix products with quantized weights on a CPU: owl2's kernels and libraries.

    python recipes/speed/cpu_products.py --threads 2 --output runs/cpu_products.json

The shapes are a Linear of the `bench` decoder and two of LLaMA-7B. Every product is measured with
weights that are not in the CPU cache for few tokens, as in a decode step. Libraries that are not
installed are skipped (``pip install openvino``).
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from owl2.engine.backends.native import build, ops
from owl2.engine.backends.weight_only_quantization import quantize_linear

Product = Callable[[torch.Tensor], object]
CACHE = 64 * 2**20  # bytes of the CPU's caches, at most


def owl2_products(weight: torch.Tensor) -> Iterator[tuple[str, int, Callable[[], Product]]]:
    """Names, bits of the weight, and functions that make a product with a copy of the weight."""
    rows = len(weight)
    for bits in (8, 4):
        values, scale = quantize_linear(weight, bits)
        for activation_bits in (16, 8):

            def make(v=values, s=scale, b=bits, a=activation_bits) -> Product:
                copy = v.clone()
                return lambda x: ops.linear(x, copy, None, s, b, a, rows)

            yield f"owl2 w{bits}a{activation_bits}", bits, make


def torch_products(weight: torch.Tensor) -> Iterator[tuple[str, int, Callable[[], Product]]]:
    """torch's product in float32, and its 8-bit ones: weights only, and oneDNN's or FBGEMM's."""

    def plain() -> Product:
        copy = weight.clone()
        return lambda x: F.linear(x, copy)

    yield "torch float32", 32, plain
    scale = weight.abs().amax(1) / 127
    values = (weight / scale[:, None]).round().to(torch.int8)

    def int8pack() -> Product:
        copy, scales = values.clone(), scale.bfloat16()
        return lambda x: torch._weight_int8pack_mm(x.bfloat16(), copy, scales)

    yield "torch _weight_int8pack_mm", 8, int8pack
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    quantized = torch.quantize_per_channel(weight, scale.double(), zeros, 0, torch.qint8)
    for engine in ("fbgemm", "onednn"):

        def dynamic(engine=engine) -> Product:
            torch.backends.quantized.engine = engine
            packed = torch.ops.quantized.linear_prepack(quantized, None)

            def product(x: torch.Tensor) -> object:
                torch.backends.quantized.engine = engine
                return torch.ops.quantized.linear_dynamic(x, packed, False)

            return product

        yield f"torch {engine} w8a8", 8, dynamic


def openvino_products(
    weight: torch.Tensor, threads: int
) -> Iterator[tuple[str, int, Callable[[], Product]]]:
    """OpenVINO's MatMul with compressed weights; activations in 8 bits where the CPU allows it."""
    try:
        import openvino as ov
        from openvino import opset13
    except ImportError:
        return
    groups = weight.unflatten(1, (-1, 64)).numpy()
    for bits, group_size in ((8, 64), (4, 64)):

        def make(bits=bits, group_size=group_size) -> Product:
            limit = 2 ** (bits - 1) - 1
            source = weight.numpy() if bits == 8 else groups
            scale = abs(source).max(-1, keepdims=True) / limit
            kind = ov.Type.i8 if bits == 8 else ov.Type.i4
            values = (source / scale).round().astype("int8")
            if bits == 8:
                constant = opset13.constant(values, dtype=kind)
            else:
                pairs = (values & 15).astype("uint8").reshape(-1, 2)
                packed = pairs[:, 0] | pairs[:, 1] << 4
                tensor = ov.Tensor(packed, ov.Shape(values.shape), kind)
                constant = opset13.constant(tensor, shared_memory=False)
            decompressed = opset13.multiply(
                opset13.convert(constant, ov.Type.f32), opset13.constant(scale.astype("float32"))
            )
            if bits == 4:
                decompressed = opset13.reshape(decompressed, list(weight.shape), False)
            token = opset13.parameter([-1, weight.shape[1]], ov.Type.f32)
            model = ov.Model([opset13.matmul(token, decompressed, False, True)], [token])
            options = {
                "INFERENCE_NUM_THREADS": threads,
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": group_size,
                "PERFORMANCE_HINT": "LATENCY",
            }
            request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
            return lambda x: request.infer([x.numpy()], share_inputs=True, share_outputs=True)

        yield f"OpenVINO {bits} bits", bits, make


def fastest(*functions: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
    """The seconds of the fastest call of functions that are called in turn."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    for function in functions:
        function()
    while time.perf_counter() < end or len(times) < 3:
        function = functions[len(times) % len(functions)]
        start = clock()
        function()
        times.append(clock() - start)
    return min(times)


def main() -> None:
    """Print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", default="1024x1024,4096x4096,11008x4096", help="NxK,...")
    parser.add_argument("--tokens", default="1,16,129")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    parser.add_argument(
        "--cpu-time", action="store_true", help="with one thread, if others use the machine"
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(f"kernels: {build.description()}; {args.threads} threads")
    print(
        "| N x K | M | product | ms | GB/s of weights | G operations/s |\n|---|--:|---|--:|--:|--:|"
    )
    rows = []
    for shape in args.shapes.split(","):
        n, k = map(int, shape.split("x"))
        weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) / k**0.5
        sources = [owl2_products(weight), torch_products(weight)]
        for source in (*sources, openvino_products(weight, args.threads)):
            for name, bits, make in source:
                size = n * k * bits / 8
                try:
                    products = [make() for _ in range(max(1, min(8, int(CACHE / size) + 1)))]
                    for m in map(int, args.tokens.split(",")):
                        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
                        used = products if m < 64 else products[:1]
                        calls = [partial(product, x) for product in used]
                        seconds = fastest(*calls, seconds=args.seconds, clock=clock)
                        row = [shape, m, name, seconds * 1e3, size / seconds / 1e9]
                        row.append(2 * m * n * k / seconds / 1e9)
                        rows.append(row)
                        print(
                            "| {} | {} | {} | {:.3f} | {:.1f} | {:.0f} |".format(*row), flush=True
                        )
                except (RuntimeError, NotImplementedError) as error:
                    print(f"| {shape} | | {name} | {str(error).splitlines()[0][:80]} | | |")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
