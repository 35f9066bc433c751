"""Adapters in the server: requests select them with `model`; answers equal the merged models'."""

import asyncio
import base64
import io
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from owl2.engine.engine import Engine
from owl2.errors import ErrorCode
from owl2.serve.app import build_app
from owl2.serve.classify import find_methods, make_scorers
from owl2.serve.config import ServerConfig
from tests.adapters import make_adapter, merged_model
from tests.engine.conftest import random_image
from tests.errors import raises_input_error
from tests.scoring.golden import FAMILY, image_files, read
from tests.serve.running import run_app

SETTINGS = {
    "colors.v1": {"r": 4, "parts": ["decoder"]},
    "team/vision": {"r": 2, "parts": ["decoder"], "modules_to_save": ["abstractor"]},
}
NAMES = ["tiny", *SETTINGS]


@pytest.fixture(scope="module")
def folders(tiny_checkpoint, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(tiny_checkpoint, root / str(seed), seed, **settings)
        for seed, (name, settings) in enumerate(SETTINGS.items(), 1)
    }


@pytest.fixture(scope="module")
def engines(tiny_checkpoint, folders, tiny_engine):
    """Engines of the base model and of the merged models, by the names in requests."""
    merged = {name: merged_model(tiny_checkpoint, folder) for name, folder in folders.items()}
    engines = {name: Engine(model, tiny_engine.processor) for name, model in merged.items()}
    return {"tiny": tiny_engine} | engines


@pytest.fixture(scope="module")
def url(tiny_checkpoint, folders):
    engine = Engine.from_pretrained(tiny_checkpoint, "cpu", "float32", adapters=folders)
    with run_app(build_app(engine, "tiny")) as url:
        yield url


