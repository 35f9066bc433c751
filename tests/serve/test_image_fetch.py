"""Images behind URLs: against servers on loopback, that the network of the test calls public."""

import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager

import pytest

from owl2.serve.config import ServerLimits
from owl2.serve.errors import ApiError
from owl2.serve.image_fetch import Network, fetch, is_public

PUBLIC, OTHER = "93.184.216.34", "1.1.1.1"
FILE = b"an image's file" * 100


class Stub(Network):
    """Names have the addresses that the test says; all of them lead to its server on loopback.

    Attributes:
        names: host to addresses, or to several such, one for each look-up.
        asked, reached: names that were looked up, addresses and ports that were connected to.
    """

    def __init__(self, port, **names):
        self.port = port
        self.names = {"good.test": [PUBLIC], **names}
        self.asked, self.reached, self.secured = [], [], []

    def resolve(self, host, port):
        self.asked.append(host)
        found = self.names[host]
        return found.pop(0) if isinstance(found[0], list) else found

    def connect(self, address, port, seconds):
        self.reached.append((address, port))
        return super().connect("127.0.0.1", self.port, seconds)

    def secure(self, connection, host):
        self.secured.append(host)
        return connection


@contextmanager
def serving(*replies, wrap=lambda connection: connection):
    """A server that gives one of `replies` for each connection: bytes, or a function of the
    connection. Yields its port and the requests that it got."""
    listener = socket.create_server(("127.0.0.1", 0))
    got = []

    def work():
        for reply in replies:
            try:
                connection = wrap(listener.accept()[0])
            except OSError:  # the test is over, or TLS was refused
                continue
            with connection:
                got.append(connection.recv(10_000).decode())
                try:
                    reply(connection) if callable(reply) else connection.sendall(reply)
                except OSError:  # the client has heard enough
                    continue

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], got
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def http(status="200 OK", body=FILE, **headers):
    headers = {"Content-Length": len(body)} | {k.replace("_", "-"): v for k, v in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


def redirect(url, status="302 Found"):
    return http(status, b"", Location=url)


def refused(url, network, **limits):
    with pytest.raises(ApiError) as caught:
        fetch(url, ServerLimits(allow_remote_images=True, **limits), network)
    assert caught.value.status == 400
    return caught.value


def get(url, network, **limits):
    return fetch(url, ServerLimits(allow_remote_images=True, **limits), network)


def test_a_file_is_fetched_from_the_address_that_was_looked_up():
    with serving(http()) as (port, got):
        network = Stub(port)
        assert get("http://good.test/a b?q=ü#part".replace(" ", "%20"), network) == FILE
    assert network.asked == ["good.test"]
    assert network.reached == [(PUBLIC, 80)]
    [head] = got
    assert head.startswith("GET /a%20b?q=%C3%BC HTTP/1.1\r\n")
    assert "\r\nHost: good.test\r\n" in head
    assert "\r\nUser-Agent: owl2\r\n" in head


def test_with_tls_the_certificate_must_be_the_names():
    with serving(http()) as (port, got):
        network = Stub(port)
        assert get("HTTPS://Good.Test/", network) == FILE
    assert (network.reached, network.secured) == ([(PUBLIC, 443)], ["good.test"])
    assert "\r\nHost: good.test\r\n" in got[0]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_a_certificate_that_nobody_signed_is_refused(tmp_path):
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=good.test"
    made = [*command.split(), "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def wrap(connection):
        return context.wrap_socket(connection, server_side=True)

    with serving(http(), wrap=wrap) as (port, got):
        network = Stub(port)
        network.secure = super(Stub, network).secure
        assert "cannot be reached" in refused("https://good.test/", network).message
    assert got == []


CLOSED = """
127.0.0.1 127.8.8.8 0.0.0.0 0.1.2.3 10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254
100.64.0.1 100.100.100.200 168.63.129.16 192.0.0.192 192.88.99.1 198.18.0.1 224.0.0.1 239.1.1.1
240.0.0.1 255.255.255.255 ::1 :: fe80::1 fe80::1%eth0 fc00::1 fd00:ec2::254 fec0::1 ff02::1
::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:8.8.8.8 ::127.0.0.1 64:ff9b::10.0.0.1 64:ff9b::7f00:1
64:ff9b:1::1 2002:7f00:1:: 2001:0:1::1 2001:db8::1 100::1
"""


@pytest.mark.parametrize("address", CLOSED.split())
def test_addresses_that_are_not_public(address):
    assert not is_public(address)
    network = Stub(9, **{"inside.test": [address]})
    assert "no public address" in refused("http://inside.test/", network).message
    assert network.reached == []


@pytest.mark.parametrize("address", ["8.8.8.8", PUBLIC, "2606:4700::1111", "64:ff9b::808:808"])
def test_addresses_that_are(address):
    assert is_public(address)


def test_a_private_address_beside_public_ones_is_refused():
    network = Stub(9, **{"mixed.test": [PUBLIC, "10.0.0.1"], "empty.test": []})
    refused("http://mixed.test/", network)
    network.names["empty.test"] = [[]]
    refused("http://empty.test/", network)
    assert network.reached == []


def test_a_name_whose_address_changes_after_the_check():
    with serving(http()) as (port, _):
        network = Stub(port, **{"turning.test": [[PUBLIC], ["127.0.0.1"]]})
        assert get("http://turning.test/", network) == FILE
        assert network.reached == [(PUBLIC, 80)]
        # A second request looks it up anew, and sees what it is now.
        refused("http://turning.test/", network)
    assert network.reached == [(PUBLIC, 80)]


class Real(Network):
    """The machine's own names and numbers, but nothing is connected to."""

    def connect(self, address, port, seconds):
        raise AssertionError(f"{address} was connected to")


LOOPBACK = """
127.0.0.1 localhost 0 127.1 2130706433 0x7f000001 0177.0.0.1 [::1] [::ffff:127.0.0.1] [::] ①27.0.0.1
"""


@pytest.mark.parametrize("host", LOOPBACK.split())
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_way_to_write_loopback_leads_there(scheme, host):
    refused(f"{scheme}://{host}/", Real())


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://good.test/",
        "gopher://good.test/",
        "//good.test/",
        "good.test",
        "http://",
        "http:///a",
        "http:good.test",
        "http://good.test:22/",
        "http://good.test:443/",
        "https://good.test:80/",
        "http://good.test:99999/",
        "http://good.test:x/",
        "http://user@good.test/",
        "http://user:word@good.test/",
        "http://good.test\\@127.0.0.1/",
        "http://good.test/a b",
        "http://good.test/\r\nHost: inside.test",
        "http://good.test/\t",
        "http://good.test/\x7f",
        "http://[::1/",
        "http://[good.test]/",
        f"http://{'a' * 64}.test/",
        "http://.test/",
        "http://good.test/" + "a" * 5000,
        "http://\ud83d.test/",
    ],
)
def test_urls_that_are_refused_before_anything_is_asked(url):
    network = Stub(9)
    assert refused(url, network).code == "invalid_image_url"
    assert (network.asked, network.reached) == ([], [])


