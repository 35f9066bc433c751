"""Admission control: running, waiting, rejected and cancelled requests."""

import asyncio
import json
import re
import socket
import threading
from contextlib import contextmanager

import httpx
import pytest

from owl2.errors import ErrorCode, InputError
from owl2.serve.admission import AdmissionController
from owl2.serve.app import build_app
from owl2.serve.config import ServerLimits
from owl2.serve.errors import ApiError
from owl2.serve.metrics import Metrics
from tests.serve.running import FakeEngine, run_app, wait_until

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "what is this?"}]}
STREAM = BODY | {"stream": True}
SECRET = "internal detail"


def image_body(url):
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    return BODY | {"messages": [{"role": "user", "content": parts}]}


class Server:
    """An application with a fake engine."""

    def __init__(self, app, engine, url):
        self.admission, self.engine, self.url = app.state.admission, engine, url

    def post(self, body=BODY, timeout=30):
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=timeout)

    def post_in_thread(self, body=BODY):
        """Send a request in a thread; the result waits for the response."""
        replies = []
        thread = threading.Thread(target=lambda: replies.append(self.post(body)))
        thread.start()

        def response():
            thread.join(20)
            return replies[0]

        return response

    @contextmanager
    def stream(self):
        url = f"{self.url}/v1/chat/completions"
        with httpx.Client() as client, client.stream("POST", url, json=STREAM) as reply:
            yield (line for line in reply.iter_lines() if line)

    def submitted(self, count=1):
        """The last of the first `count` requests that the engine received."""
        wait_until(lambda: len(self.engine.requests) >= count)
        return self.engine.requests[count - 1]

    def metric(self, name):
        text = httpx.get(f"{self.url}/metrics").text
        found = re.search(rf"^{re.escape(name)} (.+)$", text, re.MULTILINE)
        return float(found[1]) if found else None

    def answers(self, reason):
        return self.metric(f'owl2_answers_total{{reason="{reason}"}}')

    def wait_until_idle(self):
        wait_until(lambda: self.admission.in_flight == 0)
        assert self.metric("owl2_requests_running") == self.metric("owl2_requests_waiting") == 0


@pytest.fixture
def serve(tiny_engine):
    """`serve(**limits)` starts a `Server`."""
    contexts = []

    def start(error=None, **limits):
        engine = FakeEngine(tiny_engine, error)
        app = build_app(engine, "tiny", ServerLimits(**limits))
        contexts.append(run_app(app))
        return Server(app, engine, contexts[-1].__enter__())

    yield start
    for context in contexts:
        context.__exit__(None, None, None)


def error_of(reply):
    return reply.status_code, reply.json()["error"]["code"]


def data_of(line):
    return json.loads(line.removeprefix("data: "))


def test_chunks_are_sent_as_they_are_generated(serve):
    server = serve()
    with server.stream() as lines:
        request = server.submitted()
        assert data_of(next(lines))["choices"][0]["delta"]["role"] == "assistant"
        for text in ("a", " red", " circle"):
            request.emit(text)
            assert data_of(next(lines))["choices"][0]["delta"] == {"content": text}
        request.end()
        assert list(lines)[-1] == "data: [DONE]"


@pytest.mark.parametrize("body", [BODY, STREAM])
def test_disconnected_client_frees_its_slot(serve, body):
    server = serve(max_num_seqs=1)
    with pytest.raises(httpx.ReadTimeout):
        server.post(body, timeout=0.5)
    wait_until(lambda: server.engine.requests[0].aborted)
    server.wait_until_idle()
    second = server.post_in_thread()
    server.submitted(2).end()
    assert second().status_code == 200
    assert server.answers("cancelled") == 1


def test_client_that_disconnects_during_stream_aborts_request(serve):
    server = serve()
    with server.stream() as lines:
        server.submitted().emit("a")
        assert "data" in next(lines)
    wait_until(lambda: server.submitted().aborted)
    server.wait_until_idle()


