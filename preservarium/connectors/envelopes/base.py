"""What every envelope needs: what comes out of one, what one is recognised by, and fields as strangers write them. Pure."""

import binascii
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from preservarium.domain.readings import json_text
from preservarium.domain.readings.instant import instant_us
from preservarium.domain.readings.number import number_of
from preservarium.domain.readings.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US
from preservarium.errors import ReasonCode, Reject

LORAWAN: Final = "LoRaWAN"
#: Gateways looked at for the best signal; a message heard by more is a network server's mistake.
GATEWAYS_MAX: Final = 1_000
#: Messages of one envelope: a gateway that collects for a minute has heard some hundred devices.
MESSAGES_MAX: Final = 5_000
#: An event of a network that carries nothing of a device: nothing to store, and no fault.
NOT_UPLINK: Final = "not_uplink"
#: Where in `meta` stands what the network's own codec made of the payload; parsers of kind `network` read it.
DECODED: Final = "decoded"
#: What a field of `meta` may hold of a name.
_WORD_CHARACTERS_MAX: Final = 255
#: A pin beyond this is no channel of a device but a number in a topic.
PINS_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class Uplink:
    """One device's message out of an envelope."""

    device: str  #: its address as sent, in whatever spelling
    payload: Any  #: bytes, or a JSON value
    port: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    mode: str = ""  #: connector mode; "": the connector's
    by_topic: bool = False  #: the topic named the device, and nothing in the message


@dataclass(frozen=True, slots=True)
class Event:
    """What came: a parsed JSON value or bytes, and by which way."""

    value: Any
    levels: tuple[str, ...] = ()  #: of the MQTT topic
    device: str | None = None  #: that the topic names, where its pattern has {device}
    base: int = 0  #: so many levels of the topic stand before what a pattern's `#` stands for
    forced: bool = False  #: the setting or the path says that it is of this format


#: The messages of an event; none where it carries nothing of a device; None where it is not of this format. Raises Reject
#: where it is, and a field of it is broken.
Read = Callable[[Event], Sequence[Uplink] | None]


@dataclass(frozen=True, slots=True)
class Format:
    """An envelope that a platform publishes."""

    name: str  #: as in `POST /ingest/NAME` and in `connector.format`
    title: str  #: for people
    read: Read
    #: a JSON object that has one of these keys may be of it
    keys: frozenset[str] = frozenset()
    #: whether an MQTT topic is one of its own; None: the message alone says it
    topic: Callable[[Sequence[str]], bool] | None = None
    #: whether its topics are looked at where the pattern names the device, too: what comes by them is never the device's own words
    always: bool = False


# --- fields ----------------------------------------------------------------------------------------------------------


def inner(value: Any, name: str) -> Mapping[str, Any]:
    """The object in a field; an empty one where there is none."""
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def objects(value: Any, name: str) -> list[Mapping[str, Any]]:
    """The objects of a list in a field."""
    found = value.get(name) if isinstance(value, dict) else None
    return [item for item in found[:GATEWAYS_MAX] if isinstance(item, dict)] if isinstance(found, list) else []


