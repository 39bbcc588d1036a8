"""The alarm stage: validated messages and operators' actions in, alarm transitions out. It waits for no database.

Both topics change the same state, so the app gives each partition to one of them at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from heapq import heapify, heappop, heappush
from itertools import islice
from re import compile as pattern
from typing import Any, Final, NamedTuple

import structlog

from preservarium import metrics, topics
from preservarium.clock import Clock
from preservarium.domain.alarms.action import (
    ACTION_ID_CHARS_MAX,
    ACTIONS,
    NAME_CHARS_MAX,
    Action,
    AnswerDoc,
    parse_action,
)
from preservarium.domain.alarms.device import DeviceAlarms
from preservarium.domain.alarms.line import StandingDoc, TransitionDoc
from preservarium.domain.alarms.machine import Refusal, State
from preservarium.domain.alarms.rule import DeviceRules
from preservarium.domain.alarms.rules import compile_rules
from preservarium.domain.alarms.state import ALARMS_PER_DEVICE_MAX, STATE_VERSION
from preservarium.domain.alarms.turn import Outcome
from preservarium.domain.readings.json_text import to_bytes
from preservarium.domain.readings.lineage import GENERATION_LIVE, identity
from preservarium.domain.readings.reading import PIN_POSITION_NONE
from preservarium.domain.registry.device import DeviceDoc
from preservarium.errors import ReasonCode, Reject
from preservarium.registry.compiled import CompiledDevices, Documents, Known, LookupMany, ask_nobody, fields_of
from preservarium.settings import LiveSettings
from preservarium.stages.keyed import KeyedStage, KeyedWork, key_of, parse_written, written_lines
from preservarium.streaming.publish import partition_of
from preservarium.streaming.records import headers_of
from preservarium.streaming.stage import RECORDS_A_TURN, Batch, Effects, Record, Send, Tick, in_turns
from preservarium.streaming.state import Table

log = structlog.get_logger(__name__)

STAGE: Final = "alarm"

#: An action is a few hundred bytes; its comment is the largest part.
ACTION_BYTES_MAX: Final = 16_384

#: Devices whose deadlines one tick sees to. Where a gateway fails, thousands are silent at once: each raises some alarms, at
#: some 0.1 ms each, and readings of others wait meanwhile.
DUE_A_TICK_MAX: Final = 500

#: Between ticks: how late silence is told at most, and what looking at the head of a queue may cost.
TICK_S: Final = 5.0

#: A connector gathers messages for a moment and Kafka acknowledges them; they were received by then and are in no topic yet.
IN_FLIGHT_US: Final = 1_000_000

#: Until the next tick where more devices were due than one tick sees to; batches come in between.
TICK_AGAIN_S: Final = 0.1

#: Devices between two turns of the event loop: some 10 ms of work.
DUE_A_TURN: Final = 20

#: Devices of which one tick looks whether their alarms are still watched, some 0.1 ms each. After a change of a rule those of
#: all devices with an alarm are asked, in ticks that follow one another.
CHECKED_A_TICK_MAX: Final = 200

#: An alarm of which the device or the rule is gone ends after this time, so that a device that is removed and registered again,
#: or a registry that is applied in two steps, loses none.
GONE_AFTER_S: Final = 30.0

#: A state document in which an alarm is not normal has one of these; a text in it that says just that costs a look.
_STANDS: Final = pattern(b'"(?:' + "|".join(s.value for s in State if s is not State.NORMAL).encode() + b')"')

#: The deadline in a state document: a number under this key stands nowhere else in it, and in a text the quotes would be
#: escaped. So nothing need be parsed of a million series to find those that wait.
_DUE: Final = pattern(rb'"due":(\d+)')


class _Rules(NamedTuple):
    """A device's rules, or that the device is unknown: a value for the cache, which has no room for None."""

    rules: DeviceRules | None


_RULED: Final = fields_of("rules", "outages", "datatypes")


