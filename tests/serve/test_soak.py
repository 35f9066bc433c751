"""Load: 64 clients at once, of all kinds, some of them leaving: nobody is lost or mixed up."""

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
    asked = crowd.questions(Engine(tiny_engine.model, tiny_engine.processor))
    assert len({question.greedy for question in asked}) > 5
    assert sum(question.stopped != question.greedy for question in asked) > 2
    return asked


def metric(url, name, labels=""):
    text = httpx.get(f"{url}/metrics").text
    found = re.search(rf"^owl2_{name}{re.escape(labels)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def is_empty(url):
    return not metric(url, "requests_running") and not metric(url, "requests_waiting")


def test_64_clients_at_once(server_url, tiny_engine, questions):
    before = metric(server_url, "answers_total", '{reason="cancelled"}')
    seen = crowd.visit(server_url, questions, CLIENTS, 2)
    assert seen.wrong == []
    assert sum(seen.kinds[kind.__name__] for kind in crowd.KINDS) == CLIENTS * 2
    assert len(seen.kinds) > len(crowd.KINDS), "nobody left while it waited"
    wait_until(lambda: is_empty(server_url))
    assert metric(server_url, "answers_total", '{reason="cancelled"}') > before
    worker = tiny_engine.runner._worker
    wait_until(lambda: not (worker._rows.active or worker._waiting))
    assert crowd.visit(server_url, questions, 1, 6).wrong == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no /proc and no file descriptors")
def test_crowd_after_crowd_it_stays_as_large_as_it_was(tiny_checkpoint, questions):
    words = ("--model", tiny_checkpoint, "--port", "0", "--served-model-name", "tiny")
    server = ServerProcess(*words, "--device", "cpu", "--dtype", "float32")
    try:
        process = psutil.Process(server.process.pid)
        sizes = []
        for number in range(8):
            seen = crowd.visit(server.url, questions, CLIENTS, 6, seed=number)
            assert seen.wrong == []
            wait_until(lambda: is_empty(server.url), 60)
            wait_until(lambda: len(process.net_connections()) <= 3, 60)
            info = process.memory_info().rss / 2**20, process.num_fds(), process.num_threads()
            sizes.append(info)
        print(sizes)
        # What is kept on purpose (images, prompts) is there by then.
        (early, files, _), (late, last_files, threads) = sizes[3], sizes[-1]
        assert late - early < 8, sizes
        assert last_files <= files + 2, sizes
        assert threads < ServerLimits().max_num_seqs + 16, sizes
    finally:
        server.process.kill()
        server.process.wait()
