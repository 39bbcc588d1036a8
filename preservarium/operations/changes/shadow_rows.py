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
        self._parts: list[bytes] = []
        self.rows = 0  #: waiting
        self.left_out = 0

    def take(self, message: Mapping[str, Any]) -> None:
        """Add the readings of a validated message."""
        device_id, mode, message_at = message["device_id"], message["connector_mode"], message["timestamp"]
        try:
            tail = (
                _text(message["topic"] or "")
                + _text(message["parser"])
                + struct.pack(">iq", 8, message["config_rev"])
                + _text(message.get("experiment_id") or "")
                + _TAIL(
                    8,
                    message["received_at"],
                    4,
                    message["raw_partition"],
                    8,
                    message["raw_offset"],
                    4,
                    message["raw_index"],
                )
            )
        except (struct.error, UnicodeEncodeError):
            self.left_out += len(message["readings"])
            return
        prefixes, add = self._prefixes, self._parts.append
        for reading in message["readings"]:
            value, text, flags = reading.get("value"), reading.get("value_text"), reading.get("flags")
            at = reading.get("timestamp")
            if at is None:
                at = message_at
            key = device_id, mode, reading["component_type"], reading["pin_position"], reading["unit"] or ""
            prefix = prefixes.get(key)
            if prefix is None:
                if len(prefixes) >= PREFIXES_MAX:
                    prefixes.clear()
                try:
                    prefix = prefixes[key] = self._begin + b"".join(map(_text, key))
                except UnicodeEncodeError:
                    self.left_out += 1
                    continue
            try:
                if value is not None and text is None and not flags:
                    add(
                        prefix
                        + _PLAIN(8, at, 8, value, -1, -1, 2, reading.get("quality", 2), 1, "revised" in reading)
                        + tail
                    )
                else:
                    add(
                        prefix
                        + _AT(8, at)
                        + _rare(value, text, flags)
                        + _END(2, reading.get("quality", 2), 1, "revised" in reading)
                        + tail
                    )
            except (struct.error, UnicodeEncodeError, OverflowError):
                self.left_out += 1
                continue
            if not TIMESTAMP_MIN_US <= at < TIMESTAMP_MAX_US or b"\0" in (text or "").encode("utf-8", "replace"):
                self._parts.pop()
                self.left_out += 1
                continue
            self.rows += 1

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