def _of_rules(device: DeviceDoc) -> Mapping[str, Any]:
    said = _RULED(device)
    return said if device.get("enabled", True) else {**said, "enabled": False}


def _named(shared: _Rules, device: DeviceDoc) -> _Rules:
    if shared.rules is None:
        return shared
    return _Rules(replace(shared.rules, device_name=device.get("name") or device["device_id"]))


class _Device(NamedTuple):
    """A device in one batch: its rules stay the same until the end."""

    rules: DeviceRules | None
    alarms: DeviceAlarms | None  #: None: without rules and without state, so nothing need be known


class Alarming(KeyedStage[_Device]):
    """The handlers of the stage: `observe` for validated messages, `act` for operators' actions; made as every `KeyedStage`.

    Args:
        removed: (partition, device) -> whether the registry has removed it. One that is merely not known here may be any
            moment, so its alarms stay.
    """

    name = STAGE
    state_version = STATE_VERSION

    def __init__(
        self,
        table: Table,
        known: Known,
        documents: Documents,
        live: LiveSettings,
        clock: Clock,
        lookup: LookupMany = ask_nobody,
        *,
        removed: Callable[[int, str], bool] = lambda _partition, _device_id: False,
    ) -> None:
        super().__init__(table, known, documents, live, clock, lookup)
        self._removed = removed
        self.rules: CompiledDevices[_Rules] = CompiledDevices(
            "rules", self._compile, _of_rules, known, documents, live, clock, own=_named
        )
        self.configured = self.rules
        self._deadlines: dict[int, _Deadlines] = {}
        #: when a tick found more due than it sees to, s on the monotonic clock
        self._crowded_s = -TICK_S
        #: partition -> when it was taken over, or Kafka was back, µs by the worker's clock
        self._taken_over: dict[int, int] = {}
        #: partition -> (when messages were observed last, when the newest of them was received), µs
        self._heard: dict[int, tuple[int, int]] = {}
        self._unwatched: dict[int, _Unwatched] = {}

    def changed(self, device_id: str) -> None:
        """A device was registered, changed or removed; for `DeviceLookup.on_change`."""
        self.rules.forget(device_id)
        partition = partition_of(device_id.encode(), self._live().kafka.partitions)
        if partition in self._unwatched:
            self._unwatched[partition].ask(device_id)

    def _compile(self, device: DeviceDoc | None) -> _Rules:
        if device is None:
            return _Rules(None)
        documents = self._documents
        rules = compile_rules(device, documents.type(device["type"]), documents.rule, documents.datatype)
        for problem in rules.problems:
            if self._is_news(problem):
                log.warning("rule_unusable", problem=problem, device_id=device["device_id"])
        return _Rules(rules)

    def _opened(self, partition: int, device_id: str, document: dict[str, Any] | None) -> _Device:
        rules = self.rules.get(partition, device_id).rules
        unwatched = document is None and (rules is None or not rules.by_name)
        return _Device(rules, None if unwatched else DeviceAlarms(device_id, document))

    async def observe(self, batch: Batch) -> Effects:
        """Evaluate a batch of validated messages.

        Raises:
            Retry: the catalogue has not been read yet.
            Fatal: the state is of another release.
        """
        await self._documents.ready()
        work = _Work(self, batch)
        effects = await self._take(work)
        if work.newest_us:
            self._heard[batch.partition] = (self._clock.now_us(), work.newest_us)
        return effects

    async def tick(self, tick: Tick) -> Effects:
        """See to deadlines: shelves that end, series that are silent, readings that waited for others; and end the alarms
        that nothing watches any more.

        Time goes no further than messages were handled (`_reached`), so that it makes no difference to the history
        when they were. After a worker took the partition over, worked off a backlog, or had no Kafka for so long,
        `alarm.settle_s` must pass first, because connectors may have kept something back.

        Alarms whose device or rule is gone end `GONE_AFTER_S` after that was seen, by the worker's monotonic clock, whatever
        was handled. Of that, a replay knows nothing: the registry is no part of the log, and a message, where one comes
        before, ends them at once. The transition has the same id and event time either way.

        Raises:
            Retry: the catalogue has not been read yet.
            Fatal: the state is of another release.
        """
        await self._documents.ready()
        if tick.first:
            await self._find_deadlines(tick)
        now_us = self._reached(tick)
        work = _Work(self, Batch(topics.VALIDATED.name, tick.partition, ()))
        await self._withdraw(tick, work)
        if now_us is None:
            return work.finish()
        due = self._deadlines[tick.partition].due(now_us, DUE_A_TICK_MAX)
        if len(due) == DUE_A_TICK_MAX:
            self._crowded_s = self._clock.monotonic_s()
        async for device_id in in_turns(due, DUE_A_TURN):
            work.time(device_id, now_us)
        return work.finish()

    async def _withdraw(self, tick: Tick, work: "_Work") -> None:
        """End alarms that nothing watches any more."""
        suspects = self._unwatched[tick.partition]
        suspects.rev_is(self._documents.rev)
        now_s = self._clock.monotonic_s()
        async for device_id, since_s in in_turns(suspects.take(CHECKED_A_TICK_MAX), DUE_A_TURN):
            if not work.is_unwatched(device_id):
                continue
            if since_s is None:
                suspects.ask(device_id, now_s)
            elif now_s - since_s < GONE_AFTER_S:
                suspects.ask(device_id, since_s)
            else:
                # Asked again: it is over once this tick's effects are carried out.
                suspects.ask(device_id, since_s)
                work.withdraw(device_id, tick.now_us)
        if suspects.is_crowded:
            self._crowded_s = self._clock.monotonic_s()

    def _reached(self, tick: Tick) -> int | None:
        """Up to when everything that was received is handled, µs; None: that is not known.

        While records wait, it is when the newest message that was handled was received.
        """
        settle_us = round(self._live().alarm.settle_s * 1e6)
        observed_at, received_at = self._heard.get(tick.partition, (0, 0))
        # A clock that was ahead when it was read has said nothing.
        if observed_at > tick.now_us:
            observed_at = received_at = 0
        self._taken_over[tick.partition] = min(tick.now_us, self._taken_over[tick.partition])
        if tick.behind:
            found = min(received_at, tick.now_us)
        else:
            found = tick.now_us if tick.handled_us is None else tick.handled_us
            if tick.now_us - found > settle_us:
                self._taken_over[tick.partition] = tick.now_us
            if tick.now_us - observed_at < settle_us < observed_at - received_at:
                return None
        if not found or tick.now_us - self._taken_over[tick.partition] < settle_us:
            return None
        return found - IN_FLIGHT_US

    def tick_s(self) -> float:
        """Until the next tick: the usual time, or hardly any where many are due."""
        return TICK_AGAIN_S if self._clock.monotonic_s() - self._crowded_s < TICK_S else TICK_S

    async def _find_deadlines(self, tick: Tick) -> None:
        """Look through the table: what was known may be from before the partition went to another worker and back."""
        self._taken_over[tick.partition] = tick.now_us
        found = self._deadlines[tick.partition] = _Deadlines()
        unwatched = self._unwatched[tick.partition] = _Unwatched(self._documents.rev)
        async for key, value in in_turns(self._table.items(tick.partition)):
            if _STANDS.search(value):
                unwatched.stands(key.decode(), True)
            due = _DUE.search(value)
            if due is not None:
                found.put(key.decode(), int(due[1]))

    async def act(self, batch: Batch) -> Effects:
        """Carry out a batch of operators' actions; one that cannot be is told in `iot_errors`.

        Raises:
            Retry: the catalogue has not been read yet.
            Fatal: the state is of another release.
        """
        await self._documents.ready()
        work = _Work(self, batch)
        for record, index, line in written_lines(batch):
            work.line(record, index, line)
        return work.finish()


