"""The web server over real sockets: slow heads and bodies, clients that take too much, and what is no HTTP."""

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from connector_fakes import MemoryPublisher

from preservarium.clock import ManualClock
from preservarium.connectors import http
from preservarium.serving import server
from preservarium.serving.rights import Right, needs
from preservarium.settings import Http, LiveSettings, Settings, Web

ONE = b'{"device": "d1", "payload": {"t": 21.5}}'
#: On a loaded machine everything takes longer; nothing here waits for it where all is well.
PATIENCE_S = 20.0


class Site:
    """A running server with the connector on it, and sockets of chosen clients."""

    def __init__(self, **settings: Any) -> None:
        web_settings = {name: settings.pop(name) for name in list(settings) if name in Web.model_fields}
        self.live = LiveSettings(Settings(http=Http(**settings), web=Web(**web_settings)))
        self.publisher = MemoryPublisher()
        application = web.Application()
        application.add_routes(http.routes(self.publisher, self.live, ManualClock(1_700_000_000_000_000)))

        async def fails(request: web.Request) -> web.Response:
            raise ZeroDivisionError(request.path)

        async def moved(_request: web.Request) -> web.Response:
            raise web.HTTPFound("/ingest")

        application.add_routes(
            [web.get("/fails", needs(Right.OPEN, fails)), web.get("/moved", needs(Right.OPEN, moved))]
        )
        self._runner = server.install(application, self.live)
        self.port = 0
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> "Site":
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: Any) -> None:
        for writer in self._writers:
            writer.close()
        await self._runner.cleanup()

    async def open(
        self, data: bytes = b"", client: str = "127.0.0.1"
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(client, 0))
        self._writers.append(writer)
        writer.write(data)
        return reader, writer

    async def say(self, data: bytes, client: str = "127.0.0.1") -> "Answer":
        """Everything that comes back on a connection until it is closed."""
        reader, _ = await self.open(data, client)
        return await answer_of(reader)

    def connections(self) -> int:
        assert self._runner.server is not None
        return len(self._runner.server.connections)


class Answer(SimpleNamespace):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        assert self.headers["content-type"].startswith("application/json"), self
        return json.loads(self.body)


