"""The command stages: requests, cancels, reports and uplinks in; events and downlinks out. They wait for no broker.

Three topics meet here. `device_commands` and `iot_validated_data` change the same state, so the app gives each partition
to one of the two at a time; transitions of alarms become lines of `device_commands` and touch no state.

What a crash repeats has the same ids: the sink drops an event that it has, the downlink stage a downlink that it sent.
"""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Final

import orjson
import structlog

from preservarium import metrics, topics
from preservarium.clock import Clock
from preservarium.compiled import CompiledDevices, Documents, Known
from preservarium.domain.commands import (
    LINE_BYTES_MAX,
    STATE_VERSION,
    CommandEventDoc,
    DeviceCommands,
    Line,
    Outcome,
    Profile,
    Turn,
    alarm_requests,
    check_rule_commands,
    compile_profile,
    parse_line,
)
from preservarium.domain.device import DeviceDoc
from preservarium.domain.errors import ReasonCode, Reject, Retry
from preservarium.domain.reading import ErrorLine
from preservarium.publish import partition_of
from preservarium.records import error_line, parse_trusted, refuse
from preservarium.settings import LiveSettings
from preservarium.stage import Batch, Effects, Record, Send, Tick, in_turns
from preservarium.state import Table, load_state

log = structlog.get_logger(__name__)

STAGE: Final = "commands"
ALARMS_STAGE: Final = "command-alarms"

#: Time-outs and expiries are judged this often: a person who waits for one sees no difference.
TICK_S: Final = 1.0
#: Downlinks of one batch or tick; the rest follows at the next tick. The downlink stage remembers the last
#: `downlinks.REMEMBERED_MAX` of a partition, and a crash must not repeat more than that.
DOWNLINKS_A_TURN_MAX: Final = 100
#: Devices looked after in one tick: some 20 ms.
DEVICES_A_TICK_MAX: Final = 500
#: Records older than this are a backlog: while one is read, nothing times out, because its confirmation may be next.
BACKLOG_MS: Final = 5_000
#: How long after the last sign of a backlog, or after taking a partition over, nothing times out.
PATIENCE_US: Final = 10_000_000

#: Later than every instant.
NEVER_US: Final = 1 << 62

_MS_US: Final = 1_000


#: (partition, devices): asks the database for those that the worker does not know; never raises Retry.
LookupMany = Callable[[int, Iterable[str]], Awaitable[Any]]


