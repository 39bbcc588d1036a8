"""Whether everything that came in is somewhere: an audit of a run from durable facts.

Nothing is taken from counters, which die with a worker. What counts is what Kafka and the stores hold:

1. every raw message of the run is standardized, or in `iot_errors`,
2. the readings in the standardized topic are those that the raw messages decode to, computed once more (accounting_decode.py),
3. every standardized reading is validated, or it is in `iot_errors`,
4. every validated reading that is to be stored is in PostgreSQL and in ClickHouse: its natural key, and its value,
5. no two messages that have no time of their own share an instant: one row would stand for both,
6. no store holds a row twice.

A message that a crash made a stage write twice is harmless, because the next stage knows its coordinates; such
duplicates are counted and shown.

A run begins at a `Window`: the end offsets of the topics before it. What an earlier run left unfinished in the same
data directory is worked off by this one, but has raw coordinates before the window, and is left out.

Memory: 16 bytes a reading and topic, 16 a row and store, some 100 an error; sets are made of one 64th at a time.

Here are the books alone; accounting_facts.py reads what is put into them.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, cast

import orjson

from preservarium import topics
from preservarium.domain.readings.normalize import has_payload
from preservarium.domain.readings.reading import PIN_POSITION_NONE, ErrorLine, Message, Quality, RawMessage
from preservarium.streaming import records
from preservarium.streaming.stage import Batch
from preservarium.topics import Topic

#: Bags are compared one of so many parts at a time.
PARTS: Final = 64
_MASK: Final = (1 << 64) - 1

#: Examples of what is missing that are named.
EXAMPLES_MAX: Final = 5


def _hash(*parts: Any) -> int:
    """64 bits that stand for a tuple, for the life of this process.

    Among ten million keys the chance that any two of them collide is one in 370,000, and a collision could only hide
    a loss, not invent one.
    """
    return hash(parts) & _MASK


class Bag:
    """Keys with the identity of the message that each came from, as numbers, in bounded memory."""

    def __init__(self) -> None:
        self._parts = [array("Q") for _ in range(PARTS)]

    def add(self, key: int, identity: int) -> None:
        """Add a key; the same key may be added again."""
        part = self._parts[key % PARTS]
        part.append(key)
        part.append(identity)

    def __len__(self) -> int:
        """Keys added, duplicates included."""
        return sum(len(part) for part in self._parts) // 2

    def parts(self) -> Iterable[dict[int, int]]:
        """Distinct keys with an identity each, one part after the other."""
        for part in self._parts:
            yield dict(zip(part[::2], part[1::2], strict=True))

    def distinct(self) -> int:
        """Distinct keys."""
        return sum(len(part) for part in self.parts())

    def shared(self) -> Iterable[tuple[int, set[int]]]:
        """Keys that came with several identities, with these."""
        for part in self._parts:
            identities: dict[int, set[int]] = {}
            for key, identity in set(zip(part[::2], part[1::2], strict=True)):
                identities.setdefault(key, set()).add(identity)
            yield from ((key, found) for key, found in identities.items() if len(found) > 1)

    def compare(
        self, other: "Bag", excused: AbstractSet[int] = frozenset(), keys: AbstractSet[int] = frozenset()
    ) -> "Comparison":
        """How the keys here compare with the keys of another bag.

        Args:
            other: where the keys should be too.
            excused: identities whose keys may be missing there.
            keys: keys that may be missing there.
        """
        both = missing = excuses = extra = 0
        examples: list[int] = []
        for mine, theirs in zip(self.parts(), other.parts(), strict=True):
            both += len(mine.keys() & theirs.keys())
            extra += len(theirs.keys() - mine.keys())
            for key in mine.keys() - theirs.keys():
                if key in keys or mine[key] in excused:
                    excuses += 1
                else:
                    missing += 1
                    if len(examples) < EXAMPLES_MAX:
                        examples.append(mine[key])
        return Comparison(both, missing, excuses, extra, examples)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Distinct keys of one bag against another."""

    both: int
    missing: int  #: here, not there, and not excused
    excused: int  #: here, not there, and their message is in iot_errors
    extra: int  #: there, not here
    examples: list[int]  #: identities of some that are missing


