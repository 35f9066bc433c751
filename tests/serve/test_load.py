"""recipes/serving/load.py: its report of throughput and latency."""

import json

import pytest

from owl2.errors import ErrorCode, InputError
from owl2.serve.app import build_app
from recipes.serving import load
from tests.serve.running import FakeEngine, run_app


def test_report_of_two_servers(server_url, tmp_path, capsys):
    output = tmp_path / "load.json"
    options = "--clients 1 3 --rounds 2 --requests 2 --max-tokens 5 --words 4 --edge 16 --output"
    arguments = [f"one={server_url}", f"other={server_url}/v1", *options.split(), str(output)]
    assert load.main(arguments) == 0
    report = json.loads(output.read_text())
    lines = report["results"]
    assert [(line["clients"], line["server"]) for line in lines] == [
        (1, "one"), (1, "other"), (3, "one"), (3, "other"),
    ]  # fmt: skip
    assert [line["requests"] for line in lines] == [4, 4, 12, 12]
    for line in lines:
        assert line["failed"] == 0
        assert 0 < line["first_ms_p50"] <= line["first_ms_p95"] <= line["total_ms_p95"]
        assert line["first_ms_p50"] <= line["total_ms_p50"]
        assert line["first_ms_p95"] <= line["first_ms_max"] <= line["total_ms_max"]
        fewest, most = line["answers_per_client"]
        assert 0 <= fewest <= 2 <= most <= 2 * line["clients"]
        assert 1 <= line["tokens"] <= 5
        assert line["tokens_per_second"] > 0
    assert [one["server"] for one in report["rounds"]][:4] == ["one", "other"] * 2
    prompts = {reply["prompt_tokens"] for one in report["rounds"] for reply in one["replies"]}
    assert len(prompts) > 3, "all requests differ"
    assert "12" in capsys.readouterr().out


def test_servers_receive_images_in_the_same_order(server_url, monkeypatch):
    kinds = {"one": [], "other": []}
    ask = load.ask

    async def record(client, server, body):
        parts = body["messages"][0]["content"]
        kinds[server.name].append((parts[0]["type"], parts[-1]["text"]))
        return await ask(client, server, body)

    monkeypatch.setattr(load, "ask", record)
    options = "--clients 1 --rounds 2 --requests 8 --max-tokens 1 --words 4 --edge 16"
    load.main([f"one={server_url}", f"other={server_url}", *options.split()])
    one, other = kinds["one"][2:], kinds["other"][2:]  # after the warm-up
    assert [kind for kind, _ in one] == [kind for kind, _ in other]
    assert {kind for kind, _ in one} == {"text", "image_url"}
    assert not {text for _, text in one} & {text for _, text in other}, "all requests differ"


def test_failed_requests_are_counted_and_reported(tiny_engine, capsys):
    engine = FakeEngine(tiny_engine, error=InputError("no memory", ErrorCode.OUT_OF_MEMORY))
    with run_app(build_app(engine, "tiny")) as url:
        with pytest.raises(ValueError, match="400"):
            load.main([url, "--clients", "1", "--rounds", "1"])
        options = [url, "--clients", "2", "--rounds", "1", "--images", "0"]
        ask = load.ask
        calls = []

        async def ask_after_warm_up(*arguments):
            calls.append(1)
            return await ask(*arguments) if len(calls) > 1 else None

        load.ask = ask_after_warm_up
        try:
            assert load.main(options) == 1
        finally:
            load.ask = ask
    output = capsys.readouterr()
    assert "4 failed" in output.out + output.err
    assert "400" in output.err


def test_percentile():
    values = [float(value) for value in range(1, 21)]
    assert load.percentile(values, 50) == 10
    assert load.percentile(values, 95) == 19
    assert load.percentile(values[:1], 95) == 1
