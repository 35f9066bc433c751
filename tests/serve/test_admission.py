"""Places at the engine: who is answered, who waits, who is sent away, who leaves."""

import asyncio
import json
import re
import socket
import threading
from contextlib import contextmanager

import httpx
import pytest

from owl2.errors import InputError
from owl2.serve.admission import AdmissionController
from owl2.serve.app import build_app
from owl2.serve.config import ServerLimits
from owl2.serve.errors import ApiError
from owl2.serve.metrics import Metrics
from tests.serve.running import FakeEngine, run_app, wait_until

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "what is this?"}]}
STREAMED = BODY | {"stream": True}


class Server:
    """An app over an engine that does as told."""

    def __init__(self, app, engine, url):
        self.admission, self.engine, self.url = app.state.admission, engine, url

    def post(self, body=BODY):
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=30)

    def later(self, body=BODY):
        """A request in a thread of its own; `later()()` waits for the reply."""
        replies = []
        thread = threading.Thread(target=lambda: replies.append(self.post(body)))
        thread.start()

        def reply():
            thread.join(20)
            return replies[0]

        return reply

    @contextmanager
    def stream(self, body=STREAMED):
        url = f"{self.url}/v1/chat/completions"
        with httpx.Client() as client, client.stream("POST", url, json=body) as reply:
            yield reply

    def asked(self, count=1):
        """The last of `count` questions that came to the engine so far."""
        wait_until(lambda: len(self.engine.asked) >= count)
        return self.engine.asked[count - 1]

    def metric(self, name):
        text = httpx.get(f"{self.url}/metrics").text
        found = re.search(rf"^{re.escape(name)} (.+)$", text, re.MULTILINE)
        return float(found[1]) if found else None


@pytest.fixture
def serve(tiny_engine):
    """Serves with these limits; gives the `Server`."""
    open_ones = []

    def start(error=None, **limits):
        engine = FakeEngine(tiny_engine, error)
        app = build_app(engine, "tiny", ServerLimits(**limits))
        manager = run_app(app)
        open_ones.append(manager)
        return Server(app, engine, manager.__enter__())

    yield start
    for manager in open_ones:
        manager.__exit__(None, None, None)


def error_of(reply):
    return reply.status_code, reply.json()["error"]["code"]


def test_pieces_come_as_they_are_made(serve):
    server = serve()
    with server.stream() as reply:
        lines = (line for line in reply.iter_lines() if line)
        told = server.asked()
        assert json.loads(next(lines)[6:])["choices"][0]["delta"]["role"] == "assistant"
        for text in ("a", " red", " circle"):
            told.say(text)
            assert json.loads(next(lines)[6:])["choices"][0]["delta"] == {"content": text}
        told.end()
        assert list(lines)[-1] == "data: [DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(serve, stream):
    server = serve(max_num_seqs=1)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=BODY | {"stream": stream}, timeout=0.5)
    wait_until(lambda: server.engine.asked[0].aborted)
    wait_until(lambda: server.admission.in_flight == 0)
    waiting = server.later()
    server.asked(2).end()
    assert waiting().status_code == 200
    assert server.metric('owl2_answers_total{reason="cancelled"}') == 1


def test_a_client_that_leaves_in_the_middle_of_a_stream(serve):
    server = serve()
    with server.stream() as reply:
        server.asked().say("a")
        assert "data" in next(reply.iter_lines())
    wait_until(lambda: server.asked().aborted)
    wait_until(lambda: server.admission.in_flight == 0)


def test_one_that_leaves_while_it_waits_is_never_begun(serve):
    server = serve(max_num_seqs=1)
    first = server.later()
    told = server.asked()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=0.5)
    wait_until(lambda: server.admission.in_flight == 1)
    told.end()
    assert first().status_code == 200
    third = server.later()
    server.asked(2).end()
    assert third().status_code == 200
    assert len(server.engine.asked) == 2


def test_so_many_run_so_many_wait_the_next_is_sent_away(serve):
    server = serve(max_num_seqs=2, max_queued=1)
    replies = [server.later(), server.later()]
    server.asked(2)
    replies.append(server.later())
    wait_until(lambda: server.admission.in_flight == 3)
    assert server.metric("owl2_requests_running") == 2
    assert server.metric("owl2_requests_waiting") == 1
    refused = server.post()
    assert error_of(refused) == (429, "rate_limit_exceeded")
    assert int(refused.headers["Retry-After"]) >= 1
    for number in (1, 2, 3):
        server.asked(number).end()
    assert [reply().status_code for reply in replies] == [200, 200, 200]
    assert server.metric("owl2_requests_running") == server.metric("owl2_requests_waiting") == 0


def test_who_comes_at_the_same_moment_is_counted_too(tiny_engine):
    admission = AdmissionController(
        FakeEngine(tiny_engine), ServerLimits(max_num_seqs=1, max_queued=1), Metrics()
    )

    async def come():
        try:
            with admission.admit():
                await asyncio.sleep(0)  # others come before it asks for a place
        except ApiError as error:
            return error.code

    async def five():
        return await asyncio.gather(*(come() for _ in range(5)))

    for _ in range(2):  # who goes without a place leaves none taken
        assert asyncio.run(five()) == [None, None, *["rate_limit_exceeded"] * 3]


def test_time_is_limited_where_nothing_was_sent(serve):
    server = serve(request_timeout=0.3)
    assert error_of(server.post()) == (503, "timeout")
    assert server.asked().aborted
    assert server.admission.in_flight == 0
    assert server.metric('owl2_answers_total{reason="timeout"}') == 1


