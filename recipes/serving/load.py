"""Throughput and latency of OpenAI-compatible servers with 1, 4 and 16 concurrent clients.

::

    python recipes/serving/load.py ours=http://127.0.0.1:8000 vllm=http://127.0.0.1:8001 \\
        --output load.json

Each client streams one answer after another. All requests differ, so that caches have no effect;
half of them have an image, the same ones for all servers and in all runs. Several servers are
measured in turns within each round, so that changes in the load of the machine affect all of them.
Idle servers must not use the CPU.

Times are measured in the client: from sending a request to its first text and to its end.
"""

import argparse
import asyncio
import base64
import io
import itertools
import json
import math
import os
import platform
import random
import ssl
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from rich.console import Console
from rich.table import Table

TLS_CONTEXT = ssl.create_default_context()
WORDS = ("what", "which", "color", "is", "are", "the", "a", "left", "above", "circle", "square")


@dataclass
class Reply:
    """The times of one request in seconds, its token counts, and the number of its client."""

    first: float
    total: float
    prompt_tokens: int
    tokens: int
    client: int = 0


@dataclass
class Round:
    """Requests to one server from `clients` concurrent clients; they took `seconds`."""

    server: str
    clients: int
    seconds: float
    replies: list[Reply]
    errors: list[str]

    @property
    def tokens_per_second(self) -> float:
        return sum(reply.tokens for reply in self.replies) / self.seconds


