"""The aggregate stage: validated messages in, records of closed windows out.

The windows are in domain/aggregate.py; here records become messages, devices get their state, and silent devices are
found. Each device's state is read once and put once a batch.
"""

from typing import Any, Final

from preservarium import metrics, topics
from preservarium.clock import Clock
from preservarium.compiled import CompiledChecks, Documents, Known
from preservarium.domain.aggregate import (
    STATE_VERSION,
    CounterLookup,
    Outcome,
    Plan,
    dump_state,
    new_state,
    next_end_us,
    observe,
    parse_specs,
    silence,
)
from preservarium.domain.errors import ReasonCode
from preservarium.domain.reading import ErrorLine
from preservarium.publish import RECORD_OVERHEAD_BYTES
from preservarium.records import headers_of, message_error, parse_trusted, refuse, split
from preservarium.settings import LiveSettings
from preservarium.stage import Batch, Effects, Record, Send, Tick, in_turns
from preservarium.state import Table, load_state

STAGE: Final = "aggregate"

#: Silent devices whose windows one tick closes; the others wait for the next one. A few milliseconds of work.
SILENT_A_TICK_MAX: Final = 500

#: Room for the headers that are passed on: a generation and a trace.
_HEADERS_BYTES: Final = 1_000


def plan_of(live: LiveSettings) -> Plan:
    """The windows that the settings ask for.

    Raises:
        ValueError: they cannot be had; the message names the settings.
    """
    settings = live().aggregate
    try:
        return Plan(
            parse_specs(settings.windows),
            lateness_us=round(settings.lateness_s * 1e6),
            horizon_us=round(settings.horizon_s * 1e6),
            series_max=settings.series_per_device_max,
            panes_max=settings.panes_per_series_max,
        )
    except ValueError as e:
        message = f"PRESERVARIUM_AGGREGATE__WINDOWS, …__HORIZON_S, …__PANES_PER_SERIES_MAX: {e}"
        raise ValueError(message) from None


class Aggregation:
    """The stage's handler, and its `tick`.

    Args:
        table: the state table.
        known: the device's document.
        documents: the catalogue.
        live: settings.
        clock: for silence, error lines and caches.
    """

    def __init__(self, table: Table, known: Known, documents: Documents, live: LiveSettings, clock: Clock) -> None:
        self._table = table
        self._documents = documents
        self._live = live
        self._clock = clock
        self._plan = plan_of(live)
        self.checks = CompiledChecks("counters", known, documents, live, clock)
        #: partition -> device -> (worker's time of its last message, when its next open window ends), µs
        self._open: dict[int, dict[str, tuple[int, int]]] = {}

    def _counters(self, partition: int, device_id: str) -> CounterLookup:
        # Asked for a new pane and a closing window only: most messages need no configuration.
        return lambda component_type: self.checks.get(partition, device_id).series(component_type).counter

    async def __call__(self, batch: Batch) -> Effects:
        """Take a batch in.

        Raises:
            Retry: the catalogue has not been read yet.
            Fatal: the state is of another release.
        """
        await self._documents.ready()
        parsed, errors = parse_trusted(batch, stage=STAGE)
        work = _Work(self, batch.partition, errors)
        async for record, lines in in_turns(zip(batch.records, parsed, strict=True)):
            work.record(batch, record, lines)
        return work.finish(self._clock.now_us())

    async def tick(self, tick: Tick) -> Effects:
        """Close what has ended of devices that are silent.

        Raises:
            Retry: the catalogue has not been read yet.
            Fatal: the state is of another release.
        """
        await self._documents.ready()
        if tick.first:
            await self._find_open(tick)
        if tick.behind:
            return Effects()
        to_us = tick.now_us - round(self._live().aggregate.silence_s * 1e6)
        known = self._open.get(tick.partition, {})
        due = [device_id for device_id, (seen, end) in known.items() if end <= to_us and seen <= to_us]
        work = _Work(self, tick.partition, [])
        for device_id in due[:SILENT_A_TICK_MAX]:
            work.silent(device_id, to_us)
        return work.finish(None)

    async def _find_open(self, tick: Tick) -> None:
        """Look through the table: what was known may be from before the partition went to another worker and back."""
        found: dict[str, tuple[int, int]] = {}
        async for key, value in in_turns(self._table.items(tick.partition)):
            document = load_state(value, STATE_VERSION)
            end = next_end_us(document) if document else None
            if end is not None:
                found[key.decode()] = (tick.now_us, end)
        self._open[tick.partition] = found


