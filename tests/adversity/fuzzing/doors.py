"""The HTTP ports of a worker: every route that it serves, behind the real server, and no Kafka behind it."""

import asyncio
import gzip
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple
from unittest.mock import patch
from urllib.parse import quote, urlsplit

import orjson
from aiohttp import web

from fuzzing import samples
from fuzzing.mutate import BYTES_MAX, Mutator, dumped
from fuzzing.run import Broken, Target, worded
from preservarium.connectors import wiring as connectors
from preservarium.connectors.envelopes import FORMATS
from preservarium.console import wiring as console
from preservarium.notices import links
from preservarium.operations.alarm_board import Board
from preservarium.settings import LiveSettings, Settings
from preservarium.streaming.app import App

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

#: Nothing here waits for anything but our own code.
ANSWER_S_MAX: Final = 10.0
#: Of what is no whole request: an answer, if there is one, comes at once.
PART_S: Final = 0.02
_AT: Final = 1_717_243_200_000_000
ALARM: Final = {
    "alarm_id": "a1", "device_id": "d1", "device_name": "Box", "rule": "hot", "pin_position": "-1", "severity": "major", "state": "unacknowledged", "transition": "raised",
    "occurred_at": _AT, "detected_at": _AT, "transition_at": _AT, "value": 31.0, "threshold": 30.0, "unit": "°C", "message": "too hot", "active": True, "shelved_until": None, "cleared_at": None, "component_type": "temp",
}  # fmt: skip
#: Fields of queries, with values that some route takes.
QUERIES: Final = {
    "device": ["d1", "70B3D57ED0000001"], "port": ["2", "255"], "mode": ["LoRaWAN"], "limit": ["5", "200"], "cursor": ["WzEsIjYxIl0", "WyJkMSJd", "WyJ1cmdlbmN5IiwxXQ"], "q": ["temp"], "state": ["standing", "waiting", "cleared", "all", "sent,done", "silent"],
    "series": ["1,2"], "points": ["100"], "order": ["asc", "desc"], "type": ["box"], "code": ["unknown_device"], "stage": ["normalize"],
    "severity": ["major", "minor,critical"], "rule": ["hot"], "sort": ["urgency", "time", "seen", "name"], "has": ["x"], "precision": ["ns", "s", ""], "db": ["machines"], "token": ["WzFd.x.y"], "from": ["2024-06-01T00:00:00Z", "1717243200000000"], "to": ["2024-06-02"], "component_type": ["t"], "bucket": ["1h"],
}  # fmt: skip
#: An answer is waited for as long as these say: no input may make the run wait.
WAITS: Final = ("0", "x", "-1", "nan", "26", "1e999", "")
BULK: Final[list[Any]] = [
    {"action": "acknowledge", "actor": "ann", "alarms": [{"device_id": "d1", "rule": "hot", "pin_position": "-1", "alarm_id": "a1"}], "request_id": "r1"},
    {"action": "shelve", "actor": "ann", "duration_s": 60, "filter": {"state": "standing", "q": "d"}, "seen": "W1swLDFdXQ", "limit": 5},
]  # fmt: skip
HEADERS: Final = {
    b"Accept": [b"*/*", b"application/openmetrics-text"], b"Authorization": [b"Bearer x", b"Basic eDp5"], b"Origin": [b"http://localhost", b"null"], b"Idempotency-Key": [b"k1"], b"If-Modified-Since": [b"x"], b"Range": [b"bytes=0-5"],
    b"X-Forwarded-For": [b"1.2.3.4"], b"Sec-Fetch-Site": [b"same-origin", b"cross-site"], b"Cookie": [b"a=b"], b"Expect": [b"100-continue"],
}  # fmt: skip
TYPES: Final = (b"application/json", b"application/x-ndjson", b"application/json-seq", b"application/octet-stream", b"text/csv", b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=b")  # fmt: skip


class Request(NamedTuple):
    """A request whose framing is right, whatever is in it."""

    method: bytes
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    @property
    def data(self) -> bytes:
        """As it is sent."""
        head = b"%b %b HTTP/1.1\r\n" % (self.method, self.target)
        head += b"".join(b"%b: %b\r\n" % header for header in self.headers)
        return head + b"Content-Length: %d\r\n\r\n" % len(self.body) + self.body


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes


class Worker:
    """A worker's web port on loopback, in an event loop of its own.

    Args:
        dsn: its database; "": one that does not answer.
    """

    def __init__(self, dsn: str = "") -> None:
        settings = Settings(
            web={"link_secret": "a secret of this test", "public_url": "http://localhost"},
            http={"client_inflight_max": 64},
            postgres={"url": dsn or "postgresql://nobody@127.0.0.1:9/none", "connect_timeout_s": 1},
            clickhouse={"enabled": False},
        )
        self.link = urlsplit(str(links.acknowledge_link(ALARM, "ann@example.org", settings))).query
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.port = 0
        self.routes: list[tuple[str, str]] = []
        self._live = LiveSettings(settings)
        self.loop = asyncio.new_event_loop()

    async def open(self) -> None:
        """Serve."""
        app = App(self._live)
        app.publisher.publish = _acknowledged  # type: ignore[method-assign]
        with patch.object(console, "Board", _board):
            console.install(app)
        connectors.install(app)
        app.finalize()
        app.web.init_server()
        application = app.web.web_app
        application.cleanup_ctx.clear()  # the sampling of counters
        self.routes = [(r.method, r.resource.canonical) for r in application.router.routes() if r.resource]
        self._app, self._runner = app, app.web._runner
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        """Serve no more."""
        self._part()
        await self._runner.cleanup()
        for each in reversed(self._app._resources):
            await each.close()

    def _part(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def ask(self, data: bytes, method: bytes) -> Answer:
        """The answer to a whole request."""
        for attempt in range(2):
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self.port)
            reader, writer = self._streams
            try:
                async with asyncio.timeout(ANSWER_S_MAX):
                    writer.write(data)
                    answer = await _answer(reader, method)
            except TimeoutError:
                self._part()
                message = f"no answer within {ANSWER_S_MAX:g} s"
                raise Broken(message) from None
            except (asyncio.IncompleteReadError, ConnectionError):
                # It was kept from a request before, and may have been closed meanwhile; a new one may not.
                self._part()
                if attempt:
                    message = "the connection was cut without an answer"
                    raise Broken(message) from None
                continue
            if answer.headers.get("connection", "").lower() == "close":
                self._part()
            return answer
        raise AssertionError

    async def part(self, data: bytes) -> Answer | None:
        """What is answered to something that may be no request; None: nothing, as more is waited for."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            async with asyncio.timeout(PART_S):
                writer.write(data)
                return await _answer(reader, data[:4])
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            return None
        finally:
            writer.close()


async def _answer(reader: asyncio.StreamReader, method: bytes) -> Answer:
    while True:
        first, *lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin-1").split("\r\n")
        status = int(first.split(" ")[1])
        if status >= 200:
            break  # 100 Continue goes before
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = b""
    if method[:4] != b"HEAD" and status not in (204, 304):
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int(await reader.readuntil(b"\r\n"), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readexactly(2)
        else:
            body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Answer(status, headers, body)


async def _acknowledged(sends: Any) -> dict[str, int]:
    return {}


def _board() -> Board:
    board = Board()
    board.stand(orjson.dumps(["d1", "hot", "-1"]), orjson.dumps(ALARM), (0, 1))
    board.ready.set()
    board.trouble = ""
    return board


def judged(answer: Answer, method: bytes, path: bytes) -> str | None:
    """None where a request was taken, else why not; JSON, but for the page of a link."""
    if answer.status == 500:
        message = f"status 500: {answer.body[:200]!r}"
        raise Broken(message)
    if answer.status < 400:
        return None
    if method == b"HEAD":
        return f"status {answer.status}"
    if path.startswith(b"/ack"):
        return worded(answer.body.decode(), quoting=False) and f"page with status {answer.status}"
    try:
        told = orjson.loads(answer.body)
        if "error" in told:
            reasons = [told["error"], told.get("message")]
        else:
            reasons = told["reasons"] if "reasons" in told else [each["message"] for each in told["refused"]]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message = f"status {answer.status} without a reason in JSON: {answer.body[:200]!r}"
        raise Broken(message) from None
    for reason in reasons:
        if reason is not None:
            worded(reason)
    return str(reasons[0])


def _clean(data: bytes) -> bytes:
    """Without what would end a line of a head."""
    return data.replace(b"\r", b"").replace(b"\n", b"").replace(b"\0", b"")[:4_000]


def _target(m: Mutator, path: str, names: list[str]) -> bytes:
    parts = []
    for part in path.split("/"):
        if part.startswith("{"):
            given = m.one((b"d1", b"hot", b"-1", b"sink", b"device_configs", b"x"))
            part = quote(m.data([given], most=2)[:600], safe="") if m.often(0.6) else given.decode()
        elif m.often(0.01):
            part = quote(m.data([part.encode()])[:600], safe="")
        parts.append(part)
    query = []
    for name in names:
        values = [value.encode() for value in QUERIES.get(name, ["x"])]
        text = (
            m.one(WAITS).encode()
            if name == "wait_s"
            else m.data(values, most=2)[:1_500]
            if m.often(0.6)
            else m.one(values)
        )
        query.append(f"{name}={quote(text, safe='')}")
    return "/".join(parts).encode() + (b"?" + "&".join(query).encode() if query else b"")


def _headers(m: Mutator, content_type: bytes) -> list[tuple[bytes, bytes]]:
    found = [
        (b"Host", b"localhost" if m.often(0.97) else _clean(m.data([b"localhost:6066", b"[::1]:80", b"10.0.0.1"])))
    ]
    if content_type:
        found.append((b"Content-Type", content_type if m.often(0.95) else _clean(m.data([content_type]))))
    while m.often(0.15):
        name = m.one(list(HEADERS))
        value = m.one(HEADERS[name])
        found.append((name, value if name == b"Expect" or m.often(0.5) else _clean(m.data([value]))))
    return found


def _packed(m: Mutator, body: bytes) -> tuple[bytes, bytes]:
    """(encoding, body): packed, and perhaps damaged then."""
    name, pack = m.one((("gzip", gzip.compress), ("deflate", zlib.compress), ("zstd", zstd.compress)))
    packed = pack(body)
    return name.encode(), m.data([packed], most=2) if m.often(0.5) else packed


class Doors:
    """The targets of one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def targets(self) -> list[Target]:
        """All of them."""
        return [
            Target("HTTP ingest", 50_000, self._ingest, self._whole),
            Target("HTTP every route", 50_000, self._route, self._whole),
            Target("HTTP heads", 2_000, self._head, self._parts),
        ]

    def _ingest(self, m: Mutator) -> Request:
        path = "/ingest" if m.often(0.7) else f"/ingest/{m.one(list(FORMATS))}"
        names = m.one(([], [], ["device"], ["device", "port"], ["device", "mode"])) if path == "/ingest" else []
        trees = samples.EVENTS if path != "/ingest" else [*samples.ENVELOPES, *samples.EVENTS, {"t": 1}]
        content_type = m.one(TYPES)
        if m.often(0.1):
            lines = [sample.payload for sample in samples.payloads()["influx"]]
            path, names, body = (
                m.one(("/write", "/api/v2/write")),
                ["precision"],
                m.data([*lines, b"cpu,host=a v=1 1717243200000000000\n"]),
            )
        elif content_type in TYPES[1:3]:
            joined = b"\n".join(m.json(trees) for _ in range(1 + int(m.rng.random() * 3)))
            body = b"\x1e" + joined.replace(b"\n", b"\n\x1e") + b"\n" if content_type == TYPES[2] else joined
        else:
            body = m.json(trees) if m.often(0.8) else m.data([b"\1\2\3", b"t,h\n1,2\n", *map(dumped, trees)])
        headers = _headers(m, content_type)
        if m.often(0.15):
            encoding, body = _packed(m, body)
            headers.append((b"Content-Encoding", encoding if m.often(0.95) else _clean(m.data([b"gzip, gzip", b"br"]))))
        return Request(b"POST", _target(m, path, names), tuple(headers), body[:BYTES_MAX])

    def _route(self, m: Mutator) -> Request:
        method, path = m.one(self._worker.routes)
        method = {"*": "GET"}.get(method, method)
        names = [m.one([*QUERIES, "wait_s"]) for _ in range(int(m.rng.random() * 4))]
        if path.endswith(("/ack", "/actions/{action_id}", "/ingest/commands")):
            names = [n for n in names if n != "wait_s"] + ["wait_s"]
        target = _target(m, path, names)
        content_type, body = b"", b""
        if path == "/ack":
            token = self._worker.link if m.often(0.3) else m.text([self._worker.link], most=1)
            if method == "GET":
                target = (
                    b"/ack?"
                    + (token if token.isascii() and token.isprintable() and " " not in token else quote(token)).encode()
                )
            else:
                content_type, body = TYPES[6], (token + "&comment=seen").encode()
        elif method == "POST":
            content_type = TYPES[0] if m.often(0.95) else m.one(TYPES)
            trees = (
                BULK
                if "bulk" in path
                else samples.ACTIONS
                if "actions" in path
                else [*samples.COMMANDS[:1], *samples.COMMANDS[3:5], {"command": "x", "payload": 5}]
            )
            body = m.json(
                [{k: v for k, v in tree.items() if k not in ("at", "device_id") or "alarms" in path} for tree in trees]
            )
            if b"wait_s" in body:
                body = body.replace(b"wait_s", b"wait_")
        if m.often(0.02):
            method = m.one(("HEAD", "PUT", "DELETE", "OPTIONS", "BREW"))
        return Request(method.encode(), target, tuple(_headers(m, content_type)), body)

    def _head(self, m: Mutator) -> bytes:
        return m.data([*samples.HEADS, self._route(m).data, self._ingest(m).data])

    def _whole(self, request: Request) -> str | None:
        answer = self._worker.loop.run_until_complete(self._worker.ask(request.data, request.method))
        return judged(answer, request.method, request.target)

    def _parts(self, data: bytes) -> str | None:
        answer = self._worker.loop.run_until_complete(self._worker.part(data))
        return (
            "no answer: it waits for the rest"
            if answer is None
            else judged(answer, data[:4], b"".join(data.split(b" ", 2)[1:2]))
        )


@contextmanager
def doors(dsn: str = "") -> Iterator[Doors]:
    """A worker's ports, for as long as the block lasts."""
    worker = Worker(dsn)
    try:
        worker.loop.run_until_complete(worker.open())
        with patch("preservarium.console.operators.LINK_WAIT_S", 0.0):
            yield Doors(worker)
        worker.loop.run_until_complete(worker.close())
    finally:
        worker.loop.close()