async def answer_of(reader: asyncio.StreamReader) -> Answer:
    """The first answer on a connection; an assertion where it is closed without one."""
    async with asyncio.timeout(PATIENCE_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        return Answer(
            status=int(head[0].split()[1]),
            headers=headers,
            body=await reader.readexactly(int(headers["content-length"])),
        )


async def closed(reader: asyncio.StreamReader) -> None:
    async with asyncio.timeout(PATIENCE_S):
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""


def post(body: bytes = ONE, *more: str, length: int | None = None, path: str = "/ingest") -> bytes:
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        f"Content-Length: {len(body) if length is None else length}",
        *more,
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with Site() as made:
        yield made


# --- slow ---


@pytest.mark.parametrize(
    "begun", [b"", b"P", b"POST /ingest HTTP/1.1\r\n", b"POST /ingest HTTP/1.1\r\nHost: localhost\r\nX-Long: "]
)
async def test_a_head_that_does_not_come_is_given_up(site, monkeypatch, begun):
    monkeypatch.setattr(server, "HEAD_S", 0.2)
    reader, _ = await site.open(begun)
    answer = await answer_of(reader)
    assert (answer.status, answer.json["error"]) == (408, "timeout")
    await closed(reader)


async def test_a_head_that_drips_is_given_up_though_something_always_comes(site, monkeypatch):
    monkeypatch.setattr(server, "HEAD_S", 0.5)
    reader, writer = await site.open(b"POST /ingest HTTP/1.1\r\nHost: localhost\r\nX-Drip: ")
    asked = asyncio.create_task(answer_of(reader))
    while not asked.done():
        writer.write(b"x")
        await asyncio.sleep(0.02)
    assert (await asked).status == 408


async def test_the_head_of_a_further_request_has_a_time_of_its_own(site, monkeypatch):
    monkeypatch.setattr(server, "HEAD_S", 0.3)
    reader, writer = await site.open(post())
    assert (await answer_of(reader)).status == 202
    # A connection at rest is no slow head.
    await asyncio.sleep(0.6)
    writer.write(post())
    assert (await answer_of(reader)).status == 202
    writer.write(b"POST /ing")
    assert (await answer_of(reader)).status == 408
    await closed(reader)


async def test_a_request_under_way_is_not_taken_for_a_slow_head(site, monkeypatch):
    monkeypatch.setattr(server, "HEAD_S", 0.2)
    site.publisher.gate.clear()
    reader, _ = await site.open(post())
    await asyncio.sleep(0.6)
    site.publisher.gate.set()
    assert (await answer_of(reader)).status == 202


async def test_a_body_that_drips_is_given_up_and_nothing_of_it_is_taken(site, monkeypatch):
    monkeypatch.setattr(http, "BODY_TIMEOUT_S", 0.4)
    reader, writer = await site.open(post(length=10_000))
    asked = asyncio.create_task(answer_of(reader))
    while not asked.done():
        writer.write(b"\n")
        await asyncio.sleep(0.02)
    answer = await asked
    assert (answer.status, answer.json["error"]) == (408, "timeout")
    assert site.publisher.sends == []


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_body_that_breaks_off_is_taken_in_no_part(site, framing):
    lines = b"\n".join([ONE] * 400)
    if framing == "length":
        data = post(lines, "Content-Type: application/x-ndjson", length=len(lines) + 1)
    else:
        head = b"POST /ingest HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Type: application/x-ndjson\r\n\r\n"
        data = head + b"%x\r\n" % len(lines) + lines + b"\r\n"
    _reader, writer = await site.open(data)
    await writer.drain()
    writer.close()
    async with asyncio.timeout(PATIENCE_S):
        while site.connections():
            await asyncio.sleep(0.01)
    assert site.publisher.sends == []


# --- one client and the others ---


async def test_one_client_with_slow_bodies_does_not_take_the_places_of_others():
    async with Site(inflight_max=8, client_inflight_max=4) as site:
        readers = [(await site.open(post(length=10_000)))[0] for _ in range(12)]
        refused = [await answer_of(reader) for reader in await first_answers(readers, 8)]
        assert {answer.status for answer in refused} == {429}
        assert "127.0.0.1" in refused[0].json["message"]
        assert refused[0].headers["retry-after"] == "5"
        assert (await site.say(post(ONE, "Connection: close"))).status == 429
        for _ in range(3):
            assert (await site.say(post(ONE, "Connection: close"), client="127.0.0.2")).status == 202
        # What it gives back it may have again.
        for writer in site._writers[:12]:
            writer.close()
        async with asyncio.timeout(PATIENCE_S):
            while (await site.say(post(ONE, "Connection: close"))).status != 202:
                await asyncio.sleep(0.01)


async def first_answers(readers: list[asyncio.StreamReader], count: int) -> list[asyncio.StreamReader]:
    """Those readers that have something to read."""
    async with asyncio.timeout(PATIENCE_S):
        while len(found := [reader for reader in readers if reader._buffer]) < count:  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
    return found


async def test_all_clients_together_have_the_limit_of_all():
    async with Site(inflight_max=3, client_inflight_max=2) as site:
        for client in ("127.0.0.1", "127.0.0.1", "127.0.0.2"):
            await site.open(post(length=10_000), client)
        async with asyncio.timeout(PATIENCE_S):
            while (await site.say(post(ONE, "Connection: close"), client="127.0.0.3")).status != 429:
                await asyncio.sleep(0.01)


async def test_one_client_with_many_connections_does_not_take_those_of_others():
    async with Site(client_connections_max=5) as site:
        for _ in range(5):
            await site.open()
        reader, _ = await site.open()
        answer = await answer_of(reader)
        assert (answer.status, answer.json["error"]) == (429, "too_many_connections")
        await closed(reader)
        assert (await site.say(post(ONE, "Connection: close"), client="127.0.0.2")).status == 202
        site._writers[0].close()
        async with asyncio.timeout(PATIENCE_S):
            while True:
                reader, _ = await site.open(post(ONE, "Connection: close"))
                if (await answer_of(reader)).status == 202:
                    break


async def test_a_thousand_connections_come_and_go_and_none_is_counted_for_ever():
    async with Site(client_connections_max=20) as site:
        for _ in range(50):
            await asyncio.gather(*(site.say(post(ONE, "Connection: close")) for _ in range(20)), return_exceptions=True)
            for writer in site._writers:
                writer.close()
            site._writers.clear()
        runner: Any = site._runner.server
        async with asyncio.timeout(PATIENCE_S):
            while runner.places.total:
                await asyncio.sleep(0.01)


# --- no HTTP, and aiohttp's own refusals ---


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n",
        b"hello\r\n\r\n",
        b"POST /ingest HTTP/1.1\r\nHost: localhost\r\nBad Header: x\r\n\r\n",
        b"POST /ingest HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /ingest HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        b"POST /ingest HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /ingest HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
        b"POST /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /ingest HTTP/9.9\r\nHost: localhost\r\n\r\n",
    ],
    ids=lambda data: repr(data[:60]),
)  # fmt: skip
async def test_what_is_no_http_is_refused_in_json_without_a_word_in_the_log(site, data, caplog, capsys):
    with caplog.at_level(logging.DEBUG):
        answer = await site.say(data)
    assert answer.status in (400, 413, 414, 431, 505)
    assert set(answer.json) == {"error", "message"}
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert capsys.readouterr() == ("", "")


