"""guidellm: benchmarks of each route, without failed requests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import KEY, MODEL
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

REQUESTS = 20


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A tokenizer of bytes: guidellm counts the tokens of its random texts with it."""
    vocabulary = {letter: id_ for id_, letter in enumerate(sorted(ByteLevel.alphabet()))}
    bytes_ = Tokenizer(BPE(vocabulary, []))
    bytes_.pre_tokenizer, bytes_.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    directory = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=bytes_).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_benchmark(server_url, tokenizer, tmp_path, route):
    command = [
        *(str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"),
        *(
            "--backend",
            f"kind=openai_http,target={server_url},model={MODEL},api_key={KEY},"
            f"request_format={route}",
        ),
        *("--profile", "kind=concurrent,streams=4"),
        *("--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--tokenizer", f"kind=hf_auto,model={tokenizer}"),
        *("--data", "kind=synthetic_text,prompt_tokens=20,output_tokens=8"),
        *("--output", f"kind=json,path={tmp_path / 'report.json'}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=250)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [benchmark] = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["errored"] == 0
    assert totals["successful"] >= REQUESTS
