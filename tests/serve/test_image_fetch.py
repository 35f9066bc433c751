"""Fetching of images: hosts on the loopback interface, which a fake network declares public."""

import asyncio
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest

from owl2.serve.admission import current_client
from owl2.serve.config import ServerLimits
from owl2.serve.errors import ApiError
from owl2.serve.image_fetch import (
    MAX_LOOKUPS_PER_CLIENT,
    PublicNetwork,
    fetch_image,
    is_public,
)
from tests.serve.image_hosts import FILE, OTHER, PUBLIC, FakeNetwork, http_reply, redirect, run_host


def get(url, network, **limits):
    limits = ServerLimits(allow_remote_images=True, **limits)
    size = limits.max_image_bytes
    return asyncio.run(fetch_image(url, size, limits, network, lambda _: None))


def error_of(url, network, **limits):
    with pytest.raises(ApiError) as caught:
        get(url, network, **limits)
    assert caught.value.status == 400
    return caught.value


def test_file_is_fetched_from_the_resolved_address():
    with run_host(http_reply()) as (port, requests):
        network = FakeNetwork(port)
        assert get("http://good.test/a b?q=ü#part".replace(" ", "%20"), network) == FILE
    assert network.resolved == ["good.test"]
    assert network.connected == [(PUBLIC, 80)]
    [head] = requests
    assert head.startswith("GET /a%20b?q=%C3%BC HTTP/1.1\r\n")
    assert "\r\nHost: good.test\r\n" in head
    assert "\r\nUser-Agent: owl2\r\n" in head