class _Deadlines:
    """When devices of one partition have something to do though no message comes; at most one entry for each."""

    def __init__(self) -> None:
        self._at: dict[str, int] = {}
        #: no later than `_at`; a deadline that is put off stays where it was until its turn
        self._queue: list[tuple[int, str]] = []

    def put(self, device_id: str, at: int | None) -> None:
        """Note a device's deadline, µs; None: it has none."""
        if at is None:
            self._at.pop(device_id, None)
            return
        before = self._at.get(device_id)
        self._at[device_id] = at
        if before is None or at < before:
            heappush(self._queue, (at, device_id))
        if len(self._queue) > 2 * len(self._at) + RECORDS_A_TURN:
            self._queue = [(at, device_id) for device_id, at in self._at.items()]
            heapify(self._queue)

    def due(self, now_us: int, devices_max: int) -> list[str]:
        """Devices whose deadline is over; they stay until another one is put."""
        found: dict[str, int] = {}
        while self._queue and self._queue[0][0] <= now_us and len(found) < devices_max:
            _, device_id = heappop(self._queue)
            at = self._at.get(device_id)
            if at is None or device_id in found:
                continue
            if at <= now_us:
                found[device_id] = at
            else:
                heappush(self._queue, (at, device_id))
        for device_id, at in found.items():
            heappush(self._queue, (at, device_id))
        return list(found)


