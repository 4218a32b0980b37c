"""An HTTP proxy on loopback that stands before a store and misbehaves on demand.

It passes requests on as they are (signatures cover the Host header, which stays the client's), remembers them, and
breaks those that a rule names:

    proxy.inject(Fault.CUT, method="GET", path="shard-000", times=2)
"""

import http.client
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit


class Fault(Enum):
    """What can happen to a request on its way."""

    CUT = auto()  # the answer's head and half of its body, then the end of the connection
    SHORT = auto()  # half of the body, with a Content-Length that agrees
    WRONG_BYTES = auto()  # one byte in the middle of the body has another value
    UNAVAILABLE = auto()  # 503 SlowDown; the store never hears of the request
    INTERNAL = auto()  # 500 InternalError
    RESET = auto()  # the connection ends without an answer; the store never hears of the request
    LOST_ANSWER = auto()  # the store does what it was asked, and the connection ends without an answer
    STALL = auto()  # half of the body and then nothing, until the client gives up


@dataclass(frozen=True)
class Request:
    """A request as it came: method, path with query, Range header, and the bytes of body sent back."""

    method: str
    path: str
    range: str | None
    sent: int
    fault: Fault | None


@dataclass
class Rule:
    fault: Fault
    method: str
    path: str
    after: int
    times: int


class FaultyProxy:
    """`endpoint` stands for the store at `target`; a context manager. `requests` holds what has come, in order, and
    `connections` counts the clients' connections."""

    def __init__(self, target: str, max_stall_s: float = 60.0) -> None:
        parts = urlsplit(target)
        self.target = (parts.hostname, parts.port)
        self.max_stall_s = max_stall_s
        self.requests: list[Request] = []
        self.connections = 0
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def inject(self, fault: Fault, *, method: str = "GET", path: str = "", times: int = 1, after: int = 0) -> None:
        """The next `times` requests of a method whose path contains `path` meet a fault; `after` pass before."""
        with self._lock:
            self._rules.append(Rule(fault, method, path, after, times))

    def heal(self) -> None:
        """Forgets all faults that are still to come."""
        with self._lock:
            self._rules.clear()

    def faults_met(self) -> list[Fault]:
        """The faults that requests have met, in order."""
        return [request.fault for request in self.requests if request.fault]

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for rule in self._rules:
                if rule.method == method and rule.path in path and rule.times > 0:
                    if rule.after > 0:
                        rule.after -= 1
                        continue
                    rule.times -= 1
                    return rule.fault
        return None

    def refuse(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes] | None:
        """(status, XML) where the store is to refuse a request by its nature; see tests/picky_store.py."""
        return None

    def answer_instead(self, status: int) -> tuple[int, bytes] | None:
        """(status, body) that takes the place of the store's answer with a status."""
        return None

    def stall(self, handler: "_Handler") -> None:
        """Holds a connection until the client leaves it, or the proxy ends."""
        handler.connection.settimeout(0.1)
        deadline = time.monotonic() + self.max_stall_s
        while not self._closing.is_set() and time.monotonic() < deadline:
            try:
                if not handler.connection.recv(1):
                    return
            except TimeoutError:
                continue
            except OSError:
                return

    def __enter__(self) -> "FaultyProxy":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave are what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: FaultyProxy

    def setup(self) -> None:
        super().setup()
        self.owner.connections += 1

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        refused = self.owner.refuse(self.command, self.path, self.headers, body)
        if refused is not None:
            self._answer(*refused)
            return
        fault = self.owner.fault_for(self.command, self.path)
        if fault in (Fault.UNAVAILABLE, Fault.INTERNAL):
            self._refuse(fault)
            return
        if fault is Fault.RESET:
            self._note(fault, 0)
            self._leave()
            return
        try:
            answer, content = self._ask_the_store(body)
        except OSError:  # the store is down: so is the way to it
            self._note(fault, 0)
            self._leave()
            return
        if fault is Fault.LOST_ANSWER:
            self._note(fault, 0)
            self._leave()
            return
        instead = self.owner.answer_instead(answer.status)
        if instead is not None:
            self._answer(*instead)
            return
        self._send(answer, content, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on  # http.server's names

    def _ask_the_store(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        store = http.client.HTTPConnection(*self.owner.target, timeout=60)
        try:
            store.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    store.putheader(name, value)
            store.endheaders(body or None)
            answer = store.getresponse()
            return answer, answer.read()
        finally:
            store.close()

    def _send(self, answer: http.client.HTTPResponse, content: bytes, fault: Fault | None) -> None:
        half = content[: len(content) // 2]
        if fault is Fault.SHORT:
            content = half
        elif fault is Fault.WRONG_BYTES and content:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]
        length = answer.headers.get("Content-Length") if self.command == "HEAD" else len(content)
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        broken = fault in (Fault.CUT, Fault.STALL)
        sent = half if broken else content
        self._note(fault, len(sent))
        if self.command != "HEAD":
            self.wfile.write(sent)
        if fault is Fault.STALL:
            self.owner.stall(self)
        if broken:
            self._leave()

    def _refuse(self, fault: Fault) -> None:
        status, code = (503, "SlowDown") if fault is Fault.UNAVAILABLE else (500, "InternalError")
        content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        self._answer(status, content, fault)

    def _answer(self, status: int, content: bytes, fault: Fault | None = None) -> None:
        self._note(fault, len(content))
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _note(self, fault: Fault | None, sent: int) -> None:
        self.owner.requests.append(Request(self.command, self.path, self.headers.get("Range"), sent, fault))

    def _leave(self) -> None:
        self.close_connection = True
