"""The route stage: transitions of alarms in, an event for each recipient that is to hear of them out.

It knows no state. A transition that is read again gives the same events, and whoever hears them knows where they came from.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Protocol

import structlog

from preservarium import metrics, topics
from preservarium.clock import Clock
from preservarium.domain.notices import NOTIFIED, Event
from preservarium.domain.readings.json_text import to_bytes
from preservarium.domain.readings.lineage import GENERATION_LIVE
from preservarium.domain.registry.device import DeviceDoc, RecipientDoc, RuleDoc
from preservarium.errors import ReasonCode
from preservarium.settings import LiveSettings
from preservarium.streaming.records import message_error, pack, parse_trusted, refuse
from preservarium.streaming.stage import Batch, Effects, Record, Send

log = structlog.get_logger(__name__)

STAGE: Final = "route"

#: Transitions that change nothing for those who are told: a note, and the end of an occurrence that another one follows.
_UNHEARD: Final = frozenset({"commented", "superseded"})

#: RFC 5321, 4.5.3.1.3: a path has 256 octets, two of them brackets.
ADDRESS_CHARS_MAX: Final = 254
#: Recipients of one transition. More belong into a distribution list.
RECIPIENTS_MAX: Final = 50

# What SMTP takes unquoted (RFC 5321, 4.1.2), ASCII only: no blank, comma or line break can slip into a header.
_ADDRESS: Final = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?")

RecipientLookup = Callable[[str], RecipientDoc | None]


class Skipped(StrEnum):
    """Why nobody is told."""

    TRANSITION = "of no interest"
    REPLAY = "a replay"  #: what is re-derived was told when it happened
    SEVERITY = "below the recipient's severities"
    NOBODY = "no recipient is configured"
    FORMER = "the rule names others now"


@dataclass(frozen=True, slots=True)
class Told:
    """One who is to hear of a transition."""

    recipient: str  #: name in the registry, or a mail address
    channel: str
    address: str
    after_s: float = 0.0  #: escalation
    below: bool = False  #: its severity is none of the recipient's; it may have been, when it was raised


@dataclass(frozen=True, slots=True)
class Route:
    """Who is to hear of a transition."""

    told: tuple[Told, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    wrong: tuple[str, ...] = ()  #: recipients that cannot be told, for people
    gone: tuple[str, ...] = ()  #: former recipients that are not to be told, of what they were told before either


def resolve(name: str, recipient: RecipientLookup) -> RecipientDoc | str:
    """The recipient of a name; a mail address may stand for itself. Where there is none, why, for people."""
    document = recipient(name)
    if document is None:
        if "@" not in name:
            return f"recipient {name!r:.100} is not in the registry"
        document = {"name": name, "rev": 0, "channel": "mail", "address": name}
    address = document["address"]
    if document["channel"] == "mail" and (len(address) > ADDRESS_CHARS_MAX or not _ADDRESS.fullmatch(address)):
        return f"{address!r:.100} is no mail address"
    return document


def route(
    transition: Mapping[str, Any],
    recipient: RecipientLookup,
    defaults: Sequence[str],
    escalation: Sequence[Mapping[str, Any]] = (),
) -> Route:
    """Decide who is to hear of a transition; of two ways to one address, the first one and the sooner one counts.

    Whoever was told of an alarm hears how it ends, also where the rule names others by then.

    Args:
        transition: a line of `iot_alerts`. `recipients` names registry documents; an address may stand for itself.
        recipient: the catalogue's look-up.
        defaults: mail addresses for transitions that name nobody.
        escalation: the rule's.
    """
    if transition["transition"] in _UNHEARD:
        return Route(skipped=(Skipped.TRANSITION,))
    if transition.get("generation", GENERATION_LIVE) != GENERATION_LIVE:
        return Route(skipped=(Skipped.REPLAY,))
    named = [(name, 0.0) for name in transition.get("recipients") or defaults]
    for step in sorted(escalation, key=lambda step: float(step["after_s"])):
        named += [(name, float(step["after_s"])) for name in step["recipients"]]
    told: dict[str, Told] = {}
    skipped: list[Skipped] = []
    wrong: list[str] = []
    for name, after_s in named:
        document = resolve(name, recipient)
        if isinstance(document, str):
            wrong.append(document)
            continue
        severities = document.get("severities")
        below = severities is not None and transition["severity"] not in severities
        if below and NOTIFIED.get(transition["transition"]) == "raised":
            skipped.append(Skipped.SEVERITY)
            continue
        channel, address = document["channel"], document["address"]
        key = _key(document)
        if key not in told and len(told) >= RECIPIENTS_MAX:
            wrong.append(f"{address}: a transition has at most {RECIPIENTS_MAX} recipients")
        else:
            told.setdefault(key, Told(name, channel, address, after_s, below))
    gone: list[str] = []
    for name in transition.get("former", ()):
        document = resolve(name, recipient)
        if NOTIFIED.get(transition["transition"]) == "raised":
            skipped.append(Skipped.FORMER)
        elif isinstance(document, str):
            wrong.append(f"{document}: what it was told of the alarm has no end")
            gone.append(name)
        elif (key := _key(document)) in told:
            gone.append(name)  # the same address under another name
        else:
            told[key] = Told(name, document["channel"], document["address"], below=True)
    if not named:
        skipped.append(Skipped.NOBODY)
    return Route(tuple(told.values()), tuple(skipped), tuple(wrong), tuple(gone))


def _key(document: RecipientDoc) -> str:
    """Whom two documents mean alike."""
    address = document["address"]
    return f"{document['channel']} {address.lower() if document['channel'] == 'mail' else address}"


def labels_of(transition: Mapping[str, Any], device: DeviceDoc | None) -> dict[str, str]:
    """What the alarm can be grouped by (`domain.notices.LABELS`)."""
    meta = (device.get("meta") if device else None) or {}
    area = meta.get("area", "")
    return {
        "device": transition["device_id"],
        "rule": transition["rule"],
        "severity": transition["severity"],
        "group": transition.get("group") or "",
        "area": str(area)[:120],
        "type": device["type"] if device else "",
        "component_type": transition["component_type"],
        "pin": transition["pin_position"],
        "alarm": transition["alarm_id"],
    }


class RoutingDocuments(Protocol):
    """What of a `Catalogue` the stage needs."""

    @property
    def recipient(self) -> RecipientLookup:
        """The recipient of a name."""
        ...

    def rule(self, name: str) -> RuleDoc | None:
        """The rule of a name."""
        ...

    async def ready(self) -> None:
        """Wait until everything was read once.

        Raises:
            Retry: it could not be read yet.
        """
        ...


class Router:
    """The stage's handler.

    Args:
        known: the device's document, for its area and its overrides of rules.
        documents: the catalogue.
        live: settings.
        clock: for error lines.
    """

    def __init__(
        self,
        known: Callable[[int, str], DeviceDoc | None],
        documents: RoutingDocuments,
        live: LiveSettings,
        clock: Clock,
    ) -> None:
        self._known = known
        self._documents = documents
        self._live = live
        self._clock = clock
        self._said_nobody = False

    async def __call__(self, batch: Batch) -> Effects:
        """Send an event to each recipient of each transition.

        Raises:
            Retry: the catalogue has not been read yet.
        """
        await self._documents.ready()
        effects = Effects()
        parsed, errors = parse_trusted(batch, stage=STAGE)
        for error in errors:
            refuse(effects, error)
        defaults = [a.strip() for a in self._live().mail.recipients.split(",") if a.strip()]
        skipped: dict[str, int] = {}
        for record, lines in zip(batch.records, parsed, strict=True):
            for index, line in enumerate(lines):
                device = self._known(batch.partition, line["device_id"])
                found = route(line, self._documents.recipient, defaults, self._escalation(line, device))
                labels = labels_of(line, device)
                events = [(told.recipient, told.after_s, told.below, False) for told in found.told]
                events += [(name, 0.0, True, True) for name in found.gone]
                for name, after_s, below, gone in events:
                    event: Event = {
                        "recipient": name,
                        "source": str(batch.partition),
                        "offset": record.offset,
                        "index": index,
                        "after_s": after_s,
                        "below": below,
                        "labels": labels,
                        "transition": line,
                    }
                    if gone:
                        event["gone"] = True
                    effects.sends.append(Send(topics.NOTICE_EVENTS, name.encode(), to_bytes(event)))
                for text in found.wrong:
                    refuse(effects, self._error(batch, record, index, line, text))
                for reason in found.skipped:
                    skipped[reason] = skipped.get(reason, 0) + 1
        if skipped.get(Skipped.NOBODY) and not self._said_nobody:
            self._said_nobody = True  # once a process: that alarms reach nobody is a matter of configuration
            log.warning("alarms_without_notice", reason=str(Skipped.NOBODY))

        def count() -> None:
            if skipped:
                metrics.NOTICES.labels("none", "skipped").inc(sum(skipped.values()))

        effects.after.append(count)
        return effects

    def _escalation(self, line: Mapping[str, Any], device: DeviceDoc | None) -> Sequence[Mapping[str, Any]]:
        changed = ((device.get("rules") if device else None) or {}).get(line["rule"]) or {}
        rule: Mapping[str, Any] = self._documents.rule(line["rule"]) or {}
        steps: Sequence[Mapping[str, Any]] = changed.get("escalation", rule.get("escalation")) or ()
        return steps

    def _error(self, batch: Batch, record: Record, index: int, line: dict[str, Any], text: str) -> Any:
        return message_error(
            STAGE,
            ReasonCode.NOTICE_REFUSED,
            text,
            batch,
            record,
            index,
            line,
            raw=pack([line]),
            now_us=self._clock.now_us(),
        )
