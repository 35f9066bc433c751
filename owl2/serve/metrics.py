"""Metrics for `/metrics`, in Prometheus' text format.

Each application has its own registry, so that the metrics of two in one process are separate.
"""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

# Seconds, from the first token of a tiny model to a long answer on a laptop.
LATENCIES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """The metrics of one application.

    Attributes:
        requests: HTTP requests by `route` (its pattern) and `status`.
        running, waiting: Chat requests in the engine and in the queue.
        answers: Finished answers by `reason`: `stop`, `length`, `cancelled` (the client
            disconnected), `timeout` (a time limit or the shutdown), `rejected` (the request was
            invalid) or `failed` (an internal error).
        time_to_first_token, request_seconds: Seconds from the arrival of a request to its first and
            its last token.
    """

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        ProcessCollector(registry=own)
        PlatformCollector(registry=own)
        self.requests = Counter(
            "owl2_requests", "HTTP requests.", ["route", "status"], registry=own
        )
        self.running = Gauge("owl2_requests_running", "Chat requests in the engine.", registry=own)
        self.waiting = Gauge("owl2_requests_waiting", "Chat requests in the queue.", registry=own)
        self.answers = Counter("owl2_answers", "Finished answers.", ["reason"], registry=own)
        self.prompt_tokens = Counter("owl2_prompt_tokens", "Tokens of prompts.", registry=own)
        self.generated_tokens = Counter("owl2_generated_tokens", "Generated tokens.", registry=own)
        self.time_to_first_token = Histogram(
            "owl2_time_to_first_token_seconds",
            "From the arrival of a chat request to its first token.",
            buckets=LATENCIES,
            registry=own,
        )
        self.request_seconds = Histogram(
            "owl2_request_seconds",
            "From the arrival of a chat request to its last token.",
            buckets=LATENCIES,
            registry=own,
        )

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
