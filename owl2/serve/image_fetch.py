"""Images and videos from URLs, protected against server-side request forgery (SSRF).

::

    URL ──check──► host ──resolve once──► addresses, all public? ──connect to that address──► reply
     ▲                                                                                  │
     └──────────────────────────────── redirect ◄───────────────────────────────────────┘

The address of a name can change after the check, and a reply can redirect to any URL. Therefore the
connection goes to the address that was checked, and every redirect is checked like the first URL.
Proxies from the environment are not used, because they would resolve names again.
"""

import asyncio
import ipaddress
import socket
import ssl
import urllib.parse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import httpcore

from owl2.serve.admission import current_client
from owl2.serve.config import ServerLimits
from owl2.serve.errors import MAX_VALUE_LENGTH, ApiError
from owl2.serve.fair_slots import FairSlots, run_with_slots

MAX_URL_LENGTH = 4096
PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)

_UNICAST = ipaddress.ip_network("2000::/3")  # the allocated part of IPv6
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses in IPv6-only networks (RFC 6052)
# In addition to `ipaddress.is_global`, which differs between versions: protocol assignments
# (RFC 6890; metadata of one cloud), 6to4 relays (RFC 7526), the newer addresses of documentation
# (RFC 9637), and the host of Azure's machines, see
# https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16
_BLOCKED = [
    ipaddress.ip_network(net)
    for net in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "3fff::/20")
]

# A lookup has no timeout. Slow ones must not occupy the threads of other work, and those of one
# client must not delay others.
MAX_LOOKUPS, MAX_LOOKUPS_PER_CLIENT = 64, 8
_resolvers = ThreadPoolExecutor(MAX_LOOKUPS, "owl2-dns")
_ssl_context = cache(ssl.create_default_context)


class PublicNetwork(httpcore.AnyIOBackend):
    """Connections to hosts whose addresses are all public."""

    def __init__(self) -> None:
        super().__init__()
        self._lookups = FairSlots(MAX_LOOKUPS, MAX_LOOKUPS_PER_CLIENT)

    async def resolve(self, host: str) -> list[str]:
        """The addresses of a name. Raises `OSError`."""
        found = await run_with_slots(
            [self._lookups],
            (current_client.get(),),
            _resolvers,
            partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM),
        )
        return [str(entry[4][0]) for entry in found]

    async def connect(self, address: str, port: int) -> httpcore.AsyncNetworkStream:
        """A connection to an address."""
        return await super().connect_tcp(address, port)

    async def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> Any:
        """Called by httpcore with the host of the URL; its timeouts and options are not used."""
        addresses = await self.resolve(host)
        if not addresses or not all(map(is_public, addresses)):
            raise invalid_url(f"'{host}' is not a public host")
        return await self.connect(addresses[0], port)


async def fetch_image(
    url: str,
    max_bytes: int,
    limits: ServerLimits,
    network: PublicNetwork,
    on_received: Callable[[int], object],
) -> bytes:
    """The file at an http(s) URL.

    Args:
        max_bytes: Of the file.
        on_received: Called with the size of each part of the file. Its errors end the download.

    Raises:
        ApiError: 400: the URL is not allowed or cannot be reached, or its file is too large, too
            slow or redirected too often.
    """
    target = _parse(url)
    try:
        async with asyncio.timeout(limits.image_fetch_timeout):
            for _ in range(limits.max_image_redirects + 1):
                found = await _request(target, max_bytes, network, on_received)
                if isinstance(found, bytes):
                    return found
                target = _parse(found)
    except TimeoutError as error:
        raise invalid_url(f"'{_host(target)}' did not send it in time") from error
    except (OSError, httpcore.NetworkError, httpcore.ProtocolError) as error:
        raise invalid_url(f"'{_host(target)}' cannot be reached") from error
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


def _host(target: httpcore.URL) -> str:
    return target.host.decode("ascii")


def _parse(url: str) -> httpcore.URL:
    # Parsers disagree about these characters, so that another one could connect to another host.
    if len(url) > MAX_URL_LENGTH or any(char <= " " or char in "\\\x7f" for char in url):
        raise invalid_url("it is too long, or contains spaces or control characters")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna")
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
    return httpcore.URL(scheme=parts.scheme, host=host, target=path)


async def _request(
    target: httpcore.URL,
    max_bytes: int,
    network: PublicNetwork,
    on_received: Callable[[int], object],
) -> bytes | str:
    """The file at a URL, or the URL that it is redirected to."""
    host = _host(target)
    authority = f"[{host}]" if ":" in host else host
    headers = [("Host", authority), ("User-Agent", "owl2"), ("Accept", "image/*, video/*")]
    headers += [("Accept-Encoding", "identity"), ("Connection", "close")]
    async with (
        httpcore.AsyncConnectionPool(_ssl_context(), network_backend=network) as pool,
        pool.stream("GET", target, headers=headers) as response,
    ):
        if response.status in REDIRECTS:
            fields = {name.lower(): value for name, value in response.headers}
            location = fields.get(b"location", b"").decode("latin-1")
            base = f"{target.scheme.decode()}://{authority}{target.target.decode()}"
            try:
                return urllib.parse.urljoin(base, location)
            except ValueError as error:
                raise invalid_url("it is redirected to an invalid URL") from error
        if response.status != 200:
            raise invalid_url(f"'{host}' responds with status {response.status}")
        data = bytearray()
        async for chunk in response.aiter_stream():
            data += chunk
            on_received(len(chunk))
            if len(data) > max_bytes:
                raise ApiError(
                    400,
                    f"The image is larger than the limit of this server, {max_bytes:,} bytes.",
                    code="image_too_large",
                )
    return bytes(data)


def invalid_url(reason: str) -> ApiError:
    """400 for the URL of an image."""
    message = f"The image URL cannot be used: {reason[:MAX_VALUE_LENGTH]}."
    return ApiError(400, message, code="invalid_image_url")
