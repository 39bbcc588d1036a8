"""The command stages: requests, cancels, reports and uplinks in; events and downlinks out. They wait for no broker.

Three topics meet here. `device_commands` and `iot_validated_data` change the same state, so the app gives each partition
to one of the two at a time; transitions of alarms become lines of `device_commands` and touch no state.

What a crash repeats has the same ids: the sink drops an event that it has, the downlink stage a downlink that it sent.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import orjson
import structlog

from preservarium import metrics, topics
from preservarium.clock import Clock
from preservarium.domain.commands.alarm_requests import alarm_requests, check_rule_commands
from preservarium.domain.commands.device import STATE_VERSION, CommandEventDoc, DeviceCommands, Outcome, Turn
from preservarium.domain.commands.lines import LINE_BYTES_MAX, Line, parse_line
from preservarium.domain.commands.profile import Profile, compile_profile
from preservarium.domain.readings.address import canonical_address
from preservarium.domain.readings.json_text import to_bytes
from preservarium.domain.registry.device import DeviceDoc
from preservarium.errors import ReasonCode, Reject, Retry
from preservarium.registry.compiled import CompiledDevices, Documents, Known, LookupMany
from preservarium.settings import LiveSettings
from preservarium.stages.keyed import KeyedStage, KeyedWork, Waiting, key_of, parse_written, written_lines
from preservarium.streaming.records import parse_trusted, refuse
from preservarium.streaming.stage import Batch, Effects, Record, Send, Tick, in_turns
from preservarium.streaming.state import Table

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


class Commanding(KeyedStage[DeviceCommands | None]):
    """The handlers: `lines`, `uplinks`, `tick` and, of a stage without state, `alarms`.

    Args:
        table: as of every `KeyedStage`.
        known: likewise.
        lookup: makes devices known that were registered a moment ago.
        documents: as of every `KeyedStage`.
        live: likewise.
        clock: likewise.
        past_backlog: partition -> whether the lines that were there when it was taken over have been handled.
    """

    name = STAGE
    state_version = STATE_VERSION

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
        super().__init__(table, known, documents, live, clock, lookup)
        self._past_backlog = past_backlog
        self.profiles: CompiledDevices[Profile] = CompiledDevices(
            "downlinks", self._compile, None, known, documents, live, clock
        )
        self.configured = self.profiles
        #: when something is to be done, µs
        self._due: Waiting[int] = Waiting()
        #: partition -> nothing is to be done before, µs: most ticks look at no device
        self._soonest: dict[int, int] = {}
        #: partition -> until when nothing times out, µs
        self._patient_until: dict[int, int] = {}

    def _compile(self, device: DeviceDoc | None) -> Profile:
        kind = self._documents.type(device["type"]) if device else None
        return compile_profile(device, kind, self._live().commands.topic)

    def _opened(self, partition: int, device_id: str, document: dict[str, Any] | None) -> DeviceCommands | None:
        return DeviceCommands(device_id, document) if document else None

    async def lines(self, batch: Batch) -> Effects:
        """Take a batch of `device_commands`; a line that cannot be used is told in `iot_errors`.

        Raises:
            Retry: the catalogue has not been read yet.
            Fatal: the state is of another release.
        """
        await self._documents.ready()
        work = _Work(self, batch)
        for record, index, raw in written_lines(batch):
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
        return await self._take(_Work(self, batch), self._concerned(batch))

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
            await self._search(self._due, tick.partition, partial(self._due_us, tick.partition))
            self._soonest[tick.partition] = 0
        if tick.behind:
            self._patient_until[tick.partition] = tick.now_us + PATIENCE_US
        work = _Work(self, Batch(topics.COMMANDS.name, tick.partition, ()))
        known = self._due.of(tick.partition)
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

    def _due_us(self, partition: int, device_id: str, document: dict[str, Any]) -> int | None:
        return DeviceCommands(device_id, document).due_us(self.profiles.get(partition, device_id))

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
    """The record of a line of `device_commands`: keyed as the device's raw messages, however its address is spelled here."""
    return Send(topics.COMMANDS, canonical_address(line["device_id"]).encode(), to_bytes(line))