def test_waiting_client_that_disconnects_is_never_submitted(serve):
    server = serve(max_num_seqs=1)
    first = server.post_in_thread()
    request = server.submitted()
    with pytest.raises(httpx.ReadTimeout):
        server.post(timeout=0.5)
    wait_until(lambda: server.admission.in_flight == 1)
    request.end()
    assert first().status_code == 200
    third = server.post_in_thread()
    server.submitted(2).end()
    assert third().status_code == 200
    assert len(server.engine.requests) == 2


def test_requests_run_wait_and_are_rejected_in_this_order(serve):
    server = serve(max_num_seqs=2, max_queued=1)
    replies = [server.post_in_thread(), server.post_in_thread()]
    server.submitted(2)
    replies.append(server.post_in_thread())
    wait_until(lambda: server.admission.in_flight == 3)
    assert server.metric("owl2_requests_running") == 2
    assert server.metric("owl2_requests_waiting") == 1
    rejected = server.post()
    assert error_of(rejected) == (429, "rate_limit_exceeded")
    assert int(rejected.headers["Retry-After"]) >= 1
    for number in (1, 2, 3):
        server.submitted(number).end()
    assert [reply().status_code for reply in replies] == [200, 200, 200]
    server.wait_until_idle()


def test_simultaneous_arrivals_are_counted_before_they_wait(tiny_engine):
    limits = ServerLimits(max_num_seqs=1, max_queued=1)
    admission = AdmissionController(FakeEngine(tiny_engine), limits, Metrics())

    async def arrive():
        try:
            with admission.admit():
                await asyncio.sleep(0)  # the others arrive before this one waits for a slot
        except ApiError as error:
            return error.code

    async def arrive_five_times():
        return await asyncio.gather(*(arrive() for _ in range(5)))

    for _ in range(2):  # requests that never had a slot leave none occupied
        assert asyncio.run(arrive_five_times()) == [None, None, *["rate_limit_exceeded"] * 3]


def test_request_timeout_before_the_response(serve):
    server = serve(request_timeout=0.3)
    assert error_of(server.post()) == (503, "timeout")
    assert server.submitted().aborted
    server.wait_until_idle()
    assert server.answers("timeout") == 1


def test_request_timeout_during_stream(serve):
    server = serve(request_timeout=0.5)
    with server.stream() as lines:
        server.submitted().emit("a")
        assert data_of(list(lines)[-1])["error"]["code"] == "timeout"
    assert server.submitted().aborted


def test_request_timeout_includes_waiting(serve):
    server = serve(max_num_seqs=1, request_timeout=1.0)
    first = server.post_in_thread()
    server.submitted()
    second = server.post_in_thread()
    assert {error_of(first()), error_of(second())} == {(503, "timeout")}
    wait_until(lambda: all(request.aborted for request in server.engine.requests))
    server.wait_until_idle()


def test_slow_reader_does_not_occupy_a_slot(serve):
    server = serve(max_num_seqs=1)
    with server.stream():  # without reading
        request = server.submitted()
        for _ in range(2000):
            request.emit("word " * 200)
        request.end()
        second = server.post_in_thread()
        server.submitted(2).end()
        assert second().status_code == 200


@pytest.mark.parametrize(("limit", "tokens"), [(2048, 512), (5, 5)])
def test_default_number_of_tokens_respects_the_limit(serve, limit, tokens):
    server = serve(max_completion_tokens=limit)
    reply = server.post_in_thread()
    request = server.submitted()
    request.end()
    assert reply().status_code == 200
    assert request.options["max_new_tokens"] == tokens


def test_rejected_image_frees_its_slot(serve):
    server = serve(max_num_seqs=1)
    for _ in range(2):
        reply = server.post(image_body("data:image/png;base64,AAAA"))
        assert error_of(reply) == (400, "invalid_image")
    server.wait_until_idle()
    assert server.engine.requests == []


