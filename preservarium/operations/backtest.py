"""What alarm rules would have done over stored readings, by the code that runs live (`DeviceAlarms`).

Readings come device by device in the order of event time, so what came late is in its place: a back-test says what
should have been told, which differs from what was told where data were late. Nobody acknowledges in it. Operators'
shelving and the like are not repeated.

The devices are cut into pieces of about a million readings, and each process takes the next piece when it is done with
one: what is held in memory is a piece's alarms and a few kilobytes of readings.
"""

import asyncio
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from heapq import nlargest
from pathlib import Path
from typing import Any, Final, cast

import asyncpg
import orjson

from preservarium.domain.alarms.history import AlarmKey, Difference, Playback, Tally, compare
from preservarium.domain.alarms.rule import DeviceRules
from preservarium.domain.alarms.rules import compile_rules
from preservarium.domain.registry.device import DatatypeDoc, DeviceDoc, DeviceTypeDoc, RuleDoc
from preservarium.domain.registry.documents import SECTIONS
from preservarium.errors import PreservariumError
from preservarium.notices.grouping import Policies
from preservarium.operations.backtest_notices import Heard, kept, played
from preservarium.registry.catalogue import Catalogue
from preservarium.registry.file import read as read_registry
from preservarium.settings import LiveSettings, Settings
from preservarium.stores import history
from preservarium.stores.connections import connect
from preservarium.stores.registry import spelled

#: A connection must stand within this time.
CONNECT_S: Final = 60.0
#: Alarms that a report lists one by one, those raised most often; the sums are of all.
LISTED_MAX: Final = 1_000
#: Transitions that are kept to say which notices they would have made, some 100 bytes each. Whoever gets more needs no
#: count of notices but a better rule.
HEARD_MAX: Final = 50_000
#: Component types that an error names.
STORED_SHOWN_MAX: Final = 20
#: More processes than that wait for PostgreSQL.
PROCESSES_MAX: Final = 4
#: Readings of one device that go to `DeviceAlarms` together: what a call costs is then less than a hundredth of what its
#: readings cost, and they take some 200 KB.
MESSAGE_READINGS_MAX: Final = 512
#: Readings after which the progress is told.
_TOLD_EVERY: Final = 20_000


class BacktestError(PreservariumError):
    """A back-test that cannot be made."""


@dataclass(frozen=True, slots=True)
class Test:
    """What is to be evaluated; crosses the border between processes."""

    dsn: str
    rules: Mapping[str, RuleDoc]  #: by name: the rules under test
    everywhere: frozenset[
        str
    ]  #: of them, those that no type and no device has: they watch every device with such a series
    component_types: tuple[str, ...]  #: what must be read
    from_us: int
    to_us: int
    against_live: bool = False
    devices: tuple[str, ...] | None = None  #: None: all
    companions: bool = True  #: the live rules of their suppression groups take part, too
    problems: tuple[str, ...] = ()  #: what was seen in the preparation, for people


