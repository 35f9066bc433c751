"""Clients for Node.js. Their tests are in node/; each of them is one test here."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import KEY, MODEL

HERE = Path(__file__).parent


def environment(base_url, image_url):
    values = {"URL": base_url, "KEY": KEY, "MODEL": MODEL, "IMAGE": image_url}
    return os.environ | {f"OWL2_{key}": value for key, value in values.items()}


@pytest.mark.parametrize("file", ["openai.test.mjs", "ai-sdk.test.mjs"])
def test_node(file, base_url, image_url):
    done = subprocess.run(
        ["node", "--test", "--test-reporter=tap", f"node/{file}"],
        cwd=HERE,
        env=environment(base_url, image_url),
        capture_output=True,
        text=True,
        timeout=250,
    )
    passed = re.search(r"^# pass (\d+)", done.stdout, re.M)
    failed = re.search(r"^# fail (\d+)", done.stdout, re.M)
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"{file}: {passed[1]} passed")
    assert int(passed[1]) > 10
    assert failed[1] == "0"


def test_promptfoo(base_url, image_url, tmp_path):
    """An evaluation with an image, a JSON schema, and assertions."""
    content = [
        {"type": "image_url", "image_url": {"url": "{{image}}"}},
        {"type": "text", "text": "{{question}}"},
    ]
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "green"]}},
        "required": ["color"],
        "additionalProperties": False,
    }
    options = {"apiBaseUrl": base_url, "apiKey": KEY, "max_tokens": 40, "temperature": 0}
    json_format = {"type": "json_schema", "json_schema": {"name": "shape", "schema": schema}}
    config = {
        "prompts": [json.dumps([{"role": "user", "content": content}])],
        "providers": [
            {"id": f"openai:chat:{MODEL}", "label": "text", "config": options},
            {
                "id": f"openai:chat:{MODEL}",
                "label": "json",
                "config": options | {"response_format": json_format},
            },
        ],
        "tests": [
            {
                "vars": {"question": "what is this?", "image": image_url},
                "assert": [{"type": "javascript", "value": "JSON.stringify(output).length > 2"}],
            }
        ],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [HERE / "node_modules/.bin/promptfoo", "eval", "--config", "config.json"]
    command += ["--no-cache", "--no-write", "--no-table", "--output", "result.json"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(base_url, image_url) | {"PROMPTFOO_CONFIG_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    stats = json.loads((tmp_path / "result.json").read_text())["results"]["stats"]
    assert (stats["successes"], stats["failures"], stats["errors"]) == (2, 0, 0)
