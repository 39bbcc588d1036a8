"""Derived readings in PostgreSQL's binary COPY format, for `shadow_rows`: a prefix kept for each series, a tail made for each message."""

import struct
from collections.abc import Mapping
from io import BytesIO
from typing import Any, Final

import orjson

from preservarium.domain.readings.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US

COLUMNS: Final = (
    "change_id", "side", "device_id", "connector_mode", "component_type", "pin_position", "unit",
    "at", "value", "value_text", "flags", "quality", "revised",
    "topic", "parser", "config_rev", "experiment_id", "received_at", "raw_partition", "raw_offset", "raw_index",
)  # fmt: skip
_HEADER: Final = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
_TRAILER: Final = struct.pack(">h", -1)
_COUNT: Final = struct.pack(">h", len(COLUMNS))
_PLAIN: Final = struct.Struct(">iqidiiihi?").pack  # at | value | no text | no flags | quality | revised
_AT: Final = struct.Struct(">iq").pack
_VALUE: Final = struct.Struct(">id").pack
_END: Final = struct.Struct(">ihi?").pack  # quality | revised
_TAIL: Final = struct.Struct(">iqiiiqii").pack  # received_at | raw_partition | raw_offset | raw_index
_NULL: Final = struct.pack(">i", -1)
_TEXT_OID: Final = 25
#: Prefixes kept: some 150 bytes each; beyond, all are made again as they come.
PREFIXES_MAX: Final = 200_000


class Encoder:
    """Rows of one side of a change. What PostgreSQL has no room for is counted and left out, as the sink refuses it.

    Args:
        change_id: whose.
        side: 0 the candidate, 1 what stands.
    """

    def __init__(self, change_id: int, side: int) -> None:
        self._begin = _COUNT + struct.pack(">iiih", 4, change_id, 2, side)
        self._prefixes: dict[tuple[str, str, str, str, str], bytes] = {}
        #: topic, parser, revision, experiment of messages
        self._origins: dict[tuple[Any, ...], bytes] = {}
        self._parts: list[bytes] = []
        self.rows = 0  #: waiting
        self.left_out = 0

    def take(self, message: Mapping[str, Any]) -> None:
        """Add the readings of a validated message."""
        device_id, mode, message_at = message["device_id"], message["connector_mode"], message["timestamp"]
        origin = message["topic"], message["parser"], message["config_rev"], message.get("experiment_id")
        try:
            said = self._origins.get(origin)
            if said is None:
                if len(self._origins) >= PREFIXES_MAX:
                    self._origins.clear()
                said = self._origins[origin] = (
                    _text(origin[0] or "")
                    + _text(origin[1])
                    + struct.pack(">iq", 8, origin[2])
                    + _text(origin[3] or "")
                )
            tail = said + _TAIL(
                8,
                message["received_at"],
                4,
                message["raw_partition"],
                8,
                message["raw_offset"],
                4,
                message["raw_index"],
            )
        except (struct.error, UnicodeEncodeError):
            self.left_out += len(message["readings"])
            return
        prefixes, add = self._prefixes, self._parts.append
        rows = 0
        for reading in message["readings"]:
            text, flags, at = reading.get("value_text"), reading.get("flags"), reading.get("timestamp", message_at)
            key = device_id, mode, reading["component_type"], reading["pin_position"], reading["unit"]
            try:
                prefix = prefixes.get(key)
                if prefix is None:
                    if len(prefixes) >= PREFIXES_MAX:
                        prefixes.clear()
                    prefix = prefixes[key] = self._begin + b"".join([_text(part or "") for part in key])
                if not TIMESTAMP_MIN_US <= at < TIMESTAMP_MAX_US:
                    continue
                if text is None and not flags and (value := reading["value"]) is not None:
                    add(prefix + _PLAIN(8, at, 8, value, -1, -1, 2, reading["quality"], 1, "revised" in reading) + tail)
                elif text is None or "\0" not in text:
                    rare = _rare(reading.get("value"), text, flags)
                    add(prefix + _AT(8, at) + rare + _END(2, reading["quality"], 1, "revised" in reading) + tail)
                else:
                    continue
                rows += 1
            except (struct.error, UnicodeEncodeError, OverflowError):
                continue
        self.rows += rows
        self.left_out += len(message["readings"]) - rows

    def message(self) -> BytesIO:
        """The COPY of what waits, which waits no longer."""
        source = BytesIO(b"".join((_HEADER, *self._parts, _TRAILER)))
        self._parts.clear()
        self.rows = 0
        return source


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack(">i", len(encoded)) + encoded


def _rare(value: float | None, text: str | None, flags: list[str] | None) -> bytes:
    row = (_NULL if value is None else _VALUE(8, value)) + (_NULL if text is None else _text(text))
    if not flags:
        return row + _NULL
    items = b"".join(map(_text, flags))
    array = struct.pack(">iiiii", 1, 0, _TEXT_OID, len(flags), 1) + items
    return row + struct.pack(">i", len(array)) + array


def alarm_row(change_id: int, side: int, line: Mapping[str, Any]) -> tuple[Any, ...]:
    """A transition as `shadow_alarms` takes it."""
    return change_id, side, line["device_id"], line["transition_id"], orjson.dumps(line).decode()