class Commanding:
    """The handlers: `lines`, `uplinks`, `tick` and, of a stage without state, `alarms`.

    Args:
        table: the state table.
        known: the device's document.
        lookup: makes devices known that were registered a moment ago.
        documents: the catalogue.
        live: settings.
        clock: for waits, error lines and caches.
        past_backlog: partition -> whether the lines that were there when it was taken over have been handled.
    """

    def __init__(
        self,
        table: Table,
        known: Known,
        lookup: LookupMany,
        documents: Documents,
        live: LiveSettings,
        clock: Clock,
        *,
        past_backlog: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self._past_backlog = past_backlog
        self._table = table
        self._known = known
        self._lookup = lookup
        self._documents = documents
        self._live = live
        self._clock = clock
        self.profiles: CompiledDevices[Profile] = CompiledDevices(
            "downlinks", self._compile, known, documents, live, clock
        )
        #: partition -> device -> when something is to be done, µs
        self._due: dict[int, dict[str, int]] = {}
        #: partition -> nothing is to be done before, µs: most ticks look at no device
        self._soonest: dict[int, int] = {}
        #: partition -> until when nothing times out, µs
        self._patient_until: dict[int, int] = {}

    def _compile(self, device: DeviceDoc | None) -> Profile:
        kind = self._documents.type(device["type"]) if device else None
        return compile_profile(device, kind, self._live().commands.topic)

    async def lines(self, batch: Batch) -> Effects:
        """Take a batch of `device_commands`; a line that cannot be used is told in `iot_errors`.

        Raises:
            Retry: the catalogue has not been read yet.
            Fatal: the state is of another release.
        """
        await self._documents.ready()
        work = _Work(self, batch)
        for record in batch.records:
            for index, raw in enumerate((record.value or b"").split(b"\n")):
                if raw.strip():
                    work.parse(record, index, raw)
        await self._lookup(batch.partition, {line.device_id for _, _, _, line in work.parsed})
        async for record, index, raw, line in in_turns(work.parsed):
            work.line(record, index, raw, line)
        return work.finish()

    async def uplinks(self, batch: Batch) -> Effects:
        """Let validated messages confirm commands and wake devices.

        A worker that died may have sent a command and not written that down; its answer must not pass by before the
        request was read again.

        Raises:
            Retry: the catalogue, or lines of `device_commands` from before the partition was taken over, are to be read first.
            Fatal: the state is of another release.
        """
        await self._documents.ready()
        if not self._past_backlog(batch.partition):
            text = "requests that a worker before may have handed over are read first"
            raise Retry(text)
        concerned = self._concerned(batch)
        parsed, errors = parse_trusted(replace(batch, records=concerned), stage=STAGE) if concerned else ([], [])
        work = _Work(self, batch, errors)
        async for messages in in_turns(parsed):
            for message in messages:
                work.uplink(message)
        return work.finish()

    def _concerned(self, batch: Batch) -> list[Record]:
        """Records of devices that have commands: a look at the table costs a fraction of parsing the others."""
        has: dict[bytes | None, bool] = {None: True}
        for record in batch.records:
            if record.key is not None and record.key not in has:
                has[record.key] = self._table.get(batch.partition, record.key) is not None
        return [record for record in batch.records if has[record.key]]

    async def tick(self, tick: Tick) -> Effects:
        """Let time pass: expiry, time-outs, further tries, forgetting.

        Raises:
            Retry: the catalogue has not been read yet.
            Fatal: the state is of another release.
        """
        await self._documents.ready()
        if tick.first:
            self._patient_until[tick.partition] = tick.now_us + PATIENCE_US
            await self._find(tick.partition)
        if tick.behind:
            self._patient_until[tick.partition] = tick.now_us + PATIENCE_US
        work = _Work(self, Batch(topics.COMMANDS.name, tick.partition, ()))
        known = self._due.get(tick.partition, {})
        if self._soonest.get(tick.partition, 0) > tick.now_us:
            return Effects()
        due = [device_id for device_id, at in known.items() if at <= tick.now_us]
        for device_id in due[:DEVICES_A_TICK_MAX]:
            work.tick(device_id)
        waiting = (at for at in known.values() if at > tick.now_us)
        soonest = 0 if len(due) > DEVICES_A_TICK_MAX else min(waiting, default=NEVER_US)
        effects = work.finish()
        # Only once the effects are carried out: else the next tick has all of it to do. What they change comes on top.
        effects.after.insert(0, lambda: self._soonest.__setitem__(tick.partition, soonest))
        return effects

    async def _find(self, partition: int) -> None:
        """Look through the table: what was known may be from before the partition went to another worker and back."""
        found: dict[str, int] = {}
        async for key, value in in_turns(self._table.items(partition)):
            device_id = key.decode()
            document = load_state(value, STATE_VERSION)
            due = DeviceCommands(device_id, document).due_us(self.profiles.get(partition, device_id))
            if due is not None:
                found[device_id] = due
        self._due[partition] = found
        self._soonest[partition] = 0

    async def alarms(self, batch: Batch) -> Effects:
        """Transitions of alarms become requests, by the `commands` of their rules. No state: the request's key is enough.

        Raises:
            Retry: the catalogue has not been read yet.
        """
        await self._documents.ready()
        effects = Effects()
        parsed, errors = parse_trusted(batch, stage=ALARMS_STAGE)
        asked = 0
        for transitions in parsed:
            for transition in transitions:
                for line in alarm_requests(transition, self._asked(batch.partition, transition)):
                    effects.sends.append(command_send(line))
                    asked += 1
        for error in errors:
            refuse(effects, error)
        effects.after.append(lambda: metrics.COMMANDS_ASKED.inc(asked))
        return effects

    def _asked(self, partition: int, transition: dict[str, Any]) -> list[Any]:
        """What the rule asks for; the device may say it differently."""
        name = transition["rule"]
        rule = self._documents.rule(name)
        commands: list[Any] = (rule.get("commands") if rule else None) or []
        device = self._known(partition, transition["device_id"])
        own = ((device.get("rules") or {}).get(name) if device else None) or {}
        found = own.get("commands", commands) or []
        try:
            return check_rule_commands(found)
        except ValueError as e:
            # Refused where registry files are read; whatever came another way must not hold up the alarms.
            log.error("rule_commands_unusable", rule=name, device_id=transition["device_id"], error=str(e))
            return []


def command_send(line: dict[str, Any]) -> Send:
    """The record of a line of `device_commands`."""
    return Send(topics.COMMANDS, line["device_id"].encode(), orjson.dumps(line))


class _Work:
    """One batch, or one tick."""

    def __init__(self, stage: Commanding, batch: Batch, errors: Iterable[ErrorLine] = ()) -> None:
        self._stage = stage
        self._batch = batch
        self._errors = list(errors)
        self._effects = Effects()
        #: None: a device without state, of which nothing need be known
        self._devices: dict[str, DeviceCommands | None] = {}
        self._touched: set[str] = set()
        self._events: list[CommandEventDoc] = []
        self._downlinks = self._repeated = self._ignored = self._duplicates = 0
        self._now_us = now_us = stage._clock.now_us()
        self._partitions = stage._live().kafka.partitions
        self._awake_us = round(stage._live().commands.wake_s * 1e6)
        partition = batch.partition
        if batch.records and batch.records[0].timestamp < now_us // _MS_US - BACKLOG_MS:
            stage._patient_until[partition] = now_us + PATIENCE_US
        # A partition that no tick has seen was taken over a moment ago.
        self._may_time_out = stage._patient_until.get(partition, now_us + 1) <= now_us
        self.parsed: list[tuple[Record, int, bytes, Line]] = []

    def _device(self, device_id: str) -> DeviceCommands | None:
        if device_id in self._devices:
            return self._devices[device_id]
        value = self._stage._table.get(self._batch.partition, device_id.encode())
        document = load_state(value, STATE_VERSION)
        device = self._devices[device_id] = DeviceCommands(device_id, document) if document else None
        return device

    def _turn(self, record_us: int = 0) -> Turn:
        """What may be done; `record_us`: when what causes it was in Kafka or received, 0: at any time."""
        since_us = None if self._may_time_out else record_us
        return Turn(self._now_us, self._downlinks < DOWNLINKS_A_TURN_MAX, self._may_time_out, since_us)

    def _profile(self, device_id: str) -> Profile:
        return self._stage.profiles.get(self._batch.partition, device_id)

    def parse(self, record: Record, index: int, raw: bytes) -> None:
        """One line of `device_commands`."""
        key = record.key.decode("utf-8", "replace") if record.key else None
        try:
            line = parse_line(
                _json(raw),
                device_id=key,
                # Kafka's times are milliseconds: to the end of this one.
                at=record.timestamp * _MS_US + _MS_US - 1,
                key=f"{self._batch.partition}:{record.offset}:{index}",
            )
            if partition_of(line.device_id.encode(), self._partitions) != self._batch.partition:
                message = (
                    f"the record is keyed {key!r:.100}, so it is not where the commands of {line.device_id!r:.100} are"
                )
                raise Reject(ReasonCode.COMMAND_INVALID, message)
        except Reject as e:
            self._error(record, index, e.code, str(e), key, raw)
        else:
            self.parsed.append((record, index, raw, line))

    def line(self, record: Record, index: int, raw: bytes, line: Line) -> None:
        """Carry a checked line out."""
        device_id = line.device_id
        device = self._device(device_id)
        if device is None and line.kind == "wake":
            return  # nothing waits, and nothing is to be remembered of it
        if device is None:
            device = self._devices[device_id] = DeviceCommands(device_id)
        place = (f"c{self._batch.partition}", record.offset, index)
        acts: dict[str, Callable[..., Outcome]] = {
            "request": device.request,
            "cancel": device.cancel,
            "report": device.report,
            "wake": partial(device.wake, awake_us=self._awake_us),
        }
        act = acts[line.kind]
        outcome = act(line, self._profile(device_id), self._turn(record.timestamp * _MS_US), *place)
        self._outcome(device_id, outcome)
        self._repeated += outcome.repeated is not None
        if outcome.refusal is not None and line.kind == "cancel":
            text = f"cancel of {line.fields['command_id']:.100} is refused: {outcome.refusal}"
            self._error(record, index, ReasonCode.COMMAND_INVALID, text, device_id, raw)
        # A report that comes twice, or after the answer that it tells of, is nobody's fault.
        self._ignored += outcome.refusal is not None and line.kind == "report"

    def uplink(self, message: dict[str, Any]) -> None:
        """One validated message."""
        device_id = message["device_id"]
        device = self._device(device_id)
        if device is not None and device.open:
            profile = self._profile(device_id)
            turn = self._turn(message["received_at"])
            self._outcome(device_id, device.uplink(message, profile, turn, awake_us=self._awake_us))

    def tick(self, device_id: str) -> None:
        """Time passes for one device."""
        device = self._device(device_id)
        if device is not None:
            self._outcome(device_id, device.tick(self._profile(device_id), self._turn()))
        # Also where nothing changed: when it is due next may have.
        self._devices.setdefault(device_id, None)

    def _outcome(self, device_id: str, outcome: Outcome) -> None:
        self._duplicates += outcome.duplicate
        if outcome.changed:
            self._touched.add(device_id)
        key = device_id.encode()
        for event in outcome.events:
            self._events.append(event)
            self._effects.sends.append(Send(topics.COMMAND_EVENTS, key, orjson.dumps(event), self._batch.partition))
        for downlink in outcome.downlinks:
            self._downlinks += 1
            self._effects.sends.append(Send(topics.DOWNLINKS, key, orjson.dumps(downlink), self._batch.partition))

    def _error(
        self, record: Record, index: int, code: ReasonCode, text: str, device_id: str | None, raw: bytes
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
                device_id=device_id,
                now_us=self._now_us,
            )
        )

    def finish(self) -> Effects:
        """State, errors and metrics of the whole."""
        effects = self._effects
        for device_id in self._touched:
            device = self._devices[device_id]
            assert device is not None
            document = device.document()
            value = None if document is None else orjson.dumps(document)
            effects.put(self._stage._table.name, device_id.encode(), value)
        for error in self._errors:
            refuse(effects, error)
        due = {
            device_id: device.due_us(self._profile(device_id)) if device else None
            for device_id, device in self._devices.items()
        }
        effects.after.append(lambda: self._after(due))
        return effects

    def _after(self, due: dict[str, int | None]) -> None:
        known = self._stage._due.setdefault(self._batch.partition, {})
        for device_id, at in due.items():
            if at is None:
                known.pop(device_id, None)
            else:
                known[device_id] = at
                self._stage._soonest[self._batch.partition] = min(
                    at, self._stage._soonest.get(self._batch.partition, 0)
                )
        for event in self._events:
            metrics.COMMAND_EVENTS.labels(event["event"], event["state"]).inc()
        if self._repeated:
            metrics.COMMANDS_REPEATED.inc(self._repeated)
        if self._ignored:
            metrics.COMMAND_REPORTS_IGNORED.inc(self._ignored)
        if self._duplicates:
            metrics.DUPLICATES.labels(STAGE).inc(self._duplicates)


def _json(raw: bytes) -> Any:
    if len(raw) > LINE_BYTES_MAX:
        message = f"a command of {len(raw)} bytes; it may have {LINE_BYTES_MAX}"
        raise Reject(ReasonCode.ENVELOPE_TOO_LARGE, message)
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as e:
        message = f"a command is a JSON object: {e}"
        raise Reject(ReasonCode.ENVELOPE_NOT_JSON, message) from None