@dataclass
class Server:
    """A server, its model and the headers of requests."""

    name: str
    url: str
    model: str = ""
    headers: dict[str, str] = field(default_factory=dict, repr=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all servers. The exit code is 1 if a request failed."""
    given = parse_arguments(arguments)
    key = os.environ.get(given.key_env or "", "") or "none"
    servers = [find_server(argument, key) for argument in given.servers]
    rounds = asyncio.run(measure(servers, given))
    lines = [
        summary([one for one in rounds if (one.server, one.clients) == (server.name, clients)])
        for clients in given.clients
        for server in servers
    ]
    show(lines)
    if given.output:
        report = {
            "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
            "options": {name: getattr(given, name) for name in OPTIONS},
            "servers": [{"name": one.name, "url": one.url, "model": one.model} for one in servers],
            "results": lines,
            "rounds": [asdict(one) for one in rounds],
        }
        given.output.write_text(json.dumps(report, indent=1) + "\n")
    failed = [error for one in rounds for error in one.errors]
    for error in sorted(set(failed)):
        print(f"{failed.count(error)} failed: {error}", file=sys.stderr)
    return 1 if failed else 0


OPTIONS = ("clients", "rounds", "requests", "max_tokens", "words", "images", "edge")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("servers", nargs="+", metavar="[NAME=]URL", help="without /v1")
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1, 4, 16], help="concurrent clients"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2, help="requests per client and round")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--words", type=int, default=30, help="words per question")
    parser.add_argument("--images", type=float, default=0.5, help="fraction with an image")
    parser.add_argument("--edge", type=int, default=224, help="edge of images in pixels")
    parser.add_argument("--key-env", help="environment variable with the API key")
    parser.add_argument("--timeout", type=float, default=600, help="seconds per request")
    parser.add_argument("--output", type=Path, help="JSON file with every request")
    return parser.parse_args(arguments)


def find_server(argument: str, key: str) -> Server:
    """The server of `NAME=URL` or URL, with its first model."""
    name, _, url = argument.rpartition("=")
    url = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {key}"}
    models = httpx.get(f"{url}/v1/models", headers=headers, timeout=30).raise_for_status().json()
    return Server(name or url, url, models["data"][0]["id"], headers)


# ------------------------------------------------------------------ measurement


async def measure(servers: Sequence[Server], given: argparse.Namespace) -> list[Round]:
    """All rounds, after a warm-up request of each kind to each server."""
    counter = itertools.count()
    start = time.time_ns()  # questions differ between runs

    def body(server: Server, has_image: bool) -> dict[str, Any]:
        return request(server.model, random.Random(f"{start} {next(counter)}"), given, has_image)

    rounds = []
    async with AsyncExitStack() as stack:
        # Each client has a connection of its own: a pool searches all connections at every request.
        pools = {
            server.name: [
                await stack.enter_async_context(
                    httpx.AsyncClient(timeout=given.timeout, verify=TLS_CONTEXT)
                )
                for _ in range(max(given.clients))
            ]
            for server in servers
        }
        for server in servers:
            for has_image in {False, given.images > 0}:
                await ask(pools[server.name][0], server, body(server, has_image))
        for clients in given.clients:
            for number in range(given.rounds):
                rng = random.Random(number)
                mix = [rng.random() < given.images for _ in range(clients * given.requests)]
                for server in servers:
                    bodies = [body(server, has_image) for has_image in mix]
                    pool = pools[server.name][:clients]
                    rounds.append(await one_round(pool, server, bodies))
    return rounds


async def one_round(
    clients: Sequence[httpx.AsyncClient], server: Server, bodies: list[dict[str, Any]]
) -> Round:
    """Send `bodies` from concurrent clients."""
    replies: list[Reply] = []
    errors: list[str] = []

    async def one_client(number: int, client: httpx.AsyncClient) -> None:
        while bodies:
            try:
                reply = await ask(client, server, bodies.pop())
                replies.append(replace(reply, client=number))
            except (httpx.HTTPError, ValueError) as error:
                errors.append(f"{server.name}: {type(error).__name__} {error}"[:300])

    start_time = time.perf_counter()
    await asyncio.gather(*itertools.starmap(one_client, enumerate(clients)))
    return Round(server.name, len(clients), time.perf_counter() - start_time, replies, errors)


async def ask(client: httpx.AsyncClient, server: Server, body: dict[str, Any]) -> Reply:
    """Stream one answer.

    Raises:
        httpx.HTTPError: The server cannot be reached.
        ValueError: An error response, or an incomplete answer.
    """
    url = f"{server.url}/v1/chat/completions"
    start_time = time.perf_counter()
    first = usage = None
    async with client.stream("POST", url, json=body, headers=server.headers) as response:
        if response.is_error:
            raise ValueError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ValueError(str(chunk["error"]))
            usage = chunk.get("usage") or usage
            texts = (choice["delta"].get("content") for choice in chunk["choices"])
            if first is None and any(texts):
                first = time.perf_counter() - start_time
    total = time.perf_counter() - start_time
    if usage is None:
        raise ValueError("the stream ended without usage")
    return Reply(first or total, total, usage["prompt_tokens"], usage["completion_tokens"])


def request(
    model: str, rng: random.Random, given: argparse.Namespace, has_image: bool
) -> dict[str, Any]:
    """A unique request. Decoding is greedy: servers of the same model give equal answers."""
    question = " ".join(rng.choices(WORDS, k=given.words)) + f" {rng.getrandbits(32)}?"
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if has_image:
        content.insert(0, {"type": "image_url", "image_url": {"url": image(rng, given.edge)}})
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": given.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def image(rng: random.Random, edge: int) -> str:
    """A data URI of colored squares."""
    squares = Image.frombytes("RGB", (8, 8), rng.randbytes(8 * 8 * 3))
    file = io.BytesIO()
    squares.resize((edge, edge), Image.Resampling.NEAREST).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# ------------------------------------------------------------------ report


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """A row of the table: percentiles of all requests, median throughput of the rounds."""
    replies = [reply for one in rounds for reply in one.replies]
    speeds = [one.tokens_per_second for one in rounds]
    line: dict[str, Any] = {
        "server": rounds[0].server,
        "clients": rounds[0].clients,
        "requests": len(replies),
        "failed": sum(len(one.errors) for one in rounds),
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_range": [min(speeds), max(speeds)],
        "tokens": statistics.fmean([reply.tokens for reply in replies] or [0]),
    }
    for name in ("first", "total"):
        times = sorted(getattr(reply, name) for reply in replies)
        for percent in (50, 95):
            line[f"{name}_ms_p{percent}"] = 1e3 * percentile(times, percent)
        line[f"{name}_ms_max"] = 1e3 * max(times, default=math.nan)
    answers = [Counter(reply.client for reply in one.replies) for one in rounds]
    shares = [
        count[client]
        for one, count in zip(rounds, answers, strict=True)
        for client in range(one.clients)
    ]
    line["answers_per_client"] = [min(shares), max(shares)]
    return line


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of sorted values; NaN if there are none."""
    if not values:
        return float("nan")
    return values[max(0, -int(-len(values) * percent // 100) - 1)]


def show(lines: Sequence[dict[str, Any]]) -> None:
    """Print the table; times are in milliseconds."""
    caption = (
        "times in ms, measured in the client; tokens/s: median of the rounds; answers: of the "
        "client with the fewest and of the one with the most in a round"
    )
    table = Table(caption=caption)
    titles = ["clients", "server", "requests", "tokens/s", "tokens", "first p50", "p95", "max"]
    for title in (*titles, "total p50", "p95", "answers"):
        table.add_column(title, justify="left" if title == "server" else "right")
    for line in lines:
        times = [line[f"first_ms_{one}"] for one in ("p50", "p95", "max")]
        times += [line[f"total_ms_{one}"] for one in ("p50", "p95")]
        table.add_row(
            str(line["clients"]),
            line["server"],
            str(line["requests"]) + (f" (+{line['failed']} failed)" if line["failed"] else ""),
            f"{line['tokens_per_second']:.1f}",
            f"{line['tokens']:.0f}",
            *(f"{value:.0f}" for value in times),
            "{}-{}".format(*line["answers_per_client"]),
        )
    Console(width=None if sys.stdout.isatty() else 100).print(table)


if __name__ == "__main__":
    sys.exit(main())
