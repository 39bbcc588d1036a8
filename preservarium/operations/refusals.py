"""What was refused lately, in memory: how much of each cause over time, and the newest lines of `iot_errors` with their bytes.

Read from Kafka by whoever looks, and only while somebody looks: the topic is as large as the trouble is. Everything is bounded;
`preservarium dlq` reads all that the topic keeps.
"""

import asyncio
import base64
import binascii
import functools
import heapq
import inspect
import re
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from preservarium import topics
from preservarium.domain.readings.address import canonical_address
from preservarium.errors import ReasonCode
from preservarium.settings import Settings
from preservarium.streaming import following

S_US: Final = 1_000_000
#: How far back is looked: a day shows what comes every night.
SPAN_S: Final = 86_400
#: The least time that counts are told apart by: 96 bars a day.
BUCKET_S: Final = 900
BUCKETS: Final = SPAN_S // BUCKET_S
#: Of each partition at most so many lines are read at the begin, the newest: a second or so of work for twelve.
RECORDS_MAX: Final = 4_000
#: Lines kept, and their bytes: a line is a kilobyte or two, at most a megabyte.
KEPT_MAX: Final = 20_000
KEPT_BYTES_MAX: Final = 24 << 20
#: Devices remembered that the registry does not know.
UNKNOWN_MAX: Final = 20_000
#: Causes told apart: stages by codes are a few hundred, of which a handful happen.
CAUSES_MAX: Final = 500

#: Code -> what to do about it, for people. A test holds it complete.
REMEDIES: Final[Mapping[str, str]] = {
    ReasonCode.ENVELOPE_TOO_LARGE: "Send smaller messages, or raise normalize.payload_bytes_max and the topic's limit.",
    ReasonCode.ENVELOPE_NOT_UTF8: "Send bytes as payload_b64; text must be UTF-8 without NUL.",
    ReasonCode.ENVELOPE_NOT_JSON: "Look at the end of the bytes: a line that is torn comes from a sender that cuts or splits messages.",
    ReasonCode.ENVELOPE_TOO_DEEP: "No device needs such nesting: look at who sends it.",
    ReasonCode.ENVELOPE_INVALID: "Compare the bytes with docs/RECORDS.md: the message says which field is missing or wrong.",
    ReasonCode.ENVELOPE_NO_DEVICE: "Name the device in the envelope, or as the record's key.",
    ReasonCode.UNKNOWN_DEVICE: "Register the device, then `preservarium dlq redrive --code unknown_device`; or stop who sends it.",
    ReasonCode.DEVICE_DISABLED: "Switch the device on in the registry and redrive, or take it out of service where it stands.",
    ReasonCode.NO_PARSER: "Give the device's type a parser, or make a version of it active; then redrive.",
    ReasonCode.DECODE_FAILED: "Try the bytes with `preservarium decode`: wrong parser, other port or firmware, or a damaged payload.",
    ReasonCode.DECODE_LIMIT: "Split the message, or have the parser leave out what nobody reads.",
    ReasonCode.SCRIPT_FAULT: "Mend the script: `preservarium decode` shows where it raises for these bytes.",
    ReasonCode.SCRIPT_TIMEOUT: "Make the script cheaper for these bytes, or raise its limit.",
    ReasonCode.SCRIPT_SUSPENDED: "Mend the script and register a new version; this one is not tried again before.",
    ReasonCode.MAPPING_FAILED: "Name the field in the type's mapping, or a datatype like it.",
    ReasonCode.VALUE_TYPE: "The datatype says number, text or boolean, and the device sends another: correct one of them.",
    ReasonCode.VALUE_NOT_FINITE: "The sensor has no value: have the parser leave the field out.",
    ReasonCode.VALUE_RANGE: "The sensor says what it cannot measure: look at it, or widen the datatype's fail_span.",
    ReasonCode.COUNTER_NEGATIVE: "A meter below zero: look at scale and sign in the parser.",
    ReasonCode.QUALITY_FAIL: "The message names the test: look at the device, or at the test's parameters.",
    ReasonCode.TIMESTAMP_INVALID: "Look at the field that the parser takes the instant from, and at its unit.",
    ReasonCode.TIMESTAMP_FUTURE: "Set the device's clock, or correct its time zone.",
    ReasonCode.TIMESTAMP_BEFORE_BIRTH: "Readings of the device's predecessor, or a clock that was reset: see `birth` in the registry.",
    ReasonCode.SAME_INSTANT: "The device sends two values for one instant: see `same_instant` of its type.",
    ReasonCode.LATE_BEYOND_RETENTION: "Older than readings are kept (sink.retention_days): nothing is to be done but to send earlier.",
    ReasonCode.STORE_REJECTED: "The message has the database's words: mend what it names, then redrive.",
    ReasonCode.OUTPUT_TOO_LARGE: "Split the message: what became of it is larger than Kafka takes.",
    ReasonCode.STATE_LIMIT: "The device makes new series without end: look at the names that its parser gives.",
    ReasonCode.ACTION_INVALID: "Nothing: the alarm's state did not allow what was asked, and who asked was told.",
    ReasonCode.COMMAND_INVALID: "Whoever writes to device_commands writes what is no command: see docs/COMMANDS.md.",
    ReasonCode.NOTICE_REFUSED: "Correct the recipient's address in the registry, or his server's list.",
    ReasonCode.HANDLER_FAILED: "A defect of ours: the log has its trace. Report it with these bytes; redrive after the update.",
    ReasonCode.LEGACY_INVALID: "Compare with the fields of decoded_iot_data in docs/RECORDS.md.",
}  # fmt: skip

