"""Videos on the page: uploads, prompts, answers, errors, and attention maps of their frames."""

import asyncio
import json

import httpx
import pytest
from PIL import Image

from owl2.processing.messages import user_message
from owl2.processing.video import load_video
from owl2.serve.app import build_app
from owl2.serve.config import MIB, ServerLimits
from owl2.serve.errors import ApiError
from owl2.serve.web.attention_tab import AttentionTab
from owl2.serve.web.conversation import Conversation, Turn
from owl2.serve.web.mount import mount
from tests.serve.running import run_app
from tests.serve.web.page_requests import API, LIMITS, code, join, last_event, upload
from tests.serve.web.visitor import shows_error
from tests.videos import make_video


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("video") / "x.mp4")


@pytest.fixture(scope="module")
def page(tiny_engine):
    """A client of a page with the tiny engine."""
    app = build_app(tiny_engine, "tiny", LIMITS)
    mount(app, tiny_engine, LIMITS, name="tiny")
    with run_app(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        client.get("/web/")
        yield client


def test_answer_about_an_uploaded_video_is_that_of_the_engine(page, tiny_engine, video):
    data = video.read_bytes()
    assert len(data) > 1000
    [path] = upload(page, data, "x.mp4").json()
    assert page.get(f"{API}/file={path}").headers["content-type"] == "video/mp4"
    assert join(page, "s1", "what is this?", path).status_code == 200
    end = last_event(page, "s1")
    expected = tiny_engine.chat(
        [user_message("what is this?", videos=[video])], max_new_tokens=8, temperature=0
    )
    _, rows, memory = end["output"]["data"]
    assert memory["value" if isinstance(memory, dict) else 0] if memory else True
    assert expected in json.dumps(rows, ensure_ascii=False)
    assert expected in json.dumps(memory, ensure_ascii=False)


def test_invalid_video_is_reported_and_the_page_continues(page, tiny_engine):
    [path] = upload(page, b"no video" * 100, "x.mp4").json()
    join(page, "s2", "what?", path)
    assert '"role": "assistant"' not in json.dumps(last_event(page, "s2"))
    join(page, "s3", "what?")
    answer = tiny_engine.chat([user_message("what?")], max_new_tokens=8, temperature=0)
    assert answer in json.dumps(last_event(page, "s3"), ensure_ascii=False)


def test_size_of_an_upload_depends_on_its_kind(page):
    """Uploads count toward the quotas in the same way."""
    assert code(upload(page, b"x" * (MIB + 1), "x.png")) == (413, "invalid_value")
    assert upload(page, b"x" * (MIB + 1), "x.mp4").status_code == 200
    assert code(upload(page, b"x" * (2 * MIB + 1), "x.mp4"))[0] == 413
    statuses = [upload(page, b"x" * MIB, "x.mp4").status_code for _ in range(4)]
    assert statuses[-1] == 429


@pytest.mark.anyio
async def test_images_precede_videos_in_the_prompt(new_visitor, tmp_path):
    """As in `owl2 chat`, whatever the order of the uploads is."""
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (10, 20)]
    for name in ("1.mp4", "2.png"):
        (tmp_path / name).write_bytes(b"\x01")

    async def decode_video(data, budget):
        return frames

    visitor = new_visitor(decode_video=decode_video)
    request = await visitor.answered("yes", question="what?", files=sorted(tmp_path.iterdir()))
    content = request.messages[0]["content"]
    assert [part["type"] for part in content] == ["image", "video", "text"]
    assert content[1]["video"] == frames
    assert [row["path"][-5:] for row in visitor.chats[-1][:2]] == ["1.mp4", "2.png"]


@pytest.mark.anyio
async def test_number_of_videos_is_limited(new_visitor, tmp_path):
    (tmp_path / "1.mp4").write_bytes(b"\x01")
    visitor = new_visitor(max_videos=1)
    with shows_error("2 videos"):
        await visitor.ask(files=[tmp_path / "1.mp4"] * 2)
    assert visitor.conversation.turns == []


@pytest.mark.anyio
async def test_error_of_a_video_names_it_in_the_language_of_the_page(new_visitor, tmp_path):
    (tmp_path / "cats.mp4").write_bytes(b"\x01")

    async def decode_video(data, budget):
        raise ApiError(400, "The video is too long.", code="video_too_large")

    for language, needle in (("en", "cats.mp4: The video is too long"), ("zh", "这个视频")):
        visitor = new_visitor(decode_video=decode_video)
        with shows_error(needle):
            await visitor.ask(files=[tmp_path / "cats.mp4"], settings=(language, 32, 0.0, 1.0, ""))


def test_attention_of_the_frames_of_a_video(tiny_engine, video):
    frames = [frame.resize((8, 8)) for frame in load_video(video, 3)]

    async def load_files(conversation, language):
        return [Image.new("RGB", (8, 8), "red"), frames]

    turns = Conversation([Turn("what?", ("/tmp/x.mp4", "/tmp/one.png"), answer="a red circle")])
    shown, _, html = asyncio.run(AttentionTab(tiny_engine, load_files).show(turns, None, "en"))
    assert len(shown.squares) == 4
    assert html.count("<figure>") == 8
    assert html.count("file=/tmp/one.png") == 2
    assert "x.mp4" not in html


def test_limits_of_the_server_apply_to_the_page():
    limits = ServerLimits(max_videos=0, max_image_bytes=7)
    assert limits.max_upload_file_bytes == 7
    assert ServerLimits(max_image_bytes=7, max_video_bytes=9).max_upload_file_bytes == 9
