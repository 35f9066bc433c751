"""Images behind URLs, fetched so that the server cannot be sent where its clients could not go.

::

    URL ──check──► host ──look up once──► addresses, all public? ──connect to that address──► reply
     ▲                                                                                  │
     └──────────────────────────────── redirect ◄───────────────────────────────────────┘

A name can have another address a moment later, and a reply can point anywhere: what is connected to
is the address that was checked, and every redirect begins from the start. Proxies that the
environment names are not used, as they would look names up anew.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from owl2.serve.errors import SHOWN, ApiError
from owl2.serve.limits import Limits

LONGEST_URL = 4096
PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
PIECE = 2**16

_UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that is given out
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 as seen from networks without it (RFC 6052)
# Closed beside what `ipaddress` calls not global, which differs from version to version: protocol
# assignments (RFC 6890; one cloud has its metadata there), relays of 6to4 (RFC 7526), and the
# address by which Azure's machines reach their host, see
# https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16
_CLOSED = [
    ipaddress.ip_network(net) for net in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")
]


class Network:
    """What names are looked up and connections are made with; tests have one of their own."""

    def resolve(self, host: str, port: int) -> list[str]:
        """The addresses of a name. Raises `OSError` if it has none."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [str(entry[4][0]) for entry in found]

    def connect(self, address: str, port: int, seconds: float) -> socket.socket:
        """A connection to an address, no name. Raises `OSError`."""
        return socket.create_connection((address, port), seconds)

    def secure(self, connection: socket.socket, host: str) -> socket.socket:
        """The same with TLS, the certificate being `host`'s. Raises `OSError`."""
        return ssl.create_default_context().wrap_socket(connection, server_hostname=host)


@dataclass(frozen=True)
class _Target:
    """A URL that may be asked for, in parts."""

    scheme: str
    host: str
    path: str

    @property
    def authority(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def fetch(url: str, limits: Limits, network: Network) -> bytes:
    """The file behind an http(s) URL.

    How long the look-up of a name takes is not bounded here, the rest is.

    Raises:
        ApiError: 400: a URL that is not allowed, cannot be reached, gives no file or too large a
            one, redirects too often or takes too long.
    """
    deadline = time.monotonic() + limits.remote_seconds
    place = url
    for _ in range(limits.remote_redirects + 1):
        target = _read_url(place)
        try:
            with _reply(target, deadline, network) as reply:
                if reply.status not in REDIRECTS:
                    return _read(reply, target, limits.image_bytes, deadline)
                location = reply.getheader("Location", "")
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() >= deadline:
                raise _refused(f"'{target.host}' did not give the image in time") from error
            raise _refused(f"'{target.host}' cannot be reached") from error
        place = _joined(place, location)
    raise _refused(f"it is redirected more than {limits.remote_redirects} times")


def is_public(address: str) -> bool:
    """Whether an address is anyone's to reach: not private, loopback, link-local, multicast, …"""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in _UNICAST or ip.sixtofour or ip.teredo:
            return False
    closed = ip.is_multicast or ip.is_reserved or any(ip in net for net in _CLOSED)
    return ip.is_global and not closed


def _read_url(url: str) -> _Target:
    # Two readers of a URL may differ about these, and the second one would connect elsewhere.
    if len(url) > LONGEST_URL or any(letter <= " " or letter in "\\\x7f" for letter in url):
        raise _refused("it is too long, or holds spaces or control characters")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode("ascii")
    except ValueError as error:  # of UnicodeError's kind, too
        raise _refused("it is no valid URL") from error
    if parts.scheme not in PORTS or not host:
        raise _refused("only http:// and https:// are fetched")
    if parts.username is not None or parts.password is not None:
        raise _refused("it holds a user's name or a password")
    if port not in (None, PORTS[parts.scheme]):
        raise _refused("only the usual ports are connected to, 80 and 443")
    path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    if parts.query:
        path += "?" + urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~?")
    return _Target(parts.scheme, host, path)


@contextmanager
def _reply(
    target: _Target, deadline: float, network: Network
) -> Iterator[http.client.HTTPResponse]:
    port = PORTS[target.scheme]
    addresses = network.resolve(target.host, port)
    # A name with a private address beside public ones is no accident.
    if not addresses or not all(map(is_public, addresses)):
        raise _refused(f"'{target.host}' is no public address")
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    with network.connect(addresses[0], port, seconds) as plain, _cut_off(plain, deadline):
        connection = network.secure(plain, target.host) if target.scheme == "https" else plain
        with connection:
            client = http.client.HTTPConnection(target.host)
            client.sock = connection
            headers = {"Host": target.authority, "User-Agent": "owl2", "Accept": "image/*"}
            headers |= {"Accept-Encoding": "identity", "Connection": "close"}
            client.request("GET", target.path, headers=headers)
            with client.getresponse() as reply:
                yield reply


@contextmanager
def _cut_off(connection: socket.socket, deadline: float) -> Iterator[None]:
    """At the deadline the connection ends: a server that sends a byte now and then would keep a
    thread for hours, as a socket's own limit begins anew with every byte."""
    same = connection.dup()  # TLS takes the first one over

    def end() -> None:
        try:
            same.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other side was faster

    clock = threading.Timer(max(0.0, deadline - time.monotonic()), end)
    clock.daemon = True
    clock.start()
    try:
        yield
    finally:
        clock.cancel()
        clock.join()
        same.close()


def _read(reply: http.client.HTTPResponse, target: _Target, most: int, deadline: float) -> bytes:
    if reply.status != 200:
        raise _refused(f"'{target.host}' answers {reply.status}")
    data = bytearray()
    while piece := reply.read(PIECE):
        data += piece
        if len(data) > most:
            raise ApiError(
                400,
                f"The image is larger than {most:,} bytes, which is this server's limit.",
                code="image_too_large",
            )
    if time.monotonic() >= deadline:
        raise TimeoutError
    if reply.length:
        raise _refused(f"'{target.host}' sent only a part of it")
    return bytes(data)


def _joined(url: str, location: str) -> str:
    try:
        return urllib.parse.urljoin(url, location)
    except ValueError as error:
        raise _refused("it is redirected to what is no URL") from error


def _refused(reason: str) -> ApiError:
    message = f"The image's URL cannot be used: {reason[:SHOWN]}."
    return ApiError(400, message, code="invalid_image_url")
