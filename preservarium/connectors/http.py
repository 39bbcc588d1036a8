"""HTTP in: `POST /ingest`, and web hooks of LoRaWAN network servers.

| request | body | what it becomes |
|---|---|---|
| `POST /ingest` | an envelope, an array of them, or one a line (NDJSON) | one raw message each |
| `POST /ingest?device=X[&port=N][&mode=M]` | JSON | one raw message of X with the whole body as payload |
| the same, `application/x-ndjson` | one payload a line | one raw message of X each |
| the same, `application/octet-stream` | bytes | one raw message of X |
| `GET /ingest/commands?device=X[&has=ID][&wait_s=S]` | | none: the downlinks that wait for X |
| `POST /ingest/ttn`, `POST /ingest/chirpstack` | the network server's event | one raw message, or a report of a downlink |

An envelope is an object with `device` and one of `payload`, `payload_b64`; optional `port`, `mode`, `topic`, `meta`,
`experiment_id`. `received_at` is stamped here; one that the sender gives is kept as `meta.time`.

A device that fetches (`downlink: {format: http}`) is given what waits for it: `{"downlinks": [{"id", "command_id", "attempt",
"port", "payload_b64", "expires_at"}]}`, in order, or 204. It names the last one that it has with `has` at its next question;
until then it gets the same ones again, with the same ids, so that a lost answer loses nothing. Where nothing waits, asking
wakes the device's commands, and the answer is waited for, at most `wait_s` (5, at most 25).

202 is sent after Kafka has acknowledged: `{"accepted": n, "refused": [{"index", "code", "message"}], "refused_count": n}`.
400: no message in it could be taken. 401: no or a wrong token. 408: the body did not come in time. 413: too large.
429: too many requests under way. 503: Kafka does not acknowledge; send again (a part may have been taken).
"""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn

import orjson
import structlog
from aiohttp import web

from preservarium import metrics, topics
from preservarium.clock import Clock
from preservarium.connectors.base import Limits, Publishes, RawProducer, envelope_send, message_send
from preservarium.connectors.envelopes import Uplink, chirpstack, ttn, uplink_of
from preservarium.connectors.mailbox import Mailbox
from preservarium.domain.commands import NAME_CHARS_MAX
from preservarium.domain.downlinks import server_report
from preservarium.domain.errors import Fatal, ReasonCode, Reject, Retry
from preservarium.records import is_envelope, loads, payload_of
from preservarium.settings import LiveSettings
from preservarium.stage import Send

log = structlog.get_logger(__name__)

CONNECTOR: Final = "http"
MODE: Final = "HTTP"
#: Messages of one request: at 10 µs each they hold the event loop for a fifth of a second in all, in slices.
MESSAGES_MAX: Final = 20_000
#: The event loop is given free after so many messages (5 ms).
SLICE_MESSAGES: Final = 500
#: A sender is told of so many refusals; the count is always complete.
REFUSED_NAMED_MAX: Final = 1_000
#: A body must have come within this time; a sender that drips bytes would hold a place for ever.
BODY_TIMEOUT_S: Final = 30.0
#: Kafka must have acknowledged within this time.
SEND_TIMEOUT_S: Final = 30.0
#: What a refused sender should wait.
RETRY_AFTER_S: Final = 5
#: An event of a network server that is no uplink: nothing to store, and no fault.
NOT_UPLINK: Final = "not_uplink"

#: Devices that ask at once: a question that waits costs some kilobytes and no work.
ASKING_MAX: Final = 1_000
#: The way through the command stages takes a fraction of a second, while they are not busy.
WAIT_S_DEFAULT: Final = "5"
#: Proxies cut off a request after 30 or 60 s.
WAIT_S_MAX: Final = 25.0

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def routes(
    publisher: Publishes, live: LiveSettings, clock: Clock, mailbox: Mailbox | None = None
) -> list[web.RouteDef]:
    """The connector's routes, to be added to any aiohttp application; those of devices that fetch where a mailbox is kept."""
    made = Ingest(RawProducer(publisher, CONNECTOR), live, clock).routes()
    if mailbox is not None:
        made.append(web.get("/ingest/commands", Fetch(publisher, live, clock, mailbox).commands))
    return made