def data_uri(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def chat(url, name, text, image=None, **fields):
    content = [{"type": "text", "text": text}]
    if image is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": data_uri(image)}})
    body = {"model": name, "messages": [{"role": "user", "content": content}], "max_tokens": 8}
    return httpx.post(f"{url}/v1/chat/completions", json=body | fields, timeout=60)


def expected_answer(engines, name, text, image=None, tokens=8):
    parts = [{"type": "text", "text": text}]
    if image is not None:
        parts.insert(0, {"type": "image", "image": image})
    return engines[name].chat([{"role": "user", "content": parts}], max_new_tokens=tokens)


def test_concurrent_requests_for_all_models(url, engines):
    texts = ["what is this?", "is it red? yes or no", "你好"]
    requests = [
        (name, text, image) for name in NAMES for text in texts for image in (None, random_image(5))
    ]
    with ThreadPoolExecutor(len(requests)) as pool:
        responses = [*pool.map(lambda one: chat(url, *one).json(), requests)]
    for (name, *prompt), response in zip(requests, responses, strict=True):
        assert response["model"] == name
        answer = response["choices"][0]["message"]["content"]
        assert answer == expected_answer(engines, name, *prompt)
    answers = {
        tuple(r["choices"][0]["message"]["content"] for r in responses[start : start + 6])
        for start in range(0, len(requests), 6)
    }
    assert len(answers) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_streams_and_other_routes(url, engines, name):
    from openai import OpenAI

    expected = expected_answer(engines, name, "a red circle")
    with OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        messages = [{"role": "user", "content": "a red circle"}]
        chunks = client.chat.completions.create(
            model=name, messages=messages, max_tokens=8, stream=True
        )
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(texts) == expected
        response = client.responses.create(model=name, input="a red circle", max_output_tokens=16)
        longer = expected_answer(engines, name, "a red circle", tokens=16)
        assert (response.output_text, response.model) == (longer, name)
        options = {"prompt": "USER: yes", "max_tokens": 5, "echo": True, "logprobs": 1}
        completion = client.completions.create(model=name, **options).choices[0]
    with run_app(build_app(engines[name], name)) as merged_url:
        merged = httpx.post(f"{merged_url}/v1/completions", json={"model": name} | options)
    assert completion.text == merged.json()["choices"][0]["text"]
    logprobs = merged.json()["choices"][0]["logprobs"]["token_logprobs"]
    assert completion.logprobs.token_logprobs[1:] == pytest.approx(logprobs[1:], abs=1e-4)


def test_list_of_models(url):
    models = {one["id"]: one for one in httpx.get(f"{url}/v1/models").json()["data"]}
    assert list(models) == NAMES
    assert [one["parent"] for one in models.values()] == [None, "tiny", "tiny"]
    for name in NAMES:
        assert httpx.get(f"{url}/v1/models/{name}").json() == models[name]


def test_unknown_name(url):
    for response in (chat(url, "colors", "no"), httpx.get(f"{url}/v1/models/colors")):
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (404, "model_not_found")
        assert all(name in error["message"] for name in NAMES)


def test_adapter_with_other_image_policy(tiny_checkpoint, folders, engines, tmp_path):
    """Its images are decoded as they were in its training."""
    import shutil

    folder = shutil.copytree(folders["colors.v1"], tmp_path / "padded")
    other = type(engines["tiny"].processor).from_pretrained(tiny_checkpoint, image_policy="pad")
    other.save_pretrained(folder)
    engine = Engine.from_pretrained(tiny_checkpoint, "cpu", "float32", adapters={"pad": folder})
    image = random_image(5, (40, 12))
    merged = {"pad": Engine(engines["colors.v1"].model, other)}
    expected = expected_answer(merged, "pad", "red?", image)
    assert expected != expected_answer(engines, "colors.v1", "red?", image)
    with run_app(build_app(engine, "tiny")) as url:
        answer = chat(url, "pad", "red?", image).json()["choices"][0]["message"]["content"]
    assert answer == expected


def test_scores_of_a_base_and_its_adapter():
    """Q-Align's LoRA beside its base: both give the scores of the authors' code."""
    folder = FAMILY / "q_align_lora"
    golden = read("q_align_lora", "scores.json")
    adapters = {"task": folder / "adapter"}
    engine = Engine.from_pretrained(folder / "base", "cpu", "float32", adapters=adapters)
    paths = {"base": (folder / "base", None), "task": (folder / "adapter", folder / "base")}
    scorers = make_scorers(engine, find_methods(paths, [], ()))
    files = image_files("q_align_lora", golden["pictures"])
    parts = [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + data}}
        for data in (base64.b64encode(file.read_bytes()).decode() for file in files)
    ]

    async def rate_all(url):
        async with httpx.AsyncClient(timeout=60) as client:
            body = {"messages": [{"role": "user", "content": parts}]}
            requests = [
                client.post(f"{url}/classify", json=body | {"model": name})
                for name in (*scorers, "other", *scorers)
            ]
            return await asyncio.gather(*requests)

    with run_app(build_app(engine, "base", scorers=scorers)) as url:
        base, task, other, *again = asyncio.run(rate_all(url))
    assert (other.status_code, other.json()["error"]["param"]) == (404, "model")
    for response, key in zip(
        (base, task, *again), ("of_the_base_alone", "score_1_to_5") * 2, strict=True
    ):
        scores = [one["score"] for one in response.json()["data"]]
        assert scores == pytest.approx(golden[key], abs=1e-4)


@pytest.mark.parametrize(
    ("modules", "code", "needle"),
    [
        (["no-path"], ErrorCode.INVALID_VALUE, "no-path"),
        (["a=x", "a=y"], ErrorCode.CONFLICT, "'a'"),
        (["base=x"], ErrorCode.CONFLICT, "'base'"),
    ],
)
def test_invalid_options(modules, code, needle):
    config = ServerConfig(model="x", served_model_name="base", lora_modules=modules)
    with raises_input_error(code, needle):
        config.adapters  # noqa: B018  # the property raises


def test_paths_and_hub_ids(monkeypatch):
    monkeypatch.setenv("HOME", "/home/one")
    modules = ["a=~/adapters/a", "b.c/d=owner/name"]
    config = ServerConfig(model="x", lora_modules=modules)
    assert config.adapters == {"a": "/home/one/adapters/a", "b.c/d": "owner/name"}
    assert ServerConfig(model="x").adapters == {}


def test_broken_adapter_stops_the_server_before_weights_are_read(
    run_cli, tiny_checkpoint, folders, tmp_path, monkeypatch
):
    from owl2.model.modeling import Owl2ForConditionalGeneration

    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"', encoding="utf-8")
    monkeypatch.setattr(Owl2ForConditionalGeneration, "from_pretrained", None)  # fails if called
    good = f"good={folders['colors.v1']}"
    options = "--port", "0", "--lora-modules", good, "--lora-modules", f"broken={tmp_path}"
    result = run_cli("serve", "--model", tiny_checkpoint, *options)
    assert result.exit_code == 2
    assert "broken" in result.stderr
    assert "adapter_config.json" in result.stderr
