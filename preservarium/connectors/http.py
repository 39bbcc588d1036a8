"""HTTP in: `POST /ingest`, and web hooks of network servers and other platforms.

| request | body | what it becomes |
|---|---|---|
| `POST /ingest` | an envelope, ours or a platform's, an array of them, or one a line (NDJSON) | one raw message each |
| `POST /ingest?device=X[&port=N][&mode=M]` | JSON | one raw message of X with the whole body as payload |
| the same, `application/x-ndjson` | one payload a line | one raw message of X each |
| either, `application/json-seq` | as NDJSON, each behind a record separator (RFC 7464) | likewise |
| the same, `application/octet-stream` | bytes | one raw message of X |
| `POST /write`, `POST /api/v2/write` | line protocol | one raw message a device: InfluxDB's write API (influx_write.py) |
| `GET /ingest/commands?device=X[&has=ID][&wait_s=S]` | | none: the downlinks that wait for X |
| `POST /ingest/NAME` | what that platform publishes (envelopes/): `ttn`, `chirpstack`, … | raw messages, or a report of a downlink |

An envelope is an object with `device` and one of `payload`, `payload_b64`; optional `port`, `mode`, `topic`, `meta`,
`experiment_id`. `received_at` is stamped here; one that the sender gives is kept as `meta.time`.

A device that fetches (`downlink: {format: http}`) is given what waits for it: `{"downlinks": [{"id", "command_id", "attempt",
"port", "payload_b64", "expires_at"}]}`, in order, or 204. It names the last one that it has with `has` at its next question;
until then it gets the same ones again, with the same ids, so that a lost answer loses nothing. Where nothing waits, asking
wakes the device's commands, and the answer is waited for, at most `wait_s` (5, at most 25).

A body may be packed (`Content-Encoding: gzip`, `deflate`, `zstd`). One that is torn or damaged is refused as a whole.

202 is sent after Kafka has acknowledged: `{"accepted": n, "refused": [{"index", "code", "message"}], "refused_count": n}`.
400: no message in it could be taken. 401: no or a wrong token. 403: no token is configured, and a browser asks for a page of
a stranger. 408: the body did not come in time. 413: too large. 415: packed in a way that is not understood. 429: too many requests
under way, of this client or of all. 503: Kafka does not acknowledge; send again (a part may have been taken). Every refusal
is `{"error": code, "message": text for people}`.
"""

import asyncio
import hmac
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NoReturn
from urllib.parse import parse_qsl

import orjson
import structlog
from aiohttp import hdrs, web

from preservarium import metrics, topics
from preservarium.clock import Clock
from preservarium.connectors import influx_write
from preservarium.connectors.base import (
    Limits,
    Publishes,
    RawProducer,
    envelope_send,
    formats_in,
    message_send,
    report_send,
)
from preservarium.connectors.envelopes import FORMATS, NOT_UPLINK, Formats, Uplink, azure_iot, formats_of, required
from preservarium.connectors.influx_write import PAUSE, Points
from preservarium.connectors.mailbox import Mailbox
from preservarium.domain.commands.downlinks import server_report
from preservarium.domain.commands.fields import NAME_CHARS_MAX
from preservarium.domain.readings import json_text
from preservarium.domain.readings.address import canonical_address
from preservarium.domain.readings.json_text import to_bytes
from preservarium.domain.readings.number import number_of
from preservarium.errors import Fatal, ReasonCode, Reject, Retry
from preservarium.serving import bodies, hosts, server
from preservarium.serving.clients import Places, client_of
from preservarium.serving.rights import Handler, Right, bearer, needs
from preservarium.settings import LiveSettings, Settings
from preservarium.streaming.records import is_envelope, loads, payload_of
from preservarium.streaming.stage import Send

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
#: A statement of a client of InfluxDB.
QUERY_BYTES_MAX: Final = 4_096
#: What a refused sender should wait.
RETRY_AFTER_S: Final = 5

#: Devices that ask at once: a question that waits costs some kilobytes and no work.
ASKING_MAX: Final = 1_000
#: The way through the command stages takes a fraction of a second, while they are not busy.
WAIT_S_DEFAULT: Final = "5"
#: Proxies cut off a request after 30 or 60 s.
WAIT_S_MAX: Final = 25.0

#: Takes a body apart: messages of any of the classes below, or Reject for one that is none.
Parse = Callable[[web.Request, bytes], Iterator[Any]]

