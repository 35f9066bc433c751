"""What `/metrics` shows, in Prometheus' text format.

Each app has a registry of its own, so that two in one process (tests) do not add up.
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

# Seconds: from a tiny model's first token to a long answer on a laptop.
LATENCIES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """Counters of one app.

    Attributes:
        requests: answered HTTP requests by `route` (its pattern: there are few) and `status`.
        running: chat requests that have a place at the engine.
        waiting: those that wait for one.
        ended: answers by `reason`: stop, length; gone: the client left; cut: by a limit of time or
            the server's end; refused: the request was wrong; failed: a code of ours.
        first_token: seconds from a request's arrival to its first token.
        whole: seconds from its arrival to its last.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        own = self.registry
        self.requests = Counter(
            "owl2_requests", "HTTP requests answered.", ["route", "status"], registry=own
        )
        self.running = Gauge("owl2_requests_running", "Chat requests being answered.", registry=own)
        self.waiting = Gauge(
            "owl2_requests_waiting", "Chat requests waiting for a place.", registry=own
        )
        self.ended = Counter("owl2_answers", "Answers ended, and why.", ["reason"], registry=own)
        self.prompt_tokens = Counter(
            "owl2_prompt_tokens", "Tokens of prompts answered.", registry=own
        )
        self.generated_tokens = Counter("owl2_generated_tokens", "Tokens made.", registry=own)
        self.first_token = Histogram(
            "owl2_time_to_first_token_seconds",
            "From a chat request's arrival to its first token.",
            buckets=LATENCIES,
            registry=own,
        )
        self.whole = Histogram(
            "owl2_request_seconds",
            "From a chat request's arrival to its last token.",
            buckets=LATENCIES,
            registry=own,
        )

    def text(self) -> bytes:
        """All of it as Prometheus reads it."""
        return generate_latest(self.registry)
