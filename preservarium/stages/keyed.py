"""What the stages share that keep a state for each device.

A device's state is read from the table once a batch, when the first of its messages comes, and put once, where something was
applied to it: state and watermark are one value. What a stage refuses, or cannot take in any more, becomes a line of
`iot_errors`.

What a tick has to look after, each worker knows in memory of the partitions that it has (`Waiting`): no table is searched while
nothing is due.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from typing import Any, ClassVar, Final, Generic, TypeVar

import orjson

from preservarium import metrics
from preservarium.clock import Clock
from preservarium.domain.readings.address import canonical_address
from preservarium.domain.readings.reading import ErrorLine
from preservarium.errors import ReasonCode, Reject
from preservarium.registry.compiled import CompiledChecks, CompiledDevices, Documents, Known, LookupMany, ask_nobody
from preservarium.settings import LiveSettings
from preservarium.streaming.publish import partition_of
from preservarium.streaming.records import RECORD_BYTES_MAX, message_error, parse_trusted, refuse
from preservarium.streaming.stage import RECORDS_A_TURN, RECORDS_AT_ONCE, Batch, Effects, Record, in_turns
from preservarium.streaming.state import Table, load_state
from preservarium.waiting import alive

#: Texts of configuration problems that were logged; a registry with more has one line too many anyway.
PROBLEMS_LOGGED_MAX: Final = 1_000

D = TypeVar("D")
S = TypeVar("S", bound="KeyedStage[Any]")
W = TypeVar("W")
V = TypeVar("V")


class KeyedStage(ABC, Generic[D]):
    """A stage with a state for each device; `D` is what its work needs of one.

    Args:
        table: the state table.
        known: the device's document, without asking a database.
        documents: the catalogue.
        live: settings.
        clock: for error lines, caches and waits.
        lookup: asks the database for devices of which this worker has no document yet. Another worker may have normalized
            their first messages; without it they would be taken for unknown, and have no tests and no rules.
    """

    name: ClassVar[str]  #: in error lines and metrics
    state_version: ClassVar[int]  #: of a state document
    state_upgrades: ClassVar[Mapping[int, Callable[[dict[str, Any]], None]]] = {}  #: of older ones that are read, too

    configured: CompiledDevices[Any]  #: what of the registry the stage needs of a device

    def __init__(
        self,
        table: Table,
        known: Known,
        documents: Documents,
        live: LiveSettings,
        clock: Clock,
        lookup: LookupMany = ask_nobody,
    ) -> None:
        self._lookup = lookup
        self._table = table
        self._known = known
        self._documents = documents
        self._live = live
        self._clock = clock
        self._problems: set[str] = set()

    @abstractmethod
    def _opened(self, partition: int, device_id: str, document: dict[str, Any] | None) -> D:
        """What the work needs of a device, of its state document."""

    def open(self, partition: int, device_id: str) -> D:
        """What the work needs of a device, from the table."""
        value = self._table.get(partition, device_id.encode())
        return self._opened(partition, device_id, load_state(value, self.state_version, self.state_upgrades))

    async def _take(self, work: "KeyedWork[Any, D]", records: Sequence[Record] | None = None) -> Effects:
        """What the messages of a batch cause; `records`: of its batch, those that are to be looked at."""
        batch, take = work.batch, work.record
        left = batch.records if records is None else records
        since_turn = 0
        for start in range(0, len(left), RECORDS_AT_ONCE):
            some = batch.part(left[start : start + RECORDS_AT_ONCE])
            parsed, errors = parse_trusted(some, stage=self.name)
            work.errors += errors
            met = {message["device_id"] for lines in parsed for message in lines} - work.met
            if strangers := self.configured.strangers(batch.partition, met):
                await self._lookup(batch.partition, strangers)
            for record, lines in zip(some.records, parsed, strict=True):
                take(record, lines)
            since_turn += RECORDS_AT_ONCE
            if since_turn >= RECORDS_A_TURN:
                since_turn = 0
                alive()
                await asyncio.sleep(0)
        return work.finish()

    async def _search(
        self, waiting: "Waiting[W]", partition: int, entry: Callable[[str, dict[str, Any]], W | None]
    ) -> None:
        """Find in the table what waits: what was known may be from before the partition went to another worker and back."""
        found: dict[str, W] = {}
        async for key, value in in_turns(self._table.items(partition)):
            device_id, document = key.decode(), load_state(value, self.state_version, self.state_upgrades)
            one = entry(device_id, document) if document else None
            if one is not None:
                found[device_id] = one
        waiting.begin(partition, found)

    def _is_news(self, problem: str) -> bool:
        """Whether to log what of the registry cannot be used: each text once."""
        if problem in self._problems or len(self._problems) >= PROBLEMS_LOGGED_MAX:
            return False
        self._problems.add(problem)
        return True


class CheckedStage(KeyedStage[D]):
    """A stage that judges readings by the tests of their device; made as every `KeyedStage`."""

    checks_name: ClassVar[str]  #: of its compiled checks, in metrics

    def __init__(
        self,
        table: Table,
        known: Known,
        documents: Documents,
        live: LiveSettings,
        clock: Clock,
        lookup: LookupMany = ask_nobody,
    ) -> None:
        super().__init__(table, known, documents, live, clock, lookup)
        self.configured = self.checks = CompiledChecks(self.checks_name, known, documents, live, clock)


class Waiting(Generic[W]):
    """Devices that a tick may have to look after, and what it must know of them; by partition, in memory."""

    def __init__(self) -> None:
        self._devices: dict[int, dict[str, W]] = {}

    def of(self, partition: int) -> dict[str, W]:
        """Those of a partition."""
        return self._devices.setdefault(partition, {})

    def begin(self, partition: int, found: dict[str, W]) -> None:
        """These are all."""
        self._devices[partition] = found

    def put(self, partition: int, changed: Mapping[str, W | None]) -> None:
        """Note how it is with devices now; None: nothing is to be done."""
        known = self.of(partition)
        for device_id, entry in changed.items():
            if entry is None:
                known.pop(device_id, None)
            else:
                known[device_id] = entry


class OnDemand(dict[str, V]):
    """What a batch knows of its devices: made when it is asked for first, without a call after that.

    Args:
        make: of a device's address. It must not know the batch's work: what goes in a circle stays, with all the states
            that were read, until the cycle collector comes.
    """

    def __init__(self, make: Callable[[str], V]) -> None:
        self._make = make

    def __missing__(self, device_id: str) -> V:
        made = self[device_id] = self._make(device_id)
        return made


class KeyedWork(ABC, Generic[S, D]):
    """One batch, or one tick.

    Args:
        stage: whose.
        batch: the batch; of a tick, one without records.
    """

    #: An error line that is larger than a record may be is cut.
    error_bytes_max = RECORD_BYTES_MAX

    def __init__(self, stage: S, batch: Batch) -> None:
        self._stage = stage
        self.batch = batch
        self.errors: list[ErrorLine] = []
        self._effects = Effects()
        self._now_us = stage._clock.now_us()
        self._devices: dict[str, D] = OnDemand(partial(stage.open, batch.partition))
        #: devices that something was applied to
        self._touched: set[str] = set()
        self._duplicates = 0

    @property
    def met(self) -> Set[str]:
        """Devices that the batch has named so far."""
        return self._devices.keys()

    @abstractmethod
    def _document(self, device_id: str) -> bytes | None:
        """The state of a device that was touched, as it is written; None: it has none any more."""

    @abstractmethod
    def record(self, record: Record, lines: list[dict[str, Any]]) -> None:
        """Take the messages of one record."""

    def finish(self) -> Effects:
        """State and errors of the whole; caches and metrics come when the effects are carried out."""
        effects, table = self._effects, self._stage._table.name
        for device_id in self._touched:
            effects.put(table, device_id.encode(), self._document(device_id))
        for line in self.errors:
            refuse(effects, line, record_bytes_max=self.error_bytes_max)
        effects.after.append(self._after)
        return effects

    def _after(self) -> None:
        if self._duplicates:
            metrics.DUPLICATES.labels(self._stage.name).inc(self._duplicates)

    def _error(
        self,
        record: Record,
        index: int,
        code: ReasonCode,
        text: str,
        message: Mapping[str, Any],
        raw: bytes | None = None,
    ) -> None:
        """Tell what of a record cannot be used; arguments are those of `message_error`."""
        self.errors.append(
            message_error(
                self._stage.name, code, text, self.batch, record, index, message, raw=raw, now_us=self._now_us
            )
        )

    def _limited(self, record: Record, index: int, text: str, message: Mapping[str, Any]) -> None:
        """Tell that a device has more than its state may hold."""
        self._error(record, index, ReasonCode.STATE_LIMIT, text, message)

    def _registered(self, device_id: str) -> str:
        """A device's id as it is registered: people, networks and devices spell its address in their own way."""
        document = self._stage._known(self.batch.partition, device_id)
        return document["device_id"] if document else device_id

    def _comes_by_address(self, record: Record, device_id: str) -> bool:
        """Whether a record is here by the canonical form of its device's address, and the device is elsewhere by its id."""
        address = canonical_address(device_id)
        return address != device_id and key_of(record) == address

    def _require_here(self, record: Record, device_id: str, code: ReasonCode, what: str) -> None:
        """Refuse a line that somebody wrote to a partition in which the state of its device is not.

        Raises:
            Reject: with `code`.
        """
        if partition_of(device_id.encode(), self._stage._live().kafka.partitions) != self.batch.partition:
            text = (
                f"the record is keyed {key_of(record)!r:.100}, so it is not where the {what} of {device_id!r:.100} are"
            )
            raise Reject(code, text)


def key_of(record: Record) -> str | None:
    """The device that a record's key names, whoever wrote it."""
    return record.key.decode("utf-8", "replace") if record.key else None


def written_lines(batch: Batch) -> Iterator[tuple[Record, int, bytes]]:
    """The lines of a topic that anyone may write to, with their index; each is parsed on its own."""
    for record in batch.records:
        for index, line in enumerate((record.value or b"").split(b"\n")):
            if line.strip():
                yield record, index, line


def parse_written(line: bytes, bytes_max: int, what: str) -> Any:
    """A line that anyone may have written, as JSON; `what` it is, for people.

    Raises:
        Reject: `envelope_too_large` or `envelope_not_json`.
    """
    if len(line) > bytes_max:
        text = f"{what} of {len(line)} bytes; it may have {bytes_max}"
        raise Reject(ReasonCode.ENVELOPE_TOO_LARGE, text)
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as e:
        text = f"{what} is a JSON object: {e}"
        raise Reject(ReasonCode.ENVELOPE_NOT_JSON, text) from None
