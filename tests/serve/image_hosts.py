"""Hosts of images on the loopback interface, which a fake network declares public."""

import socket
import threading
from contextlib import contextmanager

from owl2.serve.image_fetch import PublicNetwork

PUBLIC, OTHER = "93.184.216.34", "1.1.1.1"
FILE = b"an image's file" * 100


class FakeNetwork(PublicNetwork):
    """Resolves names as the test defines; every connection leads to one local port, without TLS.

    Attributes:
        names: Addresses by host, or a list of addresses for each lookup.
        resolved, connected, secured: Names, (address, port) pairs and TLS hosts so far.
    """

    def __init__(self, port, use_tls=False, **names):
        self.port, self.use_tls = port, use_tls
        self.names = {"good.test": [PUBLIC], **names}
        self.resolved, self.connected, self.secured = [], [], []

    async def resolve(self, host):
        self.resolved.append(host)
        found = self.names[host]
        return found.pop(0) if isinstance(found[0], list) else found

    async def connect(self, address, port):
        self.connected.append((address, port))
        stream = await super().connect("127.0.0.1", self.port)

        async def start_tls(ssl_context, server_hostname, timeout=None):
            self.secured.append(server_hostname)
            return stream

        if not self.use_tls:
            stream.start_tls = start_tls
        return stream


@contextmanager
def run_host(*replies, wrap=lambda connection: connection):
    """A host that sends one of `replies` on each connection: bytes, or a function of the
    connection. Yields its port and the requests that it received."""
    listener = socket.create_server(("127.0.0.1", 0))
    requests = []

    def work():
        for reply in replies:
            try:
                connection = wrap(listener.accept()[0])
            except OSError:  # the test has ended, or the TLS handshake failed
                continue
            with connection:
                requests.append(connection.recv(10_000).decode())
                try:
                    reply(connection) if callable(reply) else connection.sendall(reply)
                except OSError:  # the client has closed the connection
                    continue

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], requests
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def http_reply(status="200 OK", body=FILE, **headers):
    headers = {"Content-Length": len(body)} | {k.replace("_", "-"): v for k, v in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


def redirect(url, status="302 Found"):
    return http_reply(status, b"", Location=url)
