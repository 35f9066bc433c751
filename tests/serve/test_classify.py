"""`POST /classify`: scores of a scoring model, equal to those of `ImageScorer`."""

import base64
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from owl2.engine.engine import Engine
from owl2.errors import ErrorCode
from owl2.scoring.scorer import ImageScorer
from owl2.serve import launch
from owl2.serve.app import build_app
from owl2.serve.classify import find_methods, make_scorers
from owl2.serve.config import ServerConfig
from tests.errors import raises_input_error
from tests.scoring.golden import FAMILY, image_files, read
from tests.serve.running import run_app

MODEL = FAMILY / "one_align" / "model"


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(MODEL, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def url(engine):
    methods = find_methods({"rater": (MODEL, None)}, [], ())
    with run_app(build_app(engine, "rater", scorers=make_scorers(engine, methods))) as url:
        yield url


def part(file):
    data = base64.b64encode(file.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def classify(url, files, **fields):
    messages = [{"role": "user", "content": [part(file) for file in files]}]
    body = {"model": "rater", "messages": messages} | fields
    return httpx.post(f"{url}/classify", json=body, timeout=60)


@pytest.mark.parametrize("task", ["quality", "aesthetics"])
def test_images(url, engine, task):
    expected = read("one_align", "scores.json")[f"{task}.image"]
    files = image_files("one_align", expected["pictures"])
    response = classify(url, files, task=task)
    assert response.status_code == 200
    body = response.json()
    data = body["data"]
    assert (body["object"], body["model"]) == ("list", "rater")
    assert [one["score"] for one in data] == pytest.approx(expected["score_1_to_5"], abs=1e-4)
    for index, (one, probabilities) in enumerate(zip(data, expected["probabilities"], strict=True)):
        assert one["probs"] == pytest.approx(probabilities, abs=1e-4)
        assert (one["index"], one["num_classes"]) == (index, 5)
        assert one["labels"][one["probs"].index(max(one["probs"]))] == one["label"] == "poor"
        assert one["std"] > 0
    [prompt] = ImageScorer(engine, "q-align").encode(files[0], task)
    assert body["usage"]["prompt_tokens"] == 4 * len(prompt.ids)


def test_video(url):
    expected = read("one_align", "scores.json")["quality.video.three"]
    [one] = classify(url, image_files("one_align", expected["frames"]), kind="video").json()["data"]
    assert one["score"] == pytest.approx(expected["score_1_to_5"][0], abs=1e-4)


def test_own_crop_of_q_instruct(engine):
    expected = read("one_align", "scores.json")["q_instruct.plain"]
    app = build_app(engine, "rater", scorers={"rater": ImageScorer(engine, "q-instruct")})
    with run_app(app) as url:
        response = classify(url, image_files("one_align", expected["pictures"]))
    scores = [one["score"] for one in response.json()["data"]]
    assert scores == pytest.approx(expected["score_0_to_1"], abs=1e-4)


def test_concurrent_requests_and_answers(url):
    expected = read("one_align", "scores.json")["quality.image"]
    files = image_files("one_align", expected["pictures"])
    chat = {"model": "rater", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 30}
    with ThreadPoolExecutor(9) as pool:
        answer = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=chat, timeout=60)
        found = list(pool.map(lambda file: classify(url, [file]).json(), files * 2))
    assert answer.result().status_code == 200
    scores = [one["data"][0]["score"] for one in found]
    assert scores == pytest.approx(expected["score_1_to_5"] * 2, abs=1e-4)
    metrics = httpx.get(f"{url}/metrics").text
    assert "owl2_running_requests 0.0" in metrics or "running 0.0" in metrics


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"task": "beauty"}, 400, "task"),
        ({"messages": [{"role": "user", "content": "How good?"}]}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": None}]}, 400, "messages"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "data:;base64,eA=="}}
                        ],
                    }
                ]
            },
            400,
            "messages.0.content.0.image_url.url",
        ),
    ],
)
def test_errors(url, fields, status, param):
    response = classify(url, image_files("one_align", ["wide"]), **fields)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("v1/completions", {"prompt": "Hi"}),
        ("v1/responses", {"input": "Hi"}),
    ],
)
def test_scoring_model_does_not_answer(engine, route, fields):
    """Compare2Score (here: other) needs anchors, so that it has no route either."""
    score_only = {"rater": "q-future/one-align"}
    app = build_app(
        engine, "rater", scorers={"rater": ImageScorer(engine, "q-align")}, score_only=score_only
    )
    without_route = build_app(engine, "rater", score_only={"rater": "q-future/Compare2Score"})
    for one, instead in ((app, "/classify"), (without_route, "owl2 rate")):
        with run_app(one) as url:
            reply = httpx.post(f"{url}/{route}", json={"model": "rater", **fields}, timeout=60)
            image = classify(url, image_files("one_align", ["wide"]))
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, "model")
        assert error["code"] == "model_without_answers"
        assert instead in error["message"]
        assert image.status_code == (200 if one is app else 404)