@pytest.mark.parametrize("allowed", [False, True])
def test_images_from_the_servers_network_are_never_fetched(serve, allowed):
    server = serve(allow_remote_images=allowed)
    with socket.create_server(("127.0.0.1", 0)) as internal:
        url = f"http://127.0.0.1:{internal.getsockname()[1]}/a.png"
        for address in (url, url.replace("127.0.0.1", "localhost"), "file:///etc/passwd"):
            reply = server.post(image_body(address))
            assert error_of(reply) == (400, "invalid_image_url")
            assert reply.json()["error"]["param"] == "messages.0.content.0.image_url.url"
        internal.settimeout(0.2)
        with pytest.raises(TimeoutError):
            internal.accept()
    assert server.engine.requests == []


def test_huge_text_is_rejected_without_tokenization(serve):
    server = serve()  # the tiny model's context has 128 tokens

    def body(characters):
        return BODY | {"messages": [{"role": "user", "content": "a" * characters}]}

    for characters in (10**7, 128 * 64 + 1):
        assert error_of(server.post(body(characters))) == (400, "context_length_exceeded")
    assert server.engine.requests == []
    reply = server.post_in_thread(body(128 * 64))
    server.submitted().end()
    assert reply().status_code == 200


def test_input_errors_of_the_engine_have_status_400(serve):
    server = serve(error=InputError("The question is empty.", ErrorCode.EMPTY_MESSAGE))
    for body in (BODY, STREAM):
        reply = server.post(body)
        assert reply.status_code == 400
        assert reply.json()["error"]["message"] == "The question is empty."
    assert server.answers("rejected") == 2
    server.wait_until_idle()


def test_internal_errors_have_status_500_and_keep_the_connection(serve, caplog):
    server = serve(error=RuntimeError(SECRET))
    with httpx.Client() as client:
        replies = [
            client.post(f"{server.url}/v1/chat/completions", json=body)
            for body in (BODY, STREAM, BODY)
        ]
        assert [reply.status_code for reply in replies] == [500] * 3
        assert SECRET not in "".join(reply.text for reply in replies)
    assert caplog.text.count("A request failed") == 3
    assert server.answers("failed") == 3
    server.engine.error = None
    reply = server.post_in_thread()
    server.submitted().end()
    assert reply().status_code == 200


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (InputError("not finite", ErrorCode.NON_FINITE), "rejected"),
        (RuntimeError(SECRET), "failed"),
    ],
)
def test_error_during_stream_is_the_last_event(serve, error, reason):
    server = serve()
    with server.stream() as lines:
        server.submitted().emit("a")
        server.submitted().fail(error)
        message = data_of(list(lines)[-1])["error"]["message"]
    assert ("not finite" in message) == isinstance(error, InputError)
    assert SECRET not in message
    assert server.answers(reason) == 1


def test_shutdown_rejects_new_requests_and_finishes_admitted_ones(serve):
    server = serve(max_num_seqs=1)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    replies = [server.post_in_thread(), server.post_in_thread()]
    wait_until(lambda: server.admission.in_flight == 2)
    server.admission.shutting_down = True
    assert error_of(server.post()) == (503, "shutting_down")
    assert error_of(httpx.get(f"{server.url}/health")) == (503, "shutting_down")
    server.submitted(1).end()
    server.submitted(2).end()
    assert [reply().status_code for reply in replies] == [200, 200]


def test_metrics_count_requests_tokens_and_answers(serve):
    server = serve()
    reply = server.post_in_thread(BODY | {"n": 2})
    request = server.submitted()
    for text in "abc":
        request.emit(text)
    request.emit("d", 1, "length")
    request.emit("", 0, "stop")
    assert reply().status_code == 200
    httpx.get(f"{server.url}/nowhere/at/all")
    for name, value in {
        'owl2_requests_total{route="/v1/chat/completions",status="200"}': 1,
        'owl2_requests_total{route="none",status="404"}': 1,
        "owl2_prompt_tokens_total": 7,
        "owl2_generated_tokens_total": 5,
        'owl2_answers_total{reason="stop"}': 1,
        'owl2_answers_total{reason="length"}': 1,
        "owl2_time_to_first_token_seconds_count": 1,
        "owl2_request_seconds_count": 1,
    }.items():
        assert server.metric(name) == value, name
