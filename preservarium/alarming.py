"""The alarm stage: validated messages and operators' actions in, alarm transitions out. It waits for no database.

Both topics change the same state, so the app gives each partition to one of them at a time.
"""

from heapq import heapify, heappop, heappush
from re import compile as pattern
from typing import Any, Final

import orjson
import structlog

from preservarium import metrics, topics
from preservarium.clock import Clock
from preservarium.compiled import CompiledDevices, Documents, Known
from preservarium.domain.alarm import Refusal
from preservarium.domain.device import DeviceDoc
from preservarium.domain.device_alarms import (
    ACTION_ID_CHARS_MAX,
    ACTIONS,
    ALARMS_PER_DEVICE_MAX,
    NAME_CHARS_MAX,
    STATE_VERSION,
    Action,
    AnswerDoc,
    DeviceAlarms,
    Outcome,
    StandingDoc,
    TransitionDoc,
    parse_action,
)
from preservarium.domain.errors import ReasonCode, Reject
from preservarium.domain.lineage import GENERATION_LIVE, identity
from preservarium.domain.reading import PIN_POSITION_NONE, ErrorLine
from preservarium.domain.rules import DeviceRules, compile_rules
from preservarium.publish import partition_of
from preservarium.records import headers_of, message_error, parse_trusted, refuse
from preservarium.settings import LiveSettings
from preservarium.stage import RECORDS_A_TURN, Batch, Effects, Record, Send, Tick, in_turns
from preservarium.state import Table, load_state

log = structlog.get_logger(__name__)

STAGE: Final = "alarm"

#: An action is a few hundred bytes; its comment is the largest part.
ACTION_BYTES_MAX: Final = 16_384

#: Texts of configuration problems that were logged; a registry with more has one line too many anyway.
PROBLEMS_LOGGED_MAX: Final = 1_000

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

#: The deadline in a state document: a number under this key stands nowhere else in it, and in a text the quotes would be
#: escaped. So nothing need be parsed of a million series to find those that wait.
_DUE: Final = pattern(rb'"due":(\d+)')


class Alarming:
    """The handlers of the stage: `observe` for validated messages, `act` for operators' actions.

    Args:
        table: the state table.
        known: the device's document.
        documents: the catalogue.
        live: settings.
        clock: for error lines and caches.
    """

    def __init__(self, table: Table, known: Known, documents: Documents, live: LiveSettings, clock: Clock) -> None:
        self._table = table
        self._deadlines: dict[int, _Deadlines] = {}
        #: when a tick found more due than it sees to, s on the monotonic clock
        self._crowded_s = -TICK_S
        #: partition -> when it was taken over, or Kafka was back, µs by the worker's clock
        self._taken_over: dict[int, int] = {}
        #: partition -> (when messages were observed last, when the newest of them was received), µs
        self._heard: dict[int, tuple[int, int]] = {}
        self._documents = documents
        self._live = live
        self._clock = clock
        self._logged: set[str] = set()
        self.rules: CompiledDevices[_Rules] = CompiledDevices("rules", self._compile, known, documents, live, clock)

    def _compile(self, device: DeviceDoc | None) -> "_Rules":
        if device is None:
            return _Rules(None)
        documents = self._documents
        rules = compile_rules(device, documents.type(device["type"]), documents.rule, documents.datatype)
        for problem in rules.problems:
            if problem not in self._logged and len(self._logged) < PROBLEMS_LOGGED_MAX:
                self._logged.add(problem)
                log.warning("rule_unusable", problem=problem, device_id=device["device_id"])
        return _Rules(rules)

    async def observe(self, batch: Batch) -> Effects:
        """Evaluate a batch of validated messages.

        Raises:
            Retry: the catalogue has not been read yet.
            Fatal: the state is of another release.
        """
        await self._documents.ready()
        parsed, errors = parse_trusted(batch, stage=STAGE)
        work = _Work(self, batch, errors)
        async for record, lines in in_turns(zip(batch.records, parsed, strict=True)):
            for index, message in enumerate(lines):
                work.message(record, index, message)
        newest = max(
            (m["received_at"] for lines in parsed for m in lines if m["generation"] == GENERATION_LIVE), default=0
        )
        if newest:  # a replay's messages are old by intention
            self._heard[batch.partition] = (self._clock.now_us(), newest)
        return work.finish()

    async def tick(self, tick: Tick) -> Effects:
        """See to deadlines: shelves that end, series that are silent, readings that waited for others.

        Time goes no further than messages were handled (`_reached`), so that it makes no difference to the history
        when they were. After a worker took the partition over, worked off a backlog, or had no Kafka for so long,
        `alarm.settle_s` must pass first, because connectors may have kept something back.

        Raises:
            Retry: the catalogue has not been read yet.
            Fatal: the state is of another release.
        """
        await self._documents.ready()
        if tick.first:
            await self._find_deadlines(tick)
        now_us = self._reached(tick)
        if now_us is None:
            return Effects()
        work = _Work(self, Batch(topics.VALIDATED.name, tick.partition, ()), [])
        due = self._deadlines[tick.partition].due(now_us, DUE_A_TICK_MAX)
        if len(due) == DUE_A_TICK_MAX:
            self._crowded_s = self._clock.monotonic_s()
        async for device_id in in_turns(due, DUE_A_TURN):
            work.time(device_id, now_us)
        return work.finish()

    def _reached(self, tick: Tick) -> int | None:
        """Up to when everything that was received is handled, µs; None: that is not known.

        While records wait, it is when the newest message that was handled was received.
        """
        settle_us = round(self._live().alarm.settle_s * 1e6)
        observed_at, received_at = self._heard.get(tick.partition, (0, 0))
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
        async for key, value in in_turns(self._table.items(tick.partition)):
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
        work = _Work(self, batch, [])
        partitions = self._live().kafka.partitions
        for record in batch.records:
            for index, line in enumerate((record.value or b"").split(b"\n")):
                if line.strip():
                    work.line(record, index, line, partitions)
        return work.finish()


