"""Operators' side of alarms, over Kafka alone: what stands, what became of actions, and new actions.

`alarm_standing` is compacted and small, so each worker (and the command line) reads all of it and follows it: an alarm
list of the whole system that no database and no other worker is needed for. `alarm_answers` is followed from a little
before the start. Actions go to `alarm_actions`; the alarm stage alone decides what becomes of them.

Many alarms at once: each gets an action of its own, for the occurrence that the operator saw. Which those are where a
filter names them, the list says: `Board.seen()` is how far the topic was read for it, which means the same on every
worker, and what the topic brought later was not shown.
"""

import asyncio
import heapq
import uuid
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
import structlog

from preservarium import metrics, topics
from preservarium.clock import Clock, SystemClock
from preservarium.domain.alarms.action import parse_action
from preservarium.domain.alarms.flood import BEGINS, EVERYBODY, WINDOW_US, Flood, Floods
from preservarium.domain.alarms.machine import SILENT, State
from preservarium.domain.alarms.rule import SEVERITIES
from preservarium.domain.readings.address import canonical_address, same_address
from preservarium.domain.readings.lineage import identity
from preservarium.errors import ReasonCode, Reject
from preservarium.settings import Settings
from preservarium.streaming import following
from preservarium.streaming.stage import Send
from preservarium.waiting import Waiters

log = structlog.get_logger(__name__)

#: Alarms on the board: some 2.5 KiB each, 50 MiB in all. Nobody works through more; what is over it is counted and said.
STANDING_MAX: Final = 20_000
#: Answers remembered, some 1 KiB each: hours of a busy shift.
ANSWERS_MAX: Final = 5_000
#: Answers are read from so long before the start, so that an action that was sent through another worker is found.
ANSWERS_SINCE_S: Final = 900.0

#: Word of a filter -> states. A state's own name stands for itself.
STATES: Final[Mapping[str, frozenset[str]]] = {
    **{state.value: frozenset({state.value}) for state in State if state is not State.NORMAL},
    "standing": frozenset(state.value for state in State if state is not State.NORMAL),
    "annunciated": frozenset(s.value for s in State if s is not State.NORMAL and s not in SILENT),
    "active": frozenset({State.UNACKNOWLEDGED.value, State.ACKNOWLEDGED.value}),
    "waiting": frozenset(
        {State.UNACKNOWLEDGED.value, State.RETURNED_UNACKNOWLEDGED.value, State.LATCHED_UNACKNOWLEDGED.value}
    ),
    "latched": frozenset({State.LATCHED.value, State.LATCHED_UNACKNOWLEDGED.value}),
    "silent": frozenset(state.value for state in SILENT),
}

#: What may be done to many alarms at once -> the word of `STATES` that a filter means where it names none. What takes
#: alarms away for good, or from the plant's own logic, is decided one by one.
BULK: Final[Mapping[str, str]] = {
    "acknowledge": "waiting",
    "shelve": "annunciated",
    "unshelve": "shelved",
    "comment": "standing",
}
#: Alarms of one request: more than anybody has read; their answers are a tenth of what a board remembers.
BULK_MAX: Final = 500

_WAITING: Final = STATES["waiting"]
_SILENT: Final = STATES["silent"]
_SEVERITY_RANK: Final = {name: rank for rank, name in enumerate(SEVERITIES)}

#: (device, rule, pin)
PointKey = tuple[str, str, str]


def _rank(alarm: Mapping[str, Any]) -> tuple[int, int]:
    """What needs somebody first: not yet acknowledged, then acknowledged, then set aside; each by severity."""
    state = alarm["state"]
    first = 0 if state in _WAITING else 2 if state in _SILENT else 1
    return first, _SEVERITY_RANK.get(alarm.get("severity", ""), len(_SEVERITY_RANK))


#: Order of a list -> sort key; each ends in what makes it unique, so that a cursor is a key.
_ORDERS: Final[Mapping[str, Callable[[Mapping[str, Any]], tuple[Any, ...]]]] = {
    "priority": lambda a: (*_rank(a), -_since(a)),
    "severity": lambda a: (_rank(a)[1], -_since(a)),
    "newest": lambda a: (-_since(a),),
    "oldest": lambda a: (_since(a),),
    "device": lambda a: (),
    "state": lambda a: (a["state"], -_since(a)),
}
SORTS: Final = tuple(_ORDERS)