async def test_a_body_that_is_not_chunked_as_it_says_is_refused(site, caplog):
    head = b"POST /ingest HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = await site.say(head + b"zz\r\n{}\r\n0\r\n\r\n")
    assert (answer.status, site.publisher.sends) == (400, [])
    assert answer.json["message"]
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"GET /ingest HTTP/1.1\r\nHost: localhost\r\n\r\n", 405, "method_not_allowed"),
        (b"PUT /ingest HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", 405, "method_not_allowed"),
        (b"OPTIONS /ingest HTTP/1.1\r\nHost: localhost\r\n\r\n", 405, "method_not_allowed"),
        (post(path="/ingest/nobody"), 404, "not_found"),
        (post(path="/ingestion"), 404, "not_found"),
        (post(ONE, "Expect: something"), 417, "expectation_failed"),
        (post(ONE, "Content-Encoding: br"), 415, "unsupported_encoding"),
        (post(b"", length=10_000_000), 413, "too_large"),
        (post(ONE).replace(b"localhost", b"evil.example"), 403, "host_unknown"),
        (post(ONE).replace(b"Host: localhost", b"Host: localhost\r\nHost: evil.example"), 400, "bad_request"),
        (b"GET /fails HTTP/1.1\r\nHost: localhost\r\n\r\n", 500, "internal_server_error"),
    ],
)  # fmt: skip
async def test_every_refusal_is_json_for_programs_and_people(site, data, status, code, caplog, monkeypatch):
    logged = []
    monkeypatch.setattr("preservarium.serving.server.log.error", lambda event, **_: logged.append(event))
    answer = await site.say(data)
    assert (answer.status, answer.json["error"]) == (status, code)
    assert len(answer.json["message"]) > 10
    said = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert (said, logged) == ([], ["web_handler_failed"] if status == 500 else [])
    if status == 405:
        assert answer.headers["allow"] == "POST"


async def test_what_is_no_refusal_stays_as_it_is(site):
    answer = await site.say(b"GET /moved HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (answer.status, answer.headers["location"]) == (302, "/ingest")


async def test_a_request_without_a_host_is_no_browsers(site):
    answer = await site.say(b"POST /ingest HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(ONE) + ONE)
    assert answer.status == 202


async def test_a_sender_that_asks_before_it_sends_is_told_to_go_on(site):
    reader, writer = await site.open(post(b"", "Expect: 100-continue", length=len(ONE)))
    async with asyncio.timeout(PATIENCE_S):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(ONE)
    assert (await answer_of(reader)).status == 202


async def test_requests_one_behind_the_other_are_answered_in_order(site):
    reader, _ = await site.open(post() * 5)
    assert [(await answer_of(reader)).status for _ in range(5)] == [202] * 5


async def test_it_serves_unix_sockets_too(tmp_path):
    live = LiveSettings(Settings())
    application = web.Application()
    application.add_routes(http.routes(MemoryPublisher(), live, ManualClock()))
    runner = server.install(application, live)
    await runner.setup()
    path = str(tmp_path / "s")
    await web.UnixSite(runner, path).start()
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(path)) as client,
            client.post("http://localhost/ingest", data=ONE) as response,
        ):
            assert response.status == 202
    finally:
        await runner.cleanup()


def test_this_machine_has_a_second_loopback_address():
    with socket.socket() as one:
        one.bind(("127.0.0.2", 0))