@dataclass(frozen=True, slots=True)
class Window:
    """Where a run begins: per topic (declared name) and partition the first offset that belongs to it."""

    start: Mapping[str, Mapping[int, int]]

    def holds(self, raw_partition: Any, raw_offset: Any) -> bool:
        """Whether a message with these raw coordinates belongs to the run."""
        starts = self.start.get(topics.RAW.name, {})
        return isinstance(raw_offset, int) and raw_partition in starts and raw_offset >= starts[raw_partition]


#: What the raw topic's messages should have become: the pure normalizer with the registry of the run. None means that
#: it is refused.
Decode = Callable[[RawMessage], Message | None]


class ScriptDecode(Protocol):
    """The same for devices whose parser is a script: many at once, in the sandbox."""

    def wants(self, device_id: str) -> bool:
        """Whether this device's parser is a script."""
        ...

    async def decode(self, raws: Sequence[RawMessage]) -> list[Message | None]:
        """What each became; None: it is refused."""
        ...


class Ledger:
    """The audit's books: feed it every line of the run's topics, then every row, then ask for the account.

    Args:
        window: where the run begins.
        decode: makes readings of a raw message; None leaves check 2 out.
        scripts: the same for devices whose parser is a script.
        store_failed: whether values flagged fail are stored (`quality.store_failed`).
    """

    def __init__(
        self,
        window: Window,
        decode: Decode | None,
        *,
        scripts: ScriptDecode | None = None,
        store_failed: bool = False,
    ) -> None:
        self._window = window
        self._scripts = scripts
        self._script_messages: list[tuple[int, RawMessage]] = []
        self._decode = decode
        self._store_failed = store_failed
        self.raw = Bag()
        self.decoded = Bag()  # readings that the raw messages decode to
        self.standardized_messages = Bag()
        self.standardized = Bag()  # readings
        self.validated_messages = Bag()
        self.validated = Bag()  # readings
        self.to_store = Bag()  # rows, by natural key and value, of the readings that belong into the stores
        #: natural keys of those whose instant is that of their receipt: no two messages may have one
        self.received_keys = Bag()
        self.replaced: set[int] = set()  # rows that a later value of the same instant has overwritten on purpose
        self.stores: dict[str, Bag] = {}
        self.unmerged: dict[str, int] = {}
        self.errors: Counter[tuple[str, str]] = Counter()  # (stage, code) -> lines that differ
        self.errors_by_identity: dict[str, set[int]] = {}  # stage -> identities
        #: stage -> identities of error lines that do not say which readings were refused
        self.refused_whole: dict[str, set[int]] = {}
        self.refused_readings: dict[str, set[int]] = {}  # stage -> readings
        self.refused_rows: dict[str, set[int]] = {}  # stage -> rows
        self._error_lines: set[int] = set()
        self.errors_again = 0  # lines that were there already
        self.error_lines_unplaced = 0  # without raw coordinates
        self.earlier: Counter[str] = Counter()  # topic -> lines of messages from before the run
        self.timestamp_min: int | None = None
        self.timestamp_max: int | None = None

    # --- topics ---

    def add_raw(self, batch: Batch, *, payload_bytes_max: int) -> None:
        """Take records of `iot_raw_data`."""
        for record in batch.records:
            messages, refused = records.parse_raw(
                record, batch.topic, batch.partition, payload_bytes_max=payload_bytes_max
            )
            for line in refused:
                identity = self._identity(line["partition"], line["offset"], line["index"])
                self.raw.add(_hash(identity), identity)
            for raw in messages:
                if not has_payload(raw):
                    continue  # an event of the network alone
                identity = self._identity(raw["raw_partition"], raw["raw_offset"], raw["raw_index"])
                self.raw.add(_hash(identity), identity)
                if self._scripts is not None and self._scripts.wants(raw["device"]):
                    self._script_messages.append((identity, raw))
                elif self._decode is not None and (message := self._decode(raw)) is not None:
                    for reading in message["readings"]:
                        self.decoded.add(self._reading(identity, message, reading), identity)

    async def run_scripts(self) -> None:
        """Decode what `add_raw` has left to scripts."""
        if self._scripts is None or not self._script_messages:
            return
        waiting, self._script_messages = self._script_messages, []
        made = await self._scripts.decode([raw for _, raw in waiting])
        for (identity, _), message in zip(waiting, made, strict=True):
            for reading in message["readings"] if message is not None else ():
                self.decoded.add(self._reading(identity, cast(Message, message), reading), identity)

    def add_standardized(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take lines of `iot_standardized_data`."""
        for line in lines:
            if "silent_below" in line:
                continue  # says that a device is silent (validate), and holds no reading
            identity = self._of_run(line, topics.STANDARDIZED)
            if identity is None:
                continue
            self.standardized_messages.add(_hash(identity), identity)
            for reading in line["readings"]:
                self.standardized.add(self._reading(identity, line, reading), identity)

    def add_validated(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take lines of `iot_validated_data`."""
        for line in lines:
            identity = self._of_run(line, topics.VALIDATED)
            if identity is None:
                continue
            self.validated_messages.add(_hash(identity), identity)
            for reading in line.get("repeated", ()):  # the stores have it from the message that came before
                self.validated.add(self._reading(identity, line, reading), identity)
            for reading, counts, is_stored in validated_readings(line, store_failed=self._store_failed):
                if reading.get("revised"):
                    old = reading["replaces"]
                    texts = (None, old) if isinstance(old, str) else (old, None)
                    self.replaced.add(_row(self._key(line, reading), *texts))
                if counts:
                    self.validated.add(self._reading(identity, line, reading), identity)
                if not is_stored:
                    continue
                timestamp = reading.get("timestamp", line["timestamp"])
                self.timestamp_min = min(timestamp, self.timestamp_min if self.timestamp_min is not None else timestamp)
                self.timestamp_max = max(timestamp, self.timestamp_max if self.timestamp_max is not None else timestamp)
                key = self._key(line, reading)
                self.to_store.add(_row(key, reading.get("value"), reading.get("value_text")), identity)
                if line.get("clock") == "received" and "timestamp" not in reading and line.get("attempt", 1) == 1:
                    self.received_keys.add(key, identity)

    def add_errors(self, lines: Iterable[ErrorLine | Mapping[str, Any]]) -> None:
        """Take lines of `iot_errors`."""
        for line in lines:
            partition, offset = line.get("raw_partition"), line.get("raw_offset")
            if partition is None or offset is None:
                self.error_lines_unplaced += 1
                continue
            if not self._window.holds(partition, offset):
                self.earlier[topics.ERRORS.name] += 1
                continue
            identity = self._identity(partition, offset, line.get("raw_index", 0))
            self.errors_by_identity.setdefault(line["stage"], set()).add(identity)
            # What was refused stands in the line; only its times differ when a crash makes a stage say it again.
            same = _hash(identity, *(line.get(name) for name in ("stage", "code", "message", "raw", "raw_b64")))
            if same in self._error_lines:
                self.errors_again += 1
                continue
            self._error_lines.add(same)
            self.errors[line["stage"], line["code"]] += 1
            self._refused(line, identity)

    def _refused(self, line: Mapping[str, Any], identity: int) -> None:
        """Note which readings an error line is about: the others of its message are not excused by it."""
        stage = line["stage"]
        messages = refused_messages(line)
        if not messages:
            if "raw" in line or "raw_b64" in line:
                self.refused_whole.setdefault(stage, set()).add(identity)
            return
        readings, rows = self.refused_readings.setdefault(stage, set()), self.refused_rows.setdefault(stage, set())
        for message in messages:
            whose = self._identity(message["raw_partition"], message["raw_offset"], message["raw_index"])
            for reading in message["readings"]:
                readings.add(self._reading(whose, message, reading))
                rows.add(_row(self._key(message, reading), reading.get("value"), reading.get("value_text")))

    def _of_run(self, line: Mapping[str, Any], topic: Topic) -> int | None:
        if line.get("generation", 0) or not self._window.holds(line["raw_partition"], line["raw_offset"]):
            self.earlier[topic.name] += 1
            return None
        return self._identity(line["raw_partition"], line["raw_offset"], line["raw_index"])

    @staticmethod
    def _identity(partition: int, offset: int, index: int) -> int:
        # Packed, not hashed, so that an example can be named again: 12 bits partition, 36 offset, 16 index.
        return (partition & 0xFFF) << 52 | (offset & 0xFFFFFFFFF) << 16 | index & 0xFFFF

    @staticmethod
    def name(identity: int) -> str:
        """Raw coordinates of an identity: partition/offset/index."""
        return f"{identity >> 52}/{identity >> 16 & 0xFFFFFFFFF}/{identity & 0xFFFF}"

    @staticmethod
    def _reading(identity: int, message: Mapping[str, Any], reading: Mapping[str, Any]) -> int:
        return _hash(
            identity,
            reading["component_type"],
            reading.get("pin_position", PIN_POSITION_NONE),
            reading.get("timestamp", message.get("moved_from", message["timestamp"])),
        )

    @staticmethod
    def _key(message: Mapping[str, Any], reading: Mapping[str, Any]) -> int:
        return natural_key(
            message["device_id"],
            message["connector_mode"],
            reading["component_type"],
            reading.get("pin_position", PIN_POSITION_NONE),
            reading.get("timestamp", message["timestamp"]),
        )

    # --- stores ---

    def add_rows(self, store: str, rows: Iterable[Sequence[Any]]) -> None:
        """Take rows of a store: device_id, connector_mode, component_type, pin_position, timestamp in µs, value, value_text."""
        bag = self.stores.setdefault(store, Bag())
        for device_id, mode, component_type, pin_position, timestamp, value, text in rows:
            key = _row(natural_key(device_id, mode, component_type, pin_position, timestamp), value, text)
            bag.add(key, key)

    # --- account ---

    def _excused(self, stage: str, refused: Mapping[str, set[int]]) -> tuple[set[int], set[int]]:
        """Identities whose readings may all be missing behind a stage, and the keys that may."""
        return self.refused_whole.get(stage, set()), refused.get(stage, set())

    def account(self) -> "Account":
        """Close the books."""
        normalize_errors = self.errors_by_identity.get("normalize", set())
        account = Account()
        raw_messages = self.raw.distinct()
        readings_in: int | None = None

        messages = self.raw.compare(self.standardized_messages, normalize_errors)
        account.check(
            "raw messages neither standardized nor in iot_errors", messages.missing, map(self.name, messages.examples)
        )
        if self._decode is not None:
            readings_in = self.decoded.distinct()
            decoded = self.decoded.compare(self.standardized, normalize_errors)
            account.check(
                "readings that the raw messages hold and the standardized topic does not",
                decoded.missing,
                map(self.name, decoded.examples),
            )
            account.check("standardized readings that no raw message holds", decoded.extra, ())
        validated = self.standardized.compare(self.validated, *self._excused("validate", self.refused_readings))
        account.check(
            "standardized readings neither validated nor in iot_errors",
            validated.missing,
            map(self.name, validated.examples),
        )
        to_store = self.to_store.distinct()
        told = self.errors_by_identity.get("sink", set())
        alike = [left for _, found in self.received_keys.shared() if len(left := found - told) > 1]
        account.check(
            "messages without a time of their own that share an instant with another: one row for several",
            sum(len(found) - 1 for found in alike),
            (self.name(identity) for found in alike[:EXAMPLES_MAX] for identity in sorted(found)[1:2]),
        )
        rows: dict[str, int] = {}
        for store, bag in self.stores.items():
            stage = {"postgres": "sink", "clickhouse": "sync"}.get(store, store)
            identities, refused = self._excused(stage, self.refused_rows)
            stored = self.to_store.compare(bag, identities, refused | self.replaced)
            rows[store] = stored.both
            account.check(f"validated readings not in {store}", stored.missing, map(self.name, stored.examples))
            account.check(f"rows twice in {store}", len(bag) - bag.distinct(), ())

        account.facts = {
            "raw_messages": raw_messages,
            "readings_in": readings_in,
            "standardized": self.standardized.distinct(),
            "validated": self.validated.distinct(),
            "refused_by_validate": validated.excused,
            "to_store": to_store,
            "stored": rows,
            "errors": sum(self.errors.values()),
            "errors_by_code": {f"{stage}.{code}": n for (stage, code), n in sorted(self.errors.items())},
            "errors_unplaced": self.error_lines_unplaced,
            "duplicates_between_stages": {
                "standardized": len(self.standardized_messages) - self.standardized_messages.distinct(),
                "validated": len(self.validated_messages) - self.validated_messages.distinct(),
                "errors": self.errors_again,
            },
            "sent_again": sum(len(found) - 1 for _, found in self.to_store.shared()),
            "unmerged_rows": dict(self.unmerged),
            "lines_of_earlier_runs": dict(self.earlier),
        }
        return account


def _row(key: int, value: Any, text: Any) -> int:
    """The number that stands for a row: its natural key and what it says. ClickHouse has no NULL text, and no text is empty."""
    return _hash(key, None if value is None else float(value), text or None)


def validated_readings(
    line: Mapping[str, Any], *, store_failed: bool
) -> Iterator[tuple[Mapping[str, Any], bool, bool]]:
    """The readings of a validated message: each with whether something before it is like it, and whether stores are to have it."""
    for reading in line["readings"]:
        # A later verdict on a reading that stands before is no reading of its own; a later value is.
        if reading.get("revised") and "replaces" not in reading:
            continue
        is_stored = reading.get("value") is not None or reading.get("value_text") is not None
        if reading.get("quality") == Quality.FAIL and not store_failed:
            is_stored = False
        yield reading, not reading.get("derived"), is_stored


def refused_messages(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of ours that an error line holds; none where it holds something else, or a part."""
    if str(line.get("message", "")).endswith(" bytes kept]"):
        return []
    found = []
    for text in str(line.get("raw", "")).split("\n"):
        try:
            parsed = orjson.loads(text)
        except orjson.JSONDecodeError:
            return []
        if (
            not isinstance(parsed, dict)
            or not {"readings", "raw_partition", "raw_offset", "raw_index"} <= parsed.keys()
        ):
            return []
        found.append(parsed)
    return found


def natural_key(device_id: str, mode: str, component_type: str, pin_position: str, timestamp_us: int) -> int:
    """The number that stands for a row's natural key."""
    return _hash(device_id, mode, component_type, pin_position, timestamp_us)


@dataclass(slots=True)
class Account:
    """The outcome."""

    facts: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)

    def check(self, what: str, count: int, examples: Iterable[str]) -> None:
        """Note something that must be zero."""
        self.checks.append({"what": what, "count": count, "examples": [*examples] if count else []})

    @property
    def adds_up(self) -> bool:
        """Whether everything that must be zero is."""
        return all(check["count"] == 0 for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """The account as one object."""
        return {"adds_up": self.adds_up, **self.facts, "checks": self.checks}

    def lines(self) -> list[str]:
        """The account for people."""
        f = self.facts
        rows: list[tuple[str, Any, str]] = [
            ("raw messages", f["raw_messages"], ""),
            ("readings in", f["readings_in"], "decoded once more from the raw topic"),
            ("standardized", f["standardized"], ""),
            ("validated", f["validated"], f"{f['refused_by_validate']:,} refused" if f["refused_by_validate"] else ""),
            ("to be stored", f["to_store"], _note_again(f["sent_again"])),
        ]
        names = {"postgres": "PostgreSQL", "clickhouse": "ClickHouse"}
        for store, n in f["stored"].items():
            unmerged = f["unmerged_rows"].get(store)
            rows.append((f"stored in {names.get(store, store)}", n, f"{unmerged:,} not merged yet" if unmerged else ""))
        codes = ", ".join(f"{code} {n:,}" for code, n in f["errors_by_code"].items())
        rows.append(("errors", f["errors"], codes))
        twice = f["duplicates_between_stages"]
        rows.append(
            (
                "sent twice",
                sum(twice.values()),
                "between stages, after a crash; dropped by the next stage" if sum(twice.values()) else "",
            )
        )
        width = max(len(name) for name, _, _ in rows)
        out = []
        for name, value, note in rows:
            number = "–" if value is None else f"{value:,}"
            out.append(f"  {name:<{width}}  {number:>12}" + (f"  {note}" if note else ""))
        for check in self.checks:
            if check["count"]:
                examples = f" (raw {', '.join(check['examples'])})" if check["examples"] else ""
                out.append(f"  MISSING OR WRONG: {check['count']:,} {check['what']}{examples}")
        out.append(f"  adds up: {'yes' if self.adds_up else 'no'}")
        return out


def _note_again(n: int) -> str:
    return f"{n:,} more say the same again (one row each)" if n else ""
