"""A new version of a parser, or new bounds of a datatype, first for a share of the devices: who sees it, what differs, what is decided.

Who is in a share is decided by a hash of canary and device: the same everywhere and at any time, and whoever is in 1 % is in 10 %.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, TypedDict

from preservarium.domain.readings.address import canonical_address
from preservarium.domain.registry.device import DatatypeDoc, DeviceTypeDoc, ParserDoc

#: Shares one after the other, in percent of the devices.
STEPS: Final = (1, 10, 50, 100)
#: Kinds of documents that may have a canary.
KINDS: Final = ("parser", "datatype")
#: Canaries at once: each makes variants of what is compiled, and nobody follows more.
CANARIES_MAX: Final = 20


class LimitsDoc(TypedDict):
    """When a canary is rolled back, or may go on."""

    errors: float  #: share of messages that the candidate refuses and the version in force does not
    differences: float | None  #: share of messages that come out otherwise; None: any, a person looks at them
    messages_min: int  #: compared messages before anything is decided
    hold_s: float  #: a step lasts at least so long before the next one
    auto: bool  #: whether the next step, and in the end the promotion, come by themselves


class CanaryDoc(TypedDict):
    """A canary as workers know it: a document of the type registry."""

    name: str  #: kind/name of what it is about
    kind: str
    of: str  #: name of the parser or datatype
    candidate: dict[str, Any]  #: the document that the share sees
    percent: int
    started_at: int  #: µs since the epoch, UTC
    step_at: int  #: since when this share sees it
    limits: LimitsDoc
    rev: int


LIMITS: Final[LimitsDoc] = {"errors": 0.01, "differences": None, "messages_min": 100, "hold_s": 600.0, "auto": False}


def share_of(name: str, device_id: str) -> float:
    """Where a device stands between 0 and 100: it is in a share of so many percent and more."""
    digest = hashlib.sha256(f"{name}\0{canonical_address(device_id)}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 * 100


def sees(canary: CanaryDoc, device_id: str) -> bool:
    """Whether a device is in the share."""
    return share_of(canary["name"], device_id) < canary["percent"]


class Types(Protocol):
    """The documents in force."""

    def datatype(self, name: str) -> DatatypeDoc | None:
        """The datatype of that name."""
        ...

    def parser(self, name: str) -> ParserDoc | None:
        """The active version of the parser of that name."""
        ...

    def type(self, name: str) -> DeviceTypeDoc | None:
        """The device type of that name."""
        ...


class Seen:
    """The documents as the devices of some canaries see them.

    Args:
        types: those in force.
        canaries: whose candidates stand in their places.
    """

    def __init__(self, types: Types, canaries: Iterable[CanaryDoc]) -> None:
        self._types = types
        self._candidates = {(canary["kind"], canary["of"]): canary["candidate"] for canary in canaries}

    def datatype(self, name: str) -> DatatypeDoc | None:
        """The datatype of that name."""
        found: Any = self._candidates.get(("datatype", name))
        return self._types.datatype(name) if found is None else found

    def parser(self, name: str) -> ParserDoc | None:
        """The version of the parser of that name that is to read."""
        found: Any = self._candidates.get(("parser", name))
        return self._types.parser(name) if found is None else found

    def type(self, name: str) -> DeviceTypeDoc | None:
        """The device type of that name."""
        return self._types.type(name)


#: What tells variants apart that are compiled for different shares: the canaries that are seen. Empty: what is in force.
Variant = tuple[str, ...]


def seen_by(types: Any, device_id: str) -> tuple[Variant, Any]:
    """(variant, documents) as a device sees them; `types` has `canaries`, a mapping by name, where it knows any."""
    canaries: Mapping[str, CanaryDoc] | None = getattr(types, "canaries", None)
    if not canaries:
        return (), types
    chosen = [canary for name, canary in sorted(canaries.items()) if sees(canary, device_id)]
    if not chosen:
        return (), types
    return tuple(f"{canary['name']}#{canary['rev']}" for canary in chosen), Seen(types, chosen)


# --- what differs

#: A reading as it is compared: series and instant -> value, text, unit, quality, flags.
Readings = dict[tuple[str, str, int], tuple[Any, ...]]
#: Examples that are kept of each worker.
EXAMPLES_MAX: Final = 5
TEXT_CHARS_MAX: Final = 300


def readings_of(message: Mapping[str, Any], readings: Sequence[Mapping[str, Any]]) -> Readings:
    """Readings that were judged, to be compared."""
    return {
        (r["component_type"], str(r.get("pin_position")), r.get("timestamp", message["timestamp"])): (
            r.get("value"), r.get("value_text"), r.get("unit"), r.get("quality"), tuple(sorted(r.get("flags") or ())),
        )
        for r in readings
    }  # fmt: skip


def difference(current: Readings | None, candidate: Readings | None) -> str:
    """What differs between two outcomes of a message (None: it was refused), for people; "" where nothing does."""
    if current is None or candidate is None:
        if current is candidate:
            return ""
        return "refused now, and not before" if candidate is None else "refused before, and not now"
    if repr(current) == repr(candidate):  # as text, so that NaN is itself, and 1 is not 1.0
        return ""
    said = []
    for key in sorted({*current, *candidate}):
        before, after = current.get(key), candidate.get(key)
        if repr(before) != repr(after):
            said.append(f"{key[0]}[{key[1]}]: {_short(before)} → {_short(after)}")
    return ("; ".join(said) or "the order of readings")[:TEXT_CHARS_MAX]


def _short(values: tuple[Any, ...] | None) -> str:
    if values is None:
        return "none"
    value, text, unit, quality, flags = values
    shown = repr(text if value is None else value)
    return f"{shown} {unit or ''}".rstrip() + f" q{quality}" + (f" {','.join(flags)}" if flags else "")


@dataclass(slots=True)
class Counts:
    """What was compared of a canary at one share."""

    compared: int = 0
    different: int = 0  #: came out otherwise, refusals of one of the two among them
    broken: int = 0  #: refused by the candidate, and not by what is in force
    mended: int = 0  #: the other way round
    skipped: int = 0  #: not compared, because there were too many at once
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, current: Readings | None, candidate: Readings | None, example: Mapping[str, Any]) -> None:
        """Count a message."""
        self.compared += 1
        said = difference(current, candidate)
        if not said:
            return
        self.different += 1
        self.broken += candidate is None and current is not None
        self.mended += current is None and candidate is not None
        if len(self.examples) < EXAMPLES_MAX:
            self.examples.append({**example, "difference": said})

    def join(self, other: "Counts") -> None:
        """Add what was counted elsewhere."""
        for name in ("compared", "different", "broken", "mended", "skipped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.examples = [*other.examples, *self.examples][:EXAMPLES_MAX]

    def share(self, count: int) -> float:
        """A count as a share of what was compared; 0 where nothing was."""
        return count / self.compared if self.compared else 0.0


# --- what is decided

Action = Literal["rollback", "step", "promote"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done with a canary, and why."""

    action: Action
    reason: str
    percent: int = 0  #: of the next step


