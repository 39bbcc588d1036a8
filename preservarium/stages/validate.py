"""The validate stage: standardized messages in, validated ones out, what failed to `iot_errors`.

The tests are in domain/quality/tests.py and the order of messages in domain/quality/arrival.py; here records become messages,
and outcomes become effects.

What is held back of a device that falls silent is released through the log: a tick writes a record that says so into the
partition of `iot_standardized_data`, and that record releases.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Final

import structlog

from preservarium import metrics, topics
from preservarium.domain.quality.arrival import Order, held_below
from preservarium.domain.quality.checks import DeviceChecks
from preservarium.domain.quality.validation import (
    STATE_VERSION,
    Limits,
    Outcome,
    State,
    fall_silent,
    from_version_1,
    judge,
    new_state,
    receive,
)
from preservarium.domain.readings.json_text import to_bytes
from preservarium.errors import ReasonCode, Reject
from preservarium.stages.keyed import CheckedStage, KeyedWork, Waiting
from preservarium.streaming.publish import RECORD_OVERHEAD_BYTES
from preservarium.streaming.records import headers_of, pack, split
from preservarium.streaming.stage import Batch, Effects, Record, Send, Tick

log = structlog.get_logger(__name__)

STAGE: Final = "validate"

#: Silent devices that one tick tells of; the others wait for the next one.
SILENT_A_TICK_MAX: Final = 500


class Validation(CheckedStage[tuple[DeviceChecks, State]]):
    """The stage's handler, and its `tick`; made as every `KeyedStage`."""

    name = STAGE
    state_version = STATE_VERSION
    checks_name = "checks"
    state_upgrades: ClassVar = {1: from_version_1}

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        #: devices that messages are held of -> (worker's time of the last, its record's offset)
        self._held: Waiting[tuple[int, int]] = Waiting()

    def _opened(self, partition: int, device_id: str, document: dict[str, Any] | None) -> tuple[DeviceChecks, State]:
        return self.checks.get(partition, device_id), document or new_state()

    async def __call__(self, batch: Batch) -> Effects:
        """Validate a batch.

        Raises:
            Retry: the catalogue has not been read yet.
            Fatal: the state is of another release.
        """
        await self._documents.ready()
        effects = await self._take(_Work(self, batch))
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
            await self._search(self._held, tick.partition, lambda _, state: _held_of(state, tick.now_us))
        effects = Effects()
        if tick.behind:
            return effects
        held = self._held.of(tick.partition)
        default_us = round(self._live().quality.lateness_s * 1e6)
        told: list[str] = []
        for device_id, (seen, below) in held.items():
            lateness_us = self.checks.get(tick.partition, device_id).lateness_us
            if seen + (default_us if lateness_us is None else lateness_us) > tick.now_us:
                continue
            line = to_bytes({"device_id": device_id, "silent_below": below})
            effects.sends.append(Send(topics.STANDARDIZED, device_id.encode(), line, tick.partition))
            told.append(device_id)
            if len(told) == SILENT_A_TICK_MAX:
                break

        def forget() -> None:
            for device_id in told:
                held.pop(device_id, None)

        effects.after.append(forget)
        return effects


def _held_of(state: State, seen_us: int) -> tuple[int, int] | None:
    below = held_below(state)
    return None if below is None else (seen_us, below)


class _Work(KeyedWork[Validation, tuple[DeviceChecks, State]]):
    """One batch."""

    def __init__(self, stage: Validation, batch: Batch) -> None:
        super().__init__(stage, batch)
        settings = stage._live()
        self._limits = Limits(
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
        self._record_bytes_max = settings.kafka.record_bytes_max
        self.error_bytes_max = settings.kafka.record_bytes_max - 1_000
        self._known = stage._held.of(batch.partition)
        self._held: dict[str, tuple[int, int] | None] = {}
        self._judged = Outcome()
        self._repeated = 0

    def record(self, record: Record, lines: list[dict[str, Any]]) -> None:
        """One record: at most one record out (more only where it outgrew what Kafka takes)."""
        out: list[dict[str, Any]] = []
        for index, message in enumerate(lines):
            device_id = message["device_id"]
            checks, state = self._devices[device_id]
            if "silent_below" in message:
                due: Sequence[dict[str, Any]] = fall_silent(state, message["silent_below"], record.offset)
            else:
                arrival = receive(message, checks, state, self._limits, (record.offset, len(out)))
                if arrival.duplicate:
                    self._duplicates += 1
                    continue
                self._repeated += arrival.repeated
                due = arrival.due
            self._touched.add(device_id)
            for one in due:
                judged = judge(one, checks, state, self._limits, self._judged)
                if judged.failures or judged.limited:
                    self._tell(record, index, one)
                if one["readings"] or "repeated" in one:
                    out.append(one)
        if out:
            self._send(record, lines, out)

    def _tell(self, record: Record, index: int, message: dict[str, Any]) -> None:
        """Tell what of a message cannot go on."""
        judged = self._judged
        for failure in judged.failures:
            raw = to_bytes({**message, "readings": [failure.reading]})
            self._error(record, index, failure.code, failure.text, message, raw)
        if judged.limited:
            text = f"more than {self._limits.series_max} series: the tests that need a series' past skip the others"
            self._limited(record, index, text, message)
        judged.failures, judged.limited = [], False

    def _send(self, record: Record, lines: list[dict[str, Any]], out: list[dict[str, Any]]) -> None:
        headers = headers_of(record)
        room = self._record_bytes_max - RECORD_OVERHEAD_BYTES - len(record.key or b"")
        if headers:
            room -= sum(len(name) + len(value) + 10 for name, value in headers)
        values = [pack(out)]
        if len(values[0]) > room:
            fitting = []
            for message in out:
                line = to_bytes(message)
                if len(line) <= room:
                    fitting.append(message)
                else:
                    text = f"a line of {len(line)} bytes after validation; a record may have {room}"
                    index = next((i for i, one in enumerate(lines) if one is message), 0)
                    self._error(record, index, ReasonCode.OUTPUT_TOO_LARGE, text, message, line)
                    self._judged.passed -= len(message["readings"])
            try:
                values = list(split(fitting, room))
            except Reject as e:  # pragma: no cover  # only lines that fit are left
                raise AssertionError from e
        for value in values:
            self._effects.sends.append(Send(topics.VALIDATED, record.key, value, self.batch.partition, headers))

    def _document(self, device_id: str) -> bytes:
        state = self._devices[device_id][1]
        held = _held_of(state, self._now_us)
        if held is not None or device_id in self._known:
            self._held[device_id] = held
        return to_bytes(state)

    def _after(self) -> None:
        super()._after()
        self._stage._held.put(self.batch.partition, self._held)
        metrics.READINGS.labels(STAGE).inc(self._judged.passed)
        if self._repeated:
            metrics.REPEATED.inc(self._repeated)