@dataclass(slots=True)
class Result:
    """What a piece, or all of them, came to."""

    readings: int = 0
    devices: int = 0
    unknown_devices: int = 0  #: that have readings and are not in the registry: not evaluated
    rules: dict[str, Tally] = field(default_factory=dict)  #: sums by rule
    live: dict[str, Tally] = field(default_factory=dict)  #: the same of the live rules
    alarms: list[tuple[AlarmKey, Tally]] = field(default_factory=list)  #: most often raised first
    differing: int = 0  #: alarms that are not the same under both rules
    difference: dict[str, Difference] = field(default_factory=dict)  #: by rule
    told: dict[str, int] = field(default_factory=dict)  #: recipient -> transitions
    #: piece's first device -> transitions for `backtest_notices`, packed; none where there are too many
    heard: dict[str, bytes] = field(default_factory=dict)
    transitions: int = 0  #: how many they were
    #: recipient -> kind -> notices that would have gone out; None: too many transitions to say
    notices: dict[str, dict[str, int]] | None = None
    companions: dict[str, int] = field(default_factory=dict)  #: live rule of a suppression group -> devices with it
    problems: list[str] = field(default_factory=list)

    def add(self, other: "Result") -> None:
        """Take in another piece's."""
        self.readings += other.readings
        self.devices += other.devices
        self.unknown_devices += other.unknown_devices
        self.differing += other.differing
        for mine, theirs in ((self.rules, other.rules), (self.live, other.live)):
            for rule, tally in theirs.items():
                _sum(mine.setdefault(rule, Tally()), tally)
        for rule, difference in other.difference.items():
            self.difference.setdefault(rule, Difference()).add(difference)
        for counts, more in ((self.told, other.told), (self.companions, other.companions)):
            for name, count in more.items():
                counts[name] = counts.get(name, 0) + count
        self.transitions += other.transitions
        self.heard = {**self.heard, **other.heard} if self.transitions <= HEARD_MAX else {}
        self.alarms = nlargest(LISTED_MAX, [*self.alarms, *other.alarms], key=lambda one: (one[1].raised, one[0]))
        self.problems = list(dict.fromkeys([*self.problems, *other.problems]))[:LISTED_MAX]

    def document(self, test: Test) -> dict[str, Any]:
        """As JSON. Instants µs since the epoch, durations seconds."""
        against = {rule: one.document() for rule, one in sorted(self.difference.items())} if test.against_live else None
        return {
            "from": test.from_us,
            "to": test.to_us,
            "readings": self.readings,
            "devices": self.devices,
            "unknown_devices": self.unknown_devices,
            "rules": {rule: _sums(tally) for rule, tally in sorted(self.rules.items())},
            "live": {rule: _sums(tally) for rule, tally in sorted(self.live.items())} if test.against_live else None,
            "against_live": against,
            "alarms_differing": self.differing if test.against_live else None,
            "companions": dict(sorted(self.companions.items())) if test.companions else None,
            "notices": self.notices,
            "transitions_told": dict(sorted(self.told.items())),
            "alarms": [{**key._asdict(), **tally.document()} for key, tally in self.alarms],
            "problems": [*test.problems, *self.problems],
        }


def _sum(into: Tally, other: Tally) -> None:
    into.raised += other.raised
    into.cleared += other.cleared
    into.active_us += other.active_us
    into.longest_us = max(into.longest_us, other.longest_us)
    into.standing += other.standing
    into.chatter += other.chatter
    into.suppressed += other.suppressed
    into.first_out += other.first_out
    into.severity = other.severity
    firsts = [at for at in (into.first_at, other.first_at) if at is not None]
    lasts = [at for at in (into.last_at, other.last_at) if at is not None]
    into.first_at, into.last_at = min(firsts, default=None), max(lasts, default=None)


def _sums(tally: Tally) -> dict[str, Any]:
    return {name: value for name, value in tally.document().items() if name != "severity"}


# --- preparation -----------------------------------------------------------------------------------------------------


def rules_of(path: Path, names: Iterable[str] = ()) -> dict[str, RuleDoc]:
    """The rules of a registry file.

    Args:
        path: the file; its other sections are not used.
        names: take only these; none: all.

    Raises:
        BacktestError: it has no such rule, or one that is wrong.
        RegistryFileError: it cannot be read.
    """
    file = read_registry(path)
    if errors := [problem for problem in file.errors if not problem.path or problem.path.startswith("rules")]:
        message = "; ".join(map(str, errors[:5]))
        raise BacktestError(message)
    found = {doc["name"]: cast(RuleDoc, {**doc, "rev": 0}) for doc in file.documents.get(SECTIONS["rules"], [])}
    wanted = tuple(names)
    if missing := [name for name in wanted if name not in found]:
        message = f"{path}: has no rule {', '.join(missing)}; it has: {', '.join(found) or 'none'}"
        raise BacktestError(message)
    if not found:
        message = f"{path}: has no rules"
        raise BacktestError(message)
    return {name: found[name] for name in wanted} if wanted else found