def test_tls_uses_the_host_name():
    with run_host(http_reply()) as (port, requests):
        network = FakeNetwork(port)
        assert get("HTTPS://Good.Test/", network) == FILE
    assert (network.connected, network.secured) == ([(PUBLIC, 443)], ["good.test"])
    assert "\r\nHost: good.test\r\n" in requests[0]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_self_signed_certificate_is_rejected(tmp_path):
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=good.test"
    command = [*command.split(), "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def wrap(connection):
        return context.wrap_socket(connection, server_side=True)

    with run_host(http_reply(), wrap=wrap) as (port, requests):
        network = FakeNetwork(port, use_tls=True)
        assert "good.test" in error_of("https://good.test/", network).message
    assert requests == []


PRIVATE = """
127.0.0.1 127.8.8.8 0.0.0.0 0.1.2.3 10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254
100.64.0.1 100.100.100.200 168.63.129.16 192.0.0.192 192.88.99.1 198.18.0.1 224.0.0.1 239.1.1.1
240.0.0.1 255.255.255.255 ::1 :: fe80::1 fe80::1%eth0 fc00::1 fd00:ec2::254 fec0::1 ff02::1
::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:8.8.8.8 ::127.0.0.1 64:ff9b::10.0.0.1 64:ff9b::7f00:1
64:ff9b:1::1 2002:7f00:1:: 2001:0:1::1 2001:db8::1 3fff::1 100::1
"""


@pytest.mark.parametrize("address", PRIVATE.split())
def test_private_addresses_are_rejected(address):
    assert not is_public(address)
    network = FakeNetwork(9, **{"inside.test": [address]})
    assert "inside.test" in error_of("http://inside.test/", network).message
    assert network.connected == []


@pytest.mark.parametrize("address", ["8.8.8.8", PUBLIC, "2606:4700::1111", "64:ff9b::808:808"])
def test_public_addresses(address):
    assert is_public(address)


def test_host_with_private_and_public_addresses_is_rejected():
    network = FakeNetwork(9, **{"mixed.test": [PUBLIC, "10.0.0.1"], "empty.test": []})
    error_of("http://mixed.test/", network)
    network.names["empty.test"] = [[]]
    error_of("http://empty.test/", network)
    assert network.connected == []


def test_dns_rebinding_does_not_change_the_connection():
    with run_host(http_reply()) as (port, _):
        network = FakeNetwork(port, **{"turning.test": [[PUBLIC], ["127.0.0.1"]]})
        assert get("http://turning.test/", network) == FILE
        assert network.connected == [(PUBLIC, 80)]
        # The next request resolves the name again, to an address that is not public.
        error_of("http://turning.test/", network)
    assert network.connected == [(PUBLIC, 80)]


class ResolvingNetwork(PublicNetwork):
    """Resolves names on this machine, but does not connect."""

    async def connect(self, address, port):
        raise AssertionError(f"connected to {address}")


def test_slow_lookups_of_a_client_do_not_delay_others(monkeypatch):
    finish = threading.Event()
    resolved = []

    def look_up(host, *_, **__):
        resolved.append(host)
        if host.endswith(".slow"):
            finish.wait(20)
        return [(0, 0, 0, "", (PUBLIC, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    network = PublicNetwork()

    async def resolve(client, host):
        current_client.set(client)
        return await network.resolve(host)

    async def run():
        slow = [asyncio.ensure_future(resolve("a", f"{n}.slow")) for n in range(100)]
        try:
            assert await asyncio.wait_for(resolve("b", "fast"), 10) == [PUBLIC]
            assert len(resolved) == 1 + MAX_LOOKUPS_PER_CLIENT
        finally:
            finish.set()
        await asyncio.gather(*slow)

    asyncio.run(run())


LOOPBACK = """
127.0.0.1 localhost 0 127.1 2130706433 0x7f000001 0177.0.0.1 [::1] [::ffff:127.0.0.1] [::] ①27.0.0.1
"""


@pytest.mark.parametrize("host", LOOPBACK.split())
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_notations_of_loopback_are_rejected(scheme, host):
    error_of(f"{scheme}://{host}/", ResolvingNetwork())


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
def test_invalid_urls_are_rejected_before_the_lookup(url):
    network = FakeNetwork(9)
    assert error_of(url, network).code == "invalid_image_url"
    assert (network.resolved, network.connected) == ([], [])


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
def test_redirects_are_checked_like_the_first_url(place, status):
    with run_host(redirect(place, status), http_reply()) as (port, requests):
        names = {host: [host] for host in ("127.0.0.1", "::1", "169.254.169.254")}
        network = FakeNetwork(port, **names, **{"inside.test": ["10.0.0.1"]})
        error_of("http://good.test/", network)
        assert network.connected == [(PUBLIC, 80)]
        assert len(requests) == 1


def test_valid_redirects_are_followed():
    replies = redirect("/b"), redirect("https://other.test/c", "308 x"), http_reply()
    with run_host(*replies) as (port, requests):
        network = FakeNetwork(port, **{"other.test": [OTHER]})
        assert get("http://good.test/a/x", network) == FILE
    assert network.connected == [(PUBLIC, 80), (PUBLIC, 80), (OTHER, 443)]
    assert [head.split()[1] for head in requests] == ["/a/x", "/b", "/c"]


def test_number_of_redirects_is_limited():
    with run_host(*[redirect("/")] * 5) as (port, requests):
        message = error_of("http://good.test/", FakeNetwork(port), max_image_redirects=2).message
        assert "2" in message
        assert len(requests) == 3


def test_redirect_without_location_is_rejected():
    with run_host(*[http_reply("302 Found", b"")] * 5) as (port, _):
        error_of("http://good.test/", FakeNetwork(port), max_image_redirects=1)


@pytest.mark.parametrize("status", ["404 Not Found", "500 x", "204 No Content", "304 x"])
def test_other_statuses_are_rejected(status):
    with run_host(http_reply(status)) as (port, _):
        assert status[:3] in error_of("http://good.test/", FakeNetwork(port)).message


@pytest.mark.parametrize(
    "reply",
    [
        http_reply(),
        b"HTTP/1.1 200 OK\r\n\r\n" + FILE,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"64\r\n" + FILE[:100] + b"\r\n"
        b"64\r\n" + FILE[:100] + b"\r\n0\r\n\r\n",
    ],
    ids=["length", "no length", "chunked"],
)
def test_large_file_is_rejected(reply):
    with run_host(reply, reply) as (port, _):
        network = FakeNetwork(port)
        assert error_of("http://good.test/", network, max_image_bytes=150).code == "image_too_large"
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
def test_malformed_replies_are_rejected(reply):
    with run_host(reply) as (port, _):
        assert error_of("http://good.test/", FakeNetwork(port)).code == "invalid_image_url"


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
def test_slow_hosts_are_cut_off_at_the_timeout(reply):
    with run_host(reply) as (port, _):
        begin = time.monotonic()
        message = error_of("http://good.test/", FakeNetwork(port), image_fetch_timeout=0.3).message
        assert "good.test" in message
        assert time.monotonic() - begin < 0.9


def test_message_names_the_host_without_addresses():
    class UnreachableNetwork(FakeNetwork):
        async def connect(self, address, port):
            raise ConnectionRefusedError("10.9.8.7 says no")

    message = error_of("http://good.test/", UnreachableNetwork(9)).message
    assert "good.test" in message
    assert "10.9.8.7" not in message and PUBLIC not in message


def test_unknown_host_is_rejected():
    class EmptyNetwork(FakeNetwork):
        async def resolve(self, host):
            raise socket.gaierror(-2, "unknown")

    error_of("http://good.test/", EmptyNetwork(9))
