import gzip
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from owl2.data.webdataset import read_shard
from owl2.errors import ErrorCode
from tests.data.tars import captions, write_tar
from tests.errors import raises_input_error

FILES = captions(range(3))


def keys(url: object, **options) -> list[str]:
    return [key for key, _ in read_shard(str(url), **options)]


@pytest.fixture
def shard(tmp_path):
    return write_tar(tmp_path / "a.tar", FILES)


def test_consecutive_files_of_a_key_are_grouped(shard):
    groups = list(read_shard(str(shard)))
    assert [key for key, _ in groups] == ["000000", "000001", "000002"]
    assert groups[1][1] == [(name.partition(".")[2], data) for name, data in FILES[3:6]]


def test_skip_starts_at_a_key(shard):
    assert keys(shard, skip=2) == ["000002"]
    assert keys(shard, skip=9) == []


def test_other_files_are_ignored(tmp_path):
    names = ["d/", "README", "__meta__.json", ".hidden", "._a.txt", "d/a.TXT", "d/a.cls"]
    path = write_tar(tmp_path / "a.tar", [(name, b"") for name in names])
    assert list(read_shard(str(path))) == [("d/a", [("txt", b"")])]


def test_compressed_archives_are_read(tmp_path):
    assert len(keys(write_tar(tmp_path / "a.tar.gz", FILES, "w:gz"))) == 3


# ------------------------------------------------------------------ cut short


@pytest.mark.parametrize("pack", [bytes, partial(gzip.compress, mtime=0)])
def test_every_truncation_is_detected(tmp_path, shard, pack):
    """The samples before the error are complete, wherever the file is truncated."""
    expected = list(read_shard(str(shard)))
    # 9 files of a header and a block each; then two empty blocks, of which one is sufficient.
    packed = pack(shard.read_bytes()[: (9 * 2 + 2) * 512])
    last = 9 * 2 * 512 if pack is bytes else len(packed) - 30
    path = tmp_path / "cut.tar"
    for size in [*range(0, last, 96 if pack is bytes else 7), last]:
        path.write_bytes(packed[:size])
        found = []
        with raises_input_error(ErrorCode.UNREADABLE_FILE, "cut.tar"):
            found += read_shard(str(path))
        read = []
        with raises_input_error(ErrorCode.UNREADABLE_FILE):
            for group in read_shard(str(path)):
                read.append(group)
        assert read == expected[: len(read)]
        assert len(read) < 3
    path.write_bytes(packed)
    assert list(read_shard(str(path))) == expected


def test_a_damaged_header_is_an_error(tmp_path, shard):
    damaged = bytearray(shard.read_bytes())
    damaged[6 * 512 + 10] ^= 0xFF  # in the name of the second sample's first file
    (tmp_path / "b.tar").write_bytes(damaged)
    with raises_input_error(ErrorCode.UNREADABLE_FILE):
        keys(tmp_path / "b.tar")


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_files_that_are_not_tar_are_refused(tmp_path, content):
    path = tmp_path / "b.tar"
    path.write_bytes(content)
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "b.tar"):
        keys(path)


def test_missing_file(tmp_path):
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "b.tar"):
        keys(tmp_path / "b.tar")


# ------------------------------------------------------------------ urls


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path != "/cut":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", "20480")
        self.end_headers()
        self.wfile.write(b"\0" * 100)
        return None


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


def test_shards_over_http(shard, server):
    assert len(keys(f"{server}/a.tar")) == 3
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "none.tar"):
        keys(f"{server}/none.tar")
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "/cut"):
        keys(f"{server}/cut")


def test_shards_from_a_command(shard):
    assert len(keys(f"pipe:cat {shard}")) == 3
    assert len(keys(f"pipe:gzip -c {shard} | gunzip")) == 3


@pytest.mark.parametrize(
    ("command", "expected_error"),
    [
        ("exit 7", (ErrorCode.UNREADABLE_FILE, "7")),
        ("cat SHARD; exit 7", (ErrorCode.UNREADABLE_FILE, "7")),
        ("head -c 3000 SHARD", (ErrorCode.UNREADABLE_FILE,)),
        ("head -c 3000 SHARD; exit 7", (ErrorCode.UNREADABLE_FILE, "7")),
        ("cat TOKEN none.tar 2> /dev/null", (ErrorCode.UNREADABLE_FILE, "1")),
    ],
)
def test_a_failing_command_is_reported(shard, command, expected_error):
    command = command.replace("SHARD", str(shard))
    with raises_input_error(*expected_error) as caught:
        keys(f"pipe:{command}")
    assert str(caught.value).count("TOKEN") <= 1  # the url that the user gave, and not again


@pytest.mark.timeout(30)
def test_an_abandoned_command_is_terminated(shard):
    # More than is read at a time, and then nothing: neither the end nor a broken pipe.
    groups = read_shard(f"pipe:cat {shard}; head -c 99999 /dev/zero; sleep 60")
    assert next(groups)[0] == "000000"
    groups.close()
