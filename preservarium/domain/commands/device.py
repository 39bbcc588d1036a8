"""The commands of one device: its queue, what is under way, and the state document of them.

A device has one command under way at a time. The next one is handed over when the one before has ended, in the order of
priority and then of arrival. A device that sleeps is handed its command when it has just been heard.

Ids are deterministic: a command's is made of the device and the idempotency key, an event's of the command and its
sequence number, a downlink's of the command and the number of its try. So what a crash repeats has the same ids again.

Instants are µs since the epoch, UTC. `now_us` is the clock of whoever calls.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, TypedDict

from preservarium.domain.commands.confirm import Confirm, is_confirmed, resolve_confirm
from preservarium.domain.commands.lines import CONTENTS, PRESETS, Line, check_settings
from preservarium.domain.commands.machine import OVER, REQUESTED, Event, Refusal, State, step
from preservarium.domain.commands.profile import Profile
from preservarium.domain.readings.address import canonical_address
from preservarium.domain.readings.lineage import GENERATION_LIVE, applied, identity, is_applied

#: Version of the state document; a document of another version is a defect, not something to guess at.
STATE_VERSION: Final = 1

#: Commands of one device that have not ended. A person queues a handful; with `LINE_BYTES_MAX` the document stays below
#: half of what a Kafka record may have.
OPEN_MAX: Final = 50
#: An ended command is remembered for so long, and at least until it would have expired: the same idempotency key is the
#: same command. A client that tries again does so within minutes, an operator within the day.
MEMORY_S: Final = 86_400
#: Ended commands of one device that are remembered at most, the latest: some 30 KiB.
MEMORY_MAX: Final = 500
#: What was handed over is reported within the downlink stage's retries; after its topic's retention no report can come.
LOST_AFTER_S: Final = 8 * 86_400
#: Where nothing is said: the broker's word is all that plain MQTT gives.
CONFIRM_DEFAULT: Final = "published"
EXPIRES_S_DEFAULT: Final = 86_400.0
TIMEOUT_S_DEFAULT: Final = 300.0

_S_US: Final = 1_000_000


def command_id(device_id: str, idempotency_key: str) -> str:
    """Id of a command; whoever asks may spell the device's address in their own way."""
    return identity("command", canonical_address(device_id), idempotency_key)


def downlink_id(command: str, attempt: int) -> str:
    """Id of one try of a command; `attempt` counts from 1."""
    return identity("downlink", command, attempt)


class CommandEventDoc(TypedDict):
    """A line of `command_events`: one transition, and the command as it stands after it. Instants in µs."""

    event_id: str
    command_id: str
    sequence: int  #: 1 for the request, then one more each
    device_id: str
    event: str
    state: str  #: after the event
    at: int  #: of the event
    reason: str  #: for people; "" where the event says it all
    actor: str  #: who did this; "" where nobody did
    command: str
    requested_at: int
    requested_by: str
    idempotency_key: str
    cause: str | None  #: id of the alarm transition that asked for it
    priority: int
    expires_at: int
    attempt: int  #: tries so far
    ended_at: int | None
    content: dict[str, Any]  #: what was asked for: fields, payload or payload_b64; port
    confirm: Any


class DownlinkDoc(TypedDict):
    """A line of `device_downlinks`: one try of a command."""

    downlink_id: str
    command_id: str
    device_id: str
    attempt: int
    expires_at: int  #: µs; after it, it is not sent any more
    format: str
    topic: str  #: of MQTT
    qos: int
    parser: str  #: name; its encoder makes the bytes of `fields`
    variables: dict[str, Any]  #: the device's, for the encoder
    content: dict[str, Any]
    confirmed: bool


@dataclass(slots=True)
class Command:
    """A command that has not ended."""

    id: str
    name: str
    key: str
    actor: str
    requested_at: int
    expires_at: int
    content: dict[str, Any]
    confirm: Any
    timeout_us: int
    tries: int
    priority: int
    confirmed: bool
    cause: str | None = None
    state: State = State.QUEUED
    sequence: int = 0
    attempt: int = 0  #: tries so far
    handed_over: bool = False  #: the downlink stage has it
    first_at: int = 0  #: when it was handed over first; an uplink from before confirms nothing
    since: int = 0  #: when it was handed over, or sent, or delivered last

    @property
    def waits(self) -> bool:
        """Whether it waits for its turn or for the device."""
        return self.state is State.QUEUED and not self.handed_over