def test_time_is_limited_in_a_stream(serve):
    server = serve(request_timeout=0.5)
    with server.stream() as reply:
        server.asked().say("a")
        lines = [line for line in reply.iter_lines() if line]
    assert json.loads(lines[-1][6:])["error"]["code"] == "timeout"
    assert server.asked().aborted


def test_time_is_limited_while_one_waits(serve):
    server = serve(max_num_seqs=1, request_timeout=1.0)
    first = server.later()
    server.asked()
    second = server.later()
    assert {error_of(first()), error_of(second())} == {(503, "timeout")}
    wait_until(lambda: all(told.aborted for told in server.engine.asked))
    assert server.metric("owl2_requests_running") == server.metric("owl2_requests_waiting") == 0


def test_a_slow_reader_does_not_hold_a_place(serve):
    server = serve(max_num_seqs=1)
    with server.stream():  # and reads nothing
        told = server.asked()
        for _ in range(2000):
            told.say("word " * 200)
        told.end()
        second = server.later()
        server.asked(2).end()
        assert second().status_code == 200


@pytest.mark.parametrize(("limit", "tokens"), [(2048, 512), (5, 5)])
def test_who_asks_for_no_number_of_tokens_gets_the_usual_or_the_limit(serve, limit, tokens):
    server = serve(max_completion_tokens=limit)
    reply = server.later()
    told = server.asked()
    told.end()
    assert reply().status_code == 200
    assert told.options["max_new_tokens"] == tokens


def test_a_image_that_is_refused_holds_no_place(serve):
    server = serve(max_num_seqs=1)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "?"}]}]
    for _ in range(2):
        assert error_of(server.post(BODY | {"messages": messages})) == (400, "invalid_image")
    assert server.metric("owl2_requests_running") == 0
    assert server.engine.asked == []


@pytest.mark.parametrize("remote", [False, True])
def test_images_of_the_servers_own_network_are_not_fetched(serve, remote):
    server = serve(allow_remote_images=remote)
    with socket.create_server(("127.0.0.1", 0)) as inside:
        url = f"http://127.0.0.1:{inside.getsockname()[1]}/a.png"
        for address in (url, url.replace("127.0.0.1", "localhost"), "file:///etc/passwd"):
            image = {"type": "image_url", "image_url": {"url": address}}
            messages = [{"role": "user", "content": [image, {"type": "text", "text": "?"}]}]
            reply = server.post(BODY | {"messages": messages})
            assert error_of(reply) == (400, "invalid_image_url")
            assert reply.json()["error"]["param"] == "messages.0.content.0.image_url.url"
        inside.settimeout(0.2)
        with pytest.raises(TimeoutError):
            inside.accept()
    assert server.engine.asked == []


def test_megabytes_of_text_are_refused_at_a_glance(serve):
    server = serve()  # the tiny model's context has 128 tokens

    def saying(characters):
        return BODY | {"messages": [{"role": "user", "content": "a" * characters}]}

    assert error_of(server.post(saying(10**7))) == (400, "context_length_exceeded")
    assert error_of(server.post(saying(128 * 64 + 1))) == (400, "context_length_exceeded")
    assert server.engine.asked == []
    reply = server.later(saying(128 * 64))
    server.asked().end()
    assert reply().status_code == 200


def test_invalid_prompts_are_rejected(serve):
    server = serve(error=InputError("The prompt is too long."))
    for body in (BODY, STREAMED):
        reply = server.post(body)
        assert reply.status_code == 400
        assert reply.json()["error"]["message"] == "The prompt is too long."
    assert server.metric('owl2_answers_total{reason="rejected"}') == 2
    assert server.metric("owl2_requests_running") == 0


def test_a_fault_of_ours_says_nothing_of_itself(serve, caplog):
    server = serve(error=RuntimeError("the secret of the house"))
    with httpx.Client() as client:
        replies = [
            client.post(f"{server.url}/v1/chat/completions", json=body)
            for body in (BODY, STREAMED, BODY)  # over one connection, which it does not spoil
        ]
        assert [reply.status_code for reply in replies] == [500] * 3
        assert "secret" not in "".join(reply.text for reply in replies)
    assert caplog.text.count("RuntimeError: the secret of the house") == 3
    server.engine.error = None
    second = server.later()
    server.asked().end()
    assert second().status_code == 200


@pytest.mark.parametrize("error", [InputError("not finite"), RuntimeError("a code")])
def test_a_fault_in_the_middle_of_a_stream(serve, error):
    server = serve()
    with server.stream() as reply:
        server.asked().say("a")
        server.asked().fail(error)
        lines = [line for line in reply.iter_lines() if line]
    said = json.loads(lines[-1][6:])["error"]
    assert ("not finite" in said["message"]) == isinstance(error, InputError)
    assert "code" not in said["message"]
    reason = "rejected" if isinstance(error, InputError) else "failed"
    assert server.metric(f'owl2_answers_total{{reason="{reason}"}}') == 1


def test_closing_refuses_what_is_new_and_finishes_what_runs(serve):
    server = serve(max_num_seqs=1)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    replies = [server.later(), server.later()]
    wait_until(lambda: server.admission.in_flight == 2)
    server.admission.shutting_down = True
    assert error_of(server.post()) == (503, "shutting_down")
    assert error_of(httpx.get(f"{server.url}/health")) == (503, "shutting_down")
    server.asked(1).end()
    server.asked(2).end()
    assert [reply().status_code for reply in replies] == [200, 200]


def test_the_metrics(serve):
    server = serve()
    reply = server.later(BODY | {"n": 2})
    told = server.asked()
    for word in "abc":
        told.say(word)
    told.say("d", 1, "length")
    told.say("", 0, "stop")
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
