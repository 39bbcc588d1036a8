"""SenML packs, JSON and CBOR (RFC 8428), with the units of RFC 8798 left to the units table.

A record's name is the base name and its own; the field is named by the own part, where there is one, because the base
name says which device speaks. A pack whose records carry no own name is told apart by unit (`Cel` is a temperature).

A record that cannot be read is refused by itself. Where one of its base fields cannot, or a label that must be understood is not, all are:
base fields are those of the records behind it, too.

| label | JSON | CBOR | | label | JSON | CBOR |
|---|---|---|-|---|---|---|
| base version | bver | -1 | | unit | u | 1 |
| base name | bn | -2 | | value | v | 2 |
| base time | bt | -3 | | string value | vs | 3 |
| base unit | bu | -4 | | boolean value | vb | 4 |
| base value | bv | -5 | | sum | s | 5 |
| base sum | bs | -6 | | time | t | 6 |
| name | n | 0 | | update time | ut | 7 |
|  |  |  | | data value | vd | 8 |
"""

import base64
import binascii
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import cbor2
import orjson

from preservarium.domain.decoders.base import (
    DECODED_MAX,
    Decoded,
    ParserError,
    PartRefused,
    base_time,
    failed,
    is_word,
    sorted_out,
    source_of,
)
from preservarium.domain.readings import json_text
from preservarium.domain.readings.instant import seconds_us
from preservarium.domain.readings.reading import RawMessage
from preservarium.errors import ReasonCode, Reject

#: RFC 8428, section 4.4: newer packs may mean something else.
VERSION_MAX: Final = 10
#: RFC 8428, section 4.5.3: smaller times count from now.
RELATIVE_BELOW_S: Final = 2**28
#: An instant beyond this is no time whatever it means.
_TIME_S_MAX: Final = 1e12

_LABELS: Final[dict[Any, str]] = {
    -1: "bver", -2: "bn", -3: "bt", -4: "bu", -5: "bv", -6: "bs", 0: "n", 1: "u", 2: "v", 3: "vs", 4: "vb", 5: "s",
    6: "t", 7: "ut", 8: "vd",
}  # fmt: skip
_TEXTS: Final = {"bn", "bu", "n", "u", "vs"}
_NUMBERS: Final = {"bt", "bv", "bs", "v", "s", "t", "ut", "bver"}
#: Whole numbers of more bits cannot be added to a float.
_BITS_MAX: Final = 1_024
#: Where they are not finite, their own record is refused and not the pack.
_MEASURED: Final = {"v", "s"}
#: RFC 8428, section 4.5.1.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9\-:./_]*")
NAME_CHARACTERS_MAX: Final = 200
TEXT_CHARACTERS_MAX: Final = 4_096

#: What a unit alone says of a record without a name of its own.
_NAME_OF_UNIT: Final = {
    "Cel": "temperature", "K": "temperature", "%RH": "humidity", "V": "voltage", "A": "current", "W": "power",
    "J": "energy", "Pa": "pressure", "lx": "illuminance", "lon": "longitude", "lat": "latitude", "%EL": "battery_level",
    "EL": "battery_remaining_s", "m": "distance", "m/s": "velocity", "m/s2": "acceleration", "Hz": "frequency",
    "pH": "ph", "dB": "level", "dBm": "power", "l": "volume", "l/s": "flow", "m3": "volume", "m3/s": "flow",
    "kg": "mass", "g": "mass", "S/m": "conductivity", "W/m2": "irradiance", "count": "count", "/": "ratio",
    "%": "ratio", "s": "duration", "beat/min": "heart_rate", "ohm": "resistance", "degC": "temperature",
}  # fmt: skip


def _records(payload: Any) -> list[dict[str, Any]]:
    """A pack as records with JSON labels.

    Raises:
        Reject: it is none.
    """
    if isinstance(payload, str):
        payload = payload.encode()
    if isinstance(payload, bytes):
        payload = _loads(payload)
    if isinstance(payload, dict):
        payload = [payload]
    if not isinstance(payload, list) or not all(isinstance(r, dict) for r in payload):
        message = "a SenML pack is an array of records"
        raise failed(message)
    return payload


