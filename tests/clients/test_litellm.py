"""litellm: the library with two of its providers, and its proxy."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import httpx
import litellm
import openai
import pytest
from conftest import KEY, MODEL
from pydantic import BaseModel

PROXY_KEY = f"sk-{secrets.token_hex(32)}"
TEXT = [{"role": "user", "content": "Hello"}]
PROVIDERS = ["openai", "hosted_vllm"]


class Shape(BaseModel):
    """A schema whose values end by themselves."""

    color: Literal["red", "green", "blue"]


@pytest.fixture(params=PROVIDERS)
def options(request, base_url):
    model = f"{request.param}/{MODEL}"
    return {"model": model, "api_base": base_url, "api_key": KEY, "max_tokens": 8, "num_retries": 0}


def image_message(url):
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [{"type": "text", "text": "what is this?"}, image]}]


def test_chat(options, image_url):
    reply = litellm.completion(messages=image_message(image_url), **options)
    assert reply.choices[0].message.content
    assert reply.usage.completion_tokens > 0


def test_stream(options):
    chunks = list(
        litellm.completion(
            messages=TEXT, stream=True, stream_options={"include_usage": True}, **options
        )
    )
    rebuilt = litellm.stream_chunk_builder(chunks, messages=TEXT)
    reply = litellm.completion(messages=TEXT, **options)
    assert rebuilt.choices[0].message.content == reply.choices[0].message.content
    assert rebuilt.usage.completion_tokens == reply.usage.completion_tokens


async def test_async(options):
    reply = await litellm.acompletion(messages=TEXT, **options)
    assert reply.choices[0].message.content


def test_json(options):
    options |= {"max_tokens": 60}
    reply = litellm.completion(messages=TEXT, response_format=Shape, **options)
    assert Shape.model_validate_json(reply.choices[0].message.content)


def test_text_completion(options):
    provider, _, model = options.pop("model").partition("/")
    name = {"openai": "text-completion-openai"}.get(provider, provider)
    reply = litellm.text_completion(model=f"{name}/{model}", prompt="USER: Hello", **options)
    assert reply.choices[0].text


def test_responses(options):
    options.pop("max_tokens")
    reply = litellm.responses(input="Hello", max_output_tokens=8, **options)
    assert reply.output[0].content[0].text
    events = list(litellm.responses(input="Hello", max_output_tokens=8, stream=True, **options))
    kinds = [getattr(event.type, "value", event.type) for event in events]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")


def test_batch(options):
    replies = litellm.batch_completion(messages=[TEXT, TEXT], **options)
    assert len({reply.choices[0].message.content for reply in replies}) == 1


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"api_key": "wrong"}, litellm.AuthenticationError),
        ({"model": "other"}, litellm.NotFoundError),
        ({"temperature": 5.0}, litellm.BadRequestError),
        ({"messages": [{"role": "user", "content": "a " * 9000}]}, None),
    ],
    ids=["key", "model", "value", "context"],
)
def test_errors(options, changes, error):
    if "model" in changes:
        changes = {"model": options["model"].replace(MODEL, changes["model"])}
    with pytest.raises(error or litellm.ContextWindowExceededError):
        litellm.completion(**{"messages": TEXT, **options, **changes})


def test_router_uses_another_deployment(options):
    del options["num_retries"]
    broken = {"model_name": "m", "litellm_params": options | {"api_base": "http://127.0.0.1:9/v1"}}
    working = {"model_name": "m", "litellm_params": options}
    router = litellm.Router(model_list=[broken, working], num_retries=4, retry_after=0)
    for _ in range(4):
        assert router.completion(model="m", messages=TEXT).choices[0].message.content


# ------------------------------------------------------------------ the proxy


@pytest.fixture(scope="module")
def proxy_client(base_url, tmp_path_factory):
    """OpenAI's client of a proxy in front of the server."""
    folder = tmp_path_factory.mktemp("proxy")
    params = {"model": f"hosted_vllm/{MODEL}", "api_base": base_url, "api_key": KEY}
    config = {
        "model_list": [{"model_name": "owl2", "litellm_params": params}],
        "litellm_settings": {"num_retries": 0},
        "general_settings": {"master_key": PROXY_KEY},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [str(Path(sys.executable).with_name("litellm")), "--config", "config.yaml"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=os.environ)
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 200
        while not _is_alive(url):
            log = (folder / "log").read_text()
            assert process.poll() is None and time.monotonic() < end, log
            time.sleep(0.5)
        with openai.OpenAI(base_url=f"{url}/v1", api_key=PROXY_KEY, max_retries=0) as client:
            yield client
    finally:
        process.kill()
        process.wait()


def _is_alive(url):
    try:
        return httpx.get(f"{url}/health/liveliness", trust_env=False).is_success
    except httpx.TransportError:
        return False


def test_proxy_chat(proxy_client, image_url):
    create = proxy_client.chat.completions.create
    reply = create(model="owl2", messages=image_message(image_url), max_tokens=8)
    chunks = create(model="owl2", messages=image_message(image_url), max_tokens=8, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == reply.choices[0].message.content != ""
    assert reply.usage.completion_tokens > 0


def test_proxy_json(proxy_client):
    reply = proxy_client.chat.completions.parse(
        model="owl2", messages=TEXT, response_format=Shape, max_tokens=60
    )
    assert isinstance(reply.choices[0].message.parsed, Shape)


def test_proxy_responses(proxy_client):
    reply = proxy_client.responses.create(model="owl2", input="Hello", max_output_tokens=8)
    assert reply.output_text


def test_proxy_completions(proxy_client):
    reply = proxy_client.completions.create(model="owl2", prompt="USER: Hello", max_tokens=4)
    assert reply.choices[0].text


def test_proxy_models(proxy_client):
    assert [model.id for model in proxy_client.models.list()] == ["owl2"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"temperature": 5.0}, openai.BadRequestError),
        ({"messages": [{"role": "user", "content": "a " * 9000}]}, openai.BadRequestError),
        ({"model": "other"}, openai.BadRequestError),
    ],
    ids=["value", "context", "model"],
)
def test_proxy_errors(proxy_client, options, error):
    with pytest.raises(error):
        proxy_client.chat.completions.create(**{"model": "owl2", "messages": TEXT, **options})
