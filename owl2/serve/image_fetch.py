"""Images from URLs, protected against server-side request forgery (SSRF).

::

    URL ──check──► host ──resolve once──► addresses, all public? ──connect to that address──► reply
     ▲                                                                                  │
     └──────────────────────────────── redirect ◄───────────────────────────────────────┘

The address of a name can change after the check, and a reply can redirect to any URL. Therefore the
connection goes to the address that was checked, and every redirect is checked like the first URL.
Proxies from the environment are not used, because they would resolve names again.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from owl2.serve.config import ServerLimits
from owl2.serve.errors import MAX_VALUE_LENGTH, ApiError

MAX_URL_LENGTH = 4096
PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK_BYTES = 2**16

_UNICAST = ipaddress.ip_network("2000::/3")  # the allocated part of IPv6
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses in IPv6-only networks (RFC 6052)
# In addition to `ipaddress.is_global`, which differs between versions: protocol assignments
# (RFC 6890; metadata of one cloud), 6to4 relays (RFC 7526), and the host of Azure's machines, see
# https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16
_BLOCKED = [
    ipaddress.ip_network(net) for net in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")
]


class Network:
    """DNS and connections; tests replace it."""

    def resolve(self, host: str, port: int) -> list[str]:
        """The addresses of a name. Raises `OSError`."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [str(entry[4][0]) for entry in found]

    def connect(self, address: str, port: int, seconds: float) -> socket.socket:
        """A connection to an address. Raises `OSError`."""
        return socket.create_connection((address, port), seconds)

    def secure(self, connection: socket.socket, host: str) -> socket.socket:
        """The connection with TLS; the certificate must be valid for `host`. Raises `OSError`."""
        return ssl.create_default_context().wrap_socket(connection, server_hostname=host)


@dataclass(frozen=True)
class _Target:
    """The parts of an allowed URL."""

    scheme: str
    host: str
    path: str


def fetch_image(url: str, limits: ServerLimits, network: Network) -> bytes:
    """The file at an http(s) URL. The time limit does not include DNS lookups.

    Raises:
        ApiError: 400: the URL is not allowed or cannot be reached, or its file is too large, too
            slow or redirected too often.
    """
    deadline = time.monotonic() + limits.image_fetch_timeout
    for _ in range(limits.max_image_redirects + 1):
        target = _parse(url)
        try:
            with _request(target, deadline, network) as response:
                if response.status not in REDIRECTS:
                    return _read(response, target.host, limits.max_image_bytes, deadline)
                location = response.getheader("Location", "")
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() >= deadline:
                raise invalid_url(f"'{target.host}' did not send the image in time") from error
            raise invalid_url(f"'{target.host}' cannot be reached") from error
        try:
            url = urllib.parse.urljoin(url, location)
        except ValueError as error:
            raise invalid_url("it is redirected to an invalid URL") from error
    raise invalid_url(f"it is redirected more than {limits.max_image_redirects} times")


def is_public(address: str) -> bool:
    """Whether an address is public: not private, loopback, link-local, multicast or reserved."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in _UNICAST or ip.sixtofour or ip.teredo:
            return False
    is_blocked = ip.is_multicast or ip.is_reserved or any(ip in net for net in _BLOCKED)
    return ip.is_global and not is_blocked


def _parse(url: str) -> _Target:
    # Parsers disagree about these characters, so that another one could connect to another host.
    if len(url) > MAX_URL_LENGTH or any(char <= " " or char in "\\\x7f" for char in url):
        raise invalid_url("it is too long, or contains spaces or control characters")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode("ascii")
    except ValueError as error:  # includes UnicodeError
        raise invalid_url("it is not a valid URL") from error
    if parts.scheme not in PORTS or not host:
        raise invalid_url("only http:// and https:// are supported")
    if parts.username is not None or parts.password is not None:
        raise invalid_url("it contains a user name or a password")
    if port not in (None, PORTS[parts.scheme]):
        raise invalid_url("only the default ports 80 and 443 are allowed")
    path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    if parts.query:
        path += "?" + urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~?")
    return _Target(parts.scheme, host, path)


@contextmanager
def _request(
    target: _Target, deadline: float, network: Network
) -> Iterator[http.client.HTTPResponse]:
    port = PORTS[target.scheme]
    addresses = network.resolve(target.host, port)
    # A name with both private and public addresses is an attack or a mistake.
    if not addresses or not all(map(is_public, addresses)):
        raise invalid_url(f"'{target.host}' is not a public address")
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    with network.connect(addresses[0], port, seconds) as plain, _shut_down_at(deadline, plain):
        connection = network.secure(plain, target.host) if target.scheme == "https" else plain
        with connection:
            client = http.client.HTTPConnection(target.host)
            client.sock = connection
            host = f"[{target.host}]" if ":" in target.host else target.host
            headers = {"Host": host, "User-Agent": "owl2", "Accept": "image/*"}
            headers |= {"Accept-Encoding": "identity", "Connection": "close"}
            client.request("GET", target.path, headers=headers)
            with client.getresponse() as response:
                yield response


@contextmanager
def _shut_down_at(deadline: float, connection: socket.socket) -> Iterator[None]:
    """Shut the connection down at the deadline.

    The timeout of a socket restarts with every byte, so that a server that sends single bytes could
    occupy a thread for hours.
    """
    duplicate = connection.dup()  # TLS takes over the original

    def shut_down() -> None:
        with suppress(OSError):  # the other side has closed it
            duplicate.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), shut_down)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        duplicate.close()


def _read(response: http.client.HTTPResponse, host: str, max_bytes: int, deadline: float) -> bytes:
    if response.status != 200:
        raise invalid_url(f"'{host}' responds with status {response.status}")
    data = bytearray()
    while chunk := response.read(CHUNK_BYTES):
        data += chunk
        if len(data) > max_bytes:
            raise ApiError(
                400,
                f"The image is larger than the limit of this server, {max_bytes:,} bytes.",
                code="image_too_large",
            )
    if time.monotonic() >= deadline:
        raise TimeoutError
    if response.length:
        raise invalid_url(f"'{host}' sent only a part of the file")
    return bytes(data)


def invalid_url(reason: str) -> ApiError:
    """400 for the URL of an image."""
    message = f"The image URL cannot be used: {reason[:MAX_VALUE_LENGTH]}."
    return ApiError(400, message, code="invalid_image_url")