#: Before each text of a sequence (RFC 7464).
RECORD_SEPARATOR: Final = b"\x1e"
#: A text that says itself where it ends; a number or a word may be torn and look whole.
_CLOSED: Final = re.compile(rb"[\]}\"]\s*\Z|\s\Z")


def routes(
    publisher: Publishes, live: LiveSettings, clock: Clock, mailbox: Mailbox | None = None
) -> list[web.RouteDef]:
    """The connector's routes, to be added to any aiohttp application; those of devices that fetch where a mailbox is kept."""
    made = Ingest(RawProducer(publisher, CONNECTOR), live, clock).routes()
    if mailbox is not None:
        made += Fetch(publisher, live, clock, mailbox).routes()
    return made


def _not_let_in(
    request: web.Request, settings: Settings, shown: Callable[[web.Request], bytes] = bearer
) -> web.Response | None:
    """Why a sender is not let in: the one check of every way in."""
    token = settings.http.token.get_secret_value()
    if token:
        if hmac.compare_digest(shown(request), token.encode()):
            return None
        return _refuse(401, "unauthorized", "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
    # Nothing proves that the sender may. A browser would send for any page what programs send, from inside our network.
    strange = hosts.from_a_strangers_page(request, settings.web)
    if strange or (hdrs.ORIGIN in request.headers and request.content_type in hosts.SIMPLE_TYPES):
        text = "asked by a page of another origin; senders that are no browsers are let in, and others with PRESERVARIUM_HTTP__TOKEN"
        return _refuse(403, "forbidden", text)
    return None


class Fetch:
    """Devices that ask what waits for them."""

    def __init__(self, publisher: Publishes, live: LiveSettings, clock: Clock, mailbox: Mailbox) -> None:
        self._publisher = publisher
        self._live = live
        self._clock = clock
        self._mailbox = mailbox
        self._asking = 0

    def routes(self) -> list[web.RouteDef]:
        """The routes, to be added to any aiohttp application."""

        async def commands(request: web.Request) -> web.StreamResponse:
            return await self._commands(request)

        return [web.get("/ingest/commands", needs(Right.SENDER, commands))]

    async def _commands(self, request: web.Request) -> web.StreamResponse:
        """What waits for the device that the query names; 204 where nothing does."""
        if refusal := _not_let_in(request, self._live()):
            return refusal
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
        wait_s = number_of(query.get("wait_s", WAIT_S_DEFAULT))
        if (
            not 0 < len(device) <= NAME_CHARS_MAX
            or len(has) > NAME_CHARS_MAX
            or "\0" in device
            or wait_s is None
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
            sends.append(Send(topics.MAILBOX, canonical_address(device).encode(), to_bytes({"has": has})))
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
        return report_send(whole)


class Ingest:
    """The handlers; they share one producer and one count of requests under way."""

    def __init__(self, producer: RawProducer, live: LiveSettings, clock: Clock) -> None:
        self._producer = producer
        self._live = live
        self._clock = clock
        self._places = Places()
        self._formats = formats_in(live())

    def routes(self) -> list[web.RouteDef]:
        """The routes, to be added to any aiohttp application."""

        async def query(request: web.Request) -> web.StreamResponse:
            return await self._query(request)

        async def ping(request: web.Request) -> web.StreamResponse:
            return _not_let_in(request, self._live(), influx_write.token_of) or influx_write.pong()

        return [
            web.post("/ingest", self._guarded(self._messages)),
            *(
                web.post(path, self._guarded(self._points, influx_write.token_of, _influx_answer))
                for path in ("/write", "/api/v2/write")
            ),
            web.post("/query", needs(Right.SENDER, query)),
            web.get("/query", needs(Right.SENDER, query)),
            web.get("/ping", needs(Right.SENDER, ping)),
            *(web.post(_path(name), self._guarded(partial(self._platform, name))) for name in FORMATS),
        ]

    def _guarded(
        self,
        parse: Parse,
        shown: Callable[[web.Request], bytes] = bearer,
        answer: "Callable[[Taken], web.StreamResponse] | None" = None,
    ) -> Handler:
        answer = answer or _answer

        async def handler(request: web.Request) -> web.StreamResponse:
            settings = self._live()
            if refusal := _not_let_in(request, settings, shown):
                return refusal
            client, wait = client_of(request.remote), {"Retry-After": str(RETRY_AFTER_S)}
            if self._places.total >= settings.http.inflight_max:
                return _refuse(429, "too_many_requests", f"{self._places.total} requests are under way", wait)
            if self._places.of(client) >= settings.http.client_inflight_max:
                text = f"{self._places.of(client)} requests of {client} are under way: PRESERVARIUM_HTTP__CLIENT_INFLIGHT_MAX"
                return _refuse(429, "too_many_requests", text, wait)
            with self._places.taken(client):
                return await self._take(request, parse, settings.http.body_bytes_max, answer)

        return needs(Right.SENDER, handler)

    async def _take(
        self, request: web.Request, parse: Parse, body_bytes_max: int, answer: "Callable[[Taken], web.StreamResponse]"
    ) -> web.StreamResponse:
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await bodies.read(request, body_bytes_max)
        except TimeoutError:
            return _refuse(408, "timeout", f"the body did not come within {BODY_TIMEOUT_S:g} s")
        except bodies.BodyRefused as e:
            if e.status == 400:
                metrics.CONNECTOR_REFUSED.labels(CONNECTOR, e.code).inc()
            accepted = {"Accept-Encoding": ", ".join(bodies.ENCODINGS)} if e.status == 415 else None
            return _refuse(e.status, e.code, str(e), accepted)

        if (code := self._validation(request, body)) is not None:
            return web.Response(body=orjson.dumps({"validationResponse": code}), content_type="application/json")
        sends: list[Send] = []
        refused: list[dict[str, Any]] = []
        refused_count = ignored = 0
        try:
            for index, item in enumerate(parse(request, body)):
                if index >= MESSAGES_MAX:
                    return _refuse(413, "too_many_messages", f"a request may have {MESSAGES_MAX} messages")
                if index % SLICE_MESSAGES == SLICE_MESSAGES - 1:
                    await asyncio.sleep(0)
                if item is PAUSE:
                    await asyncio.sleep(0)
                    continue
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
        return answer(Taken(len(sends), refused, refused_count, ignored))

    def _validation(self, request: web.Request, body: bytes) -> str | None:
        """The code that Azure's Event Grid wants to hear back before it sends anything; None for all else."""
        if request.path != _path(azure_iot.FORMAT.name) or azure_iot.VALIDATION.encode() not in body:
            return None
        try:
            return azure_iot.validation_code(loads(body))
        except Reject:
            return None

    async def _query(self, request: web.Request) -> web.StreamResponse:
        """What clients of InfluxDB ask before they write."""
        if refusal := _not_let_in(request, self._live(), influx_write.token_of):
            return refusal
        asked = request.query.get("q", "")
        if not asked and request.method == "POST" and request.content_type in hosts.SIMPLE_TYPES:
            try:
                async with asyncio.timeout(BODY_TIMEOUT_S):
                    body = await bodies.read(request, QUERY_BYTES_MAX)
            except TimeoutError:
                return _refuse(408, "timeout", f"the body did not come within {BODY_TIMEOUT_S:g} s")
            except bodies.BodyRefused as e:
                return _refuse(e.status, e.code, str(e))
            asked = dict(parse_qsl(body.decode("utf-8", "replace"))).get("q", "")
        return influx_write.queried(asked)

    def _points(self, request: web.Request, body: bytes) -> Iterator[Any]:
        """The messages of InfluxDB's write API.

        Raises:
            Reject: the request as a whole is none.
        """
        settings = self._live()
        return influx_write.messages_of(request.query, body, settings, settings.normalize.payload_bytes_max)

    def _platform(self, name: str, request: web.Request, body: bytes) -> Iterator[Any]:
        """The messages of `POST /ingest/NAME`: everything in it is of that platform.

        Raises:
            Reject: the body as a whole is nothing.
        """
        formats = formats_of(name, self._live().connector.device_tags)
        whole = loads(body)
        for item in whole if isinstance(whole, list) else [whole]:
            yield from _heard(item, formats, ours=False)

    def _messages(self, request: web.Request, body: bytes) -> Iterator[Any]:
        """The messages of `POST /ingest`: envelopes, uplinks, or _Payload for a device that the query names.

        Raises:
            Reject: the body as a whole is nothing.
        """
        split = _SPLITTERS.get(request.content_type)
        if "device" in request.query:
            if request.content_type == "application/octet-stream":
                yield _Payload(body)
            elif split is not None:
                for text in split(body):
                    yield _Payload(_parse(text))
            elif request.content_type == "application/json":
                yield _Payload(loads(body))
            else:
                if not body:
                    _reject(ReasonCode.ENVELOPE_INVALID, "the body is empty")
                yield _Payload(payload_of(body))
            return
        if split is None:
            try:
                whole = loads(body)
            except Reject:
                # Not one value: lines, if there is more than one. A single broken line says what is wrong with it.
                if b"\n" not in body.strip():
                    raise
            else:
                for item in whole if isinstance(whole, list) else [whole]:
                    yield from _heard(item, self._formats)
                return
        for line in (split or _lines)(body):
            yield from _heard(_parse(line), self._formats)

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
        if isinstance(item, Points):
            return message_send(item.device, item.text, limits, CONNECTOR, item.mode or MODE, now_us, meta=item.meta)
        if isinstance(item, _Report):
            return report_send(item.line)
        if isinstance(item, Uplink):
            mode, port, meta = item.mode or MODE, item.port, item.meta
            return message_send(item.device, item.payload, limits, CONNECTOR, mode, now_us, port=port, meta=meta)
        if not is_envelope(item):
            what = json_text.kind_of(item)
            _reject(
                ReasonCode.ENVELOPE_INVALID,
                f"{what} without `device` and one of `payload`, `payload_b64`, and in no envelope that is known here; "
                "or name the device in the query",
            )
        return envelope_send(item, limits, CONNECTOR, MODE, now_us)


def _path(name: str) -> str:
    """Where what a platform publishes is posted."""
    return f"/ingest/{name}"


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a request whose messages Kafka has."""

    accepted: int
    refused: list[dict[str, Any]]  #: the first `REFUSED_NAMED_MAX`: {index, code, message}
    refused_count: int
    ignored: int  #: events that carry nothing of a device


def _answer(taken: Taken) -> web.StreamResponse:
    said: dict[str, Any] = {"accepted": taken.accepted, "refused": taken.refused, "refused_count": taken.refused_count}
    if taken.ignored:
        said["ignored"] = taken.ignored
    status = 400 if taken.refused_count and not taken.accepted else 202
    return web.Response(body=orjson.dumps(said), status=status, content_type="application/json")


def _influx_answer(taken: Taken) -> web.StreamResponse:
    return influx_write.answer(taken.accepted, taken.refused, taken.refused_count)


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


def _heard(item: Any, formats: Formats, *, ours: bool = True) -> Iterator[Any]:
    """What is in a platform's envelope: uplinks, a report of a downlink, None for an event without a payload; anything else as it is."""
    if ours and is_envelope(item):
        yield item
        return
    try:
        if (report := server_report(item)) is not None:
            yield _Report(report)
            return
        found = formats.read(item) if isinstance(item, dict) else None
        if formats.forced is not None and not isinstance(item, Reject):
            found = required(found, formats.forced.name)
    except Reject as e:
        yield e
        return
    if found is None:
        yield item
    elif not found:
        yield None
    else:
        yield from found


def _lines(body: bytes) -> Iterator[bytes]:
    return (line for line in body.split(b"\n") if json_text.bare(line))


def _sequence(body: bytes) -> Iterator[bytes | Reject]:
    """The texts of a JSON text sequence (RFC 7464), each over as many lines as it likes."""
    first, *texts = body.split(RECORD_SEPARATOR)
    if first.strip():
        yield Reject(ReasonCode.ENVELOPE_NOT_JSON, "a text of a sequence begins with a record separator (0x1E)")
    for text in texts:
        # Separators in a row are one (2.1). What is torn shows by its missing end (2.4).
        if text.strip():
            torn = Reject(ReasonCode.ENVELOPE_NOT_JSON, "torn: a number or a word ends with a line feed")
            yield text if _CLOSED.search(text) else torn


_SPLITTERS: Final[dict[str, Callable[[bytes], Iterator[bytes | Reject]]]] = {
    "application/x-ndjson": _lines,
    "application/jsonl": _lines,
    "application/json-seq": _sequence,
}


def _parse(text: bytes | Reject) -> Any:
    """The text's value, or the Reject that says why it has none: its neighbours live."""
    if isinstance(text, Reject):
        return text
    try:
        return loads(text)
    except Reject as e:
        return e


def _query_port(text: str | None) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 3):
        _reject(ReasonCode.ENVELOPE_INVALID, f"port is no number: {text[:80]!r}")
    return int(text)


def _refuse(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> web.Response:
    if status != 400:
        metrics.CONNECTOR_REFUSED.labels(CONNECTOR, code).inc()
    return server.refusal(status, code, message, headers)


def _unavailable() -> web.Response:
    return _refuse(
        503,
        "unavailable",
        "Kafka does not acknowledge; send it again (a part may have been taken)",
        {"Retry-After": str(RETRY_AFTER_S)},
    )


def _reject(code: ReasonCode, message: str) -> NoReturn:
    raise Reject(code, message)