class Documents:
    """The registry as it is now, without the devices: they are too many."""

    def __init__(self, documents: Mapping[str, Mapping[str, Any]]) -> None:
        self.documents = documents

    @classmethod
    async def load(cls, connection: asyncpg.Connection) -> "Documents":
        """Read them."""
        documents = {}
        for kind, table in (("rule", "alarm_rules"), ("type", "device_types"), ("datatype", "datatypes")):
            rows = await connection.fetch(f"SELECT name, rev, doc FROM {table}")
            documents[kind] = {row["name"]: {**orjson.loads(row["doc"]), "rev": row["rev"]} for row in rows}
        return cls(documents)

    def rule(self, name: str) -> RuleDoc | None:
        """The alarm rule of that name."""
        return self.documents["rule"].get(name)

    def type(self, name: str) -> DeviceTypeDoc | None:
        """The device type of that name."""
        return self.documents["type"].get(name)

    def datatype(self, name: str) -> DatatypeDoc | None:
        """The datatype of that name."""
        return self.documents["datatype"].get(name)


def needs(rules: DeviceRules) -> set[str]:
    """Component types that the rules take in."""
    return {
        component_type
        for rule in rules.by_name.values()
        for component_type in (rule.component_type, *(each.component_type for each in rule.inputs))
    }


async def prepare(
    connection: asyncpg.Connection,
    settings: Settings,
    rules: Mapping[str, RuleDoc],
    *,
    from_us: int,
    to_us: int,
    against_live: bool = False,
    devices: Sequence[str] | None = None,
    companions: bool = True,
) -> Test:
    """Look up what a back-test needs of the registry.

    A rule watches the devices that the registry gives a rule of its name, under their overrides; one that no device type
    and no device has watches every device with such a series. The live rules of its suppression groups, as the device has
    them, take part unless `companions` is false.

    Raises:
        BacktestError: a rule cannot be used, a device is not known, or nothing is stored that a rule could watch.
    """
    if to_us <= from_us:
        message = "the time to look at is empty: --to is not after --from"
        raise BacktestError(message)
    documents = await Documents.load(connection)
    named = {name for one in documents.documents["type"].values() for name in one.get("rules") or ()}
    rows = await connection.fetch(
        "SELECT DISTINCT rule.key, rule.value ->> 'group' AS group FROM devices, json_each(doc -> 'rules') AS rule"
        " WHERE json_typeof(doc -> 'rules') = 'object'"
    )
    named.update(row["key"] for row in rows)
    if devices is not None:
        devices = [await spelled(connection, device_id) for device_id in devices]
        known = await connection.fetch("SELECT device_id FROM devices WHERE device_id = ANY($1)", list(devices))
        if missing := sorted(set(devices) - {row["device_id"] for row in known}):
            message = f"not in the registry: {', '.join(missing)}"
            raise BacktestError(message)
    grouped = {(row["key"], row["group"]) for row in rows if row["group"]}
    grouped |= {(name, _group(doc)) for name, doc in documents.documents["rule"].items() if _group(doc)}
    needed: set[str] = set()
    for look_up in (rules.get, documents.rule) if against_live else (rules.get,):
        present: dict[str, dict[str, Any]] = {name: {} for name in rules if look_up(name) is not None}
        probe = cast(DeviceDoc, {"device_id": "", "rev": 0, "type": "", "enabled": True, "rules": present})
        compiled = compile_rules(probe, None, look_up, documents.datatype)
        if compiled.problems:
            raise BacktestError("; ".join(compiled.problems))
        needed |= needs(compiled)
        groups = {_group(look_up(name)) for name in present} | {group for name, group in grouped if name in rules}
        for name in {name for name, group in grouped if group in groups and name not in rules} if companions else ():
            alone = cast(DeviceDoc, {**probe, "rules": {name: {}}})
            needed |= needs(compile_rules(alone, None, documents.rule, documents.datatype))
    rows = await connection.fetch("SELECT DISTINCT component_type FROM series ORDER BY component_type LIMIT 1000")
    stored = [row["component_type"] for row in rows]
    unknown = [f"no series of component type {one} is stored" for one in sorted(needed - set(stored))]
    if len(unknown) == len(needed):
        message = f"{'; '.join(unknown)}; there are: {', '.join(stored[:STORED_SHOWN_MAX]) or 'none'}"
        raise BacktestError(message)
    if against_live:
        unknown += [
            f"rule {name}: not live, so nothing to compare it with" for name in rules if not documents.rule(name)
        ]
    return Test(
        dsn=settings.postgres.session_dsn,
        rules=dict(rules),
        everywhere=frozenset(set(rules) - named),
        component_types=tuple(sorted(needed)),
        from_us=from_us,
        to_us=to_us,
        against_live=against_live,
        devices=None if devices is None else tuple(devices),
        companions=companions,
        problems=tuple(unknown),
    )


