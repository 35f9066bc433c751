"""The hosts and the origins that a server accepts.

A web page in a browser can send requests to a server that only its visitor can reach. Two headers,
which the page cannot set, reveal this:

- `Host` is the name in the URL. A name of another site that resolves to this machine (DNS
  rebinding) makes the browser treat the answers as those of that site.
- `Origin` is the site of the page that sends the request, and `Sec-Fetch-Site` its relation to the
  host.
"""

import ipaddress
import re
from collections.abc import Collection, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from owl2.errors import ErrorCode, InputError
from owl2.serve.errors import ApiError

ANY = "*"
# What a container calls this machine. These names do not exist in the public DNS.
CONTAINER_HOSTS = ("host.docker.internal", "host.containers.internal")
DEFAULT_PORTS = {"http": 80, "https": 443}


def parse_hosts(option: str) -> list[str]:
    """Parse `--allowed-hosts`: names without a port, separated by commas.

    `*.example.com` stands for all names below example.com, `*` for any host.

    Raises:
        InputError: A name contains a scheme, a port or a path.
    """
    hosts = [host.strip().lower() for host in option.split(",") if host.strip()]
    for host in hosts:
        if host != ANY and not re.fullmatch(r"(\*\.)?[\w.-]+|\[[0-9a-f:.]+\]", host):
            raise InputError(
                f"--allowed-hosts: '{host}' is not a host name. Use names without a scheme and a "
                "port, such as example.com or *.example.com.",
                ErrorCode.INVALID_VALUE,
            )
    return hosts


def parse_origins(option: str) -> list[str]:
    """Parse `--allowed-origins`: origins such as `https://example.com`, separated by commas.

    Raises:
        InputError: An origin has no scheme, or has a path.
    """
    origins = [origin.strip() for origin in option.split(",") if origin.strip()]
    for origin in origins:
        is_valid = re.fullmatch(r"[a-z][a-z0-9+.-]*://([^/\s]+/?)?", origin, re.IGNORECASE)
        if origin not in (ANY, "null") and not is_valid:
            raise InputError(
                f"--allowed-origins: '{origin}' is not an origin. Use SCHEME://HOST or "
                "SCHEME://HOST:PORT, such as https://example.com.",
                ErrorCode.INVALID_VALUE,
            )
    # "file://" has no host.
    return [re.sub(r"(?<!:/)/$", "", origin.lower()) for origin in origins]


def check_host(headers: Headers, allowed_hosts: Collection[str] | None) -> None:
    """Check the header `Host`.

    Args:
        allowed_hosts: As from `parse_hosts`, in addition to localhost, `CONTAINER_HOSTS` and
            addresses, which DNS cannot redirect. None: any host.

    Raises:
        ApiError: 403.
    """
    header = headers.get("host")
    if allowed_hosts is None or header is None:  # a browser always sends it
        return
    host = _host_name(header)
    if ANY in allowed_hosts or _is_safe(host) or _is_listed(host, allowed_hosts):
        return
    raise ApiError(
        403,
        f"This server does not accept requests for the host '{host}'. Start it with "
        "--allowed-hosts to accept other names than localhost.",
        code="host_not_allowed",
    )


def forwarded_host(headers: Headers, allowed_hosts: Collection[str] | None) -> str | None:
    """The header `X-Forwarded-Host`, if `allowed_hosts` lists its name; otherwise None.

    Clients can send this header, and it becomes a part of redirects.
    """
    header = headers.get("x-forwarded-host", "")
    return header if _is_listed(_host_name(header), allowed_hosts or ()) else None


def check_origin(headers: Headers, allowed_origins: Collection[str] = ()) -> None:
    """Check that a request does not come from the page of another site.

    Requests of programs have neither `Origin` nor `Sec-Fetch-Site` and are accepted.

    Args:
        allowed_origins: As from `parse_origins`.

    Raises:
        ApiError: 403.
    """
    origin = headers.get("origin")
    if origin is None:
        if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            return
    elif ANY in allowed_origins or origin in allowed_origins:
        return
    else:
        scheme = origin.partition(":")[0]
        site = _host_and_port(origin)
        if site[0] and site == _host_and_port(f"{scheme}://{headers.get('host', '')}"):
            return
    raise ApiError(
        403,
        f"This server does not accept requests from other websites ('{origin or 'unknown'}'). "
        "Start it with --allowed-origins to accept them.",
        code="origin_not_allowed",
    )


def client_network(client: Sequence[Any] | None) -> str:
    """The name of a client in quotas and queues: its address, or for IPv6 its network.

    Args:
        client: The address and the port; None for a UNIX socket.
    """
    host = str(client[0]) if client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    return str(ipaddress.IPv6Network((address.packed, 64), strict=False))


def _host_name(header: str) -> str:
    is_valid = re.fullmatch(r"[\w.:\[\]-]+", header)
    return _host_and_port(f"//{header}")[0] if is_valid else ""


def _is_listed(host: str, allowed_hosts: Collection[str]) -> bool:
    return (
        host in allowed_hosts
        or f"[{host}]" in allowed_hosts
        or any(name.startswith("*.") and host.endswith(name[1:]) for name in allowed_hosts)
    )


def _host_and_port(url: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(url)
        return parts.hostname or "", parts.port or DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        return "", None


def _is_safe(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host in ("localhost", *CONTAINER_HOSTS) or host.endswith(".localhost")
    return True