def _since(alarm: Mapping[str, Any]) -> int:
    """When it was raised; where it never was, when it was set aside. µs."""
    return int(alarm.get("occurred_at") or alarm.get("transition_at") or 0)


def _is_news(before: Mapping[str, Any], alarm: Mapping[str, Any]) -> bool:
    """Whether somebody who saw the alarm as it was before has yet to see it as it is now."""
    return (
        before.get("alarm_id") != alarm.get("alarm_id")
        or before.get("severity") != alarm.get("severity")
        or (alarm["state"] in _WAITING and before["state"] not in _WAITING)
    )


def point_of(alarm: Mapping[str, Any]) -> PointKey:
    """Which alarm."""
    return alarm["device_id"], alarm["rule"], alarm["pin_position"]


def sort_key(alarm: Mapping[str, Any], order: str) -> tuple[Any, ...]:
    """Where an alarm stands in a list of that order."""
    return (*_ORDERS[order](alarm), *point_of(alarm))


@dataclass(frozen=True, slots=True)
class Filter:
    """Which alarms of the board."""

    states: frozenset[str] = STATES["standing"]
    severities: frozenset[str] = frozenset()  #: empty: all
    device_id: str = ""
    rule: str = ""
    q: str = ""  #: part of a device's address or name, a rule or a message, any case

    def takes(self, alarm: Mapping[str, Any]) -> bool:
        """Whether an alarm is one of them."""
        if alarm["state"] not in self.states or (self.severities and alarm["severity"] not in self.severities):
            return False
        if (self.rule and alarm["rule"] != self.rule) or (
            self.device_id and not same_address(alarm["device_id"], self.device_id)
        ):
            return False
        if not self.q or same_address(alarm["device_id"], self.q):
            return True
        needle = self.q.casefold()
        texts = (alarm["device_id"], alarm.get("device_name"), alarm["rule"], alarm.get("message"))
        return any(needle in str(text).casefold() for text in texts if text)


@dataclass(slots=True)
class Page:
    """A part of a list."""

    alarms: list[dict[str, Any]]
    next: list[Any] | None  #: sort key of the last one, where there are more
    total: int  #: that the filter takes