def _group(doc: Mapping[str, Any] | None, override: Mapping[str, Any] | None = None) -> str:
    """The suppression group of a rule; "" where it has none."""
    group: str = {**(doc or {}), **(override or {})}.get("group") or ""
    return group


def _restricted(
    device: DeviceDoc, test: Test, documents: Documents, rule: Callable[[str], RuleDoc | None]
) -> DeviceRules:
    """The device's rules of those under test, with the live ones of their suppression groups."""
    overrides = device.get("rules") or {}
    device_type = documents.type(device["type"])
    inherited = (device_type.get("rules") or []) if device_type else []
    names = [name for name in test.rules if name in inherited or name in overrides or name in test.everywhere]
    chosen = {name: overrides.get(name, {}) for name in names if rule(name) is not None}
    groups = {_group(rule(name), one) for name, one in chosen.items() if one is not None} - {""}
    for name in dict.fromkeys([*inherited, *overrides]) if test.companions and groups else ():
        override = overrides.get(name, {})
        if name not in test.rules and override is not None and _group(documents.rule(name), override) in groups:
            chosen[name] = override

    def look_up(name: str) -> RuleDoc | None:
        return rule(name) if name in test.rules else documents.rule(name)

    # The type's rules are not under test, but what it says of datatypes holds.
    of_type = cast(DeviceTypeDoc, {**device_type, "rules": []}) if device_type else None
    return compile_rules(cast(DeviceDoc, {**device, "rules": chosen}), of_type, look_up, documents.datatype)


# --- evaluation ------------------------------------------------------------------------------------------------------


class Assembler:
    """Makes messages of rows: readings of one device, in the order of their times; those of one instant are never parted.

    What a message costs is shared by its readings, so one holds as many as it may, whatever the devices sent.

    Args:
        series: what the rows' numbers mean.
        emit: called with device and message, in order.
        readings_max: of a message, unless one instant has more; 1: a message is what the device said at an instant.
    """

    def __init__(
        self,
        series: Sequence[history.Series],
        emit: Callable[[str, dict[str, Any]], None],
        readings_max: int = MESSAGE_READINGS_MAX,
    ) -> None:
        self._series = series
        self._emit = emit
        self._readings_max = readings_max
        self._number = -1
        self._readings: list[dict[str, Any]] = []
        self._position = 0

    def take(self, rows: Iterable[history.Row]) -> int:
        """Take rows; how many they were."""
        series, readings, readings_max = self._series, self._readings, self._readings_max
        last = self._number
        one = series[last]  # of -1, any: there are no readings of it yet
        component_type, pin_position = one.component_type, one.pin_position
        before = readings[-1]["timestamp"] if readings else 0
        count = 0
        for number, at, value, quality in rows:
            count += 1
            at += history.EPOCH_US
            if number != last:
                following = series[number]
                component_type, pin_position = following.component_type, following.pin_position
                if readings and following.device_id != one.device_id:
                    self._send(one.device_id, readings)
                    readings = []
                last, one = number, following
            if at != before:
                if len(readings) >= readings_max:
                    self._send(one.device_id, readings)
                    readings = []
                before = at
            reading: dict[str, Any] = {
                "component_type": component_type,
                "pin_position": pin_position,
                "value": value if value == value else None,
                "quality": quality,
                "timestamp": at,
            }
            if quality >= history.UNIT_UNKNOWN:
                reading["quality"] -= history.UNIT_UNKNOWN
                reading["flags"] = ["unit_unknown"]
            readings.append(reading)
        self._number, self._readings = last, readings
        return count

    def finish(self) -> None:
        """Emit the last message."""
        if self._readings:
            self._send(self._series[self._number].device_id, self._readings)
            self._readings = []

    def _send(self, device_id: str, readings: list[dict[str, Any]]) -> None:
        self._position += 1
        self._emit(
            device_id,
            {
                "generation": 0,
                # Its place in the playback: the raw coordinates are in the order of arrival, which is another one.
                "raw_partition": 0,
                "raw_offset": self._position,
                "raw_index": 0,
                "timestamp": readings[0]["timestamp"],
                "received_at": readings[-1]["timestamp"],  # nothing came late
                "readings": readings,
            },
        )


