"""InfluxDB's write API: what Telegraf, collectors and firmware that know InfluxDB send, without a change of theirs.

| request | what it becomes |
|---|---|
| `POST /write?db=D[&rp=R][&precision=P]` | points of line protocol (InfluxDB 1) |
| `POST /api/v2/write?bucket=B[&org=O][&precision=P]` | the same (InfluxDB 2 and 3) |
| `GET`, `HEAD /ping` | 204: somebody is here, and the token is right |
| `POST`, `GET /query?q=CREATE DATABASE …` | an empty result: every database is there. Any other query is refused |

Which tag names the device of a point says the setting `connector.device_tags`. The points of a device are one raw message (or several, where they are many), in
their order, for a parser of kind `influx`; database or bucket are the connector mode; `precision` goes with the message.

`http.token` is asked for as `Authorization: Token T`, `Bearer T` or `Basic` with any user and the token as password, or as `u` and `p` of the query (InfluxDB 1).
A body may be packed with gzip. 204 is sent after Kafka has acknowledged. 400 where lines could not be taken: the others were, as with
InfluxDB (`partial write`), so that it must not be sent again. 503: send again.
"""

import base64
import binascii
from collections.abc import Iterator, Mapping
from typing import Any, Final

from aiohttp import hdrs, web

from preservarium.connectors.device_names import rule_of
from preservarium.domain.decoders.influx import PRECISION, points
from preservarium.errors import ReasonCode, Reject
from preservarium.serving import server
from preservarium.serving.rights import bearer
from preservarium.settings import Settings

#: As InfluxDB 1 and 2 spell them -> as a parser does. Minutes and hours (InfluxDB 1) are no precision of a sensor.
PRECISIONS: Final[Mapping[str, str]] = {
    "": "ns",
    "n": "ns",
    "ns": "ns",
    "u": "us",
    "µ": "us",
    "us": "us",
    "ms": "ms",
    "s": "s",
}
#: Points of one raw message: at five fields each half of what a message may become.
POINTS_MAX: Final = 1_000
#: Points read between two looks at the event loop (5 ms).
SLICE_POINTS: Final = 500
#: What clients take for a version of InfluxDB 1.
VERSION: Final = "1.8.10"
#: Longest query that is looked at.
QUERY_CHARACTERS_MAX: Final = 1_000
_CREATE: Final = "create database"


class Pause:
    """Here the event loop may be given free."""

    __slots__ = ()


PAUSE: Final = Pause()


class Points:
    """Points of one device out of a request: a message."""

    __slots__ = ("device", "mode", "precision", "text")

    def __init__(self, device: str, mode: str, precision: str, text: str) -> None:
        self.device = device
        self.mode = mode
        self.precision = precision
        self.text = text

    @property
    def meta(self) -> dict[str, Any]:
        """What goes with the message."""
        return {} if self.precision == "ns" else {PRECISION: self.precision}


def token_of(request: web.Request) -> bytes:
    """The token that a client of InfluxDB shows; b"" where there is none."""
    scheme, _, given = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    if scheme.lower() == "token":
        # InfluxDB 2 clients for InfluxDB 1 send USER:PASSWORD there.
        return given.strip().rpartition(":")[2].encode("utf-8", "surrogateescape")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(given.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return bearer(request) or request.query.get("p", "").encode("utf-8", "surrogateescape")


def messages_of(
    query: Mapping[str, str], body: bytes, settings: Settings, payload_bytes_max: int
) -> Iterator[Points | Reject | Pause]:
    """The messages of a request, a device after the other as each comes first, and the lines that cannot be taken; `PAUSE` in between.

    Args:
        query: of the request.
        body: unpacked.
        settings: the rule that names devices.
        payload_bytes_max: of one message.

    Raises:
        Reject: the request as a whole is none.
    """
    spelled = query.get("precision", "")
    if (precision := PRECISIONS.get(spelled)) is None:
        message = f"precision is one of ns, us, ms, s (n, u), not {spelled!r:.20}"
        raise Reject(ReasonCode.ENVELOPE_INVALID, message)
    mode = query.get("bucket") or query.get("db") or ""
    try:
        text = body.decode()
    except UnicodeDecodeError as e:
        message = f"line protocol is UTF-8: {e.reason} at byte {e.start}"
        raise Reject(ReasonCode.ENVELOPE_NOT_UTF8, message) from None
    rule = rule_of(settings.connector.device_tags)
    collected: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for number, point in enumerate(points(text)):
        if number % SLICE_POINTS == SLICE_POINTS - 1:
            yield PAUSE
        if isinstance(point, Reject):
            yield point
            continue
        device = rule.device(point.measurement, point.tags)
        if device is None:
            message = f"none of the tags {rule.text} names the device: {point.text[:80]!r}"
            yield Reject(ReasonCode.ENVELOPE_NO_DEVICE, message)
            continue
        lines = collected.setdefault(device, [])
        # A message in JSON takes some more room than its text: quotes are written with a backslash.
        size = len(point.text.encode()) + point.text.count('"') + point.text.count("\\") + 2
        if lines and (len(lines) >= POINTS_MAX or sizes[device] + size > payload_bytes_max - 2):
            yield Points(device, mode, precision, "\n".join(lines))
            lines.clear()
        sizes[device] = size + (sizes[device] if lines else 0)
        lines.append(point.text)
    for device, lines in collected.items():
        yield Points(device, mode, precision, "\n".join(lines))


def answer(accepted: int, refused: list[dict[str, Any]], refused_count: int) -> web.StreamResponse:
    """What InfluxDB would say: 204, or 400 with how many lines were dropped and why the first was."""
    if not refused_count:
        return web.Response(status=204, headers={"X-Influxdb-Version": VERSION})
    # Clients look for these words: what has them is not sent again.
    begin = "partial write" if accepted else "unable to parse"
    text = f"{begin}: {refused[0]['message']} dropped={refused_count}"
    body = {"code": "invalid", "message": text, "error": text}
    return web.json_response(body, status=400, headers={"X-Influxdb-Version": VERSION})


def queried(text: str) -> web.StreamResponse:
    """The answer to a query: only that a database is to be made is understood, which clients ask at their start."""
    if len(text) <= QUERY_CHARACTERS_MAX and text.strip().lower().startswith(_CREATE):
        return web.json_response({"results": [{"statement_id": 0}]}, headers={"X-Influxdb-Version": VERSION})
    return server.refusal(400, "invalid", "only points are taken here; ask PostgreSQL or ClickHouse for what is stored")


def pong() -> web.StreamResponse:
    """The answer to a ping."""
    return web.Response(status=204, headers={"X-Influxdb-Version": VERSION})