class Board:
    """What is not normal now, and the last answers; fed record by record, asked by views."""

    def __init__(self) -> None:
        self._standing: dict[PointKey, dict[str, Any]] = {}
        #: order that was asked for -> sort key of each alarm: a page of 20,000 alarms must not compute them each time
        self._keys: dict[str, dict[PointKey, tuple[Any, ...]]] = {}
        self._answers: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._floods = Floods()
        #: alarms that found no room
        self.dropped: set[PointKey] = set()
        self._waiting = Waiters()
        #: partition of `alarm_standing` -> offset of the next record
        self._read: dict[int, int] = {}
        #: where the record stands that made the alarm what somebody is to look at; none where it was not read from Kafka
        self._brought: dict[PointKey, tuple[int, int]] = {}
        #: whether everything was read once
        self.ready = asyncio.Event()
        #: why what is here may be old; "" while it is followed
        self.trouble = "not read yet"

    # --- feeding ---

    def stand(self, key: bytes, value: bytes | None, at: tuple[int, int] | None = None) -> PointKey | None:
        """Take one record of `alarm_standing`, of partition and offset `at`; which alarm it is of.

        What is no such record is skipped.
        """
        if at is not None:
            self._read[at[0]] = max(self._read.get(at[0], 0), at[1] + 1)
        try:
            device_id, rule, pin = orjson.loads(key)
            alarm = None if value is None else orjson.loads(value)
            point = (str(device_id), str(rule), str(pin))
            if alarm is not None and (point_of(alarm) != point or not isinstance(alarm["state"], str)):
                raise ValueError(point)
        except (ValueError, TypeError, KeyError) as e:
            log.warning("standing_record_unusable", key=key[:200].decode(errors="replace"), error=repr(e))
            return None
        self.put(point, alarm, at)
        return point

    def put(self, point: PointKey, alarm: dict[str, Any] | None, at: tuple[int, int] | None = None) -> None:
        """How an alarm stands now, as the record `at` says; None: normal."""
        if alarm is None:
            self._remove(point)
            self.dropped.discard(point)
            return
        before = self._standing.get(point)
        if before is None and len(self._standing) >= STANDING_MAX:
            if len(self.dropped) < STANDING_MAX:
                self.dropped.add(point)
            return
        self._standing[point] = alarm
        if at is not None and (before is None or _is_news(before, alarm)):
            self._brought[point] = at
        for order, keys in self._keys.items():
            keys[point] = sort_key(alarm, order)
        if alarm.get("transition") == "raised" and (before is None or before.get("alarm_id") != alarm["alarm_id"]):
            self._floods.take(alarm["detected_at"], alarm.get("recipients") or ())

    def _remove(self, point: PointKey) -> None:
        self._standing.pop(point, None)
        self._brought.pop(point, None)
        for keys in self._keys.values():
            keys.pop(point, None)

    def keep(self, points: Iterable[PointKey]) -> None:
        """Forget all other alarms: after everything was read anew."""
        kept = set(points)
        for point in [p for p in self._standing if p not in kept]:
            self._remove(point)
        self.dropped &= kept

    def answer(self, value: bytes | None) -> None:
        """Take one line of `alarm_answers`; the first answer of an action stays."""
        try:
            answer = orjson.loads(value or b"null")
            action_id = answer["action_id"]
        except (ValueError, TypeError, KeyError):
            return
        if action_id not in self._answers:
            self._answers[action_id] = answer
            while len(self._answers) > ANSWERS_MAX:
                self._answers.popitem(last=False)
        self._waiting.wake(action_id)

    # --- asking ---

    @property
    def complete(self) -> bool:
        """Whether what is here is everything, and of now."""
        return self.ready.is_set() and not self.trouble and not self.dropped

    def note(self) -> str | None:
        """Why it is not, for people."""
        if self.trouble:
            return f"The alarm list is not followed now ({self.trouble}): what is shown may be old."
        if self.dropped:
            return f"More than {STANDING_MAX:,} alarms stand: {len(self.dropped):,} are not in this list."
        return None

    def get(self, point: PointKey) -> dict[str, Any] | None:
        """How an alarm stands; None: normal. Its device may be named by any spelling of its address."""
        found = self._standing.get(point)
        if found is None:
            device_id, *rest = point
            found = next(
                (a for p, a in self._standing.items() if [*p[1:]] == rest and same_address(p[0], device_id)), None
            )
        return found

    def alarms(self) -> list[dict[str, Any]]:
        """Every alarm that is not normal."""
        return [*self._standing.values()]

    def page(self, wanted: Filter, *, order: str = "priority", after: Sequence[Any] | None, limit: int) -> Page:
        """The first `limit` alarms of a filter behind sort key `after`.

        Raises:
            TypeError: `after` is no key of that order.
        """
        keys = self._sorted_by(order)
        found = [(keys[p], p) for p, a in self._standing.items() if wanted.takes(a)]
        total = len(found)
        if after is not None:
            position = tuple(after)
            found = [each for each in found if each[0] > position]
        # Not a sort: a page is short, and 20,000 alarms would be sorted for nothing.
        page = heapq.nsmallest(limit, found)
        following = list(page[-1][0]) if len(found) > len(page) and page else None
        return Page([self._standing[p] for _, p in page], following, total)

    def _sorted_by(self, order: str) -> dict[PointKey, tuple[Any, ...]]:
        keys = self._keys.get(order)
        if keys is None:
            keys = self._keys[order] = {p: sort_key(a, order) for p, a in self._standing.items()}
        return keys

    def seen(self) -> list[list[int]]:
        """What a list of now shows: [partition, offset of the next record] of `alarm_standing`."""
        return [[partition, offset] for partition, offset in sorted(self._read.items())]

    def shown(self, wanted: Filter, seen: Sequence[Sequence[int]], limit: int) -> tuple[list[dict[str, Any]], int, int]:
        """The first `limit` alarms of a filter, without those that a list of `seen` did not show as they are.

        Returns:
            Those alarms, how many there are without the limit, and how many were left out because they are newer.
        """
        read = {each[0]: each[1] for each in seen}
        keys = self._sorted_by("priority")
        found, newer = [], 0
        for point, alarm in self._standing.items():
            if wanted.takes(alarm):
                at = self._brought.get(point)
                if at is not None and at[1] >= read.get(at[0], 0):
                    newer += 1
                else:
                    found.append(keys[point])
        # A key ends in its alarm's point.
        first = [self._standing[key[-3:]] for key in heapq.nsmallest(limit, found)]
        return first, len(found), newer

    def counts(self) -> dict[str, Any]:
        """How many stand: by severity (of those that are annunciated), by state, and how many wait for somebody."""
        severities: Counter[str] = Counter()
        states: Counter[str] = Counter()
        waiting: Counter[str] = Counter()
        for alarm in self._standing.values():
            state = alarm["state"]
            states[state] += 1
            if state not in _SILENT:
                severities[alarm["severity"]] += 1
                if state in _WAITING:
                    waiting[alarm["severity"]] += 1
        return {
            "severity": {name: severities.get(name, 0) for name in SEVERITIES},
            "waiting": {name: waiting.get(name, 0) for name in SEVERITIES},
            "state": dict(sorted(states.items())),
            "total": len(self._standing),
        }

    def flood(self, now_us: int) -> dict[str, Any]:
        """Whether alarms come faster than people can work: annunciations of the last ten minutes."""
        flood = self.floods(now_us)[EVERYBODY]
        return {"on": flood.on, "raised": flood.raised, "window_s": WINDOW_US // 1_000_000, "limit": BEGINS}

    def floods(self, now_us: int) -> dict[str, Flood]:
        """The same for each recipient of alarms; "" is everybody."""
        return self._floods.now(now_us)

    def measure(self, now_us: int) -> None:
        """Set the metrics of what stands now. Where the board may be old, they say what it last knew."""
        counts = self.counts()
        for severity in SEVERITIES:
            metrics.ALARMS_STANDING.labels(severity).set(counts["severity"][severity])
            metrics.ALARMS_WAITING.labels(severity).set(counts["waiting"][severity])
        metrics.ALARMS_CHATTERING.set(sum(bool(alarm.get("chattering")) for alarm in self._standing.values()))
        for operator, flood in self.floods(now_us).items():
            metrics.ALARMS_RECENT.labels(operator).set(flood.raised)
            metrics.ALARM_FLOOD.labels(operator).set(flood.on)

    def answered(self, action_id: str) -> dict[str, Any] | None:
        """What became of an action; None where it is not known (yet)."""
        return self._answers.get(action_id)

    def answers(self, limit: int) -> list[dict[str, Any]]:
        """The last answers, newest first."""
        return [answer for answer, _ in zip(reversed(self._answers.values()), range(limit), strict=False)]

    async def wait(self, action_id: str, timeout_s: float) -> dict[str, Any] | None:
        """The answer of an action, waited for; None where it did not come in time."""
        if action_id not in self._answers and timeout_s > 0:
            await self._waiting.wait(action_id, timeout_s)
        return self._answers.get(action_id)


# --- following -------------------------------------------------------------------------------------------------------


async def follow(
    board: Board, settings: Settings, *, now_us: int, stopped: Callable[[], bool], once: bool = False
) -> None:
    """Read everything into the board, then whatever comes, until `stopped`; with `once`, only what is there now.

    What stands is read from its beginning, answers from a little while ago.

    Raises:
        Retry: a topic is not there.
        KafkaError, OSError: Kafka cannot be read (TimeoutError among them); what the board has stays.
    """
    kafka = settings.kafka
    standing, answers = (topic.full(kafka.topic_prefix) for topic in (topics.ALARM_STANDING, topics.ALARM_ANSWERS))
    seen: set[PointKey] = set()

    def take(records: Sequence[Any], first: bool) -> None:
        for record in records:
            if record.topic != standing:
                board.answer(record.value)
                continue
            point = board.stand(record.key or b"", record.value, (record.partition, record.offset))
            if point is not None and first:
                # A tombstone, and what stands after it, come in order: the last one counts.
                if record.value is None:
                    seen.discard(point)
                else:
                    seen.add(point)

    def caught_up() -> None:
        board.keep(seen)
        board.trouble = ""
        board.ready.set()

    since_ms = now_us // 1_000 - round(ANSWERS_SINCE_S * 1_000)
    sources = {standing: None, answers: since_ms}
    await following.follow(kafka, sources, take, caught_up, client="preservarium-board", stopped=stopped, once=once)


# --- acting ----------------------------------------------------------------------------------------------------------

#: Sends records and returns when Kafka has acknowledged all of them; raises Retry where it cannot.
Publish = Callable[[Sequence[Send]], Awaitable[Any]]


@dataclass(slots=True)
class Desk:
    """Where operators act: checks an action and sends it.

    Args:
        board: what stands, and where answers come in.
        publish: to Kafka, acknowledged.
        clock: says when.
    """

    board: Board
    publish: Publish
    clock: Clock = field(default_factory=SystemClock)

    async def act(self, line: Mapping[str, Any]) -> str:
        """Send an action; its id. `at` is now; an id that was answered already is not sent again.

        Args:
            line: an `ActionDoc` without `at`; an `action_id` of the sender's makes it safe to repeat.

        Raises:
            Reject: it is not well formed; the message names the field.
            Retry: Kafka did not acknowledge it; it may have been taken all the same, so repeat it with the same id.
        """
        complete = {**line, "action_id": line.get("action_id") or uuid.uuid4().hex, "at": self.clock.now_us()}
        action = parse_action(complete)
        if self.board.answered(action.action_id) is None:
            await self.publish([_action_send(action.device_id, complete)])
        return action.action_id

    async def act_many(self, request_id: str, line: Mapping[str, Any], alarms: Sequence[Any]) -> list[dict[str, Any]]:
        """Send the same action for many alarms, each as an action of its own.

        An action's id is made of `request_id`, the alarm and its occurrence: the same request may be sent again.

        Args:
            request_id: of the sender's making.
            line: what all have in common: `action` (a word of `BULK`), `actor`, `comment`, `duration_s`, `one_shot`.
            alarms: `device_id`, `rule` and perhaps `pin_position`, `alarm_id` of each, at most `BULK_MAX`; other fields say
                nothing. One that comes twice is taken once.

        Returns:
            For each alarm its point, `alarm_id`, `action_id` and `outcome`: sent (its answer will come), done or refused
            (with `code` and `reason`; answered before, or not well formed).

        Raises:
            Reject: the request as a whole is not well formed.
            Retry: Kafka did not acknowledge it; a part may have been taken all the same, so repeat it with the same id.
        """
        if str(line.get("action")) not in BULK:  # anything may stand there, also what is no key
            message = (
                f"action is one of {', '.join(BULK)}: {line.get('action')!r:.100} is done one by one, or not at all"
            )
            raise Reject(ReasonCode.ACTION_INVALID, message)
        if len(alarms) > BULK_MAX:
            raise Reject(ReasonCode.ACTION_INVALID, f"{len(alarms):,} alarms; a request may have {BULK_MAX}")
        at = self.clock.now_us()
        # What is wrong with all of them is said once.
        parse_action({**line, "device_id": "-", "rule": "-", "at": at})
        results: dict[str, dict[str, Any]] = {}
        sends: list[Send] = []
        for alarm in alarms:
            point = {name: alarm.get(name) for name in _POINT} if isinstance(alarm, Mapping) else dict.fromkeys(_POINT)
            point["pin_position"] = "-1" if point["pin_position"] is None else point["pin_position"]
            # Empty where the alarm was set aside without having been raised.
            point["alarm_id"] = point["alarm_id"] or None
            action_id = identity("action", request_id, *point.values())
            if action_id in results:
                continue
            results[action_id] = result = {**point, "action_id": action_id, "outcome": "sent"}
            complete = {**line, **point, "action_id": action_id, "at": at}
            try:
                action = parse_action(complete)
            except Reject as e:
                result |= {"outcome": "refused", "code": str(e.code), "reason": str(e)}
                continue
            if (answer := self.board.answered(action_id)) is not None:
                result |= _outcome(answer)
            else:
                sends.append(_action_send(action.device_id, complete))
        if sends:
            await self.publish(sends)
        return [*results.values()]

    async def wait_many(self, results: Sequence[dict[str, Any]], timeout_s: float) -> None:
        """Wait until all that `act_many` sent is answered, at most `timeout_s`, and write the outcomes into the results."""
        waiting = [result for result in results if result["outcome"] == "sent"]
        answers = await asyncio.gather(*(self.board.wait(result["action_id"], timeout_s) for result in waiting))
        for result, answer in zip(waiting, answers, strict=True):
            if answer is not None:
                result |= _outcome(answer)


def _action_send(device_id: str, line: Mapping[str, Any]) -> Send:
    """The record of an action: to where the device's raw messages are, since people spell an address in their own way."""
    return Send(topics.ALARM_ACTIONS, canonical_address(device_id).encode(), orjson.dumps(line))


_POINT: Final = ("device_id", "rule", "pin_position", "alarm_id")


def _outcome(answer: Mapping[str, Any]) -> dict[str, Any]:
    return {name: answer.get(name) for name in ("outcome", "code", "reason", "state")}


def tally(results: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many of the results are done, refused and not answered yet."""
    counts = Counter(result["outcome"] for result in results)
    return {"done": counts["done"], "refused": counts["refused"], "pending": counts["sent"]}