@pytest.mark.parametrize(
    "place",
    [
        "http://127.0.0.1/",
        "http://inside.test/secret",
        "//inside.test/",
        "https://[::1]/",
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "http://good.test:22/",
        "http://user@good.test/",
        "data:image/png;base64,AAAA",
        "http://[",
    ],
)
@pytest.mark.parametrize("status", ["301 x", "302 x", "303 x", "307 x", "308 x"])
def test_a_redirect_is_checked_as_the_first_url_was(place, status):
    with serving(redirect(place, status), http()) as (port, got):
        names = {host: [host] for host in ("127.0.0.1", "::1", "169.254.169.254")}
        network = Stub(port, **names, **{"inside.test": ["10.0.0.1"]})
        refused("http://good.test/", network)
        assert network.reached == [(PUBLIC, 80)]
        assert len(got) == 1


def test_redirects_that_are_allowed_are_followed():
    replies = redirect("/b"), redirect("https://other.test/c", "308 x"), http()
    with serving(*replies) as (port, got):
        network = Stub(port, **{"other.test": [OTHER]})
        assert get("http://good.test/a/x", network) == FILE
    assert network.reached == [(PUBLIC, 80), (PUBLIC, 80), (OTHER, 443)]
    assert [head.split()[1] for head in got] == ["/a/x", "/b", "/c"]


def test_redirects_without_end():
    with serving(*[redirect("/")] * 5) as (port, got):
        message = refused("http://good.test/", Stub(port), max_image_redirects=2).message
        assert "more than 2 times" in message
        assert len(got) == 3


def test_a_redirect_to_nowhere_goes_on_until_there_have_been_too_many():
    with serving(*[http("302 Found", b"")] * 5) as (port, _):
        refused("http://good.test/", Stub(port), max_image_redirects=1)


@pytest.mark.parametrize("status", ["404 Not Found", "500 x", "204 No Content", "304 x"])
def test_other_answers_are_no_image(status):
    with serving(http(status)) as (port, _):
        assert f"answers {status[:3]}" in refused("http://good.test/", Stub(port)).message


@pytest.mark.parametrize(
    "reply",
    [
        http(),
        b"HTTP/1.1 200 OK\r\n\r\n" + FILE,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"64\r\n" + FILE[:100] + b"\r\n"
        b"64\r\n" + FILE[:100] + b"\r\n0\r\n\r\n",
    ],
    ids=["length", "no length", "chunked"],
)
def test_a_file_that_is_too_large(reply):
    with serving(reply, reply) as (port, _):
        network = Stub(port)
        assert refused("http://good.test/", network, max_image_bytes=150).code == "image_too_large"
        assert len(get("http://good.test/", network)) >= 200


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"\0" * 100,
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 1000,
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000,
    ],
    ids=["nothing", "zeros", "a part", "a part of a chunk", "headers", "a header"],
)
def test_servers_that_do_not_do_it_right(reply):
    with serving(reply) as (port, _):
        assert refused("http://good.test/", Stub(port)).code == "invalid_image_url"


def drip(head):
    def reply(connection):
        connection.sendall(head)
        for _ in range(200):
            connection.sendall(b"a")
            time.sleep(0.02)

    return reply


@pytest.mark.parametrize(
    "reply",
    [
        drip(b"HTTP/1.1 200 OK\r\nA: "),
        drip(b"HTTP/1.1 200 OK\r\n\r\n"),
        drip(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n"),
        lambda connection: time.sleep(1),
    ],
    ids=["headers", "body", "body of a length", "nothing"],
)
def test_servers_that_take_their_time(reply):
    with serving(reply) as (port, _):
        begin = time.monotonic()
        message = refused("http://good.test/", Stub(port), image_fetch_timeout=0.3).message
        assert "in time" in message
        assert time.monotonic() - begin < 0.9


def test_who_cannot_be_reached_is_named_without_addresses():
    class Away(Stub):
        def connect(self, address, port, seconds):
            raise ConnectionRefusedError("10.9.8.7 says no")

    message = refused("http://good.test/", Away(9)).message
    assert "good.test" in message
    assert "10.9.8.7" not in message and PUBLIC not in message


def test_a_name_that_is_none():
    class Nameless(Stub):
        def resolve(self, host, port):
            raise socket.gaierror(-2, "unknown")

    refused("http://good.test/", Nameless(9))
