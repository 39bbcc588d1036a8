"""The aggregate stage: validated messages in, records of closed windows out.

The windows are in domain/windows.py; here records become messages, and silent devices are found.
"""

from typing import Any, ClassVar, Final

from preservarium import metrics, topics
from preservarium.domain.windows import (
    STATE_VERSION,
    Nature,
    NatureLookup,
    Outcome,
    Plan,
    State,
    dump_state,
    from_version_1,
    new_state,
    next_end_us,
    observe,
    parse_specs,
    silence,
)
from preservarium.settings import LiveSettings
from preservarium.stages.keyed import CheckedStage, KeyedWork, Waiting
from preservarium.streaming.publish import RECORD_OVERHEAD_BYTES
from preservarium.streaming.records import headers_of, split
from preservarium.streaming.stage import Batch, Effects, Record, Send, Tick

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


class Aggregation(CheckedStage[tuple[State, NatureLookup]]):
    """The stage's handler, and its `tick`; made as every `KeyedStage`."""

    name = STAGE
    state_version = STATE_VERSION
    checks_name = "counters"
    state_upgrades: ClassVar = {1: from_version_1}

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._plan = plan_of(self._live)
        #: devices with an open window -> (worker's time of its last message, when the next one ends), µs
        self._ends: Waiting[tuple[int, int]] = Waiting()

    def _opened(self, partition: int, device_id: str, document: State | None) -> tuple[State, NatureLookup]:
        return document or new_state(), self._natures(partition, device_id)

    def _natures(self, partition: int, device_id: str) -> NatureLookup:
        # Asked for a new pane and a closing window only: most messages need no configuration.
        def look(component_type: str) -> Nature:
            check = self.checks.get(partition, device_id).series(component_type)
            return Nature(counts=check.counter is not None, circular=check.circular)

        return look

    async def __call__(self, batch: Batch) -> Effects:
        """Take a batch in.

        Raises:
            Retry: the catalogue has not been read yet.
            Fatal: the state is of another release.
        """
        await self._documents.ready()
        return await self._take(_Work(self, batch))

    async def tick(self, tick: Tick) -> Effects:
        """Close what has ended of devices that are silent.

        Raises:
            Retry: the catalogue has not been read yet.
            Fatal: the state is of another release.
        """
        await self._documents.ready()
        if tick.first:
            await self._search(self._ends, tick.partition, lambda _, state: _waiting(state, tick.now_us))
        if tick.behind:
            return Effects()
        to_us = tick.now_us - round(self._live().aggregate.silence_s * 1e6)
        known = self._ends.of(tick.partition)
        due = [device_id for device_id, (seen, end) in known.items() if end <= to_us and seen <= to_us]
        work = _Work(self, Batch(topics.VALIDATED.name, tick.partition, ()))
        for device_id in due[:SILENT_A_TICK_MAX]:
            work.silent(device_id, to_us)
        return work.finish()


def _waiting(state: State, seen_us: int) -> tuple[int, int] | None:
    end = next_end_us(state)
    return None if end is None else (seen_us, end)


class _Work(KeyedWork[Aggregation, tuple[State, NatureLookup]]):
    """One batch, or one tick."""

    def __init__(self, stage: Aggregation, batch: Batch) -> None:
        super().__init__(stage, batch)
        self._observed = Outcome()
        self._causes: dict[str, int] = {}
        self._record_bytes_max = stage._live().kafka.record_bytes_max
        self._known = stage._ends.of(batch.partition)
        self._ends: dict[str, tuple[int, int] | None] = {}

    def record(self, record: Record, lines: list[dict[str, Any]]) -> None:
        """One record of validated messages."""
        plan, outcome = self._stage._plan, self._observed
        for index, message in enumerate(lines):
            device_id = message["device_id"]
            state, natures = self._devices[device_id]
            observe(message, state, plan, natures, outcome)
            if outcome.duplicate:
                outcome.duplicate = False
                self._duplicates += 1
                continue
            self._touched.add(device_id)
            if outcome.limited:
                outcome.limited = False
                text = (
                    f"more than {plan.series_max} series, or {plan.panes_max} panes of one: the others have no windows"
                )
                self._limited(record, index, text, message)
        if outcome.windows:
            self._send(record.key, outcome.windows, headers_of(record))
            outcome.windows = []

    def silent(self, device_id: str, to_us: int) -> None:
        """One device of which nothing was heard."""
        state, natures = self._devices[device_id]
        self._touched.add(device_id)
        windows = silence(device_id, state, to_us, self._stage._plan, natures)
        if windows:
            self._send(device_id.encode(), windows, ())

    def _send(self, key: bytes | None, windows: list[dict[str, Any]], headers: tuple[tuple[str, bytes], ...]) -> None:
        room = self._record_bytes_max - RECORD_OVERHEAD_BYTES - len(key or b"") - _HEADERS_BYTES
        for value in split(windows, room):
            self._effects.sends.append(Send(topics.AGGREGATES, key, value, self.batch.partition, headers))
        for window in windows:
            cause = window["closed_by"]
            self._causes[cause] = self._causes.get(cause, 0) + 1

    def finish(self) -> Effects:
        """As of every stage; a device is heard of when the batch is done, and not by a tick."""
        self._now_us = self._stage._clock.now_us()
        return super().finish()

    def _document(self, device_id: str) -> bytes:
        state = self._devices[device_id][0]
        seen_us = self._now_us if self.batch.records else self._known.get(device_id, (0, 0))[0]
        self._ends[device_id] = _waiting(state, seen_us)
        return dump_state(state)

    def _after(self) -> None:
        super()._after()
        self._stage._ends.put(self.batch.partition, self._ends)
        metrics.READINGS.labels(STAGE).inc(self._observed.taken)
        if self._observed.late:
            metrics.AGGREGATE_LATE.labels("corrected").inc(self._observed.late)
        if self._observed.dropped:
            metrics.AGGREGATE_LATE.labels("dropped").inc(self._observed.dropped)
        for cause, count in self._causes.items():
            metrics.WINDOWS.labels(cause).inc(count)
