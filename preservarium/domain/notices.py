"""When one recipient is told of which alarms: grouping, repetition, quiet hours, digests, limits, escalation.

Everything that is held of a recipient is one document. `Inbox.hear` takes the transitions of alarms in, `Inbox.plan` is
asked now and then what has fallen due, and `Inbox.take` hands out what was planned. A notice is planned first and handed
out later, so that what is sent again after a crash is the same notice to the last byte, whatever the time has become.

The three intervals are Prometheus Alertmanager's (its documentation, section "route"): a new group waits `group_wait`; then it is
looked at every `group_interval`, and told where something in it is new; where nothing is, it is told again after
`repeat_interval` as long as an alarm in it is active and not acknowledged. An alarm is one entry for its (device, rule, pin): what
comes and goes between two notices is one line that says how often.

Instants are µs since the epoch, UTC; `now_us` is the worker's clock. It may have been wrong when it was read: see `Inbox.heal`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, timedelta, tzinfo
from typing import Any, Final, Literal, NotRequired, TypedDict

from preservarium.domain.local_time import DAYS, Hours, covers, furthest, local
from preservarium.domain.readings.lineage import applied, identity, is_applied
from preservarium.domain.remembered import Remembered

#: Version of the state document; a document of another version is a defect, not something to guess at.
STATE_VERSION: Final = 1

#: Alarms that a recipient's document tells apart: at 600 bytes each as a rule and 1.8 KB at the most, half of the 1 MB that
#: a record may have. Nobody reads a longer list; what is beyond is counted in the next notice.
ENTRIES_MAX: Final = 300
#: Alarms that a notice lists, the most severe first; the others are counted.
LINES_MAX: Final = 50
#: Lines of one recipient's notices that are planned and not handed out yet: room in the document for two full ones.
PLANNED_LINES_MAX: Final = 2 * LINES_MAX
#: Ids of transitions that one line names: a chattering alarm has hundreds, and the last ones are what is asked for.
IDS_MAX: Final = 20
#: Transitions that a recipient's document remembers, so that one that `iot_alerts` holds twice is told and counted once: all that
#: a crash of the alarm stage repeats is one batch. 8 KB.
HEARD_MAX: Final = 1_000
#: Notices that one tick hands out, at the most: what a crash repeats, and so what the outbox must be able to tell.
HANDED_OUT_MAX: Final = 100
#: Notices of one window that a limit can allow: each is an instant in the document.
LIMIT_MAX: Final = 1_000
#: An alarm of which nothing was heard for so long is not told again: a week of repeats reached nobody.
FORGET_US: Final = 7 * 86_400 * 1_000_000
#: The longest delay of an escalation (domain/registry/documents.py).
ESCALATION_MAX_US: Final = 7 * 86_400 * 1_000_000
#: Quiet hours and digests are looked at on full minutes: that is how exactly people say them.
MINUTE_US: Final = 60_000_000
#: Texts in the document; a message is a line of a notice, a name fits a column.
MESSAGE_CHARS_MAX: Final = 250
NAME_CHARS_MAX: Final = 120

#: From the worst.
SEVERITIES: Final = ("critical", "major", "minor", "warning", "indeterminate")
#: What a group can be made of.
LABELS: Final = ("device", "rule", "severity", "group", "area", "type", "component_type", "pin", "alarm")

#: States in which an alarm is not annunciated.
SILENT: Final = frozenset({"shelved", "suppressed", "out_of_service"})
#: Transitions that people are told of. What an operator did, an operator knows. One that is graver now is raised once more.
#: One that nothing watches any more is over for whoever was told of it.
NOTIFIED: Final = {"raised": "raised", "severity_raised": "raised", "cleared": "cleared", "withdrawn": "cleared"}
#: Transitions after which nothing is to be told of the alarm any more.
_ENDS: Final = frozenset({"reset"})

#: Fields of a transition that a notice needs.
_KEPT: Final = (
    "alarm_id", "transition_id", "device_id", "device_name", "rule", "component_type", "pin_position", "severity",
    "transition", "state", "occurred_at", "detected_at", "cleared_at", "value", "unit", "threshold", "message",
    "raw_partition", "raw_offset", "raw_index", "connector_mode", "reason",
)  # fmt: skip

Entry = dict[str, Any]
Group = dict[str, Any]


class Event(TypedDict):
    """A line of `notice_events`, keyed by recipient: a transition that one recipient is to hear of."""

    recipient: str
    source: str  #: which partition of `iot_alerts` it came from
    offset: int
    index: int
    after_s: float  #: escalation: to be told only where nobody has acknowledged until then; 0: at once
    below: bool  #: only who was told before is to hear of it: the severity is below, or the rule names others now
    gone: NotRequired[
        bool
    ]  #: the recipient cannot be told any more, or is told under another name: the alarm is forgotten
    labels: dict[str, str]  #: of `LABELS`
    transition: dict[str, Any]  #: the line of `iot_alerts`


class Line(TypedDict, total=False):
    """An alarm in a notice: the last transition of interest (`_KEPT`), and …"""

    status: Literal["raised", "cleared"]
    new: bool  #: False: told before, and standing
    raised_count: int  #: times it was raised since it was last told
    first_at: int | None  #: when it was first raised since it was last told
    transitions: list[str]  #: ids of what this line tells, at most `IDS_MAX`, the last ones
    transitions_count: int


class Delivery(TypedDict):
    """A line of `notices`, keyed by recipient: one notice, as it is to be sent."""

    delivery_id: str
    number: int  #: grows by one with each notice of the partition: what is missing shows; says nothing of what is a duplicate
    sequence: int  #: of the recipient's notices, from 1
    recipient: str
    kind: Literal["alarms", "repeat", "digest", "test"]
    group: dict[str, str]  #: labels; empty for a digest
    held: dict[str, Any] | None  #: why, since when, and how many notices were held back into this one
    planned_at: int
    lines: list[dict[str, Any]]  #: `Line`
    more: dict[str, int]  #: status -> alarms that are not listed


@dataclass(frozen=True, slots=True)
class Policy:
    """How a recipient wants to be told."""

    group_by: tuple[str, ...] = ("rule",)
    group_wait_us: int = 30_000_000
    group_interval_us: int = 300_000_000
    repeat_interval_us: int = 14_400_000_000
    cleared: bool = True  #: tell when alarms are over
    quiet: tuple[Hours, ...] = ()
    digest: Literal["", "hour", "day"] = ""
    digest_minute: int = 0  #: of the local day
    through: frozenset[str] = frozenset({"critical"})  #: severities that neither quiet hours nor a digest hold back
    limit_notices: int = 60
    limit_window_us: int = 3_600_000_000
    zone: tzinfo = UTC

    def is_quiet(self, at_us: int) -> bool:
        """Whether it is a quiet hour."""
        return bool(self.quiet) and covers(self.quiet, local(at_us, self.zone))

    def period(self, at_us: int) -> int:
        """Number of the digest's period; a digest is due when it has become another one.

        It never goes back: a time of day that the clock shows twice makes one digest, one that it skips makes it at the
        change. The hours of a digest are those of UTC, which no change of the clock repeats or skips.
        """
        if self.digest == "hour":
            return at_us // 3_600_000_000
        return (furthest(at_us, self.zone) - timedelta(minutes=self.digest_minute)).toordinal()

    def holds(self, severity: str, at_us: int) -> str:
        """Why an alarm of this severity is not told now; empty where it may be."""
        if severity in self.through:
            return ""
        if self.is_quiet(at_us):
            return "quiet_hours"
        return "digest" if self.digest else ""


class Inbox:
    """What one recipient is to be told.

    Args:
        recipient: its name.
        document: state as `document` gave it; None for a new one.
    """

    def __init__(self, recipient: str, document: Mapping[str, Any] | None = None) -> None:
        self._recipient = recipient
        self._state: dict[str, Any] = (
            dict(document)
            if document
            else {"v": STATE_VERSION, "m": {}, "seq": 0, "sent": [], "held": None, "more": {}, "g": {}, "plans": []}
        )
        self._group_of = {point: key for key, group in self._groups.items() for point in group["e"]}
        self._heard: Remembered | None = None

    @property
    def _groups(self) -> dict[str, Group]:
        groups: dict[str, Group] = self._state["g"]
        return groups

    def document(self) -> dict[str, Any]:
        """The state as JSON-able data."""
        if self._heard is not None:
            self._state["heard"] = self._heard.text()
        return self._state

    def heal(self, policy: Policy, now_us: int) -> None:
        """Take back what a clock that was ahead has left here.

        What has happened lies in the past, and what is to come no further ahead than the policy puts it. So whatever
        a clock said once, it holds up no notice longer than its own intervals do:

        - `sent` (the limit), `last` and `told` of a group (its beat, repetition), `at` and `tat` of an alarm, since when
          something is held back: at most now;
        - `from` (escalation): at most its delay after this look;
        - `due`: at most the longer of wait and interval after now, or after the last escalation.

        The period of a digest is compared for being another one, so a wrong one is over at the next look. What a clock that
        was ahead has told early, or forgotten after `FORGET_US`, does not come back; that a worker whose clock is wrong does
        not tick prevents it (preservarium/clock.py).
        """
        self._state["sent"] = [min(at, now_us) for at in self._state["sent"]]
        if self._state["held"] is not None:
            self._state["held"]["since"] = min(self._state["held"]["since"], now_us)
        for group in self._groups.values():
            for name in ("last", "told"):
                if group[name] is not None:
                    group[name] = min(group[name], now_us)
            latest = now_us
            for entry in group["e"].values():
                entry["at"], entry["tat"] = min(entry["at"], now_us), min(entry["tat"], now_us)
                if entry["from"]:
                    entry["from"] = min(entry["from"], now_us + entry.get("after", ESCALATION_MAX_US))
                    latest = max(latest, entry["from"])
            if group["due"] is not None:
                group["due"] = min(group["due"], latest + max(policy.group_wait_us, policy.group_interval_us))

    # --- hearing ----------------------------------------------------------------------------------------------------

    def hear(self, event: Event, policy: Policy, now_us: int) -> bool:
        """Take a transition in; False where it was heard before. Events of one source come in its order.

        A place in `iot_alerts` is heard once, and so is a transition, wherever that topic holds it again.
        """
        if is_applied(self._state["m"], event["source"], event["offset"], event["index"]):
            return False
        applied(self._state["m"], event["source"], event["offset"], event["index"])
        transition = event["transition"]
        if self._heard is None:
            self._heard = Remembered(HEARD_MAX, self._state.get("heard", ""))
        if transition["transition_id"] in self._heard:
            return False
        self._heard.add(transition["transition_id"])
        point = "\n".join((transition["device_id"], transition["rule"], transition["pin_position"]))
        what, state = transition["transition"], transition["state"]
        if event.get("gone") or state in SILENT or what in _ENDS:
            self._drop(point)
        elif what == "acknowledged":
            self._acknowledged(point)
        elif what == "severity_lowered":
            if entry := self._entry(point):
                entry["t"]["severity"] = transition["severity"]
        elif what == "withdrawn" and not self._was_told(point):
            self._drop(point)
        elif what in NOTIFIED:
            self._changed(point, event, policy, now_us)
        return True

    def _was_told(self, point: str) -> bool:
        """Whether the recipient knows of an alarm that, as far as it knows, is not over."""
        entry = self._entry(point)
        return entry is not None and entry["told"] == "raised"

    def _changed(self, point: str, event: Event, policy: Policy, now_us: int) -> None:
        transition = event["transition"]
        entry = self._entry(point)
        status = NOTIFIED[transition["transition"]]
        if status == "raised":
            if entry is None:
                if not self._room():
                    self._count("raised", now_us)
                    return
                entry = _new_entry()
            if not (entry["n"] and entry["c"]):
                # Of an alarm that comes and goes, the time to answer begins with the first one.
                after_us = round(event["after_s"] * 1e6)
                # Whoever detected it may have another clock: it was not after now.
                entry["from"] = min(transition["detected_at"], now_us) + after_us if after_us else 0
                entry["after"] = after_us
            entry["ack"] = False
            if transition["transition"] == "raised" or not entry["n"]:
                entry["n"] += 1
            entry["first"] = entry["first"] or transition["occurred_at"]
        elif entry is None:
            if event["after_s"] or event.get("below") or not policy.cleared:
                return  # this recipient was never told, or wants to hear of no end
            if not self._room():
                self._count("cleared", now_us)
                return
            entry = _new_entry()
        else:
            if entry["from"] > now_us:
                # It is over before the escalation.
                entry.update(n=0, first=None, **{"from": 0})
                if not entry["told"]:
                    self._drop(point)
                    return
            if not entry["n"] and (not entry["told"] or not policy.cleared):
                self._drop(point)  # answered before this recipient was told
                return
        entry["t"], entry["at"] = {**_trimmed(transition), "transition": status}, now_us
        entry["c"] += 1
        entry["ids"] = [*entry["ids"], transition["transition_id"]][-IDS_MAX:]
        self._place(point, entry, event["labels"], policy, now_us)

    def _place(self, point: str, entry: Entry, labels: Mapping[str, str], policy: Policy, now_us: int) -> None:
        """Put an alarm into its group, which is another one where labels or policy have changed."""
        chosen = {name: labels.get(name, "") for name in policy.group_by}
        key = "\n".join(f"{name}={value}" for name, value in chosen.items()) or "all"
        if self._group_of.get(point, key) != key:
            self._drop(point)
        group = self._groups.setdefault(key, {"l": chosen, "due": None, "last": None, "told": None, "e": {}})
        group["e"][point] = entry
        self._group_of[point] = key
        if entry["held"] is None:
            self._schedule(group, max(entry["from"], now_us), policy)

    def _schedule(self, group: Group, from_us: int, policy: Policy) -> None:
        """Look at a group at its time after `from_us`."""
        if group["last"] is None:
            due = from_us + policy.group_wait_us
        else:
            # The interval's own beat goes on: what comes late in it is told at its end.
            beats = -(-max(1, from_us - group["last"]) // policy.group_interval_us)
            due = group["last"] + beats * policy.group_interval_us
        group["due"] = due if group["due"] is None else min(group["due"], due)

    def _acknowledged(self, point: str) -> None:
        """Somebody has answered: what was not told of the alarm's beginning need not be told any more."""
        entry = self._entry(point)
        if entry is None:
            return
        entry["ack"] = True
        if not entry["n"]:
            return
        over = entry["t"]["transition"] == "cleared"
        entry.update(n=0, first=None, **{"from": 0})
        if not (over and entry["told"]):
            entry.update(c=0, ids=[], held=None)
        if over and not entry["told"]:
            self._drop(point)

    def _entry(self, point: str) -> Entry | None:
        key = self._group_of.get(point)
        return None if key is None else self._groups[key]["e"].get(point)

    def _drop(self, point: str) -> None:
        key = self._group_of.pop(point, None)
        if key is not None:
            group = self._groups[key]
            group["e"].pop(point, None)
            if not group["e"]:
                # A group without alarms is over; the next alarm waits `group_wait` again.
                del self._groups[key]

    def _room(self) -> bool:
        """Whether another alarm can be told apart; makes room by forgetting one that was told."""
        if len(self._group_of) < ENTRIES_MAX:
            return True
        told = [
            (-_rank(entry), entry["at"], point) for point, entry in self._entries() if not entry["c"] and entry["told"]
        ]
        if not told:
            return False
        self._drop(min(told)[2])
        return True

    def _entries(self) -> Iterator[tuple[str, Entry]]:
        for group in self._groups.values():
            yield from group["e"].items()

    def _count(self, status: str, now_us: int) -> None:
        """Count an alarm that there is no room for; the next notice says how many."""
        more = self._state["more"]
        more[status] = more.get(status, 0) + 1
        self._note_held("too_many", now_us)

    # --- planning ---------------------------------------------------------------------------------------------------

    def plan(self, policy: Policy, now_us: int, number: int, *, behind: bool = False) -> int:
        """Plan what has fallen due.

        Args:
            policy: the recipient's.
            now_us: the worker's clock.
            number: of the next notice.
            behind: events wait to be heard: nothing is concluded from silence, so nothing is repeated or escalated.

        Returns:
            The number of the notice after those that were planned.
        """
        self._state["sent"] = [at for at in self._state["sent"] if at > now_us - policy.limit_window_us]
        first = number
        if self._release(policy, now_us, number):
            number += 1
        for key in [k for k, g in self._groups.items() if g["due"] is not None and g["due"] <= now_us]:
            if self._planned_lines() >= PLANNED_LINES_MAX:
                break  # the rest next time: the document has no room
            if self._flush(key, policy, now_us, number, behind):
                number += 1
        assert len(self._state["sent"]) <= policy.limit_notices or number == first, "the limit was exceeded"
        return number

    def _planned_lines(self) -> int:
        return sum(len(delivery["lines"]) for delivery in self._state["plans"])

    def _flush(self, key: str, policy: Policy, now_us: int, number: int, behind: bool) -> bool:
        """Look at a group; whether a notice was planned."""
        group = self._groups[key]
        pending = {
            point: entry
            for point, entry in group["e"].items()
            if entry["c"] and not entry["held"] and not (entry["from"] > now_us or (behind and entry["from"]))
        }
        if all(self._is_restless(entry, policy, now_us) for entry in pending.values()):
            pending = {}
        told = {p: e for p, e in pending.items() if not policy.holds(e["t"]["severity"], now_us)}
        standing = {
            point: entry
            for point, entry in group["e"].items()
            if not entry["c"] and entry["told"] == "raised" and not entry["ack"]
            if not policy.holds(entry["t"]["severity"], now_us)
        }
        is_full = len(self._state["sent"]) >= policy.limit_notices
        if held := [e for p, e in pending.items() if is_full or p not in told]:
            noted: dict[str, Any] = {}
            for entry in held:
                why = policy.holds(entry["t"]["severity"], now_us) or "limit"
                entry["held"] = [why, policy.period(now_us) if policy.digest else 0]
                noted = self._note_held(why, now_us)
            noted["notices"] += 1
        repeats = standing and not behind and now_us - (group["told"] or 0) >= policy.repeat_interval_us
        kind: Literal["alarms", "repeat"] | None = "alarms" if told else "repeat" if repeats else None
        if kind is not None and not is_full:
            self._deliver(kind, group["l"], {**told, **standing}, None, now_us, number)
            group["told"] = now_us
        else:
            kind = None
        group["last"] = now_us
        self._tidy(key, policy, now_us)
        return kind is not None

    def _is_restless(self, entry: Entry, policy: Policy, now_us: int) -> bool:
        """Whether a chattering alarm was told lately: then it alone is no reason for a further notice."""
        return bool(
            entry["t"].get("chattering") and entry["told"] and now_us - entry["tat"] < policy.repeat_interval_us
        )

    def _note_held(self, why: str, now_us: int) -> dict[str, Any]:
        if self._state["held"] is None:
            self._state["held"] = {"since": now_us, "why": why, "notices": 0}
        noted: dict[str, Any] = self._state["held"]
        return noted

    def _release(self, policy: Policy, now_us: int, number: int) -> bool:
        """Tell in one notice what was held back and need not be any longer; whether one was planned."""
        held = self._state["held"]
        if held is None:
            return False
        waiting = {point: entry for point, entry in self._entries() if entry["held"]}
        if not waiting and not self._state["more"]:
            self._state["held"] = None  # answered, or silenced, meanwhile
            return False
        free = {point: entry for point, entry in waiting.items() if self._is_free(entry, policy, now_us)}
        # What was only counted goes with the first that is told, and by itself where there is none.
        waits = any(entry["c"] for _, entry in self._entries())
        counted = bool(self._state["more"]) and not waits and not policy.is_quiet(now_us)
        is_full = len(self._state["sent"]) >= policy.limit_notices
        if is_full or self._planned_lines() >= PLANNED_LINES_MAX or not (free or counted):
            return False
        self._deliver("digest", {}, free, dict(held), now_us, number)
        if len(free) == len(waiting):
            self._state["held"] = None
        for key in dict.fromkeys(self._group_of[point] for point in free):
            self._groups[key]["told"] = now_us
            self._tidy(key, policy, now_us)
        return True

    def _is_free(self, entry: Entry, policy: Policy, now_us: int) -> bool:
        why = policy.holds(entry["t"]["severity"], now_us)
        return not why or (why == "digest" and policy.period(now_us) != (entry["held"] or [why, 0])[1])

    def _deliver(
        self,
        kind: Literal["alarms", "repeat", "digest"],
        labels: Mapping[str, str],
        entries: Mapping[str, Entry],
        held: dict[str, Any] | None,
        now_us: int,
        number: int,
    ) -> None:
        """Plan one notice and note what it tells."""
        ordered = sorted(entries.values(), key=_order)
        counts: dict[str, int] = self._state["more"]
        self._state["more"] = {}
        for entry in ordered[LINES_MAX:]:
            counts[entry["t"]["transition"]] = counts.get(entry["t"]["transition"], 0) + 1
        self._state["seq"] += 1
        lines = [_line(entry) for entry in ordered[:LINES_MAX]]
        told = [i for line in lines for i in line["transitions"]]
        delivery: Delivery = {
            # When it was planned is in it, because a document that was lost counts its notices from 1 again.
            "delivery_id": identity("notice", self._recipient, self._state["seq"], now_us, *told),
            "number": number,
            "sequence": self._state["seq"],
            "recipient": self._recipient,
            "kind": kind,
            "group": dict(labels),
            "held": held,
            "planned_at": now_us,
            "lines": lines,
            "more": counts,
        }
        self._state["plans"].append(delivery)
        self._state["sent"].append(now_us)
        for entry in entries.values():
            if entry["c"]:
                entry["told"] = entry["t"]["transition"]
            entry.update(tat=now_us, n=0, c=0, ids=[], first=None, held=None, **{"from": 0})

    def _tidy(self, key: str, policy: Policy, now_us: int) -> None:
        """Forget alarms that are over and told, and say when the group is looked at next."""
        group = self._groups[key]
        for point, entry in list(group["e"].items()):
            over = entry["told"] == "cleared" and not entry["c"]
            if over or (not entry["c"] and now_us - entry["at"] > FORGET_US):
                del group["e"][point]
                del self._group_of[point]
        if not group["e"]:
            del self._groups[key]
            return
        waits = [e["from"] for e in group["e"].values() if e["c"] and not e["held"]]
        waits += [0 for e in group["e"].values() if not e["c"] and e["told"] and not e["ack"]]
        group["due"] = None
        if waits:
            self._schedule(group, min(waits), policy)

    # --- handing out ------------------------------------------------------------------------------------------------

    def planned(self) -> list[int]:
        """Numbers of the notices that were planned and not handed out."""
        return [plan["number"] for plan in self._state["plans"]]

    def take(self, number: int | None = None) -> list[Delivery]:
        """What was planned, up to a number; hand it out before this state is stored."""
        plans: list[Delivery] = self._state["plans"]
        self._state["plans"] = [] if number is None else [plan for plan in plans if plan["number"] > number]
        return [plan for plan in plans if plan not in self._state["plans"]]

    def due_us(self, policy: Policy, now_us: int) -> int | None:
        """When to ask for the next plan; None: not before something is heard."""
        if self._state["plans"]:
            return 0
        dues = [group["due"] for group in self._groups.values() if group["due"] is not None]
        if self._state["held"] is not None:
            if len(self._state["sent"]) >= policy.limit_notices:
                dues.append(self._state["sent"][-policy.limit_notices] + policy.limit_window_us)
            else:
                dues.append((now_us // MINUTE_US + 1) * MINUTE_US)
        return min(dues, default=None)


def _new_entry() -> Entry:
    """An alarm of which nothing was told.

    t: its last transition; at: when that was heard; told: the last status that was told, and when (tat); ack: somebody has
    answered; c: transitions since then, and their ids; n: times raised since then, and when first; from: not told before;
    held: why it is held back, and the digest's period then.
    """
    return {
        "t": {}, "at": 0, "told": "", "tat": 0, "ack": False, "c": 0, "ids": [], "n": 0, "first": None, "from": 0,
        "held": None,
    }  # fmt: skip


def _order(entry: Entry) -> tuple[bool, bool, int, int]:
    """What is new first, of that what is not over, of that the worst, of that the last."""
    return not entry["c"], entry["t"]["transition"] == "cleared", _rank(entry), -entry["t"]["occurred_at"]


def _rank(entry: Entry) -> int:
    severity = entry["t"]["severity"]
    return SEVERITIES.index(severity) if severity in SEVERITIES else len(SEVERITIES)


def _trimmed(transition: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: transition.get(name) for name in _KEPT if transition.get(name) is not None}
    for name, chars in (("message", MESSAGE_CHARS_MAX), ("device_name", NAME_CHARS_MAX)):
        text = kept.get(name)
        if isinstance(text, str) and len(text) > chars:
            kept[name] = text[: chars - 1] + "…"
    for flag in ("chattering", "first_out"):
        if transition.get(flag):
            kept[flag] = True
    return kept


def _line(entry: Entry) -> dict[str, Any]:
    return {
        **entry["t"],
        "status": entry["t"]["transition"],
        "new": bool(entry["c"]),
        "raised_count": entry["n"],
        "first_at": entry["first"],
        "transitions": list(entry["ids"]),
        "transitions_count": entry["c"],
    }


def minute_of_day(text: str) -> int:
    """Minutes of HH:MM.

    Raises:
        ValueError: it is none.
    """
    hours, colon, minutes = text.partition(":")
    if not (
        colon and hours.isdigit() and minutes.isdigit() and len(minutes) == 2 and int(hours) < 24 and int(minutes) < 60
    ):
        message = f"{text!r:.40} is no time of day (HH:MM)"
        raise ValueError(message)
    return int(hours) * 60 + int(minutes)


def policy_of(document: Mapping[str, Any], defaults: Policy, zone: tzinfo) -> Policy:
    """A recipient's policy.

    Args:
        document: RecipientDoc.
        defaults: where it says nothing.
        zone: what its `timezone` names.

    Raises:
        ValueError: a time of day is none.
    """

    def us(name: str, default: int) -> int:
        value = document.get(name)
        return default if value is None else round(value * 1e6)

    limit: Mapping[str, Any] = document.get("limit") or {}
    digest: Mapping[str, Any] = document.get("digest") or {}
    quiet: Sequence[Mapping[str, Any]] = document.get("quiet_hours") or ()
    through = document.get("through")
    return Policy(
        group_by=tuple(document.get("group_by", defaults.group_by)),
        group_wait_us=us("group_wait_s", defaults.group_wait_us),
        group_interval_us=us("group_interval_s", defaults.group_interval_us),
        repeat_interval_us=us("repeat_interval_s", defaults.repeat_interval_us),
        cleared=document.get("cleared", defaults.cleared),
        quiet=tuple(
            Hours(
                minute_of_day(q["since"]),
                minute_of_day(q["until"]),
                frozenset(DAYS.index(d) for d in q.get("days") or DAYS),
            )
            for q in quiet
        ),
        digest=digest.get("every", ""),
        digest_minute=minute_of_day(digest["at"]) if "at" in digest else 0,
        through=defaults.through if through is None else frozenset(through),
        limit_notices=limit.get("notices", defaults.limit_notices),
        limit_window_us=round(limit.get("window_s", defaults.limit_window_us / 1e6) * 1e6),
        zone=zone,
    )
