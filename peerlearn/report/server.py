"""The board's server: on this machine's loopback address alone, and to be read alone.

    GET, HEAD   /                         overview of all runs and studies
                /runs.csv                 the same as CSV
                /run/NAME                 page of a run
                /run/NAME/log             end of its newest log
                /run/NAME/metrics.csv     its metrics
                /study/NAME               page of a study

NAME is the path of a run below the folder. It is looked up among the runs that were found, and becomes no path.
All else is 404, and another method 405. `peerlearn.report.admission` tells who is refused. Each connection has one
request.
"""

import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes, urlsplit

from peerlearn.errors import UserError
from peerlearn.report.admission import Door
from peerlearn.report.answers import Answer, whole
from peerlearn.runs.text import printable

LOOPBACK = "127.0.0.1"
# For a tunnel it is good to know the port before.
USUAL_PORTS = range(8777, 8797)
# A client that sends nothing, or takes nothing, for so long is left.
_PATIENCE_SECONDS = 10.0
# Threads; where one more client comes, the one that waits for longest is left.
_MOST_CONNECTIONS = 32
_PIECE_BYTES = 2**16
_METHODS = ("GET", "HEAD")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Connection": "close",
}

logger = logging.getLogger(__name__)


class BoardServer(ThreadingHTTPServer):
    """Answers each connection in a thread of its own, which does not outlive the process."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, door: Door, answer: Callable[[str], Answer | None]) -> None:
        """Take a port.

        Args:
            port: port of the loopback address; 0 = a free one.
            door: who may read.
            answer: gives the answer to a path; None = there is nothing.

        Raises:
            OSError: the port is taken.
        """
        self.door = door
        self.answer = answer
        # The oldest first; whether its request has come.
        self._connections: dict[socket.socket, bool] = {}
        self._guard = threading.Lock()
        super().__init__((LOOPBACK, port), _Handler)

    @property
    def port(self) -> int:
        """The port that it has."""
        return int(self.server_address[1])

    def server_bind(self) -> None:
        """Bind without asking for the name of the address, which may take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = LOOPBACK, self.port

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection; where there are too many, leave one that has sent no request, or the oldest."""
        with self._guard:
            if len(self._connections) >= _MOST_CONNECTIONS:
                silent = (each for each, has_come in self._connections.items() if not has_come)
                left = next(silent, next(iter(self._connections)))
                del self._connections[left]
                with contextlib.suppress(OSError):
                    left.shutdown(socket.SHUT_RDWR)
            self._connections[request] = False
        super().process_request(request, client_address)

    def request_has_come(self, request: socket.socket) -> None:
        """Note that a client has sent its request."""
        with self._guard:
            if request in self._connections:
                self._connections[request] = True

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        with self._guard:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what is wrong with the board; nothing of clients that have gone."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            logger.warning("an answer failed: %r", error)


class _Handler(BaseHTTPRequestHandler):
    server: BoardServer
    timeout = _PATIENCE_SECONDS
    protocol_version = "HTTP/1.1"

    def parse_request(self) -> bool:
        """Read the request, and answer one that no path could be answered for."""
        self.close_connection = True
        if not super().parse_request():
            return False
        self.close_connection = True
        if self.command not in _METHODS:
            self._send(whole("405: the board is read alone\n", status=405))
            return False
        return True

    def do_GET(self) -> None:
        """Answer."""
        self.server.request_has_come(self.connection)
        try:
            target = urlsplit(self.path)
            if target.scheme or target.netloc:
                raise ValueError("a path is asked for")
            query = dict(parse_qsl(target.query, max_num_fields=8))
        except ValueError:
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        refusal = self.server.door.refusal(target.path, query, self.headers)
        self._send(refusal or self._answer(os.fsdecode(unquote_to_bytes(target.path))))

    def _answer(self, path: str) -> Answer:
        try:
            answer = self.server.answer(path)
        except UserError as error:
            return whole(f"503: {printable(str(error))}\n", status=503)
        except Exception as error:
            logger.warning("an answer failed: %r", error)
            return whole("500: the board has failed; it has said why where it runs\n", status=500)
        return answer or whole("404: there is no such page\n", status=404)

    do_HEAD = do_GET  # noqa: N815

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that cannot be read."""
        self._send(whole(f"{code:d}: {HTTPStatus(code).phrase}\n", status=code))

    def version_string(self) -> str:
        """Without the version of Python."""
        return "peerlearn"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a page asks every few seconds."""

    def _send(self, answer: Answer) -> None:
        # Of a request that cannot be read there are none.
        headers = self.headers if hasattr(self, "headers") else Message()
        is_known = bool(answer.etag) and headers.get("If-None-Match") == answer.etag
        zips = answer.zipped is not None and "gzip" in headers.get("Accept-Encoding", "")
        size = len(answer.zipped or b"") if zips else answer.size
        is_chunked = size is None and self.request_version == self.protocol_version
        self.send_response(HTTPStatus.NOT_MODIFIED if is_known else answer.status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{answer.kind}; charset=utf-8")
        self.send_header("Content-Security-Policy", f"{answer.policy}; frame-ancestors 'none'")
        if answer.etag:
            self.send_header("ETag", answer.etag)
        if answer.cookie:
            self.send_header("Set-Cookie", answer.cookie)
        if answer.status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", ", ".join(_METHODS))
        if zips and not is_known:
            self.send_header("Content-Encoding", "gzip")
        if is_chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif not is_known and size is not None:
            self.send_header("Content-Length", str(size))
        self.end_headers()
        if is_known or self.command == "HEAD":
            return
        for piece in (answer.zipped or b"",) if zips else answer.pieces:
            self._write(piece, is_chunked=is_chunked)
        if is_chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _write(self, content: bytes, *, is_chunked: bool) -> None:
        # The patience is for each write, and a line may be slow.
        for start in range(0, len(content), _PIECE_BYTES):
            piece = content[start : start + _PIECE_BYTES]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