def _loads(data: bytes) -> Any:
    # RFC 8428, section 6: CBOR packs are arrays, 0x80 to 0x9f; JSON ones begin with a bracket or blanks.
    if 0x80 <= data[:1].ljust(1)[0] <= 0xBF:
        try:
            pack = cbor2.loads(data)
        except Exception as e:  # cbor2 raises whatever the builders of its tags raise
            # What the library says of it is in words of its own code.
            what = "torn" if isinstance(e, cbor2.CBORDecodeEOF) else "no CBOR"
            message = f"the payload is {what}: it cannot be read as a CBOR pack"
            raise failed(message) from None
        if not isinstance(pack, list | dict):
            message = "a SenML pack is an array of records"
            raise failed(message)
        return [_labelled(r) for r in (pack if isinstance(pack, list) else [pack])]
    try:
        return json_text.loads(data)
    except orjson.JSONDecodeError as e:
        message = f"the payload is neither JSON nor CBOR: {e.msg}"
        raise failed(message) from None


def _labelled(record: Any) -> Any:
    if not isinstance(record, dict):
        return record
    labelled: dict[str, Any] = {}
    for label, value in record.items():
        name = _LABELS.get(label, label) if isinstance(label, int | str) else None
        if not isinstance(name, str):
            if isinstance(label, int):
                continue  # numbers that are not assigned are optional extensions (section 4.4)
            message = f"the label {label!r:.40} is not known"
            raise failed(message)
        if name == "vd" and isinstance(value, bytes):
            value = base64.urlsafe_b64encode(value).rstrip(b"=").decode()
        labelled[name] = value
    return labelled


def _check(record: dict[str, Any], *, base: bool) -> None:
    """Refuse a record for one of its base fields, or for one of its own."""
    for label, value in record.items():
        if (label in _BASE_FIELDS) is not base:
            # Section 4.4: a label with an underscore behind it must be understood or the pack refused.
            if base and isinstance(label, str) and label.endswith("_"):
                message = f"{label} must be understood, and is not"
                raise failed(message)
        elif label in _TEXTS:
            if not isinstance(value, str):
                message = f"{label} is text, not {json_text.kind_of(value)}"
                raise failed(message)
        elif label in _NUMBERS:
            if isinstance(value, bool) or not isinstance(value, int | float) or not _usable(label, value):
                message = f"{label} is a number, not {value!r:.40}"
                raise failed(message)
        elif label == "vb" and not isinstance(value, bool):
            message = f"vb is true or false, not {value!r:.40}"
            raise failed(message)


def _usable(label: str, value: int | float) -> bool:
    if isinstance(value, int):
        return value.bit_length() < _BITS_MAX
    return label in _MEASURED or math.isfinite(value)


def resolve(pack: list[dict[str, Any]], now_s: float) -> list[dict[str, Any]]:
    """Resolved records (RFC 8428, section 4.6): no base fields, full names, absolute times.

    Args:
        pack: records with JSON labels.
        now_s: the instant that relative times count from, seconds since the epoch, UTC.

    Returns:
        A record for each that has a value or a sum, with `n`, `t` and what it has of `u`, `v`, `vs`, `vb`, `vd`, `s`,
        `ut` and extensions. `bver` is not repeated.

    Raises:
        Reject: DECODE_FAILED, the pack is not SenML, one of its records is not, or of a version that is not known.
    """
    return [_resolved(record, base, now_s).fields for record, base in _with_base(pack)]


class _Resolved(NamedTuple):
    """A resolved record."""

    fields: dict[str, Any]
    own: str  #: the part of its name that is its own
    at_us: int  #: its time, µs, as it is given


_BASE_FIELDS: Final = frozenset({"bver", "bn", "bt", "bu", "bv", "bs"})
_WORKED_IN: Final = _BASE_FIELDS | {"n", "t", "u", "v", "s"}
_OWN_FIELDS: Final = frozenset({"n", "u", "v", "vs", "vb", "s", "t", "ut", "vd"})
_VALUES: Final = frozenset({"v", "vs", "vb", "vd", "s"})


