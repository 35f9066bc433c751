"""Requests to the routes of the page, without a browser."""

import json

from owl2.serve.config import MIB, ServerLimits

LIMITS = ServerLimits(
    max_images=4,
    max_image_bytes=MIB,
    max_videos=1,
    max_video_bytes=2 * MIB,
    max_upload_bytes=6 * MIB,
    max_client_upload_bytes=4 * MIB,
)
API = "/web/gradio_api"


def code(reply):
    return reply.status_code, reply.json()["error"]["code"]


def upload(client, data=b"image", name="cat.png", **options):
    files = {"files": (name, data, "image/png")}
    return client.post(f"{API}/upload", files=files, **options)


def function_index(client, event):
    dependencies = client.get("/web/config").json()["dependencies"]
    return next(one["id"] for one in dependencies if one["targets"][0][1] == event)


def join(client, session, text="what?", path=None, event="submit", **fields):
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    box = {"text": text, "files": [file] if path else []}
    body = {
        "data": [box, None, [], "en", 8, 0, 1, ""],
        "fn_index": function_index(client, event),
        "session_hash": session,
    }
    content = json.dumps(body | fields)  # httpx cannot encode lone surrogates
    headers = {"Content-Type": "application/json"}
    return client.post(f"{API}/queue/join", content=content, headers=headers)


def last_event(client, session):
    with client.stream("GET", f"{API}/queue/data", params={"session_hash": session}) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if "process_completed" in line:
                return json.loads(line.removeprefix("data:"))
    return None