_MEMBER: Final = re.compile(r'"(?P<code>[a-z0-9_]+)"  #: (?P<meaning>.+)')


@functools.cache
def meanings() -> Mapping[str, str]:
    """Code -> what it means, as preservarium/errors.py says; empty where that comes without its source."""
    try:
        return {m["code"]: m["meaning"] for m in _MEMBER.finditer(inspect.getsource(ReasonCode))}
    except OSError:
        return {}


def bytes_of(line: Mapping[str, Any]) -> bytes | None:
    """The bytes that an error line has of its input; None where it has none: then `iot_raw_data` has them."""
    if isinstance(line.get("raw"), str):
        return str(line["raw"]).encode("utf-8", "surrogatepass")
    try:
        return base64.b64decode(line["raw_b64"], validate=True)
    except (KeyError, TypeError, binascii.Error, ValueError):
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """One line that is kept."""

    number: int  #: in the order of reading, of this process
    id: str  #: partition:offset in `iot_errors`
    at_us: int  #: when it was refused
    cause: tuple[str, str]  #: (stage, code)
    device: str  #: canonical address; "" where none is known
    value: bytes

    @property
    def place(self) -> tuple[int, int]:
        """What the newest come first by: of one instant, what was read last."""
        return self.at_us, self.number

    @property
    def line(self) -> dict[str, Any]:
        """The error line."""
        found: dict[str, Any] = orjson.loads(self.value)
        return found


@dataclass(slots=True)
class _Cause:
    total: int = 0  #: of the time that is looked at, as far as it was read
    last_us: int = 0
    buckets: dict[int, int] = field(default_factory=dict)  #: begin of a bucket in units of its width -> lines
    kept: deque[Kept] = field(default_factory=deque)


