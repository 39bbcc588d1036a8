"""Which notices a transition calls for. Pure: decisions with reasons, no channel.

A notice is identified by its transition and its address. The same transition read again gives the same notices with
the same Message-IDs, which mail systems use to drop the second copy.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from preservarium.domain.device import RecipientDoc
from preservarium.domain.lineage import GENERATION_LIVE, identity

#: Transitions that people are told of. What an operator did, an operator knows.
NOTIFIED: Final = frozenset({"raised", "cleared"})
#: States in which an alarm is not annunciated.
SILENT: Final = frozenset({"shelved", "suppressed", "out_of_service"})

#: RFC 5321, 4.5.3.1.3: a path has 256 octets, two of them brackets.
ADDRESS_CHARS_MAX: Final = 254
#: Recipients of one transition. More belong into a distribution list.
RECIPIENTS_MAX: Final = 50

# What SMTP takes unquoted (RFC 5321, 4.1.2), ASCII only: no blank, comma or line break can slip into a header.
_ADDRESS: Final = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?")

RecipientLookup = Callable[[str], RecipientDoc | None]


class Skipped(StrEnum):
    """Why nobody is told."""

    TRANSITION = "of no interest"  #: an operator's action, or of a shelved alarm
    REPLAY = "a replay"  #: what is re-derived was told when it happened
    SEVERITY = "below the recipient's severities"
    NOBODY = "no recipient is configured"
    CHANNEL = "the channel is not available"


@dataclass(frozen=True, slots=True)
class Notice:
    """One message to one address."""

    transition: Mapping[str, Any]  #: line of `iot_alerts`
    channel: str
    address: str

    @property
    def id(self) -> str:
        """Deterministic: of the transition and the address."""
        return identity("notice", self.transition["transition_id"], self.channel, self.address)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a transition calls for."""

    notices: tuple[Notice, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    wrong: tuple[str, ...] = ()  #: recipients that cannot be told, for people


def plan(transition: Mapping[str, Any], recipient: RecipientLookup, defaults: Sequence[str]) -> Plan:
    """Decide who is told of a transition.

    Args:
        transition: a line of `iot_alerts`. `recipients` names registry documents; an address may stand for itself.
        recipient: the catalogue's look-up.
        defaults: mail addresses for transitions that name nobody.
    """
    if transition["transition"] not in NOTIFIED or transition["state"] in SILENT:
        return Plan(skipped=(Skipped.TRANSITION,))
    if transition.get("generation", GENERATION_LIVE) != GENERATION_LIVE:
        return Plan(skipped=(Skipped.REPLAY,))
    named = transition.get("recipients") or ()
    notices: dict[str, Notice] = {}
    skipped: list[Skipped] = []
    wrong: list[str] = []
    for name in named or defaults:
        document = recipient(name) if named else None
        if document is None:
            channel, address = "mail", name
            if "@" not in name:
                wrong.append(f"recipient {name!r:.100} is not in the registry")
                continue
        else:
            channel, address = document["channel"], document["address"]
            severities = document.get("severities")
            if severities is not None and transition["severity"] not in severities:
                skipped.append(Skipped.SEVERITY)
                continue
        if channel != "mail":
            skipped.append(Skipped.CHANNEL)
        elif len(address) > ADDRESS_CHARS_MAX or not _ADDRESS.fullmatch(address):
            wrong.append(f"{address!r:.100} is no mail address")
        elif len(notices) >= RECIPIENTS_MAX:
            wrong.append(f"{address}: a transition has at most {RECIPIENTS_MAX} recipients")
        else:
            notices.setdefault(address.lower(), Notice(transition, channel, address))
    if not named and not defaults:
        skipped.append(Skipped.NOBODY)
    return Plan(tuple(notices.values()), tuple(skipped), tuple(wrong))