def _with_base(pack: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The records that hold something, each with the base fields that stand for it.

    Raises:
        Reject: DECODE_FAILED, a base field is wrong.
    """
    base: dict[str, Any] = {}
    for record in pack:
        if not record.keys() <= _OWN_FIELDS:
            _check(record, base=True)
            base = {**base, **{k: v for k, v in record.items() if k in _BASE_FIELDS}}
            if base.get("bver", VERSION_MAX) > VERSION_MAX:
                message = f"SenML version {base['bver']}; {VERSION_MAX} is known"
                raise failed(message)
        if record.keys() & _VALUES:
            yield record, base


def _resolved(record: dict[str, Any], base: dict[str, Any], now_s: float) -> _Resolved:
    """A record with its base fields worked in.

    Raises:
        Reject: DECODE_FAILED, it cannot be read.
    """
    _check(record, base=False)
    own = record.get("n", "")
    # LwM2M's names are paths and begin with a slash (OMA LwM2M Core, 7.4.4), which RFC 8428 does not allow.
    name = (base.get("bn", "") + own).removeprefix("/")
    if not _NAME.fullmatch(name) or len(name) > NAME_CHARACTERS_MAX:
        message = f"{name!r:.80} is no SenML name"
        raise failed(message)
    first, second = base.get("bt", 0), record.get("t", 0)
    at = first + second
    if abs(at) > _TIME_S_MAX:
        message = f"the time {at} is out of range"
        raise failed(message)
    # Whole microseconds of either: seconds as a float have 52 bits.
    at_us = seconds_us(first) + seconds_us(second) if at else 0
    if at < RELATIVE_BELOW_S:
        at += now_s
    resolved: dict[str, Any] = {"n": name, "t": at}
    if unit := record.get("u", base.get("bu")):
        resolved["u"] = unit
    if "v" in record:
        resolved["v"] = record["v"] + base.get("bv", 0)
    if "s" in record or "bs" in base:
        resolved["s"] = record.get("s", 0) + base.get("bs", 0)
    if not record.keys() <= _WORKED_IN:
        # Extensions with a base label of their own would end in nothing here: they are kept as they are.
        resolved.update({k: v for k, v in record.items() if k not in resolved and k not in _WORKED_IN})
    return _Resolved(resolved, own.removeprefix("/"), at_us)


class SenmlDecoder:
    """Packs as JSON values, JSON text or CBOR bytes.

    A sum is a field of its own, `<name>.sum`, in the unit times second (section 4.5.4).
    """

    __slots__ = ("_full_names",)

    def __init__(self, source: Mapping[str, Any]) -> None:
        names = source.get("names", "own")
        if not is_word(names, {"own", "full"}) or source.keys() - {"names", "description"}:
            message = "a senml parser knows `names: own` or `names: full`"
            raise ParserError(message)
        self._full_names = names == "full"

    def decode(self, raw: RawMessage) -> list[Decoded | Reject]:
        """The records of a pack, and those that cannot be read.

        Raises:
            Reject: DECODE_FAILED, or DECODE_LIMIT.
        """
        base_us = base_time(raw)
        out: list[Decoded | Reject] = []
        for number, (record, base) in enumerate(_with_base(_records(raw["payload"])), 1):
            try:
                out += self._fields(_resolved(record, base, 0.0), base_us)
            except Reject as e:
                out.append(_refused(f"record {number}: {e}", {**base, **record}))
            if len(out) > DECODED_MAX:
                raise Reject(ReasonCode.DECODE_LIMIT, f"more than {DECODED_MAX} records")
        sorted_out(out)
        return out

    def _fields(self, resolved: _Resolved, base_us: int) -> list[Decoded]:
        record, at_s = resolved.fields, resolved.fields["t"]
        at = None if not at_s else base_us + resolved.at_us if at_s < RELATIVE_BELOW_S else resolved.at_us
        unit = record.get("u")
        name = record["n"] if self._full_names else resolved.own or _NAME_OF_UNIT.get(unit or "", record["n"])
        found = [
            Decoded(name, _value(label, record[label]), unit, at, None)
            for label in ("v", "vs", "vb", "vd")
            if label in record
        ]
        if "s" in record and (record["s"] or not found):
            found.append(Decoded(f"{name}.sum", record["s"], f"{unit}*s" if unit else "s", at, None))
        return found


def _refused(message: str, record: dict[str, Any]) -> Reject:
    try:
        return PartRefused(message, json_text.dumps([record]))
    except TypeError:  # CBOR has put into it what JSON has not
        return failed(message)


def _value(label: str, value: Any) -> Any:
    if label in {"v", "vb"}:
        return value
    if not isinstance(value, str) or len(value) > TEXT_CHARACTERS_MAX:
        message = f"{label} is text of at most {TEXT_CHARACTERS_MAX} characters"
        raise failed(message)
    if label == "vd":
        try:
            base64.b64decode(value + "=" * (-len(value) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            message = "vd is not base64url"
            raise failed(message) from None
    return value


def compile_parser(doc: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> SenmlDecoder:
    """The decoder of a `senml` or `senml_cbor` parser. Variables are not used.

    Raises:
        ParserError: the source is wrong.
    """
    return SenmlDecoder(source_of(doc))
