"""A proxy on loopback in front of an S3 server that spoils some of its answers.

It forwards requests byte for byte, the Host header that the signature covers included, and reads
whole answers (by Content-Length, as the server gives it for objects) before it passes them on.
"""

from __future__ import annotations

import random
import re
import socket
import socketserver
import threading
import urllib.parse
from collections import Counter

FAULTS = ("slow_down", "reset", "truncate", "flip", "stall", "trickle")
STALL_S = 5.0
TRICKLE_S = 0.05  # a byte


def _error(status: str, code: str) -> bytes:
    body = f"<Error><Code>{code}</Code></Error>"
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


ERRORS = {
    "slow_down": _error("503 Slow Down", "SlowDown"),
    "denied": _error("403 Forbidden", "AccessDenied"),
}


class FaultyProxy:
    """Serves at `endpoint`; as a context manager, so that it ends with all its connections.

    The next reads of Arrow files are spoiled by the faults in `planned`, in order; then `share` of
    the ranged ones, each by one of `faults`, drawn from `seed`. `served` counts the answers by what
    happened to them ("whole" or the fault).
    """

    def __init__(
        self, upstream: str, *, share: float = 0.0, faults: tuple[str, ...] = FAULTS, seed: int = 0
    ) -> None:
        target = urllib.parse.urlsplit(upstream)
        self.upstream = target.hostname, target.port
        self.share, self.faults = share, faults
        self.planned: list[str] = []
        self.served: Counter[str] = Counter()
        self.closing = threading.Event()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Connection)
        self._server.proxy = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def draw(self, request: bytes) -> str:
        """What happens to the answer to `request`."""
        fate = "whole"
        with self._lock:
            if self.planned and re.match(rb"GET \S+\.arrow[ ?]", request):
                fate = self.planned.pop(0)
            elif b"\r\nrange:" in request.lower() and self._random.random() < self.share:
                fate = self._random.choice(self.faults)
            self.served[fate] += 1
            return fate


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = False
    block_on_close = True
    request_queue_size = 128
    proxy: FaultyProxy


class _Connection(socketserver.BaseRequestHandler):
    """One client connection and its own connection to the server."""

    def handle(self) -> None:
        proxy: FaultyProxy = self.server.proxy
        self.request.settimeout(0.1)
        with socket.create_connection(proxy.upstream) as server:
            try:
                while request := self._request(proxy):
                    server.sendall(request)
                    head, body = _message(server, has_body=not request.startswith(b"HEAD "))
                    if not self._answer(proxy.draw(request), head, body):
                        return
            except (BrokenPipeError, ConnectionResetError):
                return  # the client gave up

    def _request(self, proxy: FaultyProxy) -> bytes:
        """The next request, which has no body; empty at the end."""
        data = b""
        while not data.endswith(b"\r\n\r\n"):
            try:
                part = self.request.recv(65536)
            except TimeoutError:
                if proxy.closing.is_set():
                    return b""
                continue
            if not part:
                return b""
            data += part
        return data

    def _answer(self, fate: str, head: bytes, body: bytes) -> bool:
        """Pass an answer on or spoil it; False when the connection is over."""
        closing = self.server.proxy.closing
        if fate in ERRORS:
            self._send(ERRORS[fate])
            return True
        if fate == "reset":
            # Linger 0 makes close a reset.
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.request.close()
            return False
        if fate == "truncate":
            self._send(head + body[: len(body) // 2])
            return False
        if fate == "stall":
            self._send(head + body[: len(body) // 2])
            closing.wait(STALL_S)
            return False
        if fate == "trickle":
            for byte in head + body:
                if closing.wait(TRICKLE_S):
                    return False
                self._send(bytes([byte]))
            return True
        if fate == "flip":
            place = len(body) // 3
            body = body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
        self._send(head + body)
        return True

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self.request.send(view) :]
            except TimeoutError:
                if self.server.proxy.closing.is_set():
                    raise BrokenPipeError from None


def _message(server: socket.socket, has_body: bool) -> tuple[bytes, bytes]:
    """Head and body of one answer."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _receive(server)
    head, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.split(b":", 1) for line in head.lower().split(b"\r\n")[1:])
    length = int(fields.get(b"content-length", b"0")) if has_body else 0
    while len(body) < length:
        body += _receive(server)
    return head + b"\r\n\r\n", body


def _receive(server: socket.socket) -> bytes:
    part = server.recv(1 << 20)
    if not part:
        raise ConnectionResetError("the server closed its connection")
    return part
