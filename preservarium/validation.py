"""The validate stage: standardized messages in, validated ones out, what failed to `iot_errors`.

The rules are in domain/quality.py and the order of messages in domain/arrival.py; here records become messages, devices get
their checks and their state, and the outcome becomes effects. Each device's state is read once and put once a batch.

What is held back of a device that falls silent is released through the log: a tick writes a record that says so into the
partition of `iot_standardized_data`, and that record releases.
"""

from typing import Any, Final

import orjson
import structlog

from preservarium import metrics, topics
from preservarium.clock import Clock
from preservarium.compiled import CompiledChecks, Documents, Known
from preservarium.domain.arrival import Order, held_below
from preservarium.domain.errors import ReasonCode, Reject
from preservarium.domain.quality import (
    STATE_VERSION,
    DeviceChecks,
    Limits,
    State,
    fall_silent,
    judge,
    new_state,
    receive,
)
from preservarium.domain.reading import ErrorLine
from preservarium.publish import RECORD_OVERHEAD_BYTES
from preservarium.records import headers_of, message_error, pack, parse_trusted, refuse, split
from preservarium.settings import LiveSettings
from preservarium.stage import Batch, Effects, Record, Send, Tick, in_turns
from preservarium.state import Table, load_state

log = structlog.get_logger(__name__)

STAGE: Final = "validate"

#: Silent devices that one tick tells of; the others wait for the next one.
SILENT_A_TICK_MAX: Final = 500


class Validation:
    """The stage's handler, and its `tick`.

    Args:
        table: the state table.
        known: the device's document.
        documents: the catalogue.
        live: settings.
        clock: for error lines and caches.
    """

    def __init__(self, table: Table, known: Known, documents: Documents, live: LiveSettings, clock: Clock) -> None:
        self._table = table
        self._documents = documents
        self._live = live
        self._clock = clock
        self.checks = CompiledChecks("checks", known, documents, live, clock)
        #: partition -> device that messages are held of -> (worker's time of the last, its record's offset)
        self._held: dict[int, dict[str, tuple[int, int]]] = {}

    async def __call__(self, batch: Batch) -> Effects:
        """Validate a batch.

        Raises:
            Retry: the catalogue has not been read yet.
            Fatal: the state is of another release.
        """
        await self._documents.ready()
        settings = self._live()
        limits = Limits(
            future_skew_us=round(settings.quality.future_skew_s * 1e6),
            store_failed=settings.quality.store_failed,
            series_max=settings.quality.series_per_device_max,
            skew_noted_us=settings.quality.skew_noted_s * 1e6,
            order=Order(
                lateness_us=round(settings.quality.lateness_s * 1e6),
                held_max=settings.quality.held_per_device_max,
                repeats_max=settings.quality.repeats_remembered,
            ),
        )
        parsed, errors = parse_trusted(batch, stage=STAGE)
        effects = Effects()
        work = _Work(self, batch, limits, settings.kafka.record_bytes_max, self._clock.now_us(), effects, errors)
        async for record, lines in in_turns(zip(batch.records, parsed, strict=True)):
            work.record(record, lines)
        work.finish()
        for problem in self.checks.take_problems():
            log.warning("datatype_unusable_in_part", problem=problem)
        return effects

    async def tick(self, tick: Tick) -> Effects:
        """Tell the log of devices that are silent while messages of theirs are held back.

        Raises:
            Retry: the catalogue has not been read yet.
            Fatal: the state is of another release.
        """
        await self._documents.ready()
        if tick.first:
            await self._find_held(tick)
        effects = Effects()
        if tick.behind:
            return effects
        held = self._held.get(tick.partition, {})
        default_us = round(self._live().quality.lateness_s * 1e6)
        told: list[str] = []
        for device_id, (seen, below) in held.items():
            lateness_us = self.checks.get(tick.partition, device_id).lateness_us
            if seen + (default_us if lateness_us is None else lateness_us) > tick.now_us:
                continue
            line = orjson.dumps({"device_id": device_id, "silent_below": below})
            effects.sends.append(Send(topics.STANDARDIZED, device_id.encode(), line, tick.partition))
            told.append(device_id)
            if len(told) == SILENT_A_TICK_MAX:
                break

        def forget() -> None:
            for device_id in told:
                held.pop(device_id, None)

        effects.after.append(forget)
        return effects

    async def _find_held(self, tick: Tick) -> None:
        """Look through the table: what was known may be from before the partition went to another worker and back."""
        found: dict[str, tuple[int, int]] = {}
        async for key, value in in_turns(self._table.items(tick.partition)):
            document = load_state(value, STATE_VERSION)
            below = held_below(document) if document else None
            if below is not None:
                found[key.decode()] = (tick.now_us, below)
        self._held[tick.partition] = found