def number(value: Any) -> float | None:
    """A number, or one in text; None for anything else."""
    if isinstance(value, str):
        value = number_of(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e15 < value < 1e15:
        return None
    return value


def word(value: Any) -> str | None:
    """A text that is not empty, cut to what a name may have."""
    return value[:_WORD_CHARACTERS_MAX] if isinstance(value, str) and value else None


def name_of(value: Any) -> str | None:
    """What names a device: text, or a number as it is written."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return word(value)


def put(meta: dict[str, Any], name: str, value: Any) -> None:
    """Note what is known."""
    if value is not None:
        meta[name] = value


def instant(value: Any, unit: str | None = None) -> int | None:
    """µs; None for what is none: a network without a clock still delivers good payloads."""
    at = None if value is None else instant_us(value, unit)
    return at if at is not None and TIMESTAMP_MIN_US <= at <= TIMESTAMP_MAX_US else None


def whole(value: Any) -> int | None:
    """A whole number, or one in text."""
    found = number(value)
    return int(found) if found is not None and found == int(found) else None


def port_of(value: Any) -> int | None:
    """A LoRaWAN port, as a number or in text.

    Raises:
        Reject: ENVELOPE_INVALID.
    """
    if value is None or value == "":
        return None
    port = whole(value)
    if port is None:
        raise Reject(ReasonCode.ENVELOPE_INVALID, f"the port is no number: {value!r:.80}")
    return port


def from_base64(value: Any, name: str) -> bytes:
    """Bytes out of base64: of either alphabet (RFC 4648, 4 and 5), with or without padding.

    Raises:
        Reject: ENVELOPE_INVALID.
    """
    if not isinstance(value, str):
        raise Reject(ReasonCode.ENVELOPE_INVALID, f"{name} is not a string")
    try:
        return binascii.a2b_base64(value, strict_mode=True)
    except ValueError as e:
        text = "".join(value.split()).rstrip("=").replace("-", "+").replace("_", "/")
        try:
            return binascii.a2b_base64(text + "=" * (-len(text) % 4), strict_mode=True)
        except ValueError:
            raise Reject(ReasonCode.ENVELOPE_INVALID, f"{name} is not base64: {e}") from None


def from_hex(value: Any, name: str) -> bytes:
    """Bytes out of hexadecimal text, in upper or lower case, with or without blanks.

    Raises:
        Reject: ENVELOPE_INVALID.
    """
    if not isinstance(value, str):
        raise Reject(ReasonCode.ENVELOPE_INVALID, f"{name} is not a string")
    try:
        return bytes.fromhex(value.removeprefix("0x"))
    except ValueError:
        raise Reject(ReasonCode.ENVELOPE_INVALID, f"{name} is not hexadecimal: {value!r:.80}") from None


def required_device(value: Any, where: str) -> str:
    """The text that names a device.

    Raises:
        Reject: ENVELOPE_NO_DEVICE.
    """
    device = name_of(value)
    if device is None:
        raise Reject(ReasonCode.ENVELOPE_NO_DEVICE, f"no device: {where}")
    return device


def scalar(value: Any) -> Any:
    """What a topic of one value says: a number, a boolean, or text; a JSON object or list as it is; None for nothing."""
    if isinstance(value, bytes):
        try:
            value = value.decode().strip()
        except UnicodeDecodeError:
            return None
    if not isinstance(value, str):
        return value
    if value == "" or "\0" in value:
        return None
    found = number_of(value)
    # A number that no double holds, or with a zero before it, is a text: its digits would be lost.
    if found is not None and (isinstance(found, float) or str(found) == value or value.startswith(("+", "-0"))):
        return found if abs(found) < 1e300 else value
    return {"true": True, "false": False}.get(value, value)


def text_of(value: Any) -> str:
    """What came as text; "" where it is none."""
    if isinstance(value, bytes):
        try:
            return value.decode().strip()
        except UnicodeDecodeError:
            return ""
    return value if isinstance(value, str) else ""


def document(value: Any) -> dict[str, Any] | None:
    """An object that may be written as JSON in a text."""
    if isinstance(value, str) and value[:1] == "{":
        try:
            value = json_text.loads(value.encode())
        except (orjson.JSONDecodeError, UnicodeEncodeError):
            return None
    return value if isinstance(value, dict) and value else None


def nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    """`{"relay": [{"power": 5}]}` of the path relay, 0, power: a number is a pin."""
    for step in reversed(path[1:]):
        if step.isascii() and step.isdigit() and int(step) < PINS_MAX:
            value = [*[None] * int(step), value]
        else:
            value = {step: value}
    return {path[0]: value}


def online(event: Event, device: str, is_online: bool) -> list[Uplink]:
    """What a broker's last will and a platform's availability say, in one word for all platforms."""
    return [Uplink(event.device or device, {"online": is_online}, by_topic=True)]


def heard(network: str, receptions: Sequence[tuple[float | None, float | None, Any]]) -> dict[str, Any]:
    """`meta` of a message that gateways have heard: (RSSI in dBm, SNR in dB, gateway) of each; the best signal counts."""
    meta: dict[str, Any] = {"network": network}
    if not receptions:
        return meta
    rssi, snr, gateway = max(receptions, key=lambda h: h[0] if h[0] is not None else -1e9)
    put(meta, "rssi", rssi)
    put(meta, "snr", snr)
    put(meta, "gateway", word(gateway))
    meta["gateways"] = len(receptions)
    return meta


# --- envelopes as data -----------------------------------------------------------------------------------------------

Path = tuple[str, ...]


def path(text: str) -> Path:
    """`a.b` as steps."""
    return tuple(text.split("."))


def at(value: Any, steps: Path) -> Any:
    """What stands there; None where there is nothing. A step finds its key in any case where it is not there as written."""
    for step in steps:
        if not isinstance(value, dict):
            return None
        found = value.get(step)
        if found is None and step not in value:
            lower = step.lower()
            found = next((v for k, v in value.items() if k.lower() == lower), None)
        value = found
    return value


@dataclass(frozen=True, slots=True)
class Table:
    """Where the fields of an envelope stand: several paths are alternatives, the first that is there counts."""

    network: str
    device: tuple[Path, ...]
    payload: tuple[Path, ...]
    encoding: Callable[[Any, str], bytes] = from_base64
    port: tuple[Path, ...] = ()
    time: tuple[Path, ...] = ()
    time_unit: str | None = None
    f_cnt: tuple[Path, ...] = ()
    sf: tuple[Path, ...] = ()
    dr: tuple[Path, ...] = ()
    frequency: tuple[Path, ...] = ()  #: Hz, or MHz where it is below 10,000
    name: tuple[Path, ...] = ()
    application: tuple[Path, ...] = ()
    decoded: tuple[Path, ...] = ()
    #: the list of gateways, and in each of them RSSI, SNR and what names it; where it is absent, these stand at the top
    receptions: tuple[Path, ...] = ()
    rssi: tuple[Path, ...] = ()
    snr: tuple[Path, ...] = ()
    gateway: tuple[Path, ...] = ()
    mode: str = LORAWAN

    def uplink(self, value: Mapping[str, Any]) -> Uplink | None:
        """The message; None where it has no payload.

        Raises:
            Reject: a field of it is broken.
        """
        found = first(value, self.payload)
        decoded = document(first(value, self.decoded))
        if found in (None, "") and decoded is None:
            return None
        device = required_device(first(value, self.device), " or ".join(".".join(p) for p in self.device))
        payload: Any = decoded if found in (None, "") else self.encoding(found, ".".join(self.payload[0]))
        given = first(value, self.receptions)
        # Of one gateway alone, what was once XML is an object.
        given = [given] if isinstance(given, dict) else given if isinstance(given, list) else []
        of: list[Mapping[str, Any]] = [g for g in given[:GATEWAYS_MAX] if isinstance(g, dict)]
        signals = [
            (number(first(g, self.rssi)), number(first(g, self.snr)), first(g, self.gateway)) for g in (of or [value])
        ]
        meta = heard(self.network, [s for s in signals if s != (None, None, None)])
        put(meta, "time", instant(first(value, self.time), self.time_unit))
        put(meta, "f_cnt", whole(first(value, self.f_cnt)))
        put(meta, "sf", whole(first(value, self.sf)))
        put(meta, "dr", whole(first(value, self.dr)))
        put(meta, "frequency", hertz(first(value, self.frequency)))
        put(meta, "name", word(first(value, self.name)))
        put(meta, "application", word(first(value, self.application)))
        if payload is not decoded:
            put(meta, DECODED, decoded)
        return Uplink(device, payload, port_of(first(value, self.port)), meta, self.mode)


def first(value: Any, paths: Sequence[Path]) -> Any:
    """What stands at the first of the paths that is there."""
    return next((found for p in paths if (found := at(value, p)) is not None), None)


def paths(*texts: str) -> tuple[Path, ...]:
    """Alternatives."""
    return tuple(map(path, texts))


def hertz(value: Any) -> int | None:
    """A frequency in Hz of one that is in Hz or, below 10,000, in MHz; as a number or in text."""
    found = number(value)
    if found is None or found <= 0:
        return None
    return round(found * 1e6) if found < 10_000 else int(found)


def below(event: Event, root: str) -> tuple[str, ...] | None:
    """The levels of a topic below the platform's own word for it; None where it does not have it.

    Where the format is named by the setting, that word may be another: then what the pattern's `#` stands for counts.
    """
    levels = event.levels
    if root in levels[:-1]:
        return levels[levels.index(root) + 1 :]
    return levels[event.base :] if event.forced and event.base < len(levels) else None


def rooted(root: str) -> Callable[[Sequence[str]], bool]:
    """Whether a topic has the platform's own word for its topics before the last level."""
    return lambda levels: root in levels[:-1]


def tabular(table: Table, is_one: Callable[[Mapping[str, Any]], bool]) -> Read:
    """The reader of an envelope that is one message in one object."""

    def read(event: Event) -> Sequence[Uplink] | None:
        value = event.value
        if not isinstance(value, dict) or not ((surely := is_one(value)) or event.forced):
            return None
        uplink = table.uplink(value)
        if uplink is None:
            return [] if surely else None
        return [uplink]

    return read


def limited(uplinks: Iterator[Uplink], what: str) -> list[Uplink]:
    """The messages of an envelope of many.

    Raises:
        Reject: ENVELOPE_TOO_LARGE.
    """
    found: list[Uplink] = []
    for uplink in uplinks:
        if len(found) >= MESSAGES_MAX:
            raise Reject(ReasonCode.ENVELOPE_TOO_LARGE, f"{what} of more than {MESSAGES_MAX} messages")
        found.append(uplink)
    return found