@pytest.mark.parametrize(
    ("name", "chats"),
    [("one-align", False), ("q-instruct-mplug-owl2-1031", True), ("my-scorer", True)],
)
def test_command_finds_models_without_answers(name, chats, tmp_path, monkeypatch, run_cli):
    """The check of `owl2 chat` decides; the page has a chat, so it is refused for others."""
    folder = tmp_path / name
    folder.symlink_to(MODEL)
    found = {}

    class Stop(Exception):
        pass

    def build(engine, name, config, keys, example, hosts, origins, scorers, score_only):
        found.update(score_only=score_only, example=example, rated=set(scorers))
        raise Stop

    monkeypatch.setattr(launch, "build_app", build)
    config = ServerConfig(model=str(folder), served_model_name="rater", port=0, device="cpu")
    with pytest.raises(Stop):
        launch.serve_model(config)
    assert found["score_only"] == ({} if chats else {"rater": "q-future/one-align"})
    assert ("/classify" in found["example"]) is not chats
    assert found["rated"] == {"rater"}  # also by the ancestor in config.json
    if not chats:
        result = run_cli("web", "--model", folder, "--port", 0)
        assert (result.exit_code, "owl2 rate" in result.stderr) == (2, True)


def test_model_without_scores_has_no_route(engine):
    others = ("co_instruct", "compare2score")  # the last one needs anchors
    models = {name: (FAMILY / name / "model", None) for name in others}
    assert find_methods(models, [], ()) == {}
    with run_app(build_app(engine, "rater")) as url:
        assert classify(url, image_files("one_align", ["wide"])).status_code == 404


def test_compare2score():
    folder, golden = FAMILY / "compare2score" / "model", read("compare2score", "scores.json")
    anchors = image_files("compare2score", golden["anchors"])
    own = Engine.from_pretrained(folder, device="cpu", dtype="float32")
    methods = find_methods({"rater": (folder, None)}, anchors, ["rater"])
    scorers = make_scorers(own, methods, anchors)
    files = image_files("compare2score", golden["pictures"])
    with run_app(build_app(own, "rater", scorers=scorers)) as url:
        response = classify(url, files)
        video = classify(url, files, kind="video")
    assert response.status_code == 200
    [prompt, *_] = prompts = scorers["rater"].encode(files[0], "quality")
    tokens = response.json()["usage"]["prompt_tokens"]
    assert tokens == len(files) * len(prompts) * len(prompt.ids)
    for one, expected in zip(response.json()["data"], golden["pictures"].values(), strict=True):
        assert one["score"] == pytest.approx(expected["score"], abs=2e-3)
        assert one["probs"] == pytest.approx(expected["preferences"], abs=1e-6)
        assert one["labels"] == [f"anchor {number}" for number in range(1, 6)]
        assert (one["num_classes"], one["label"], one["std"]) == (5, None, None)
    assert video.status_code == 400


def test_anchors_of_the_command(tmp_path, run_cli):
    folder = tmp_path / "Compare2Score"
    folder.symlink_to(FAMILY / "compare2score" / "model")
    images = FAMILY / "compare2score" / "images"
    for options, code in (
        ((folder,), "anchor images"),
        ((folder, "--anchors", images), "5 anchor images"),  # eight were passed
        ((folder, "--anchors", tmp_path / "none"), str(tmp_path / "none")),
        ((MODEL, "--anchors", images), "Compare2Score"),
    ):
        result = run_cli("serve", "--port", 0, "--device", "cpu", "--model", *options)
        assert (result.exit_code, code in result.stderr) == (2, True), result.stderr


def test_only_models_without_scores_are_skipped(tmp_path):
    with raises_input_error(ErrorCode.FILE_NOT_FOUND):
        find_methods({"rater": (str(tmp_path / "none"), None)}, [], ())