class _Unwatched:
    """Devices of one partition with an alarm that is not normal, and of which of them to ask whether it is still watched."""

    def __init__(self, rev: int) -> None:
        self._rev = rev
        self._standing: set[str] = set()
        #: device -> since when something of it is not watched, s on the monotonic clock; None: not asked yet
        self._asked: dict[str, float | None] = {}

    def stands(self, device_id: str, stands: bool) -> None:
        """Note whether a device has such an alarm; one that has is asked about."""
        if not stands:
            self._standing.discard(device_id)
            self._asked.pop(device_id, None)
        elif device_id not in self._standing:
            self._standing.add(device_id)
            self._asked.setdefault(device_id, None)

    def ask(self, device_id: str, since_s: float | None = None) -> None:
        """Ask about a device, after all others."""
        if device_id in self._standing:
            before = self._asked.pop(device_id, None)
            self._asked[device_id] = before if since_s is None else since_s

    def rev_is(self, rev: int) -> None:
        """Ask about all of them where types or rules have changed."""
        if rev != self._rev:
            self._rev = rev
            for device_id in self._standing:
                self._asked.setdefault(device_id, None)

    def take(self, devices_max: int) -> list[tuple[str, float | None]]:
        """The next ones, which are not asked about any more."""
        found = list(islice(self._asked.items(), devices_max))
        for device_id, _ in found:
            del self._asked[device_id]
        return found

    @property
    def is_crowded(self) -> bool:
        """Whether some wait that were not asked about yet."""
        return any(since_s is None for since_s in islice(self._asked.values(), 1))