@dataclass(frozen=True, slots=True)
class Turn:
    """When something is done, and what may follow from it at once."""

    now_us: int
    may_send: bool = True  #: commands may be handed over; else it is due at the next tick
    may_time_out: bool = True  #: False while confirmations may wait unread in Kafka
    #: When what is done now may have been done before, by a worker that died before it wrote that down; None: now
    since_us: int | None = None


@dataclass(slots=True)
class Outcome:
    """What a line, an uplink or the time caused."""

    duplicate: bool = False  #: applied before; nothing was done
    changed: bool = False  #: the state document differs
    events: list[CommandEventDoc] = field(default_factory=list)
    downlinks: list[DownlinkDoc] = field(default_factory=list)
    refusal: Refusal | None = None  #: of a cancel or a report
    repeated: State | None = None  #: of a request whose key is known: where that command stands


# {"v": 1, "m": marks, "q": [open commands in the order of arrival], "r": {id of an ended one: [state, until]}}


class DeviceCommands:
    """The commands of one device: takes lines, uplinks and the time in order, and gives what they cause.

    Made of the state document, which `document` gives back; how the input is cut into batches makes no difference.
    Not to be shared between tasks.
    """

    def __init__(self, device_id: str, document: Mapping[str, Any] | None = None) -> None:
        self._device_id = device_id
        document = document or {}
        self._marks: dict[str, list[int]] = dict(document.get("m", {}))
        self._open = [_unpack(row) for row in document.get("q", ())]
        self._ended: dict[str, list[Any]] = dict(document.get("r", {}))

    def document(self) -> dict[str, Any] | None:
        """The state as JSON-able data; None where there is nothing to be kept."""
        if not self._open and not self._ended:
            return None
        return {
            "v": STATE_VERSION,
            "m": self._marks,
            "q": [_pack(command) for command in self._open],
            "r": self._ended,
        }

    @property
    def open(self) -> tuple[Command, ...]:
        """Commands that have not ended, in the order of their arrival."""
        return tuple(self._open)

    def due_us(self, profile: Profile) -> int | None:
        """When `tick` has something to do; None where it never has. 0: now."""
        if not self._open:
            # Only what is remembered: forgotten all at once, so that a quiet device costs one more look.
            return max((until for _, until in self._ended.values()), default=None)
        times = [command.expires_at for command in self._open if command.waits]
        under_way = self._under_way()
        if under_way is not None and under_way.handed_over:
            times.append(_lost_at(under_way))
        elif under_way is not None and not under_way.waits:
            times.append(under_way.since + under_way.timeout_us)
        elif not profile.sleeps:
            times.append(0)
        return min(times)

    def request(self, line: Line, profile: Profile, turn: Turn, source: str, offset: int, index: int) -> Outcome:
        """Take a request. One that cannot be carried out becomes a command that has failed, with the reason.

        Args:
            line: of kind request.
            profile: of the device.
            turn: when, and what may be done.
            source: which partition it came from, for the watermark.
            offset: offset in it.
            index: line within the record.
        """
        outcome = self._begin(source, offset, index)
        if outcome.duplicate:
            return outcome
        identifier = command_id(self._device_id, line.fields["idempotency_key"])
        known = self._ended.get(identifier)
        waiting = next((command for command in self._open if command.id == identifier), None)
        if known is not None or waiting is not None:
            outcome.repeated = State(known[0]) if known is not None else waiting.state if waiting else None
            return outcome
        command, problem = _made(identifier, line, profile)
        if not problem and len(self._open) >= OPEN_MAX:
            problem = f"the device has {OPEN_MAX} commands that have not ended"
        self._open.append(command)
        command.sequence = 1
        outcome.events.append(self._line(command, REQUESTED, line.at, actor=line.actor))
        if problem:
            self._apply(command, Event.FAIL, turn.now_us, outcome, reason=problem)
        self._advance(profile, turn, outcome, awake=False)
        return outcome

    def cancel(self, line: Line, profile: Profile, turn: Turn, source: str, offset: int, index: int) -> Outcome:
        """Take a cancel, as `request`; an outcome whose `refusal` says why nothing changed, where that is so."""
        outcome = self._begin(source, offset, index)
        if outcome.duplicate:
            return outcome
        wanted = line.fields["command_id"]
        command = next((command for command in self._open if command.id == wanted), None)
        if command is None:
            outcome.refusal = Refusal.IS_OVER if wanted in self._ended else Refusal.UNKNOWN
            return outcome
        self._apply(command, Event.CANCEL, line.at, outcome, actor=line.actor)
        self._advance(profile, turn, outcome, awake=False)
        return outcome

    def report(self, line: Line, profile: Profile, turn: Turn, source: str, offset: int, index: int) -> Outcome:
        """Take a report of the downlink stage or of a network server, as `cancel`."""
        outcome = self._begin(source, offset, index)
        if outcome.duplicate:
            return outcome
        command = self._under_way()
        attempt = 0
        if command is not None:
            attempts = range(command.attempt, 0, -1)
            attempt = next((n for n in attempts if downlink_id(command.id, n) == line.fields["downlink_id"]), 0)
        if command is None or not attempt:
            outcome.refusal = Refusal.UNKNOWN
            return outcome
        self._reported(command, attempt, line, outcome)
        self._advance(profile, turn, outcome, awake=False)
        return outcome

    def wake(
        self, line: Line, profile: Profile, turn: Turn, source: str, offset: int, index: int, *, awake_us: int
    ) -> Outcome:
        """The device asks what waits for it: it is awake for `awake_us`, as after an uplink. Otherwise as `cancel`."""
        outcome = self._begin(source, offset, index)
        if not outcome.duplicate:
            self._advance(profile, turn, outcome, awake=turn.now_us - line.at <= awake_us)
        return outcome

    def _reported(self, command: Command, attempt: int, line: Line, outcome: Outcome) -> None:
        word, reason = line.fields["report"], line.fields["reason"]
        if word in ("sent", "expired") and attempt != command.attempt:
            outcome.refusal = Refusal.OTHER_TRY
            return
        match word:
            case "sent":
                if self._apply(command, Event.PUBLISH, line.at, outcome) and command.confirm == "published":
                    self._apply(command, Event.CONFIRM, line.at, outcome)
            case "expired":
                event = Event.EXPIRE if attempt == 1 else Event.TIME_OUT
                self._apply(command, event, line.at, outcome, reason=reason)
            case "failed":
                self._apply(command, Event.FAIL, line.at, outcome, reason=reason)
            case "transmitted" | "acknowledged":
                self._apply(command, Event.DELIVER, line.at, outcome)
                if command.confirm == "delivered" and (word == "acknowledged" or not command.confirmed):
                    outcome.refusal = None  # delivered already by the gateway's word
                    self._apply(command, Event.CONFIRM, line.at, outcome)
            case "not_acknowledged":
                if attempt != command.attempt:
                    outcome.refusal = Refusal.OTHER_TRY
                elif command.attempt < command.tries and line.at < command.expires_at and not command.waits:
                    self._apply(command, Event.RETRY, line.at, outcome, reason=reason)
                else:
                    self._apply(command, Event.FAIL, line.at, outcome, reason=reason)

    def uplink(self, message: Mapping[str, Any], profile: Profile, turn: Turn, *, awake_us: int) -> Outcome:
        """Take a validated message of the device: it may confirm what is under way, and says that the device is awake.

        A message confirms only what was handed over before it was received. A device that sleeps is awake for
        `awake_us` after a message was received; one that comes later, out of a backlog, wakes nothing.
        """
        if not self._open or message["generation"] != GENERATION_LIVE:
            return Outcome()
        source = str(message["raw_partition"])
        outcome = self._begin(f"u{source}", message["raw_offset"], message["raw_index"])
        if outcome.duplicate:
            return outcome
        command, received_at = self._under_way(), message["received_at"]
        if (
            command is not None
            and received_at > command.first_at
            and is_confirmed(command.confirm, message["readings"])
        ):
            self._apply(command, Event.CONFIRM, received_at, outcome)
        self._advance(profile, turn, outcome, awake=turn.now_us - received_at <= awake_us)
        return outcome

    def tick(self, profile: Profile, turn: Turn) -> Outcome:
        """Let time do its work: expiry, time-outs and tries, forgetting what has ended."""
        outcome = Outcome()
        self._advance(profile, turn, outcome, awake=False)
        return outcome

    # --- what follows from everything ---

    def _advance(self, profile: Profile, turn: Turn, outcome: Outcome, *, awake: bool) -> None:
        now_us = turn.now_us
        for command in [c for c in self._open if c.waits and c.expires_at <= now_us]:
            self._apply(command, Event.TIME_OUT if command.attempt else Event.EXPIRE, now_us, outcome)
        if turn.may_time_out:
            self._time_out(now_us, outcome)
        while turn.may_send and profile.known and (awake or not profile.sleeps):
            following = self._next()
            if following is None:
                break
            if profile.problem:
                self._apply(following, Event.FAIL, now_us, outcome, reason=profile.problem)
            else:
                self._hand_over(following, profile, turn, outcome)
        self._forget(now_us, outcome)

    def _time_out(self, now_us: int, outcome: Outcome) -> None:
        command = self._under_way()
        if command is None or command.waits:
            return
        if command.handed_over:
            if now_us >= _lost_at(command):
                self._apply(command, Event.FAIL, now_us, outcome, reason="no report of the downlink came")
        elif now_us >= command.since + command.timeout_us:
            again = command.attempt < command.tries and now_us < command.expires_at
            self._apply(command, Event.RETRY if again else Event.TIME_OUT, now_us, outcome)

    def _hand_over(self, command: Command, profile: Profile, turn: Turn, outcome: Outcome) -> None:
        now_us = turn.now_us
        command.attempt += 1
        # Of a hand-over that is repeated, the answer may have come already.
        since_us = now_us if turn.since_us is None else max(turn.since_us, command.requested_at)
        command.first_at = command.first_at or min(now_us, since_us)
        self._apply(command, Event.HAND_OVER, now_us, outcome)
        outcome.downlinks.append(
            {
                "downlink_id": downlink_id(command.id, command.attempt),
                "command_id": command.id,
                "device_id": self._device_id,
                "attempt": command.attempt,
                "expires_at": command.expires_at,
                "format": profile.format,
                "topic": profile.topic,
                "qos": profile.qos,
                "parser": profile.parser,
                "variables": dict(profile.variables),
                "content": command.content,
                "confirmed": command.confirmed,
            }
        )

    def _under_way(self) -> Command | None:
        """The one command that was handed over at least once."""
        return next((command for command in self._open if command.attempt), None)

    def _next(self) -> Command | None:
        """Whose turn it is: a further try first, then by priority and arrival; None where one is under way."""
        under_way = self._under_way()
        if under_way is not None:
            return under_way if under_way.waits else None
        return max(self._open, key=lambda command: command.priority, default=None)

    def _apply(
        self, command: Command, event: Event, at: int, outcome: Outcome, *, reason: str = "", actor: str = ""
    ) -> bool:
        target = step(command.state, event, tries=command.attempt, handed_over=command.handed_over)
        if isinstance(target, Refusal):
            outcome.refusal = target
            return False
        outcome.changed = True
        command.state = target
        command.sequence += 1
        command.handed_over = event is Event.HAND_OVER
        command.since = at
        outcome.events.append(self._line(command, event, at, reason=reason, actor=actor))
        if target in OVER:
            self._open.remove(command)
            self._ended.pop(command.id, None)
            self._ended[command.id] = [target, max(at + MEMORY_S * _S_US, command.expires_at)]
        return True

    def _forget(self, now_us: int, outcome: Outcome) -> None:
        over = [identifier for identifier, (_, until) in self._ended.items() if until <= now_us]
        over += list(self._ended)[: max(0, len(self._ended) - MEMORY_MAX)]
        for identifier in over:
            outcome.changed |= self._ended.pop(identifier, None) is not None

    def _begin(self, source: str, offset: int, index: int) -> Outcome:
        if is_applied(self._marks, source, offset, index):
            return Outcome(duplicate=True)
        applied(self._marks, source, offset, index)
        return Outcome(changed=True)

    def _line(self, command: Command, event: str, at: int, *, reason: str = "", actor: str = "") -> CommandEventDoc:
        return {
            "event_id": identity("command event", command.id, command.sequence),
            "command_id": command.id,
            "sequence": command.sequence,
            "device_id": self._device_id,
            "event": str(event),
            "state": str(command.state),
            "at": at,
            "reason": reason,
            "actor": actor,
            "command": command.name,
            "requested_at": command.requested_at,
            "requested_by": command.actor,
            "idempotency_key": command.key,
            "cause": command.cause,
            "priority": command.priority,
            "expires_at": command.expires_at,
            "attempt": command.attempt,
            "ended_at": at if command.state in OVER else None,
            "content": command.content,
            "confirm": command.confirm,
        }