def decide(canary: CanaryDoc, counts: Counts, now_us: int) -> Decision | None:
    """What the limits say; None: nothing yet.

    Args:
        canary: as it is.
        counts: of its present share.
        now_us: the clock, µs since the epoch, UTC.
    """
    limits = canary["limits"]
    if counts.compared < limits["messages_min"]:
        return None
    of = f"of {counts.compared} messages at {canary['percent']} %"
    for count, most, what in (
        (counts.broken, limits["errors"], "are refused by the candidate alone"),
        (counts.different, limits["differences"], "come out otherwise"),
    ):
        if most is not None and counts.share(count) > most:
            return Decision("rollback", f"{count} {of} {what}: {counts.share(count):.2%}, and {most:.2%} is the limit")
    if not limits["auto"] or now_us - canary["step_at"] < limits["hold_s"] * 1e6:
        return None
    told = f"{counts.different} {of} come out otherwise, {counts.broken} are refused by the candidate alone: within the limits"
    following = [step for step in STEPS if step > canary["percent"]]
    return Decision("step", told, following[0]) if following else Decision("promote", told)


def checked(limits: LimitsDoc, percent: int) -> Collection[str]:
    """What is wrong with limits and a share, for people."""
    wrong = []
    if not 1 <= percent <= 100:
        wrong.append("percent is 1 to 100")
    for name in ("errors", "differences"):
        value = limits[name]
        if value is not None and not 0 <= value <= 1:
            wrong.append(f"{name} is a share, 0 to 1")
    if limits["messages_min"] < 1:
        wrong.append("messages_min is 1 or more")
    if not 0 <= limits["hold_s"] <= 30 * 86_400:
        wrong.append("hold_s is 0 to 30 days")
    return wrong