class _Work(KeyedWork[Alarming, _Device]):
    """One batch, or one tick."""

    def __init__(self, stage: Alarming, batch: Batch) -> None:
        super().__init__(stage, batch)
        #: when the newest message of the live generation was received, µs: a replay's are old by intention
        self.newest_us = 0
        #: of all messages; what an alarm makes of one is told at once, and taken out of it
        self._observed = Outcome()
        self._transitions: list[TransitionDoc] = []
        #: (device, rule, pin) -> how the alarm stands after the batch
        self._standing: dict[tuple[str, str, str], StandingDoc | None] = {}
        self._answers: list[AnswerDoc] = []
        self._due: dict[str, int | None] = {}
        #: device -> whether it has an alarm that is not normal
        self._stands: dict[str, bool] = {}

    def record(self, record: Record, lines: list[dict[str, Any]]) -> None:
        """One record of validated messages."""
        for index, message in enumerate(lines):
            received_at = message["received_at"]
            if received_at > self.newest_us and message["generation"] == GENERATION_LIVE:
                self.newest_us = received_at
            device_id = message["device_id"]
            rules, alarms = self._devices[device_id]
            if alarms is None:
                continue
            outcome = alarms.observe(message, rules, outcome=self._observed)
            if outcome.duplicate:
                outcome.duplicate = False
                self._duplicates += 1
                continue
            self._touched.add(device_id)
            if outcome.limited:
                outcome.limited = False
                text = f"more than {ALARMS_PER_DEVICE_MAX} alarms: the others are not watched"
                self._limited(record, index, text, message)
            if outcome.transitions or outcome.standing:
                self._tell(record, device_id, outcome)
                outcome.transitions, outcome.standing = [], {}

    def time(self, device_id: str, now_us: int) -> None:
        """One device whose deadline is over."""
        rules, alarms = self._devices[device_id]
        if alarms is not None:
            self._outcome(None, device_id, alarms.tick(now_us, rules))

    def is_unwatched(self, device_id: str) -> bool:
        """Whether an alarm of a device is not normal and not watched any more."""
        rules, alarms = self._devices[device_id]
        if alarms is None or (rules is None and not self._stage._removed(self.batch.partition, device_id)):
            return False
        return alarms.stands_without_rule(rules)

    def withdraw(self, device_id: str, now_us: int) -> None:
        """End those alarms."""
        rules, alarms = self._devices[device_id]
        if alarms is not None:
            self._outcome(None, device_id, alarms.withdraw_unwatched(now_us, rules))

    def line(self, record: Record, index: int, raw: bytes) -> None:
        """One line of `alarm_actions`: carried out, or sent on to where its device is."""
        key = key_of(record)
        device_id = key
        line: dict[str, Any] | None = None
        action: Action | None = None
        outcome = Outcome()
        try:
            line = _object(raw)
            action = parse_action(line, key)
            device_id = self._registered(action.device_id)
            if self._comes_by_address(record, device_id):
                there = to_bytes({**line, "device_id": device_id})
                self._effects.sends.append(Send(topics.ALARM_ACTIONS, device_id.encode(), there))
                return
            action = replace(action.by(self._now_us), device_id=device_id)
            self._require_here(record, device_id, ReasonCode.ACTION_INVALID, "alarms")
            rules, alarms = self._devices[device_id]
            if alarms is None:
                outcome.refusal = Refusal.UNKNOWN_ALARM
                if action.alarm_id is not None:
                    # Somebody saw it stand, and nothing is known of it: it stands no longer.
                    outcome.refusal = Refusal.OTHER_OCCURRENCE
                    self._standing[device_id, action.rule, action.pin_position] = None
            else:
                outcome = alarms.act(action, rules, f"a{self.batch.partition}", record.offset, index)
                self._outcome(record, device_id, outcome)
            if outcome.refusal is not None:
                message = f"{action.event} of rule {action.rule!r} is refused: {outcome.refusal}"
                raise Reject(ReasonCode.ACTION_INVALID, message)
            refused = None
        except Reject as e:
            self._error(record, index, e.code, str(e), {"device_id": device_id}, raw)
            refused = e
        if line is not None and device_id and not outcome.duplicate:
            self._answer(record, index, line, action, device_id, outcome, refused)

    def _answer(
        self,
        record: Record,
        index: int,
        line: dict[str, Any],
        action: Action | None,
        device_id: str,
        outcome: Outcome,
        refused: Reject | None,
    ) -> None:
        """Say what became of an action; of one that is not well formed too, as far as it can be told."""
        code = outcome.refusal.name.lower() if outcome.refusal else str(refused.code) if refused else ""
        action_id = line.get("action_id") if action is None or action.action_id else None
        if not isinstance(action_id, str) or not 0 < len(action_id) <= ACTION_ID_CHARS_MAX or "\0" in action_id:
            action_id = identity("action", self.batch.partition, record.offset, index)
        self._answers.append(
            {
                "action_id": action_id,
                "device_id": device_id,
                "rule": action.rule if action else _text(line, "rule"),
                "pin_position": action.pin_position if action else _text(line, "pin_position", PIN_POSITION_NONE),
                "alarm_id": outcome.alarm_id,
                "action": line["action"] if action else _text(line, "action"),
                "actor": action.actor if action else _text(line, "actor"),
                "comment": action.comment if action else _text(line, "comment"),
                "at": action.at if action else record.timestamp * 1_000,
                "until": action.until if action else None,
                "one_shot": action.one_shot if action else False,
                "outcome": "refused" if refused else "done",
                "code": code,
                "reason": str(outcome.refusal or refused or ""),
                "state": outcome.state.value if outcome.state else "",
                "transitions": [t["transition_id"] for t in outcome.transitions],
                "answered_at": self._now_us,
            }
        )

    def _outcome(self, record: Record | None, device_id: str, outcome: Outcome) -> None:
        if outcome.duplicate:
            self._duplicates += 1
            return
        self._touched.add(device_id)
        self._observed.evaluated += outcome.evaluated
        self._observed.late += outcome.late
        self._tell(record, device_id, outcome)

    def _tell(self, record: Record | None, device_id: str, outcome: Outcome) -> None:
        for (rule, pin), standing in outcome.standing.items():
            self._standing[device_id, rule, pin] = standing
        for transition in outcome.transitions:
            self._transitions.append(transition)
            value = to_bytes(transition)
            headers = headers_of(record) if record is not None else ()
            send = Send(topics.ALERTS, device_id.encode(), value, self.batch.partition, headers)
            self._effects.sends.append(send)

    def finish(self) -> Effects:
        """As of every stage; how alarms stand now, and answers to operators, are sent besides."""
        sends, partition = self._effects.sends, self.batch.partition
        for point, standing in self._standing.items():
            value = None if standing is None else to_bytes(standing)
            sends.append(Send(topics.ALARM_STANDING, to_bytes(point), value, partition))
        for answer in self._answers:
            key = answer["device_id"].encode()
            sends.append(Send(topics.ALARM_ANSWERS, key, to_bytes(answer), partition))
        return super().finish()

    def _document(self, device_id: str) -> bytes:
        rules, alarms = self._devices[device_id]
        assert alarms is not None
        document = alarms.document()
        self._due[device_id] = document.get("due") if rules is not None else None
        self._stands[device_id] = alarms.stands
        return to_bytes(document)

    def _after(self) -> None:
        super()._after()
        deadlines = self._stage._deadlines.setdefault(self.batch.partition, _Deadlines())
        for device_id, due in self._due.items():
            deadlines.put(device_id, due)
        # None before the first tick, which finds them all.
        if (unwatched := self._stage._unwatched.get(self.batch.partition)) is not None:
            for device_id, stands in self._stands.items():
                unwatched.stands(device_id, stands)
        metrics.READINGS.labels(STAGE).inc(self._observed.evaluated)
        if self._observed.late:
            metrics.ALARM_LATE.inc(self._observed.late)
        for transition in self._transitions:
            metrics.ALARM_TRANSITIONS.labels(transition["transition"], transition["severity"]).inc()
        for answer in self._answers:
            action = answer["action"] if answer["action"] in ACTIONS else "unknown"
            metrics.ALARM_ACTIONS.labels(action, answer["outcome"]).inc()
            metrics.ALARM_ANSWER_SECONDS.observe(max(0, answer["answered_at"] - answer["at"]) / 1e6)


def _object(raw: bytes) -> dict[str, Any]:
    line = parse_written(raw, ACTION_BYTES_MAX, "an action")
    if not isinstance(line, dict):
        message = "an action is a JSON object"
        raise Reject(ReasonCode.ACTION_INVALID, message)
    return line


def _text(line: dict[str, Any], name: str, default: str = "") -> str:
    value = line.get(name)
    return value[:NAME_CHARS_MAX].replace("\0", "") if isinstance(value, str) else default