def _lost_at(command: Command) -> int:
    return max(command.since, command.expires_at) + LOST_AFTER_S * _S_US


def _made(identifier: str, line: Line, profile: Profile) -> tuple[Command, str]:
    """The command that a request asks for, and why it cannot be, or ""."""
    asked = line.fields
    preset = profile.commands.get(asked["command"], {})
    merged = {**profile.given, **preset, **{k: v for k, v in asked.items() if k in PRESETS}}
    content, problem = _content(asked, preset)
    if not problem and asked["command"] not in profile.commands and not content:
        problem = f"there is no command {asked['command']!r:.100} of the device's type, and no content is given"
    content = content or {"fields": {}}
    confirm: Confirm = CONFIRM_DEFAULT
    try:
        check_settings({k: v for k, v in merged.items() if k in PRESETS})
        confirm = resolve_confirm(merged.get("confirm", CONFIRM_DEFAULT), content.get("fields", {}))
    except ValueError as e:
        problem = problem or str(e)
        merged = {k: v for k, v in merged.items() if k not in PRESETS}
    if "port" in merged:
        content["port"] = merged["port"]
    command = Command(
        id=identifier,
        name=asked["command"],
        key=asked["idempotency_key"],
        actor=line.actor,
        requested_at=line.at,
        expires_at=line.at + round(merged.get("expires_s", EXPIRES_S_DEFAULT) * 1e6),
        content=content,
        confirm=confirm,
        timeout_us=round(merged.get("timeout_s", TIMEOUT_S_DEFAULT) * 1e6),
        tries=merged.get("tries", 1),
        priority=merged.get("priority", 0),
        confirmed=merged.get("confirmed", False),
        cause=asked.get("cause"),
    )
    return command, profile.problem or problem


def _content(asked: Mapping[str, Any], preset: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """What is to be sent: the request's own, else the command's, fields merged; and what is wrong with it."""
    own = {name: asked[name] for name in CONTENTS if name in asked}
    common = {name: preset[name] for name in CONTENTS if name in preset}
    if not own:
        return common, ""
    if "fields" in own and "fields" in common:
        return {"fields": {**common["fields"], **own["fields"]}}, ""
    if common and own.keys() != common.keys():
        return own, f"the command {asked['command']!r:.100} takes {', '.join(common)}"
    return own, ""


_DEFAULTS: Final = {f.name: f.default for f in fields(Command)}


def _pack(command: Command) -> dict[str, Any]:
    """Without what is as it was at first: most commands wait."""
    row = {name: getattr(command, name) for name in _DEFAULTS}
    return {name: value for name, value in row.items() if value != _DEFAULTS[name]}


def _unpack(row: Mapping[str, Any]) -> Command:
    command = Command(**row)
    return replace(command, state=State(command.state), content=dict(command.content))
