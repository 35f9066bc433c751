"""What a killed evaluation goes on from."""

import os
import threading
from dataclasses import replace

import pytest

from owl2.errors import InputError
from owl2.eval import heartbeat
from owl2.eval import response_cache as module
from owl2.eval.heartbeat import beating
from owl2.eval.response_cache import Journal, key_of
from owl2.eval.sharding import Team

ALONE = Team()


@pytest.fixture
def make(tmp_path):
    def journal(settings=1, team=ALONE, name="task"):
        return Journal(tmp_path, name, {"a": settings}, team)

    return journal


def row(key):
    return {"key": key, "answer": f"answer {key} 🦉"}


def test_rows_come_back(make):
    make().add([row("a"), row("b")])
    again = make()
    again.add([row("c")])
    assert make().all(["c", "a"]) == [row("c"), row("a")]
    assert make().known().keys() == {"a", "b", "c"}


def test_any_text_is_a_line(make):
    texts = ["\u2028 \x85 \x0b", "\r\n", "half \ud83e", "🦉"]
    rows = [{"key": str(n), "answer": text} for n, text in enumerate(texts)]
    make().add(rows)
    assert make().all(["0", "1", "2", "3"]) == rows
    assert "🦉" in make().path.read_text(encoding="utf-8")


def test_half_a_line_is_dropped_and_nothing_is_joined_to_it(make):
    make().add([row("a"), row("b")])
    path = make().path
    path.write_bytes(path.read_bytes()[:-7])
    again = make()
    assert again.known() == {"a": row("a")}
    again.add([row("c")])
    assert make().known() == {"a": row("a"), "c": row("c")}


@pytest.mark.parametrize("text", [b"", b"{", b"not ours\n", b'{"settings": {"a": 2}}\n'])
def test_what_is_of_other_settings_or_not_ours_is_begun_anew(make, text):
    path = make().path
    path.write_bytes(text)
    assert make().known() == {}
    make().add([row("a")])
    assert make().known() == {"a": row("a")}


def test_other_settings(make):
    make(1).add([row("a")])
    assert not make(1).began_anew
    second = make(2)
    assert second.known() == {}
    assert second.began_anew
    assert make(1).known() == {}, "the file is the second's now"


def test_other_rounds_are_not_looked_at(make):
    make(name="task").add([row("a")])
    make(name="task_blind").add([row("b")])
    assert make(name="task").known() == {"a": row("a")}
    make(name="task").remove()
    assert make(name="task_blind").known() == {"b": row("b")}


def test_the_first_process_waits_for_the_others(make, monkeypatch):
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    first, second = make(team=Team(0, 2)), make(team=Team(1, 2))
    assert first.path != second.path
    first.add([row("a")])
    later = threading.Timer(0.1, lambda: second.add([row("b")]))
    later.start()
    assert first.all(["a", "b"]) == [row("a"), row("b")]
    later.join()
    first.remove()
    assert not first.path.exists()
    assert not second.path.exists()


def test_a_process_that_stands_still_is_given_up(make, monkeypatch):
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    first = make(team=Team(0, 2))
    first.add([row("a")])
    with pytest.raises(InputError, match="1 answers of 2 are missing, and nobody has written one"):
        first.all(["a", "b"])


def test_a_process_that_died_is_given_up_soon(make, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat, "QUIET_SECONDS", 1.0)
    first, second, third = (make(team=Team(rank, 3)) for rank in range(3))
    first.add([row("a")])
    with beating(tmp_path, Team(1, 3)), beating(tmp_path, Team(2, 3)):
        threading.Timer(1.5, lambda: [second.add([row("b")]), third.add([row("c")])]).start()
        assert len(first.all(["a", "b", "c"])) == 3, "they lived, and were waited for"
    assert len(first.all(["a", "b", "c"])) == 3, "they ended, and owe nothing"
    third.add([row("f")])
    first.add([row("d")])
    with (
        beating(tmp_path, Team(2, 3)),
        pytest.raises(InputError, match=r"1 answers of 6 are missing, and process 1 has ended"),
    ):
        first.all(["a", "b", "c", "d", "e", "f"])


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "task.part.jsonl").mkdir()
    with pytest.raises(InputError, match=r"task\.part\.jsonl cannot be written"):
        Journal(tmp_path, "task", {}, Team())


def test_a_key_is_of_all_that_decides_the_answer(questions, tmp_path, images):
    question = questions[0]
    path = tmp_path / "a.png"
    path.write_bytes((images / "red.png").read_bytes())
    image = {"type": "image", "path": str(path)}
    own = replace(question, messages=[{"role": "user", "content": [image]}])
    keys = {
        key_of(own),
        key_of(question),
        key_of(replace(own, id="other")),
        key_of(replace(own, facts={"a": 1})),
        key_of(replace(own, expected=("other",))),
    }
    assert len(keys) == 5
    assert key_of(own) in keys
    os.utime(path, (1, 1))
    assert key_of(own) not in keys
