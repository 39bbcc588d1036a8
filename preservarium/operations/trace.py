"""Where a stored reading comes from, and what became of a raw record: each step with what it knew and made.

Nothing is searched: a row has the raw coordinates of its message, Kafka gives a record by its offset, and the databases answer by
their keys. Of `iot_errors`, which has no index, the lines of the device's partition are read from the receipt of the message on, and
no more than `ERRORS_READ_MAX` of them.
"""

import asyncio
import hashlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from preservarium import topics
from preservarium.domain.quality.rederivation import (
    MOVED_MAX_US,
    Status,
    StoredReading,
    Unverifiable,
    bits,
    find,
    finite,
    instant_of,
    verdicts,
)
from preservarium.domain.readings import legacy
from preservarium.domain.readings.lineage import Coordinates, derivation_of
from preservarium.domain.readings.reading import Quality, RawMessage
from preservarium.errors import Fatal, PreservariumError, Reject, Retry
from preservarium.operations.raw_records import Records
from preservarium.operations.rederive import LEARNT_US, Configuration, Derived, Rederiver, Verdict
from preservarium.settings import Settings
from preservarium.stores import lineage
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.stores.registry_past import Past
from preservarium.streaming.publish import partition_of
from preservarium.streaming.records import attempt_of, generation_of, original_line, parse_raw, received_ms

#: Bytes of a raw message that are shown; all of them count for the hash.
RAW_SHOWN_MAX: Final = 65_536
#: Fields that a parser found that are shown.
FIELDS_SHOWN_MAX: Final = 500
#: Lines of a raw record that are traced.
LINES_MAX: Final = 100
#: Lines of `iot_errors` that are read for one raw record: some hundredths of a second.
ERRORS_READ_MAX: Final = 5_000
#: Notices that are told one by one.
NOTICES_MAX: Final = 100
#: Readings that are named where several are meant.
CANDIDATES_MAX: Final = 10
#: A database that has not answered within this time is told as not to be asked.
ASK_S: Final = 10.0

GONE: Final = "Kafka has deleted it: {topic} keeps {days:g} days, and partition {partition} begins at offset {begin}"


class TraceError(PreservariumError):
    """There is nothing to trace, or more than one reading is meant; the message says which."""


@dataclass(frozen=True, slots=True)
class Point:
    """A reading, as people name it."""

    device: str  #: in any spelling of its address
    component_type: str
    at_us: int  #: the device's time; to the second or the millisecond where it has no more digits
    pin: str | None = None  #: None: whichever there is
    mode: str | None = None