class _Work(KeyedWork[Commanding, DeviceCommands | None]):
    """One batch, or one tick. A device without state is None: nothing need be known of it."""

    def __init__(self, stage: Commanding, batch: Batch) -> None:
        super().__init__(stage, batch)
        self._events: list[CommandEventDoc] = []
        self._downlinks = self._repeated = self._ignored = 0
        self._due: dict[str, int | None] = {}
        self._awake_us = round(stage._live().commands.wake_s * 1e6)
        now_us, partition = self._now_us, batch.partition
        if batch.records and batch.records[0].timestamp < now_us // _MS_US - BACKLOG_MS:
            stage._patient_until[partition] = now_us + PATIENCE_US
        # A partition that no tick has seen was taken over a moment ago.
        self._may_time_out = stage._patient_until.get(partition, now_us + 1) <= now_us
        self.parsed: list[tuple[Record, int, bytes, Line]] = []

    def _turn(self, record_us: int = 0) -> Turn:
        """What may be done; `record_us`: when what causes it was in Kafka or received, 0: at any time."""
        since_us = None if self._may_time_out else record_us
        return Turn(self._now_us, self._downlinks < DOWNLINKS_A_TURN_MAX, self._may_time_out, since_us)

    def _profile(self, device_id: str) -> Profile:
        return self._stage.profiles.get(self.batch.partition, device_id)

    def parse(self, record: Record, index: int, raw: bytes) -> None:
        """One line of `device_commands`."""
        key = key_of(record)
        try:
            line = parse_line(
                parse_written(raw, LINE_BYTES_MAX, "a command"),
                device_id=key,
                # Kafka's times are milliseconds: to the end of this one.
                at=record.timestamp * _MS_US + _MS_US - 1,
                key=f"{self.batch.partition}:{record.offset}:{index}",
            )
        except Reject as e:
            self._error(record, index, e.code, str(e), {"device_id": key}, raw)
        else:
            self.parsed.append((record, index, raw, line))

    def line(self, record: Record, index: int, raw: bytes, line: Line) -> None:
        """Carry a checked line out, or send it on to where its device is."""
        device_id = self._registered(line.device_id)
        try:
            if self._comes_by_address(record, device_id):
                there = to_bytes({**orjson.loads(raw), "device_id": device_id})
                self._effects.sends.append(Send(topics.COMMANDS, device_id.encode(), there))
                return
            self._require_here(record, device_id, ReasonCode.COMMAND_INVALID, "commands")
        except Reject as e:
            self._error(record, index, e.code, str(e), {"device_id": key_of(record)}, raw)
            return
        device = self._devices[device_id]
        if device is None and line.kind == "wake":
            return  # nothing waits, and nothing is to be remembered of it
        if device is None:
            device = self._devices[device_id] = DeviceCommands(device_id)
        place = (f"c{self.batch.partition}", record.offset, index)
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
            self._error(record, index, ReasonCode.COMMAND_INVALID, text, {"device_id": device_id}, raw)
        # A report that comes twice, or after the answer that it tells of, is nobody's fault.
        self._ignored += outcome.refusal is not None and line.kind == "report"

    def record(self, record: Record, lines: list[dict[str, Any]]) -> None:
        """One record of validated messages."""
        for message in lines:
            device_id = message["device_id"]
            device = self._devices[device_id]
            if device is not None and device.open:
                turn = self._turn(message["received_at"])
                outcome = device.uplink(message, self._profile(device_id), turn, awake_us=self._awake_us)
                self._outcome(device_id, outcome)

    def tick(self, device_id: str) -> None:
        """Time passes for one device."""
        device = self._devices[device_id]
        if device is not None:
            self._outcome(device_id, device.tick(self._profile(device_id), self._turn()))

    def _outcome(self, device_id: str, outcome: Outcome) -> None:
        self._duplicates += outcome.duplicate
        if outcome.changed:
            self._touched.add(device_id)
        key = device_id.encode()
        for event in outcome.events:
            self._events.append(event)
            self._effects.sends.append(Send(topics.COMMAND_EVENTS, key, to_bytes(event), self.batch.partition))
        for downlink in outcome.downlinks:
            self._downlinks += 1
            self._effects.sends.append(Send(topics.DOWNLINKS, key, to_bytes(downlink), self.batch.partition))

    def finish(self) -> Effects:
        """As of every stage; when a device is due next may have changed where nothing else has."""
        for device_id, device in self._devices.items():
            self._due[device_id] = device.due_us(self._profile(device_id)) if device else None
        return super().finish()

    def _document(self, device_id: str) -> bytes | None:
        device = self._devices[device_id]
        assert device is not None
        document = device.document()
        return None if document is None else to_bytes(document)

    def _after(self) -> None:
        super()._after()
        stage, partition = self._stage, self.batch.partition
        stage._due.put(partition, self._due)
        soonest = [at for at in self._due.values() if at is not None]
        if soonest:
            stage._soonest[partition] = min(*soonest, stage._soonest.get(partition, 0))
        for event in self._events:
            metrics.COMMAND_EVENTS.labels(event["event"], event["state"]).inc()
        if self._repeated:
            metrics.COMMANDS_REPEATED.inc(self._repeated)
        if self._ignored:
            metrics.COMMAND_REPORTS_IGNORED.inc(self._ignored)