class _Work:
    """One batch, or one tick."""

    def __init__(self, stage: Aggregation, partition: int, errors: list[ErrorLine]) -> None:
        self._stage = stage
        self._partition = partition
        self._errors = errors
        self._effects = Effects()
        self._devices: dict[str, tuple[dict[str, Any], CounterLookup]] = {}
        self._touched: set[str] = set()
        self._taken = self._late = self._dropped = self._duplicates = 0
        self._causes: dict[str, int] = {}
        self._record_bytes_max = stage._live().kafka.record_bytes_max

    def _device(self, device_id: str) -> tuple[dict[str, Any], CounterLookup]:
        device = self._devices.get(device_id)
        if device is None:
            value = self._stage._table.get(self._partition, device_id.encode())
            state = load_state(value, STATE_VERSION) or new_state()
            device = self._devices[device_id] = (state, self._stage._counters(self._partition, device_id))
        return device

    def record(self, batch: Batch, record: Record, lines: list[dict[str, Any]]) -> None:
        """One record of validated messages."""
        plan = self._stage._plan
        windows: list[dict[str, Any]] = []
        for index, message in enumerate(lines):
            device_id = message["device_id"]
            state, counters = self._device(device_id)
            outcome = observe(message, state, plan, counters)
            if outcome.duplicate:
                self._duplicates += 1
                continue
            self._touched.add(device_id)
            self._taken += outcome.taken
            self._late += outcome.late
            self._dropped += outcome.dropped
            windows += outcome.windows
            if outcome.limited:
                self._limited(batch, record, index, message, outcome)
        if windows:
            self._send(record.key, windows, headers_of(record))

    def _limited(self, batch: Batch, record: Record, index: int, message: dict[str, Any], outcome: Outcome) -> None:
        plan = self._stage._plan
        text = f"more than {plan.series_max} series, or {plan.panes_max} panes of one: the others have no windows"
        self._errors.append(
            message_error(
                STAGE,
                ReasonCode.STATE_LIMIT,
                text,
                batch,
                record,
                index,
                message,
                raw=None,
                now_us=self._stage._clock.now_us(),
            )
        )

    def silent(self, device_id: str, to_us: int) -> None:
        """One device of which nothing was heard."""
        state, counters = self._device(device_id)
        self._touched.add(device_id)
        windows = silence(device_id, state, to_us, self._stage._plan, counters)
        if windows:
            self._send(device_id.encode(), windows, ())

    def _send(self, key: bytes | None, windows: list[dict[str, Any]], headers: tuple[tuple[str, bytes], ...]) -> None:
        room = self._record_bytes_max - RECORD_OVERHEAD_BYTES - len(key or b"") - _HEADERS_BYTES
        for value in split(windows, room):
            self._effects.sends.append(Send(topics.AGGREGATES, key, value, self._partition, headers))
        for window in windows:
            cause = window["closed_by"]
            self._causes[cause] = self._causes.get(cause, 0) + 1

    def finish(self, now_us: int | None) -> Effects:
        """State, errors and metrics; `now_us` where the devices were heard of."""
        effects = self._effects
        ends: dict[str, int | None] = {}
        for device_id in self._touched:
            state = self._devices[device_id][0]
            ends[device_id] = next_end_us(state)
            effects.put(self._stage._table.name, device_id.encode(), dump_state(state))
        for line in self._errors:
            refuse(effects, line)
        effects.after.append(lambda: self._after(ends, now_us))
        return effects

    def _after(self, ends: dict[str, int | None], now_us: int | None) -> None:
        known = self._stage._open.setdefault(self._partition, {})
        for device_id, end in ends.items():
            if end is None:
                known.pop(device_id, None)
            else:
                seen = now_us if now_us is not None else known.get(device_id, (0, 0))[0]
                known[device_id] = (seen, end)
        metrics.READINGS.labels(STAGE).inc(self._taken)
        if self._duplicates:
            metrics.DUPLICATES.labels(STAGE).inc(self._duplicates)
        if self._late:
            metrics.AGGREGATE_LATE.labels("corrected").inc(self._late)
        if self._dropped:
            metrics.AGGREGATE_LATE.labels("dropped").inc(self._dropped)
        for cause, count in self._causes.items():
            metrics.WINDOWS.labels(cause).inc(count)
