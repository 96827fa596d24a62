"""The few requests of Google Cloud Storage's and Azure's protocols that a `Storage` makes.

No such server fits into a test, so this one stands in: it shows what is sent where, not what the
real ones do with it.
"""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from typing import TypeVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

MODIFIED = "Tue, 24 Nov 2026 13:00:00 GMT"
# The header of a PUT that must not replace anything -> the status that refuses it.
CREATE_ONLY = {"x-goog-if-generation-match": ("0", 412), "If-None-Match": ("*", 409)}


Server = TypeVar("Server", bound=HTTPServer)


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Answer requests from a thread inside the block."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class ObjectServer(ThreadingHTTPServer):
    """Objects by BUCKET/KEY in memory; `requests` are (method, path, Authorization).

    Only prefixes that begin with `listable` may be listed.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.listable = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ObjectServer

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path).strip("/"), parse_qs(parts.query)
        self.server.requests.append((self.command, path, self.headers["Authorization"]))
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.command == "PUT":
            self._put(path, body)
        elif self.command == "POST":
            self._batch(body.decode())
        elif self.command == "DELETE":
            self._answer(202 if self.server.objects.pop(path, None) is not None else 404)
        elif "/" not in path:
            self._list(path, query.get("prefix", [""])[0])
        elif path in self.server.objects:
            self._get(self.server.objects[path])
        else:
            self._answer(404)

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = _serve

    def _put(self, path: str, body: bytes) -> None:
        for header, (value, refusal) in CREATE_ONLY.items():
            if self.headers[header] == value and path in self.server.objects:
                self._answer(refusal)
                return
        self.server.objects[path] = body
        self._answer(201)

    def _get(self, content: bytes) -> None:
        wanted = self.headers["Range"] or self.headers["x-ms-range"]
        if wanted is None:
            self._answer(200, content)
            return
        begin, end = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
        part = content[begin : end + 1]
        place = f"bytes {begin}-{begin + len(part) - 1}/{len(content)}"
        self._answer(206, part, {"Content-Range": place})

    def _batch(self, body: str) -> None:
        """Azure deletes by a request that holds requests."""
        parts = ""
        for number, line in enumerate(re.findall(r"DELETE (\S+) HTTP", body)):
            path = unquote(urlsplit(line).path).strip("/")
            gone = self.server.objects.pop(path, None) is None
            status = "404 The specified blob does not exist." if gone else "202 Accepted"
            parts += (
                f"--batch\r\nContent-Type: application/http\r\nContent-ID: {number}\r\n\r\n"
                f"HTTP/1.1 {status}\r\nx-ms-error-code: BlobNotFound\r\n\r\n\r\n"
            )
        kind = {"Content-Type": "multipart/mixed; boundary=batch"}
        self._answer(202, f"{parts}--batch--\r\n".encode(), kind)

    def _list(self, bucket: str, prefix: str) -> None:
        if not prefix.startswith(self.server.listable):
            self._answer(403)
            return
        google, azure = "", ""
        for path, content in sorted(self.server.objects.items()):
            key = path.removeprefix(f"{bucket}/")
            if key != path and key.startswith(prefix):
                name, size = escape(key), len(content)
                google += (
                    f"<Contents><Key>{name}</Key><Size>{size}</Size><ETag>e</ETag>"
                    "<LastModified>2026-11-24T13:00:00Z</LastModified></Contents>"
                )
                azure += (
                    f"<Blob><Name>{name}</Name><Properties><Content-Length>{size}</Content-Length>"
                    f"<Last-Modified>{MODIFIED}</Last-Modified><Content-Type/></Properties></Blob>"
                )
        if "restype=container" in self.path:
            text = f"<EnumerationResults><Blobs>{azure}</Blobs><NextMarker/></EnumerationResults>"
        else:
            text = f"<ListBucketResult>{google}</ListBucketResult>"
        self._answer(200, text.encode())

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None):
        self.send_response(status)
        common = {"ETag": '"e"', "Last-Modified": MODIFIED, "Content-Length": str(len(body))}
        for name, value in (common | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        pass