class Fetch:
    """Devices that ask what waits for them."""

    def __init__(self, publisher: Publishes, live: LiveSettings, clock: Clock, mailbox: Mailbox) -> None:
        self._publisher = publisher
        self._live = live
        self._clock = clock
        self._mailbox = mailbox
        self._asking = 0

    async def commands(self, request: web.Request) -> web.StreamResponse:
        """What waits for the device that the query names; 204 where nothing does."""
        token = self._live().http.token.get_secret_value()
        if token and not _authorized(request, token):
            return _refuse(401, "unauthorized", "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
        if self._asking >= ASKING_MAX:
            wait = {"Retry-After": str(RETRY_AFTER_S)}
            return _refuse(429, "too_many_requests", f"{self._asking} devices are asking", wait)
        self._asking += 1
        try:
            return await self._answer(request.query)
        finally:
            self._asking -= 1

    async def _answer(self, query: Mapping[str, str]) -> web.StreamResponse:
        device, has = query.get("device", ""), query.get("has", "")
        try:
            wait_s = float(query.get("wait_s", WAIT_S_DEFAULT))
        except ValueError:
            wait_s = -1.0
        if (
            not 0 < len(device) <= NAME_CHARS_MAX
            or len(has) > NAME_CHARS_MAX
            or "\0" in device
            or not 0 <= wait_s <= WAIT_S_MAX
        ):
            text = f"name the device; wait_s is a number from 0 to {WAIT_S_MAX:g}"
            return _refuse(400, "envelope_invalid", text)
        if self._mailbox.trouble:
            wait = {"Retry-After": str(RETRY_AFTER_S)}
            return _refuse(503, "unavailable", f"the mailbox is not followed now: {self._mailbox.trouble}", wait)
        had = self._mailbox.upto(device, has)
        waiting = self._waiting(device, had)
        sends = [self._line(device, {"kind": "report", "downlink_id": each, "report": "acknowledged"}) for each in had]
        if had:
            sends.append(Send(topics.MAILBOX, device.encode(), orjson.dumps({"has": has})))
        if not waiting:
            sends.append(self._line(device, {"kind": "wake"}))
        if sends:
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await self._publisher.publish(sends)
            except (Retry, TimeoutError, Fatal) as e:
                log.warning("http fetch refused: Kafka does not acknowledge", error=str(e))
                return _unavailable()
        # It may have come while Kafka acknowledged.
        waiting = waiting or self._waiting(device, had)
        if not waiting and wait_s:
            await self._mailbox.wait(device, wait_s)
            waiting = self._waiting(device, had)
        if not waiting:
            return web.Response(status=204)
        return web.Response(body=orjson.dumps({"downlinks": waiting}), content_type="application/json")

    def _waiting(self, device: str, had: Sequence[str]) -> list[dict[str, Any]]:
        return [line for line in self._mailbox.waiting(device, self._clock.now_us()) if line["id"] not in had]

    def _line(self, device: str, line: dict[str, Any]) -> Send:
        whole = {**line, "device_id": device, "actor": "device", "at": self._clock.now_us()}
        return Send(topics.COMMANDS, device.encode(), orjson.dumps(whole))


class Ingest:
    """The handlers; they share one producer and one count of requests under way."""

    def __init__(self, producer: RawProducer, live: LiveSettings, clock: Clock) -> None:
        self._producer = producer
        self._live = live
        self._clock = clock
        self._inflight = 0

    def routes(self) -> list[web.RouteDef]:
        """The routes, to be added to any aiohttp application."""
        return [
            web.post("/ingest", self._guarded(self._messages)),
            web.post("/ingest/ttn", self._guarded(lambda r, b: _network_server(ttn, b))),
            web.post("/ingest/chirpstack", self._guarded(lambda r, b: _network_server(chirpstack, b))),
        ]

    def _guarded(self, parse: Callable[[web.Request, bytes], Iterator[Any]]) -> _Handler:
        async def handler(request: web.Request) -> web.StreamResponse:
            settings = self._live().http
            token = settings.token.get_secret_value()
            if token and not _authorized(request, token):
                return _refuse(401, "unauthorized", "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
            if self._inflight >= settings.inflight_max:
                wait = {"Retry-After": str(RETRY_AFTER_S)}
                return _refuse(429, "too_many_requests", f"{self._inflight} requests are under way", wait)
            self._inflight += 1
            try:
                return await self._take(request, parse, settings.body_bytes_max)
            finally:
                self._inflight -= 1

        return handler

    async def _take(
        self, request: web.Request, parse: Callable[[web.Request, bytes], Iterator[Any]], body_bytes_max: int
    ) -> web.StreamResponse:
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await _read(request, body_bytes_max)
        except TimeoutError:
            return _refuse(408, "timeout", f"the body did not come within {BODY_TIMEOUT_S:g} s")
        except web.RequestPayloadError as e:  # a broken Content-Encoding, or a sender that went away
            return _refuse(400, "envelope_invalid", f"the body cannot be read: {e}")
        if body is None:
            return _refuse(413, "too_large", f"the body may have {body_bytes_max} bytes")

        sends: list[Send] = []
        refused: list[dict[str, Any]] = []
        refused_count = ignored = 0
        try:
            for index, item in enumerate(parse(request, body)):
                if index >= MESSAGES_MAX:
                    return _refuse(413, "too_many_messages", f"a request may have {MESSAGES_MAX} messages")
                if index % SLICE_MESSAGES == SLICE_MESSAGES - 1:
                    await asyncio.sleep(0)
                try:
                    if item is None:
                        ignored += 1
                        continue
                    sends.append(self._send(item, request))
                except Reject as e:
                    refused_count += 1
                    metrics.CONNECTOR_REFUSED.labels(CONNECTOR, e.code).inc()
                    if len(refused) < REFUSED_NAMED_MAX:
                        refused.append({"index": index, "code": e.code, "message": str(e)})
        except Reject as e:  # the body as a whole
            metrics.CONNECTOR_REFUSED.labels(CONNECTOR, e.code).inc()
            return _refuse(400, e.code, str(e))
        if ignored:
            metrics.CONNECTOR_REFUSED.labels(CONNECTOR, NOT_UPLINK).inc(ignored)

        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._producer.send(sends)
        except (Retry, TimeoutError) as e:
            log.warning("http ingest refused: Kafka does not acknowledge", messages=len(sends), error=str(e))
            return _unavailable()
        except Fatal as e:
            log.error("http ingest refused: Kafka is not as declared", error=str(e))
            return _unavailable()
        except Reject as e:
            return _refuse(413, e.code, str(e))
        answer: dict[str, Any] = {"accepted": len(sends), "refused": refused, "refused_count": refused_count}
        if ignored:
            answer["ignored"] = ignored
        return web.Response(
            body=orjson.dumps(answer),
            status=400 if refused_count and not sends else 202,
            content_type="application/json",
        )

    def _messages(self, request: web.Request, body: bytes) -> Iterator[Any]:
        """The messages of `POST /ingest`: envelopes, uplinks, or _Payload for a device that the query names.

        Raises:
            Reject: the body as a whole is nothing.
        """
        lines = request.content_type in ("application/x-ndjson", "application/jsonl", "application/json-seq")
        if "device" in request.query:
            if request.content_type == "application/octet-stream":
                yield _Payload(body)
            elif lines:
                for line in _lines(body):
                    yield _Payload(_parse(line))
            elif request.content_type == "application/json":
                yield _Payload(loads(body))
            else:
                if not body:
                    _reject(ReasonCode.ENVELOPE_INVALID, "the body is empty")
                yield _Payload(payload_of(body))
            return
        if not lines:
            try:
                whole = loads(body)
            except Reject:
                # Not one value: lines, if there is more than one. A single broken line says what is wrong with it.
                if b"\n" not in body.strip():
                    raise
            else:
                yield from whole if isinstance(whole, list) else [whole]
                return
        yield from map(_parse, _lines(body))

    def _send(self, item: Any, request: web.Request) -> Send:
        limits = Limits.of(self._live())
        now_us = self._clock.now_us()
        if isinstance(item, _Payload):
            item, query = item.value, request.query
            if isinstance(item, Reject):
                raise item
            mode, port = query.get("mode") or MODE, _query_port(query.get("port"))
            return message_send(query["device"], item, limits, CONNECTOR, mode, now_us, port=port)
        if isinstance(item, Reject):
            raise item
        if isinstance(item, _Report):
            return Send(topics.COMMANDS, item.line["device_id"].encode(), orjson.dumps(item.line))
        uplink = item if isinstance(item, Uplink) else None if is_envelope(item) else uplink_of(item)
        if uplink is not None:
            port, meta = uplink.port, uplink.meta
            return message_send(
                uplink.device, uplink.payload, limits, CONNECTOR, uplink.mode, now_us, port=port, meta=meta
            )
        if not is_envelope(item):
            what = "an object" if isinstance(item, dict) else f"a {type(item).__name__}"
            _reject(
                ReasonCode.ENVELOPE_INVALID,
                f"{what} without `device` and one of `payload`, `payload_b64`; or name the device in the query",
            )
        return envelope_send(item, limits, CONNECTOR, MODE, now_us)


class _Payload:
    """A payload of the device that the query names."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class _Report:
    """What a network server says of a downlink of ours."""

    __slots__ = ("line",)

    def __init__(self, line: dict[str, Any]) -> None:
        self.line = line


def _network_server(recognise: Callable[[Any], Uplink | None], body: bytes) -> Iterator[Any]:
    whole = loads(body)
    for event in whole if isinstance(whole, list) else [whole]:
        try:
            report = server_report(event)
            if report is not None:
                yield _Report(report)
            else:
                yield recognise(event) if isinstance(event, dict) else _not_an_object()
        except Reject as e:
            yield e


def _not_an_object() -> Reject:
    return Reject(ReasonCode.ENVELOPE_INVALID, "an event is an object")


def _lines(body: bytes) -> Iterator[bytes]:
    return (line for line in body.split(b"\n") if line.strip())


def _parse(line: bytes) -> Any:
    """The line's value, or the Reject that says why it has none: its neighbours live."""
    try:
        return loads(line)
    except Reject as e:
        return e


def _query_port(text: str | None) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 3):
        _reject(ReasonCode.ENVELOPE_INVALID, f"port is no number: {text[:80]!r}")
    return int(text)


async def _read(request: web.Request, limit: int) -> bytes | None:
    """The body; None where it is larger than `limit`. Faust's application has a limit of its own in `read()`."""
    if request.content_length is not None and request.content_length > limit:
        return None
    parts: list[bytes] = []
    size = 0
    async for part in request.content.iter_any():
        size += len(part)
        if size > limit:
            return None
        parts.append(part)
    return b"".join(parts)


def _authorized(request: web.Request, token: str) -> bool:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    # Compared as bytes: compare_digest takes no other text than ASCII.
    same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), token.encode())
    return scheme.lower() == "bearer" and same


def _refuse(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> web.Response:
    if status != 400:
        metrics.CONNECTOR_REFUSED.labels(CONNECTOR, code).inc()
    body = orjson.dumps({"error": code, "message": message})
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)


def _unavailable() -> web.Response:
    return _refuse(
        503,
        "unavailable",
        "Kafka does not acknowledge; send it again (a part may have been taken)",
        {"Retry-After": str(RETRY_AFTER_S)},
    )


def _reject(code: ReasonCode, message: str) -> NoReturn:
    raise Reject(code, message)