class _Work:
    """One batch."""

    def __init__(
        self,
        stage: Validation,
        batch: Batch,
        limits: Limits,
        record_bytes_max: int,
        now_us: int,
        effects: Effects,
        errors: list[ErrorLine],
    ) -> None:
        self._stage = stage
        self._batch = batch
        self._limits = limits
        self._record_bytes_max = record_bytes_max
        self._now_us = now_us
        self._effects = effects
        self._errors = errors
        self._devices: dict[str, tuple[DeviceChecks, State]] = {}
        self._touched: set[str] = set()
        self._passed = 0
        self._duplicates = 0
        self._repeated = 0

    def record(self, record: Record, lines: list[dict[str, Any]]) -> None:
        """One record: at most one record out (more only where it outgrew what Kafka takes)."""
        out: list[dict[str, Any]] = []
        devices, partition = self._devices, self._batch.partition
        for index, message in enumerate(lines):
            device_id = message["device_id"]
            device = devices.get(device_id)
            if device is None:
                value = self._stage._table.get(partition, device_id.encode())
                checks = self._stage.checks.get(partition, device_id)
                device = devices[device_id] = (checks, load_state(value, STATE_VERSION) or new_state())
            checks, state = device
            if "silent_below" in message:
                due = fall_silent(state, message["silent_below"], record.offset)
            else:
                arrival = receive(message, checks, state, self._limits, (record.offset, len(out)))
                if arrival.duplicate:
                    self._duplicates += 1
                    continue
                self._repeated += arrival.repeated
                due = arrival.due
            self._touched.add(device_id)
            for one in due:
                self._judge(record, index, one, checks, state, out)
        if out:
            self._send(record, lines, out)

    def _judge(
        self,
        record: Record,
        index: int,
        message: dict[str, Any],
        checks: DeviceChecks,
        state: State,
        out: list[dict[str, Any]],
    ) -> None:
        outcome = judge(message, checks, state, self._limits)
        self._passed += outcome.passed
        for failure in outcome.failures:
            raw = orjson.dumps({**message, "readings": [failure.reading]})
            self._error(record, index, failure.code, failure.text, message, raw)
        if outcome.limited:
            text = f"more than {self._limits.series_max} series: the tests that need a series' past skip the others"
            self._error(record, index, ReasonCode.STATE_LIMIT, text, message, None)
        if message["readings"] or "repeated" in message:
            out.append(message)

    def _send(self, record: Record, lines: list[dict[str, Any]], out: list[dict[str, Any]]) -> None:
        headers = headers_of(record)
        room = self._record_bytes_max - RECORD_OVERHEAD_BYTES - len(record.key or b"")
        room -= sum(len(name) + len(value) + 10 for name, value in headers)
        values = [pack(out)]
        if len(values[0]) > room:
            fitting = []
            for message in out:
                line = orjson.dumps(message)
                if len(line) <= room:
                    fitting.append(message)
                else:
                    text = f"a line of {len(line)} bytes after validation; a record may have {room}"
                    index = next((i for i, one in enumerate(lines) if one is message), 0)
                    self._error(record, index, ReasonCode.OUTPUT_TOO_LARGE, text, message, line)
                    self._passed -= len(message["readings"])
            try:
                values = list(split(fitting, room))
            except Reject as e:  # pragma: no cover  # only lines that fit are left
                raise AssertionError from e
        partition = self._batch.partition
        self._effects.sends += [Send(topics.VALIDATED, record.key, value, partition, headers) for value in values]

    def _error(
        self, record: Record, index: int, code: ReasonCode, text: str, message: dict[str, Any], raw: bytes | None
    ) -> None:
        self._errors.append(
            message_error(STAGE, code, text, self._batch, record, index, message, raw=raw, now_us=self._now_us)
        )

    def finish(self) -> None:
        """State, errors and metrics of the whole batch."""
        effects = self._effects
        known = self._stage._held.get(self._batch.partition, {})
        held: dict[str, tuple[int, int] | None] = {}
        for device_id in self._touched:
            state = self._devices[device_id][1]
            effects.put(self._stage._table.name, device_id.encode(), orjson.dumps(state))
            below = held_below(state)
            if below is not None:
                held[device_id] = (self._now_us, below)
            elif device_id in known:
                held[device_id] = None
        for line in self._errors:
            refuse(effects, line, record_bytes_max=self._record_bytes_max - 1_000)
        passed, duplicates = self._passed, self._duplicates
        effects.after.append(lambda: metrics.READINGS.labels(STAGE).inc(passed))
        if duplicates:
            effects.after.append(lambda: metrics.DUPLICATES.labels(STAGE).inc(duplicates))
        if self._repeated:
            effects.after.append(lambda: metrics.REPEATED.inc(self._repeated))
        if held:
            effects.after.append(lambda: self._now_held(held))

    def _now_held(self, held: dict[str, tuple[int, int] | None]) -> None:
        known = self._stage._held.setdefault(self._batch.partition, {})
        for device_id, entry in held.items():
            if entry is None:
                known.pop(device_id, None)
            else:
                known[device_id] = entry