class _Piece:
    """The evaluation of one piece."""

    def __init__(
        self,
        test: Test,
        documents: Documents,
        devices: Mapping[str, DeviceDoc],
        series: Sequence[history.Series],
        told: Callable[[int], None],
    ) -> None:
        self.result = Result()
        self._test = test
        self._documents = documents
        self._devices = devices
        self._assembler = Assembler(series, self._message)
        self._told = told
        self._device_id: str | None = None
        self._new: Playback | None = None
        self._live: Playback | None = None
        self._unsaid = 0
        self._heard = Heard()
        self._first = series[0].device_id if series else ""

    def take(self, rows: Iterator[history.Row]) -> None:
        """Take rows, device after device."""
        count = self._assembler.take(rows)
        self.result.readings += count
        self._unsaid += count
        if self._unsaid >= _TOLD_EVERY:
            self._told(self._unsaid)
            self._unsaid = 0

    def _message(self, device_id: str, message: dict[str, Any]) -> None:
        if device_id != self._device_id:
            self._close()
            self._open(device_id)
        if self._new is not None:
            self._new.take(message)
        if self._live is not None:
            self._live.take(message)

    def _open(self, device_id: str) -> None:
        self._device_id = device_id
        self._new = self._live = None
        device = self._devices.get(device_id)
        if device is None:
            self.result.unknown_devices += 1
            return
        rules = _restricted(device, self._test, self._documents, self._test.rules.get)
        self.result.problems += [f"{device_id}: {problem}" for problem in rules.problems]
        live = (
            _restricted(device, self._test, self._documents, self._documents.rule) if self._test.against_live else None
        )
        tested = frozenset(self._test.rules)
        if tested.isdisjoint(rules.by_name) and (live is None or tested.isdisjoint(live.by_name)):
            return
        self._new = Playback(device_id, rules, tested, heard=self._hear)
        self._live = Playback(device_id, live, tested) if live is not None else None
        self.result.devices += 1
        for name in (rules.by_name.keys() | (live.by_name.keys() if live is not None else ())) - tested:
            self.result.companions[name] = self.result.companions.get(name, 0) + 1

    def _hear(self, transitions: Sequence[Mapping[str, Any]]) -> None:
        for one in transitions:
            if one["rule"] not in self._test.rules:
                continue
            self.result.transitions += 1
            if self._heard.count >= HEARD_MAX:
                continue
            device = self._devices[one["device_id"]]
            changed = (device.get("rules") or {}).get(one["rule"]) or {}
            rule: Mapping[str, Any] = self._test.rules[one["rule"]]
            self._heard.add(kept(one, device, changed.get("escalation", rule.get("escalation")) or ()))

    def _close(self) -> None:
        """The device's last reading was taken."""
        if self._new is None:
            return
        new = self._new.close(self._test.to_us)
        live = self._live.close(self._test.to_us) if self._live is not None else None
        result = self.result
        for key, tally in new.tallies.items():
            _sum(result.rules.setdefault(key.rule, Tally()), tally)
            result.alarms.append((key, tally))
        for recipient, count in new.told.items():
            result.told[recipient] = result.told.get(recipient, 0) + count
        if live is not None:
            for key, tally in live.tallies.items():
                _sum(result.live.setdefault(key.rule, Tally()), tally)
            for key in new.spans.keys() | live.spans.keys():
                ours, theirs = new.spans.get(key, ()), live.spans.get(key, ())
                result.difference.setdefault(key.rule, Difference()).add(compare(ours, theirs))
                result.differing += list(ours) != list(theirs)
        self._new = self._live = None

    def finish(self) -> Result:
        """The result, after the last row."""
        self._assembler.finish()
        self._close()
        self._told(self._unsaid)
        if self.result.transitions <= HEARD_MAX:
            self.result.heard[self._first] = self._heard.packed()
        self.result.alarms = nlargest(LISTED_MAX, self.result.alarms, key=lambda one: (one[1].raised, one[0]))
        return self.result