class Refusals:
    """What was read. For one event loop."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()  #: everything that was there when the reading began was read
        self.trouble = "not read yet"  #: why it is not followed now; "" where it is
        self.clear()

    def clear(self) -> None:
        """Forget everything: it will be read anew."""
        self.ready.clear()
        self._causes: dict[tuple[str, str], _Cause] = {}
        self._devices: dict[str, dict[str, Kept]] = {}
        self._ids: dict[str, Kept] = {}
        self._unknown: OrderedDict[str, int] = OrderedDict()
        self._bytes = 0
        self._number = 0
        self.since_us: int | None = None  #: of the oldest line that was read
        self.cut = False  #: whether older lines of the time were left out

    def take(self, records: Sequence[Any]) -> None:
        """Take records of `iot_errors`: each has partition, offset, timestamp (ms) and value. What is no line of ours is left out."""
        for record in records:
            try:
                line = orjson.loads(record.value or b"null")
                stage, code = str(line["stage"]), str(line["code"])
                at_us = int(line.get("last_seen") or record.timestamp * 1_000)
            except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
                continue
            device = canonical_address(str(line.get("device_id") or ""))
            self._number += 1
            kept = Kept(self._number, f"{record.partition}:{record.offset}", at_us, (stage, code), device, record.value)
            if kept.id in self._ids:
                continue
            self.since_us = at_us if self.since_us is None else min(self.since_us, at_us)
            self._count(kept)
            if code == ReasonCode.UNKNOWN_DEVICE and device:
                self._unknown[device] = at_us
                self._unknown.move_to_end(device)
                if len(self._unknown) > UNKNOWN_MAX:
                    self._unknown.popitem(last=False)

    def _count(self, kept: Kept) -> None:
        cause = self._causes.get(kept.cause)
        if cause is None:
            if len(self._causes) >= CAUSES_MAX:
                return
            cause = self._causes[kept.cause] = _Cause()
        cause.last_us = max(cause.last_us, kept.at_us)
        bucket = kept.at_us // (BUCKET_S * S_US)
        cause.buckets[bucket] = cause.buckets.get(bucket, 0) + 1
        if len(cause.buckets) > 2 * BUCKETS:
            del cause.buckets[min(cause.buckets)]
        cause.kept.append(kept)
        self._ids[kept.id] = kept
        if kept.device:
            self._devices.setdefault(kept.device, {})[kept.id] = kept
        self._bytes += len(kept.value)
        while len(self._ids) > KEPT_MAX or self._bytes > KEPT_BYTES_MAX:
            # Of what there is most, so that a flood of one cause does not wash the others away.
            self._drop(max(self._causes.values(), key=lambda each: len(each.kept)).kept.popleft())

    def _drop(self, kept: Kept) -> None:
        del self._ids[kept.id]
        self._bytes -= len(kept.value)
        if kept.device:
            others = self._devices[kept.device]
            del others[kept.id]
            if not others:
                del self._devices[kept.device]

    # --- asking ---

    def causes(self, now_us: int) -> list[dict[str, Any]]:
        """Causes of the last day, those that happened last first: how often, when, what it means and what to do.

        `counts` are of `BUCKETS` buckets of `BUCKET_S`, the oldest first; the last one is of now.
        """
        last = now_us // (BUCKET_S * S_US)
        first = last - BUCKETS + 1
        found: list[dict[str, Any]] = []
        for (stage, code), cause in self._causes.items():
            for old in [bucket for bucket in cause.buckets if bucket < first]:
                del cause.buckets[old]
            counts = [cause.buckets.get(bucket, 0) for bucket in range(first, last + 1)]
            if not any(counts):
                continue
            hour = sum(counts[-(3_600 // BUCKET_S) :])
            found.append({
                "stage": stage, "code": code, "day": sum(counts), "hour": hour, "last_at": cause.last_us, "counts": counts,
                "meaning": meanings().get(code, ""), "remedy": REMEDIES.get(code, ""),
            })  # fmt: skip
        found.sort(key=lambda each: (-each["hour"], -each["last_at"], each["stage"], each["code"]))
        return found

    def newest(
        self, *, stage: str = "", code: str = "", device_id: str = "", before: tuple[int, int] | None = None, limit: int
    ) -> tuple[list[Kept], tuple[int, int] | None]:
        """Lines that are kept, newest first, and `before` of the next page.

        Args:
            stage: of this stage; "" for all.
            code: of this code; "" for all.
            device_id: of this device, in any spelling; "" for all.
            before: (instant, number) of the last one of the page before.
            limit: most lines.
        """
        device = canonical_address(device_id)
        if device_id:
            lines = list(self._devices.get(device, {}).values())
        else:
            lines = [
                kept
                for (its_stage, its_code), cause in self._causes.items()
                if stage in ("", its_stage) and code in ("", its_code)
                for kept in cause.kept
            ]
        found = [
            kept
            for kept in lines
            if (before is None or kept.place < before) and stage in ("", kept.cause[0]) and code in ("", kept.cause[1])
        ]
        newest = heapq.nlargest(limit + 1, found, key=lambda kept: kept.place)
        page = newest[:limit]
        return page, page[-1].place if len(newest) > limit else None

    def get(self, identity: str) -> Kept | None:
        """A line by its id, where it is kept."""
        return self._ids.get(identity)

    def unknown(self, now_us: int) -> int:
        """Devices that sent within the last day and are in no registry, as far as it was read."""
        since = now_us - SPAN_S * S_US
        return sum(1 for at_us in self._unknown.values() if at_us >= since)


async def follow(refusals: Refusals, settings: Settings, *, now_us: int, stopped: Callable[[], bool]) -> None:
    """Read the last day, of each partition at most the newest `RECORDS_MAX` lines, then whatever comes, until `stopped`.

    Raises:
        Retry, KafkaError, OSError: as streaming/following.py.
    """
    refusals.clear()
    taken: dict[int, int] = {}

    def take(records: Sequence[Any], first: bool) -> None:
        refusals.take(records)
        if first and records:
            partition = records[0].partition
            taken[partition] = taken.get(partition, 0) + len(records)
            refusals.cut = refusals.cut or taken[partition] >= RECORDS_MAX

    def caught_up() -> None:
        refusals.trouble = ""
        refusals.ready.set()

    kafka = settings.kafka
    source = {topics.ERRORS.full(kafka.topic_prefix): max(0, now_us - SPAN_S * S_US) // 1_000}
    await following.follow(
        kafka, source, take, caught_up, client="preservarium-refusals", stopped=stopped, records_max=RECORDS_MAX
    )
