"""Attacks on the page: files of the server and of other visitors, uploads."""

import asyncio
import os
import re
import socket
from pathlib import Path

import httpx
import pytest

from owl2.serve.config import MIB
from owl2.serve.web.exchange import PageExchange
from tests.serve.running import wait_until
from tests.serve.web.page_requests import API, LIMITS, code, join, last_event, upload

FORM = "multipart/form-data; boundary=b"


def test_files_are_private(new_client, uploads):
    owner, other = new_client(), new_client()
    [path] = upload(owner, b"mine").json()
    url = f"{API}/file={path}"
    assert owner.get(url).content == b"mine"
    assert owner.get(url, headers={"Range": "bytes=1-2"}).content == b"in"
    assert code(other.get(url)) == (404, "not_found")
    other.cookies.clear()
    assert code(other.get(url)) == (404, "not_found")


def test_the_same_content_does_not_reveal_an_upload(new_client, uploads):
    """Who has a file cannot find out whether another visitor has uploaded it."""
    owner, other = new_client(), new_client()
    [path] = upload(owner, b"known").json()
    [second] = upload(other, b"known").json()
    assert path != second
    guess = str(Path(second).parents[2] / Path(path).relative_to(Path(path).parents[2]))
    assert code(other.get(f"{API}/file={guess}")) == (404, "not_found")


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "/", __file__, "x" * 9000])
def test_files_of_the_server_do_not_exist(path, new_client):
    for address in (path, path.replace("/", "%2f"), f"/{path}", f"{path}%00"):
        assert new_client().get(f"{API}/file={address}").status_code == 404


def test_examples_are_readable(new_client):
    config = new_client().get("/web/config").text
    [path, *_] = re.findall(r'"path": ?"([^"]+\.png)"', config)
    assert new_client().get(f"{API}/file={path}").headers["content-type"] == "image/png"


@pytest.mark.parametrize(
    "name, kind, disposition",
    [
        ("a.png", "image/png", "inline"),
        ("a.svg", "application/octet-stream", "attachment"),
        ("a.html", "application/octet-stream", "attachment"),
    ],
)
def test_a_browser_does_not_run_uploads(name, kind, disposition, new_client, uploads):
    client = new_client()
    [path] = upload(client, b"<script>1</script>", name).json()
    reply = client.get(f"{API}/file={path}")
    assert reply.headers["content-type"] == kind
    assert reply.headers["content-disposition"].startswith(disposition)
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_uploads_need_a_visitor(server):
    for cookie in (None, "", "short", "x" * 44):
        client = httpx.Client(
            base_url=server[0], cookies={"owl2-visitor": cookie} if cookie else {}
        )
        assert code(upload(client)) == (403, "missing_cookie")


def test_uploads_have_quotas(server, new_client, uploads, caplog):
    """Another cookie does not give another quota."""
    statuses = []
    for _ in range(8):
        reply = upload(new_client(), b"x" * (MIB - 1000))
        statuses.append(reply.status_code)
    assert statuses == [200] * 4 + [429] * 4 or statuses == [200] * 3 + [429] * 5
    assert code(reply) == (429, "upload_quota_exceeded")
    assert int(reply.headers["retry-after"]) > 0
    assert sum("uploads are rejected" in line for line in caplog.messages) == 1
    directory = server[1].routes[-1].app.uploads.directory
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    assert size <= LIMITS.max_client_upload_bytes


def test_small_files_count_with_their_directories(new_client, uploads):
    files = [("files", (f"{number}.png", b"x", "image/png")) for number in range(500)]
    reply = new_client().post(f"{API}/upload", files=files)
    assert code(reply) == (429, "upload_quota_exceeded")


@pytest.mark.parametrize(
    "content, kind",
    [
        (b"", FORM),
        (b"--b\r\n\r\nx", FORM),
        (b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\nx\r\n--b--\r\n', FORM),
        (b"x", "multipart/form-data"),
        (b"x", "text/plain"),
        (b"--b\r\n" + b"a: b\r\n" * 5000, FORM),
    ],
)
def test_invalid_uploads(content, kind, server, new_client, uploads):
    reply = new_client().post(f"{API}/upload", content=content, headers={"Content-Type": kind})
    assert reply.status_code in (200, 400)
    assert reply.status_code == 400 or reply.json() == []
    assert list(server[1].routes[-1].app.uploads.directory.iterdir()) == []


def test_an_interrupted_upload_is_deleted(server, new_client, uploads):
    client = new_client()
    address = httpx.URL(server[0])
    head = (
        f"POST {API}/upload HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM}\r\n"
        f"Cookie: owl2-visitor={client.cookies['owl2-visitor']}\r\nContent-Length: 900000\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    )
    directory = server[1].routes[-1].app.uploads.directory
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(head.encode() + b"x" * 10_000)
        wait_until(lambda: list(directory.iterdir()))
    wait_until(lambda: not list(directory.iterdir()))


@pytest.mark.anyio
@pytest.mark.parametrize("is_complete", [False, True])
async def test_the_time_of_a_body_is_limited(is_complete):
    messages = [{"type": "http.request", "body": b"x", "more_body": not is_complete}]

    async def receive():
        return messages.pop(0) if messages else await asyncio.sleep(0.1, {"type": "late"})

    exchange = PageExchange(receive, None)
    exchange.limit(10, 0.02, httpx.Headers())
    assert (await exchange.receive())["body"] == b"x"
    assert (await exchange.receive())["type"] == ("late" if is_complete else "http.disconnect")
    rejection = exchange.take_rejection()
    assert (rejection and rejection.status) == (None if is_complete else 408)


def test_no_space_is_an_error_of_the_upload(new_client, uploads, monkeypatch):
    async def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("owl2.serve.web.gateway.upload_fn", fail)
    assert code(upload(new_client())) == (507, "upload_quota_exceeded")


def test_a_directory_as_a_file_does_not_stop_the_deletion(server, new_client, uploads):
    client = new_client()
    [path] = upload(client).json()
    for number, directory in enumerate(Path(path).parents):
        join(client, f"s{number}", path=str(directory))
        assert "Files must be uploaded" in str(last_event(client, f"s{number}"))
    page = server[1].routes[-1].app.gradio.get_blocks()
    assert not any(os.path.isdir(file) for files in page.temp_file_sets for file in files)
