"""The web server: aiohttp's, with deadlines, limits of a client, and refusals as JSON for programs and people.

Bodies are left packed (bodies.py), and a head must come within a time. A client has a share of the connections, so that it cannot
take all of them. A request that is not for us (hosts.py) comes to no handler, neither one of ours nor one of Faust's.
"""

import resource
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final

import orjson
import structlog
from aiohttp import hdrs, http_exceptions, web

from preservarium.serving import bodies, hosts
from preservarium.serving.clients import Places, client_of
from preservarium.serving.rights import Right, right_of
from preservarium.settings import LiveSettings

log = structlog.get_logger(__name__)

#: From the connection, or the first byte of a further request, to the end of the head. A head has some hundred bytes.
HEAD_S: Final = 10.0
#: A connection without a request is kept for so long: longer than proxies keep theirs (60 s), which must not find it closed.
KEEPALIVE_S: Final = 75.0
#: Connections of all clients: a thousand devices may wait for their commands. Never more than half of the files that the
#: process may open: the other half are Kafka's, the databases' and the tables'.
CONNECTIONS_MAX: Final = 2_048
#: A client over its limit is told of in the log, but not for each connection.
TOLD_EVERY_S: Final = 60.0

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def refusal(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> web.Response:
    """A refusal: a code for programs, a text for people."""
    body = orjson.dumps({"error": code, "message": message})
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)


def install(application: web.Application, live: LiveSettings, *, bound: str | None = None) -> "Runner":
    """Put the door before an application that has not started; what runs it.

    Args:
        application: it gets a middleware.
        live: settings.
        bound: address that is bound, where it is not `web.host`.
    """

    @web.middleware
    async def door(request: web.Request, handler: _Handler) -> web.StreamResponse:
        settings = live().web if bound is None else live().web.model_copy(update={"host": bound})
        if why := hosts.misaddressed(request, settings):
            return refusal(403, "host_unknown", why)
        # Senders' handlers read bodies themselves; nobody else is sent a packed one.
        if hdrs.CONTENT_ENCODING in request.headers and right_of(request.match_info.handler) is not Right.SENDER:
            try:
                if bodies.encoding_of(request) != "identity":
                    return refusal(415, "unsupported_encoding", "send the body as it is, without Content-Encoding")
            except bodies.BodyRefused as e:
                return refusal(e.status, e.code, str(e))
        return await handler(request)

    application.middlewares.append(door)
    return Runner(application, live)


def _as_json(e: web.HTTPException) -> web.Response:
    """A refusal of aiohttp's own (404, 405, 413, …) in our words."""
    code = HTTPStatus(e.status).name.lower()
    kept = {name: value for name, value in e.headers.items() if name not in (hdrs.CONTENT_TYPE, hdrs.CONTENT_LENGTH)}
    text = {
        404: "there is nothing under this path",
        405: f"this path takes {e.headers.get(hdrs.ALLOW, 'other methods')}",
    }
    return refusal(e.status, code, text.get(e.status) or e.text or e.reason, kept)


class Runner(web.AppRunner):
    """Runs an application as this module's docstring says."""

    def __init__(self, application: web.Application, live: LiveSettings) -> None:
        super().__init__(application, access_log=None, auto_decompress=False, keepalive_timeout=KEEPALIVE_S)
        self._live = live

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        # Hook: aiohttp makes its server in a function of the application. tests/contract holds it.
        return _Server(self._live, made.request_handler, request_factory=made.request_factory, **made._kwargs)


class _Server(web.Server):
    """Makes a handler for each connection; counts those of each client."""

    def __init__(self, live: LiveSettings, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.live = live
        self.places = Places()
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._connections_max = CONNECTIONS_MAX if files == resource.RLIM_INFINITY else min(CONNECTIONS_MAX, files // 2)
        self._told_s = -TOLD_EVERY_S

    def __call__(self) -> "_Connection":
        return _Connection(self, loop=self._loop, **self._kwargs)

    def full_for(self, client: str) -> str:
        """Why a client may not have a further connection; "" where it may."""
        most = self.live().web.client_connections_max
        if self.places.of(client) < most and self.places.total < self._connections_max:
            return ""
        if time.monotonic() - self._told_s >= TOLD_EVERY_S:
            self._told_s = time.monotonic()
            log.warning("web_connections_refused", client=client, its=self.places.of(client), all=self.places.total)
        return f"{self.places.of(client)} connections of {client} are open, {self.places.total} in all"


class _Connection(web.RequestHandler):
    """One connection."""

    def __init__(self, server: _Server, **keywords: Any) -> None:
        super().__init__(server, **keywords)
        self._server = server
        self._client: str | None = None
        self._head_due: Any = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        client = client_of(peer[0] if isinstance(peer, tuple) else None)
        if why := self._server.full_for(client):
            self._part(429, "too_many_connections", why)
            return
        self._server.places.take(client)
        self._client = client
        self._wait_for_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._client is not None:
            self._server.places.give_back(self._client)
            self._client = None
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self._request_count
        super().data_received(data)
        if self._request_count != before:
            self._head_came()
        elif self._head_due is None and self._idle:
            self._wait_for_head()

    @property
    def _idle(self) -> bool:
        # Hook: aiohttp waits here for a further request. tests/contract holds it.
        return self._waiter is not None and not self._waiter.done()

    def _wait_for_head(self) -> None:
        self._head_due = self._loop.call_later(HEAD_S, self._head_late)

    def _head_came(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def _head_late(self) -> None:
        self._head_due = None
        if self._idle:
            self._part(408, "timeout", f"the head of a request did not come within {HEAD_S:g} s")

    def _part(self, status: int, code: str, message: str) -> None:
        """Say why, where there is no request yet that could be answered, and close."""
        if self.transport is not None:
            body = orjson.dumps({"error": code, "message": message})
            self.transport.write(
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
                + body
            )
        self.force_close()

    async def finish_response(
        self, request: Any, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """As aiohttp does; its own refusals become JSON."""
        if isinstance(resp, web.HTTPException) and resp.status >= 400 and resp.content_type != "application/json":
            resp = _as_json(resp)
        return await super().finish_response(request, resp, start_time)

    def handle_error(
        self, request: Any, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """As aiohttp does, but JSON; what a sender did wrong is no error of ours."""
        if isinstance(exc, http_exceptions.HttpProcessingError):
            text = " ".join((message or exc.message or "").split())[:200]
            status, code, text = (
                (exc.code if 400 <= exc.code < 500 else 400),
                "bad_request",
                f"this is no HTTP request: {text}",
            )
        else:
            log.error("web_handler_failed", path=request.path, exc_info=exc)
            code, text = HTTPStatus(status).name.lower(), "an error of ours; it stands in the log"
        if request.writer.output_size > 0:
            gone = "a part of the answer was sent already"
            raise ConnectionError(gone)
        response = refusal(status, code, text)
        response.force_close()
        return response