class _Rules:
    """A device's rules, or that the device is unknown: a value for the cache, which has no room for None."""

    __slots__ = ("rules",)

    def __init__(self, rules: DeviceRules | None) -> None:
        self.rules = rules


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


class _Work:
    """One batch, or one tick."""

    def __init__(self, stage: Alarming, batch: Batch, errors: list[ErrorLine]) -> None:
        self._stage = stage
        self._batch = batch
        self._errors = errors
        self._effects = Effects()
        #: None: a device without rules and without state, of which nothing need be known
        self._alarms: dict[str, DeviceAlarms | None] = {}
        self._rules: dict[str, DeviceRules | None] = {}
        self._touched: set[str] = set()
        self._now_us = stage._clock.now_us()
        self._evaluated = self._late = self._duplicates = 0
        self._transitions: list[TransitionDoc] = []
        #: (device, rule, pin) -> how the alarm stands after the batch
        self._standing: dict[tuple[str, str, str], StandingDoc | None] = {}
        self._answers: list[AnswerDoc] = []
        self._due: dict[str, int | None] = {}

    def _device(self, device_id: str) -> DeviceAlarms | None:
        """The device's alarms, with the rules of this batch: they stay the same until its end."""
        if device_id in self._alarms:
            return self._alarms[device_id]
        partition = self._batch.partition
        rules = self._rules[device_id] = self._stage.rules.get(partition, device_id).rules
        document = load_state(self._stage._table.get(partition, device_id.encode()), STATE_VERSION)
        unwatched = document is None and (rules is None or not rules.by_name)
        alarms = self._alarms[device_id] = None if unwatched else DeviceAlarms(device_id, document)
        return alarms

    def message(self, record: Record, index: int, message: dict[str, Any]) -> None:
        """One validated message."""
        device_id = message["device_id"]
        alarms = self._device(device_id)
        if alarms is None:
            return
        outcome = alarms.observe(message, self._rules[device_id])
        if outcome.limited:
            text = f"more than {ALARMS_PER_DEVICE_MAX} alarms: the others are not watched"
            self._error(record, index, ReasonCode.STATE_LIMIT, text, device_id, None, message)
        self._outcome(record, device_id, outcome)

    def time(self, device_id: str, now_us: int) -> None:
        """One device whose deadline is over."""
        alarms = self._device(device_id)
        if alarms is not None:
            self._outcome(None, device_id, alarms.tick(now_us, self._rules[device_id]))

    def line(self, record: Record, index: int, raw: bytes, partitions: int) -> None:
        """One line of `alarm_actions`."""
        key = record.key.decode("utf-8", "replace") if record.key else None
        device_id = key
        line: dict[str, Any] | None = None
        action: Action | None = None
        outcome = Outcome()
        try:
            line = _object(raw)
            action = parse_action(line, key)
            device_id = action.device_id
            if partition_of(device_id.encode(), partitions) != self._batch.partition:
                message = f"the record is keyed {key!r:.100}, so it is not where the alarms of {device_id!r:.100} are"
                raise Reject(ReasonCode.ACTION_INVALID, message)
            alarms = self._device(device_id)
            if alarms is None:
                outcome.refusal = Refusal.UNKNOWN_ALARM
            else:
                source = f"a{self._batch.partition}"
                outcome = alarms.act(action, self._rules[device_id], source, record.offset, index)
                self._outcome(record, device_id, outcome)
            if outcome.refusal is not None:
                message = f"{action.event} of rule {action.rule!r} is refused: {outcome.refusal}"
                raise Reject(ReasonCode.ACTION_INVALID, message)
            refused = None
        except Reject as e:
            self._error(record, index, e.code, str(e), device_id, raw, {})
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
        batch = self._batch
        action_id = line.get("action_id") if action is None or action.action_id else None
        if not isinstance(action_id, str) or not 0 < len(action_id) <= ACTION_ID_CHARS_MAX or "\0" in action_id:
            action_id = identity("action", batch.partition, record.offset, index)
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
        self._evaluated += outcome.evaluated
        self._late += outcome.late
        for (rule, pin), standing in outcome.standing.items():
            self._standing[device_id, rule, pin] = standing
        for transition in outcome.transitions:
            self._transitions.append(transition)
            value = orjson.dumps(transition)
            headers = headers_of(record) if record is not None else ()
            send = Send(topics.ALERTS, device_id.encode(), value, self._batch.partition, headers)
            self._effects.sends.append(send)

    def _error(
        self,
        record: Record,
        index: int,
        code: ReasonCode,
        text: str,
        device_id: str | None,
        raw: bytes | None,
        message: dict[str, Any],
    ) -> None:
        self._errors.append(
            message_error(
                STAGE,
                code,
                text,
                self._batch,
                record,
                index,
                {**message, "device_id": device_id},
                raw=raw,
                now_us=self._now_us,
            )
        )

    def finish(self) -> Effects:
        """State, errors and metrics of the whole batch."""
        effects = self._effects
        for device_id in self._touched:
            alarms = self._alarms[device_id]
            assert alarms is not None
            document = alarms.document()
            self._due[device_id] = document.get("due") if self._rules[device_id] is not None else None
            effects.put(self._stage._table.name, device_id.encode(), orjson.dumps(document))
        partition = self._batch.partition
        for point, standing in self._standing.items():
            value = None if standing is None else orjson.dumps(standing)
            effects.sends.append(Send(topics.ALARM_STANDING, orjson.dumps(point), value, partition))
        for answer in self._answers:
            key = answer["device_id"].encode()
            effects.sends.append(Send(topics.ALARM_ANSWERS, key, orjson.dumps(answer), partition))
        for line in self._errors:
            refuse(effects, line)
        effects.after.append(self._count)
        return effects

    def _count(self) -> None:
        deadlines = self._stage._deadlines.setdefault(self._batch.partition, _Deadlines())
        for device_id, due in self._due.items():
            deadlines.put(device_id, due)
        metrics.READINGS.labels(STAGE).inc(self._evaluated)
        if self._late:
            metrics.ALARM_LATE.inc(self._late)
        if self._duplicates:
            metrics.DUPLICATES.labels(STAGE).inc(self._duplicates)
        for transition in self._transitions:
            metrics.ALARM_TRANSITIONS.labels(transition["transition"], transition["severity"]).inc()
        for answer in self._answers:
            action = answer["action"] if answer["action"] in ACTIONS else "unknown"
            metrics.ALARM_ACTIONS.labels(action, answer["outcome"]).inc()
            metrics.ALARM_ANSWER_SECONDS.observe(max(0, answer["answered_at"] - answer["at"]) / 1e6)


def _object(raw: bytes) -> dict[str, Any]:
    if len(raw) > ACTION_BYTES_MAX:
        message = f"an action of {len(raw)} bytes; it may have {ACTION_BYTES_MAX}"
        raise Reject(ReasonCode.ENVELOPE_TOO_LARGE, message)
    try:
        line = orjson.loads(raw)
    except orjson.JSONDecodeError as e:
        message = f"an action is a JSON object: {e}"
        raise Reject(ReasonCode.ENVELOPE_NOT_JSON, message) from None
    if not isinstance(line, dict):
        message = "an action is a JSON object"
        raise Reject(ReasonCode.ACTION_INVALID, message)
    return line


def _text(line: dict[str, Any], name: str, default: str = "") -> str:
    value = line.get(name)
    return value[:NAME_CHARS_MAX].replace("\0", "") if isinstance(value, str) else default
