"""The validate stage: standardized messages in, validated ones out, what failed to `iot_errors`.

The rules are in domain/quality.py; here records become messages, devices get their checks and their state, and the
outcome becomes effects. Each device's state is read once and put once a batch.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final

import orjson
import structlog

from preservarium import metrics, topics
from preservarium.clock import Clock
from preservarium.compiled import CompiledDevices, Documents, Known
from preservarium.domain.device import DeviceDoc
from preservarium.domain.errors import Fatal, ReasonCode, Reject
from preservarium.domain.quality import STATE_VERSION, CheckCompiler, DeviceChecks, Limits, State, new_state, validate
from preservarium.domain.reading import ErrorLine
from preservarium.publish import RECORD_OVERHEAD_BYTES
from preservarium.records import GENERATION_HEADER, TRACE_HEADER, error_line, error_send, pack, parse_trusted, split
from preservarium.settings import LiveSettings
from preservarium.stage import Batch, Effects, Record, Send

log = structlog.get_logger(__name__)

STAGE: Final = "validate"

#: Records between two turns of the event loop: some 5 ms of work at a few readings a record.
RECORDS_A_TURN: Final = 250

#: Headers that every stage passes on.
_PASSED_ON: Final = frozenset({GENERATION_HEADER, TRACE_HEADER})

StateOf = Callable[[int, bytes], bytes | None]


def passed_headers(record: Record) -> tuple[tuple[str, bytes], ...]:
    """Generation and trace of a record, for what is made of it."""
    return tuple((name, value) for name, value in record.headers or () if name in _PASSED_ON)


def load_state(value: bytes | None, version: int) -> dict[str, Any] | None:
    """A state document.

    Raises:
        Fatal: it is of another version: an older worker must not overwrite what a newer one wrote.
    """
    if value is None:
        return None
    document: dict[str, Any] = orjson.loads(value)
    if document.get("v") != version:
        message = f"state of version {document.get('v')}, this worker reads version {version}: use one release"
        raise Fatal(message)
    return document


class Validation:
    """The stage's handler.

    Args:
        state_of: (partition, key) -> state document as bytes.
        table: name of the state table.
        known: the device's document.
        documents: the catalogue.
        live: settings.
        clock: for error lines and caches.
    """

    def __init__(
        self, state_of: StateOf, table: str, known: Known, documents: Documents, live: LiveSettings, clock: Clock
    ) -> None:
        self._state_of = state_of
        self._table = table
        self._documents = documents
        self._live = live
        self._clock = clock
        self._compiler = CheckCompiler(documents.datatype)
        self._compiler_rev = documents.rev
        self.checks: CompiledDevices[DeviceChecks] = CompiledDevices(
            "checks", self._compile, known, documents, live, clock
        )

    def _compile(self, device: DeviceDoc | None) -> DeviceChecks:
        if self._documents.rev != self._compiler_rev:
            self._compiler = CheckCompiler(self._documents.datatype)
            self._compiler_rev = self._documents.rev
        return self._compiler.device(device, self._documents.type(device["type"]) if device else None)

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
        )
        parsed, errors = parse_trusted(batch, stage=STAGE)
        effects = Effects()
        work = _Work(self, batch, limits, settings.kafka.record_bytes_max, self._clock.now_us(), effects, errors)
        for number, (record, lines) in enumerate(zip(batch.records, parsed, strict=True), 1):
            work.record(record, lines)
            if number % RECORDS_A_TURN == 0:
                await asyncio.sleep(0)
        work.finish()
        for problem in self._compiler.take_problems():
            log.warning("datatype_unusable_in_part", problem=problem)
        return effects


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

    def record(self, record: Record, lines: list[dict[str, Any]]) -> None:
        """One record: at most one record out (more only where it outgrew what Kafka takes)."""
        out: list[dict[str, Any]] = []
        devices, partition = self._devices, self._batch.partition
        for index, message in enumerate(lines):
            device_id = message["device_id"]
            device = devices.get(device_id)
            if device is None:
                value = self._stage._state_of(partition, device_id.encode())
                checks = self._stage.checks.get(partition, device_id)
                device = devices[device_id] = (checks, load_state(value, STATE_VERSION) or new_state())
            outcome = validate(message, *device, self._limits)
            if outcome.duplicate:
                self._duplicates += 1
                continue
            self._touched.add(device_id)
            self._passed += outcome.passed
            for failure in outcome.failures:
                raw = orjson.dumps({**message, "readings": [failure.reading]})
                self._error(record, index, failure.code, failure.text, message, raw)
            if outcome.limited:
                text = f"more than {self._limits.series_max} series: the tests that need a series' past skip the others"
                self._error(record, index, ReasonCode.STATE_LIMIT, text, message, None)
            if message["readings"]:
                out.append(message)
        if out:
            self._send(record, lines, out)

    def _send(self, record: Record, lines: list[dict[str, Any]], out: list[dict[str, Any]]) -> None:
        headers = passed_headers(record)
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
                    index = next(i for i, one in enumerate(lines) if one is message)
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
            error_line(
                STAGE,
                code,
                text,
                topic=self._batch.topic,
                partition=self._batch.partition,
                offset=record.offset,
                index=index,
                raw=raw,
                device_id=message["device_id"],
                raw_partition=message["raw_partition"],
                raw_offset=message["raw_offset"],
                raw_index=message["raw_index"],
                parser=message.get("parser"),
                config_rev=message.get("config_rev"),
                generation=message["generation"],
                now_us=self._now_us,
            )
        )

    def finish(self) -> None:
        """State, errors and metrics of the whole batch."""
        effects = self._effects
        for device_id in self._touched:
            effects.put(self._stage._table, device_id.encode(), orjson.dumps(self._devices[device_id][1]))
        for line in self._errors:
            effects.sends.append(error_send(line, record_bytes_max=self._record_bytes_max - 1_000))
            effects.refused[line["code"]] = effects.refused.get(line["code"], 0) + 1
        passed, duplicates = self._passed, self._duplicates
        effects.after.append(lambda: metrics.READINGS.labels(STAGE).inc(passed))
        if duplicates:
            effects.after.append(lambda: metrics.DUPLICATES.labels(STAGE).inc(duplicates))
