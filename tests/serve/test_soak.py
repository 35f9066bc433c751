"""Load: 64 concurrent clients of all kinds, some of which disconnect; answers are not mixed up."""

import re
import sys

import httpx
import psutil
import pytest

from owl2.engine.engine import Engine
from owl2.serve.config import ServerLimits
from tests.serve import crowd
from tests.serve.running import wait_until
from tests.serve.test_launch import ServerProcess

CLIENTS = 64


@pytest.fixture(scope="module")
def questions(tiny_engine):
    questions = crowd.questions(Engine(tiny_engine.model, tiny_engine.processor))
    assert len({question.greedy for question in questions}) > 5
    assert sum(question.stopped != question.greedy for question in questions) > 2
    return questions


def metric(url, name, labels=""):
    text = httpx.get(f"{url}/metrics").text
    found = re.search(rf"^owl2_{name}{re.escape(labels)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def is_idle(url):
    return not metric(url, "requests_running") and not metric(url, "requests_waiting")


def test_64_concurrent_clients(server_url, tiny_engine, questions):
    before = metric(server_url, "answers_total", '{reason="cancelled"}')
    result = crowd.run_clients(server_url, questions, CLIENTS, 2)
    assert result.failures == []
    assert sum(result.kinds[kind.__name__] for kind in crowd.KINDS) == CLIENTS * 2
    assert len(result.kinds) > len(crowd.KINDS), "no client disconnected while it waited"
    wait_until(lambda: is_idle(server_url))
    assert metric(server_url, "answers_total", '{reason="cancelled"}') > before
    wait_until(lambda: not (tiny_engine.stats().num_running or tiny_engine.stats().num_waiting))
    assert crowd.run_clients(server_url, questions, 1, 6).failures == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs /proc and file descriptors")
def test_memory_threads_and_descriptors_do_not_grow(tiny_checkpoint, questions):
    options = ("--model", tiny_checkpoint, "--port", "0", "--served-model-name", "tiny")
    server = ServerProcess(*options, "--device", "cpu", "--dtype", "float32")
    try:
        process = psutil.Process(server.process.pid)
        sizes = []
        for number in range(8):
            result = crowd.run_clients(server.url, questions, CLIENTS, 6, seed=number)
            assert result.failures == []
            wait_until(lambda: is_idle(server.url), 60)
            wait_until(lambda: len(process.net_connections()) <= 3, 60)
            info = process.memory_info().rss / 2**20, process.num_fds(), process.num_threads()
            sizes.append(info)
        print(sizes)  # for the report of a failure
        # The caches of images and prompts are full by then.
        (early, files, _), (late, last_files, threads) = sizes[3], sizes[-1]
        assert late - early < 8, sizes
        assert last_files <= files + 2, sizes
        assert threads < ServerLimits().max_num_seqs + 16, sizes
    finally:
        server.close()