async def _evaluate(test: Test, piece: history.Piece, told: Callable[[int], None]) -> Result:
    connection = await connect(test.dsn, what="a back-test", timeout=CONNECT_S)
    try:
        series = await history.series_of(connection, piece, test.component_types, test.devices)
        rows = await connection.fetch(
            "SELECT device_id, rev, doc FROM devices WHERE device_id = ANY($1)", list({s.device_id for s in series})
        )
        devices = {row["device_id"]: cast(DeviceDoc, {**orjson.loads(row["doc"]), "rev": row["rev"]}) for row in rows}
        work = _Piece(test, await Documents.load(connection), devices, series, told)
        await history.read(connection, series, test.from_us, test.to_us, work.take)
        return work.finish()
    finally:
        await connection.close(timeout=5)


_counter: Any = None
_stopped: Any = None


class _StoppedError(Exception):
    """The others have ended."""


def _begin(counter: Any, stopped: Any) -> None:
    global _counter, _stopped
    _counter, _stopped = counter, stopped
    # Ctrl-C goes to all processes; the first one tells the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _in_process(test: Test, piece: history.Piece) -> Result:
    def told(count: int) -> None:
        if _stopped.is_set():
            raise _StoppedError
        with _counter.get_lock():
            _counter.value += count

    told(0)
    result = asyncio.run(_evaluate(test, piece, told))
    # Connection and piece are cycles, and the collector would wait for many of them.
    gc.collect()
    return result


def default_processes() -> int:
    """As many as there are cores, within reason."""
    return min(PROCESSES_MAX, os.cpu_count() or 1)


async def run(
    connection: asyncpg.Connection,
    test: Test,
    *,
    processes: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> Result:
    """Evaluate all pieces.

    Args:
        connection: to plan with.
        test: what.
        processes: how many; None: `default_processes`. One piece is evaluated here.
        progress: called with the readings so far and how many there are, about.
    """
    pieces = await history.pieces(connection, test.component_types, test.devices, test.from_us, test.to_us)
    total = sum(piece.readings for piece in pieces)
    result = Result()
    workers = min(len(pieces), processes or default_processes())
    progress(0, total)
    if workers <= 1:
        done = 0

        def told(count: int) -> None:
            nonlocal done
            done += count
            progress(done, max(done, total))

        for piece in pieces:
            result.add(await _evaluate(test, piece, told))
            gc.collect()
        return result
    context = multiprocessing.get_context("spawn")
    counter, stopped = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(counter, stopped)) as pool:
        waiting = {pool.submit(_in_process, test, piece) for piece in pieces}
        try:
            while waiting:
                done_now, waiting = await asyncio.to_thread(wait, waiting, 0.2, FIRST_COMPLETED)
                for one in done_now:
                    result.add(one.result())
                progress(counter.value, max(counter.value, total))
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return result


async def count_notices(connection: asyncpg.Connection, settings: Settings, test: Test, result: Result) -> None:
    """Say in `result.notices` which notices would have gone out, by the recipients and the settings as they are."""
    if result.transitions > HEARD_MAX:
        return
    rows = await connection.fetch("SELECT name, rev, doc FROM recipients")
    recipients = {row["name"]: {**orjson.loads(row["doc"]), "rev": row["rev"]} for row in rows}
    catalogue = Catalogue()
    for document in recipients.values():
        catalogue.offer("recipient", document)
    policies = Policies(catalogue, LiveSettings(settings))
    defaults = [address.strip() for address in settings.mail.recipients.split(",") if address.strip()]
    heard = [result.heard[first] for first in sorted(result.heard)]  # pieces end in any order
    result.notices = played(heard, catalogue.recipient, policies.of, defaults, test.to_us)
