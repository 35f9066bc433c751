"""guidellm: benchmarks of each route, without failed requests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import KEY, MODEL

REQUESTS = 20


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_benchmark(server_url, checkpoint, tmp_path, route):
    command = [
        *(str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"),
        *(
            "--backend",
            f"kind=openai_http,target={server_url},model={MODEL},api_key={KEY},"
            f"request_format={route}",
        ),
        *("--profile", "kind=concurrent,streams=4"),
        *("--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--tokenizer", f"kind=hf_auto,model={checkpoint}"),
        *("--data", "kind=synthetic_text,prompt_tokens=20,output_tokens=8"),
        *("--output", f"kind=json,path={tmp_path / 'report.json'}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=250)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [benchmark] = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["errored"] == 0
    assert totals["successful"] >= REQUESTS