class Tracer:
    """Traces readings and raw records. For one task at a time; to be closed.

    Args:
        settings: where Kafka is, and limits.
        connection: of asyncpg, to the database of the readings.
        clickhouse: where ClickHouse is; None: it is not asked.
    """

    def __init__(self, settings: Settings, connection: Any, clickhouse: ClickHouseStore | None = None) -> None:
        self._settings = settings
        self._connection = connection
        self._clickhouse = clickhouse
        self._past = Past(connection)
        self._rederiver = Rederiver(settings, self._past)

    async def close(self) -> None:
        """End what runs scripts."""
        await self._rederiver.close()

    # --- back: from a reading to its bytes

    async def reading(self, point: Point) -> dict[str, Any]:
        """The chain of one stored reading, from its raw bytes to its rows; JSON.

        Raises:
            TraceError: there is no such reading, or there are several.
            RecordsError: Kafka cannot be asked.
        """
        stored, series_id = await self._find(point)
        await self._past.prepare(stored.received_at - 2 * LEARNT_US)
        topic = topics.DECODED if stored.parser == legacy.PARSER else topics.RAW
        full = full_name(self._settings, topic)
        async with Records(self._settings) as records:
            record, gone = await self._record(records, full, topic, stored.raw)
        clickhouse = asyncio.ensure_future(self._in_clickhouse(stored))
        try:
            verdict = await self._rederiver.verify(stored, record)
            configuration = verdict.derived.configuration if verdict.derived is not None else None
            if configuration is None and topic is topics.RAW:
                found = await self._rederiver.configuration(stored.device_id, stored.received_at, stored.parser)
                configuration = found if isinstance(found, Configuration) else None
            raw = self._raw(record, stored.raw, topic.name, gone)
            transitions = await lineage.transitions(self._connection, stored.device_id, stored.raw, stored.received_at)
            document: dict[str, Any] = {
                "reading": _identity(stored),
                "derivation_id": _derivation(stored),
                "raw": raw,
                "parser": _parser(stored.parser, configuration),
                "decoded": _decoded(verdict.derived),
                "mapping": _mapping(stored, verdict.derived),
                "validated": _validated(stored, configuration),
                "rederivation": _rederivation(verdict),
                "windows": await lineage.windows(self._connection, stored),
                "rollups": await lineage.rollups(self._connection, series_id, stored.timestamp),
                "alarms": transitions,
                "notices": await self._notices(transitions),
                "stored": {"postgres": _row(stored), "clickhouse": await clickhouse},
            }
        finally:
            clickhouse.cancel()
        return document

    async def _find(self, point: Point) -> tuple[StoredReading, int]:
        devices = await lineage.spelled(self._connection, point.device)
        series = await lineage.series_of(self._connection, devices, point.component_type, point.pin, point.mode)
        if not series:
            others = await lineage.series_of(self._connection, devices, None, None, None)
            there = sorted({(one["component_type"], one["pin_position"]) for one in others})
            named = ", ".join(f"{c} (pin {p})" for c, p in there[:CANDIDATES_MAX])
            message = f"device {point.device} has no series {point.component_type}"
            if point.pin is not None or point.mode is not None:
                message += f" at pin {point.pin or 'any'}, mode {point.mode or 'any'}"
            raise TraceError(f"{message}; it has: {named}" if named else f"{message}, nor any other")
        width = 1_000_000 if point.at_us % 1_000_000 == 0 else 1_000 if point.at_us % 1_000 == 0 else 1
        ids = {(s["connector_mode"], s["component_type"], s["pin_position"]): s["series_id"] for s in series}
        rows = await lineage.rows_between(self._connection, list(ids.values()), point.at_us, point.at_us + width - 1)
        exact = [row for row in rows if row.timestamp == point.at_us]
        rows = exact or rows
        if len(rows) > 1:
            named = "; ".join(
                f"pin {r.pin_position}, mode {r.connector_mode}, at {r.timestamp}" for r in rows[:CANDIDATES_MAX]
            )
            message = f"{len(rows)} readings are meant: {named}"
            raise TraceError(message)
        if not rows:
            near: list[int] = []
            for series_id in list(ids.values())[:CANDIDATES_MAX]:
                near += [at for at in await lineage.nearest(self._connection, series_id, point.at_us) if at]
            near.sort(key=lambda at: abs(at - point.at_us))
            message = f"device {point.device} has no stored {point.component_type} at {point.at_us}"
            if near:
                message += f"; the nearest is at {near[0]}"
            raise TraceError(message)
        row = rows[0]
        return row, ids[row.connector_mode, row.component_type, row.pin_position]

    # --- forward: from a raw record to what became of it

    async def forward(self, partition: int, offset: int, line: int | None = None) -> dict[str, Any]:
        """What became of a raw record, or of one of its lines; JSON.

        Raises:
            TraceError: there is no such record, or Kafka has deleted it: then nothing says whose it was.
            RecordsError: Kafka cannot be asked.
        """
        full = topics.RAW.full(self._prefix)
        async with Records(self._settings) as records:
            record, gone = await self._record(records, full, topics.RAW, Coordinates(partition, offset, line or 0))
            if record is None:
                message = f"raw {partition}:{offset}: {gone}"
                raise TraceError(message)
            payload_max = self._settings.normalize.payload_bytes_max
            messages, refused = parse_raw(record, topics.RAW.name, partition, payload_bytes_max=payload_max)
            lines = {message["raw_index"]: message for message in messages}
            alone = len(messages) + len(refused) == 1
            if line is not None and line not in lines and line not in {one["index"] for one in refused}:
                message = f"raw {partition}:{offset} has no line {line}; it has {len(messages) + len(refused)}"
                raise TraceError(message)
            wanted = [message for n, message in lines.items() if line is None or n == line][:LINES_MAX]
            received = min((m["received_at"] for m in wanted), default=received_ms(record) * 1_000)
            await self._past.prepare(received - 2 * LEARNT_US)
            told = [
                await self._message(
                    message, original_line(record.value or b"", message["raw_index"], alone=alone), record
                )
                for message in wanted
            ]
            keys = {one["device_id"] for one in told} | {m["device"] for m in wanted}
            if record.key:
                keys.add(record.key.decode("utf-8", "replace"))
            errors, complete = await self._errors(records, keys, partition, offset, line, received_ms(record) * 1_000)
        return {
            "raw": {
                "topic": topics.RAW.name,
                "partition": partition,
                "offset": offset,
                "line": line,
                "kafka_time": record.timestamp * 1_000,
                "key": (record.key or b"").decode("utf-8", "replace") or None,
                "bytes": len(record.value or b""),
                "lines": len(messages) + len(refused),
                "attempt": attempt_of(record),
                "generation": generation_of(record),
            },
            "messages": told,
            "lines_not_shown": max(0, len([1 for n in lines if line is None or n == line]) - len(wanted)),
            "errors": errors,
            "errors_complete": complete,
        }

    async def _message(self, raw: RawMessage, original: bytes, record: Any) -> dict[str, Any]:
        """What became of one message."""
        coordinates = Coordinates(raw["raw_partition"], raw["raw_offset"], raw["raw_index"])
        devices = await lineage.spelled(self._connection, raw["device"])
        device_id = devices[0]
        derived: Derived | None = None
        reason = ""
        try:
            for at_us in (raw["received_at"], None):
                found = await self._rederiver.configuration(device_id, at_us, None)
                if isinstance(found, Configuration):
                    derived = await self._rederiver.derive(raw, found)
                    break
                reason = found
        except (Reject, Fatal) as e:
            reason = f"{e.code}: {e}" if isinstance(e, Reject) else str(e)
        if derived is not None:
            device_id = str(derived.judged.message["device_id"])
        series = await lineage.series_of(self._connection, devices, None, None, None)
        ids = [one["series_id"] for one in series]
        instants = [raw["received_at"]]
        if derived is not None:
            message = derived.judged.message
            instants = [instant_of(message, one) for one in message["readings"]]
        rows = await lineage.rows_between(self._connection, ids, min(instants), max(instants) + MOVED_MAX_US)
        rows += await lineage.rows_before(self._connection, ids, min(instants))
        mine = [row for row in rows if row.raw == coordinates]
        transitions = await lineage.transitions(self._connection, device_id, coordinates, raw["received_at"])
        return {
            "device_id": device_id,
            "raw": self._raw_of(raw, original, record),
            "refused": reason or None,
            "readings": [
                {**_identity(row), "value": row.value, "value_text": row.value_text, "unit": row.unit,
                 "quality": row.quality, "flags": list(row.flags), "generation": row.generation,
                 "revised": row.revised, "parser": row.parser, "ingested_at": row.ingested_at}
                for row in mine
            ],
            "not_stored": _not_stored(derived, rows, coordinates) if derived is not None else [],
            "alarms": transitions,
            "notices": await self._notices(transitions),
        }  # fmt: skip

    async def _errors(
        self, records: Records, keys: set[str], partition: int, offset: int, line: int | None, since_us: int
    ) -> tuple[list[dict[str, Any]], bool]:
        """Error lines of a raw record, and whether every line that may be one was looked at."""
        full = topics.ERRORS.full(self._prefix)
        there = await records.partitions(full)
        if not there:
            return [], True
        count = len(there)
        places = {partition_of(key.encode(), count) for key in keys} & there
        # A second before: the clocks of brokers and connectors differ.
        begins = await records.since(full, places, since_us - 1_000_000)
        found: list[dict[str, Any]] = []
        complete = True
        for place, begin in begins.items():
            span = await records.span(full, place)
            if span is None:
                continue
            begin = max(begin, span.begin)
            end = min(span.end, begin + ERRORS_READ_MAX)
            complete = complete and end == span.end
            async for some in records.between(full, place, begin, end):
                for record in some:
                    if (one := _error_of(record, partition, offset, line)) is not None:
                        found.append({"id": f"{place}:{record.offset}", **one})
        return found, complete

    # --- parts

    @property
    def _prefix(self) -> str:
        return self._settings.kafka.topic_prefix

    async def _record(
        self, records: Records, full: str, topic: topics.Topic, raw: Coordinates
    ) -> tuple[Any | None, str]:
        """The record, or why there is none."""
        span = await records.span(full, raw.partition)
        if span is None:
            return None, f"Kafka has no partition {raw.partition} of {full}"
        if raw.offset < span.begin:
            days = (topic.retention_ms or 0) / topics.DAY_MS
            return None, GONE.format(topic=full, days=days, partition=raw.partition, begin=span.begin)
        if raw.offset >= span.end:
            return None, f"partition {raw.partition} of {full} ends at offset {span.end}: the topic was made anew"
        found = await records.at(full, raw.partition, [raw.offset])
        return found.get(raw.offset), "" if raw.offset in found else "no record stands at this offset"

    def _raw(self, record: Any | None, raw: Coordinates, topic: str, gone: str) -> dict[str, Any]:
        place = {"topic": topic, "partition": raw.partition, "offset": raw.offset, "line": raw.line}
        if record is None:
            return {**place, "available": False, "gone": gone}
        if topic != topics.RAW.name:
            lines = (record.value or b"").split(b"\n")
            line = lines[raw.line] if raw.line < len(lines) else b""
            return {**place, "available": True, "kafka_time": record.timestamp * 1_000, **_bytes(line)}
        payload_max = self._settings.normalize.payload_bytes_max
        messages, refused = parse_raw(record, topic, raw.partition, payload_bytes_max=payload_max)
        alone = len(messages) + len(refused) == 1
        for message in messages:
            if message["raw_index"] == raw.line:
                line = original_line(record.value or b"", raw.line, alone=alone)
                return {**place, "available": True, **self._raw_of(message, line, record)}
        return {**place, "available": True, "gone": "no message is on this line"}

    def _raw_of(self, message: RawMessage, line: bytes, record: Any) -> dict[str, Any]:
        return {
            "kafka_time": record.timestamp * 1_000,
            "connector": message["connector"],
            "mode": message["mode"] or None,
            "mqtt_topic": message["topic"] or None,
            "port": message["port"],
            "device": message["device"],
            "received_at": message["received_at"],
            "attempt": attempt_of(record),
            "meta": message["meta"],
            **_bytes(line),
        }

    async def _notices(self, transitions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return await lineage.notices(
            self._connection,
            sorted({one["alarm_id"] for one in transitions}),
            [one["transition_id"] for one in transitions],
            NOTICES_MAX,
        )

    async def _in_clickhouse(self, stored: StoredReading) -> dict[str, Any]:
        """The row there, and whether it says the same."""
        if self._clickhouse is None:
            return {"asked": False, "why": "ClickHouse is not enabled (PRESERVARIUM_CLICKHOUSE__ENABLED)"}
        try:
            async with asyncio.timeout(ASK_S):
                row = await lineage.clickhouse_row(self._clickhouse, stored)
        except (Retry, TimeoutError) as e:
            return {"asked": False, "why": str(e) or "ClickHouse does not answer"}
        if row is None:
            return {"asked": True, "row": None, "same": False}
        mine = _row(stored)
        other = [
            name
            for name, value in row.items()
            if name not in ("ingested_at", "value") and name in mine and mine[name] != value
        ]
        if bits(row["value"]) != bits(stored.value):
            other.append("value")
        return {"asked": True, "row": row, "same": not other, "differs_in": sorted(other)}


def full_name(settings: Settings, topic: topics.Topic) -> str:
    """A topic's name in the cluster; that of the replaced service is a setting."""
    if topic is topics.DECODED:
        return settings.normalize.decoded_topic
    return topic.full(settings.kafka.topic_prefix)


# --- what is said of each step


def _identity(stored: StoredReading) -> dict[str, Any]:
    return {
        "device_id": stored.device_id,
        "connector_mode": stored.connector_mode,
        "component_type": stored.component_type,
        "pin_position": stored.pin_position,
        "timestamp": stored.timestamp,
    }


def _derivation(stored: StoredReading) -> str:
    message = {
        "device_id": stored.device_id,
        "connector_mode": stored.connector_mode,
        "timestamp": stored.timestamp,
        "received_at": stored.received_at,
        "raw_partition": stored.raw.partition,
        "raw_offset": stored.raw.offset,
        "raw_index": stored.raw.line,
        "parser": stored.parser,
        "config_rev": stored.config_rev,
        "generation": stored.generation,
    }
    reading = {"component_type": stored.component_type, "pin_position": stored.pin_position}
    return derivation_of(message, reading).id


def _row(stored: StoredReading) -> dict[str, Any]:
    return {
        "timestamp": stored.timestamp,
        "received_at": stored.received_at,
        "ingested_at": stored.ingested_at,
        "value": stored.value,
        "value_text": stored.value_text,
        "unit": stored.unit,
        "quality": stored.quality,
        "flags": list(stored.flags),
        "parser": stored.parser,
        "config_rev": stored.config_rev,
        "generation": stored.generation,
        "revised": stored.revised,
        "raw_partition": stored.raw.partition,
        "raw_offset": stored.raw.offset,
        "raw_index": stored.raw.line,
    }


def _bytes(line: bytes) -> dict[str, Any]:
    """Bytes as text where they are text, else as base64; with their hash."""
    shown = line[:RAW_SHOWN_MAX]
    found: dict[str, Any] = {"bytes": len(line), "sha256": hashlib.sha256(line).hexdigest()}
    if len(shown) < len(line):
        found["cut"] = RAW_SHOWN_MAX
    try:
        return {**found, "text": shown.decode()}
    except UnicodeDecodeError:
        return {**found, "b64": b64encode(shown).decode()}


def _parser(name: str, configuration: Configuration | None) -> dict[str, Any]:
    document = configuration.documents.parser if configuration is not None else None
    if document is None:
        return {"parser": name, "kind": None, "hash": None}
    return {"parser": name, "kind": document["kind"], "hash": document["hash"], "status": document["status"]}


def _decoded(derived: Derived | None) -> dict[str, Any] | None:
    if derived is None or derived.configuration is None:
        return None
    fields = [
        {"name": f.name, "value": _plain(f.value), "unit": f.unit, "timestamp": f.timestamp, "pin": f.pin}
        for f in derived.fields[:FIELDS_SHOWN_MAX]
    ]
    return {
        "fields": fields,
        "more": len(derived.fields) - len(fields),
        "refused": [f"{one.code}: {one}" for one in derived.refused[:CANDIDATES_MAX]],
    }


def _plain(value: Any) -> Any:
    """A value as JSON has it: what parsers find may be of classes of their own, and not finite."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**63 else str(int(value))
    number = float(value)
    return number if number - number == 0 else str(number)


def _mapping(stored: StoredReading, derived: Derived | None) -> dict[str, Any] | None:
    """Which field became the reading, by whose word, and what was calculated."""
    if derived is None or derived.configuration is None:
        return None
    reading = find(stored, derived.judged)
    mapper, documents = derived.configuration.compiled.mapper, derived.configuration.documents
    for field in derived.fields:
        target = mapper.target(field.name, field.unit, field.pin)
        if target is None or (target.component_type, target.pin_position) != (
            stored.component_type,
            stored.pin_position,
        ):
            continue
        at = derived.judged.message["timestamp"] if field.timestamp is None else field.timestamp
        if reading is not None and at != instant_of(derived.judged.message, reading):
            continue
        by, entry = "its own name", None
        for whose, document in (("the device", documents.device), ("the type", documents.type)):
            mapping: Mapping[str, Any] = (document.get("mapping") if document else None) or {}
            if field.name in mapping:
                by, entry = whose, mapping[field.name]
                break
        change = target.change
        return {
            "field": field.name,
            "by": by,
            "entry": entry,
            "component_type": target.component_type,
            "pin_position": target.pin_position,
            "value_before": _plain(field.value),
            "unit_before": field.unit or (entry or {}).get("unit"),
            "unit": target.unit,
            "kind": target.kind,
            # As fractions: what is calculated is exact, and rounded once.
            "conversion": None if change is None else {"factor": str(change.factor), "offset": str(change.offset)},
        }
    return None


def _validated(stored: StoredReading, configuration: Configuration | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "value": stored.value,
        "value_text": stored.value_text,
        "unit": stored.unit,
        "quality": stored.quality,
        "quality_name": _quality(stored.quality),
        "flags": list(stored.flags),
        "revised": stored.revised,
    }
    if configuration is None:
        return found
    check = configuration.checks.series(stored.component_type)
    said = verdicts({"unit": stored.unit}, stored.flags, check)
    bounds = finite(
        {
            "fail_min": check.fail_min,
            "fail_max": check.fail_max,
            "suspect_min": check.suspect_min,
            "suspect_max": check.suspect_max,
        }
    )
    return {**found, "tests": said, "bounds": bounds}


def _quality(quality: int) -> str:
    try:
        return Quality(quality).name.lower()
    except ValueError:
        return str(quality)


_WHY: Final[Mapping[Unverifiable, str]] = {
    Unverifiable.RAW_GONE: "Kafka has the raw record no more",
    Unverifiable.OTHER_MESSAGES: "other messages decided it, too: a later verdict, or what a counter consumed since its last state",
    Unverifiable.NO_CONFIGURATION: "the registry has not what read it",
    Unverifiable.NO_SANDBOX: "its parser is a script, and the sandbox does not start here",
}


def rederivation_text(verdict: Verdict) -> str:
    """A verdict for people."""
    if verdict.status is Status.IDENTICAL:
        return "derived again from the raw bytes: bit by bit the same"
    if verdict.why is not None:
        return f"not derived again: {_WHY[verdict.why]}" + (f" ({verdict.text})" if verdict.text else "")
    return "derived again from the raw bytes: DIFFERENT in " + ", ".join(
        f"{one.field} ({one.stored!r} is stored, {one.derived!r} comes out)" for one in verdict.differences
    )


def _rederivation(verdict: Verdict) -> dict[str, Any]:
    configuration = verdict.derived.configuration if verdict.derived is not None else None
    return {
        "status": str(verdict.status),
        "why": None if verdict.why is None else str(verdict.why),
        "text": rederivation_text(verdict),
        "registry_as_of": None if configuration is None else configuration.as_of,
        "differences": [
            {"field": one.field, "stored": _listed(one.stored), "derived": _listed(one.derived)}
            for one in verdict.differences
        ],
    }


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _not_stored(derived: Derived, rows: Sequence[StoredReading], coordinates: Coordinates) -> list[dict[str, Any]]:
    """Readings of a message that have no row of its own, with what stands in their place, or what was said of them."""
    message = derived.judged.message
    failures = {(f.reading["component_type"], f.reading["pin_position"]): f for f in derived.judged.failures}
    mode = message["connector_mode"]
    found: list[dict[str, Any]] = []
    for reading in message["readings"]:
        at = instant_of(message, reading)
        name = reading["component_type"], reading["pin_position"]
        there = [row for row in rows if (row.component_type, row.pin_position) == name and row.connector_mode == mode]
        if any(row.raw == coordinates and 0 <= row.timestamp - at <= MOVED_MAX_US for row in there):
            continue
        if name in failures:
            why = f"refused: {failures[name].code}: {failures[name].text}"
        elif standing := [row for row in there if row.timestamp == at]:
            other = standing[0]
            what = "a later verdict" if other.revised else "a row"
            why = f"{what} of raw {other.raw} stands at this instant, generation {other.generation}"
        else:
            why = "no row yet: see the errors, or the sink has not come to it"
        found.append({"component_type": name[0], "pin_position": name[1], "timestamp": at, "why": why})
    return found


def _error_of(record: Any, partition: int, offset: int, line: int | None) -> dict[str, Any] | None:
    try:
        found = orjson.loads(record.value or b"null")
    except orjson.JSONDecodeError:
        return None
    if not isinstance(found, dict) or (found.get("raw_partition"), found.get("raw_offset")) != (partition, offset):
        return None
    if line is not None and found.get("raw_index", 0) != line:
        return None
    return {
        name: found.get(name)
        for name in ("stage", "code", "message", "raw_index", "part", "attempt", "generation", "first_seen")
        if name in found
    }
