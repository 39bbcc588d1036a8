"""Messages of the sink service that this one replaces (topic `decoded_iot_data`), as readings.

One message is one reading: `mac_address`, `mode`, `data_point_label`, `pin`, `value`, `unit`, `original_topic` and
`timestamp` (seconds, milliseconds, or ISO 8601 text; without an offset it is UTC). Absent fields take the old
service's defaults. Where the old service logged and skipped, this one says `legacy_invalid`.
"""

import math
from typing import Any, Final

from preservarium.domain.readings.instant import instant_us
from preservarium.domain.readings.number import number_of
from preservarium.domain.readings.reading import PIN_POSITION_NONE, UNKNOWN, Message, Quality
from preservarium.errors import ReasonCode, Reject

#: Stands where a parser stands; the raw coordinates of such a row are those in the old service's topic.
PARSER: Final = "decoded_iot_data@1"


def legacy_message(
    fields: Any, *, received_at: int, partition: int, offset: int, index: int, generation: int = 0
) -> Message:
    """The validated message that an old message stands for.

    Args:
        fields: the parsed line.
        received_at: when Kafka took it, µs since the epoch, UTC.
        partition: coordinates in the old service's topic.
        offset: see partition.
        index: see partition.
        generation: 0 live.

    Raises:
        Reject: `legacy_invalid`: a field is missing or garbled.
    """
    if not isinstance(fields, dict):
        raise Reject(ReasonCode.LEGACY_INVALID, "not a JSON object")
    device_id = _text(fields, "mac_address", None)
    if not device_id:
        raise Reject(ReasonCode.LEGACY_INVALID, "mac_address is missing")
    timestamp = instant_us(fields.get("timestamp"))
    if timestamp is None:
        raise Reject(ReasonCode.LEGACY_INVALID, f"timestamp is no instant: {fields.get('timestamp')!r:.100}")
    return {
        "device_id": device_id,
        "connector_mode": _text(fields, "mode", UNKNOWN),
        "topic": _text(fields, "original_topic", ""),
        "timestamp": timestamp,
        "received_at": received_at,
        "raw_partition": partition,
        "raw_offset": offset,
        "raw_index": index,
        "parser": PARSER,
        "config_rev": 0,
        "generation": generation,
        "readings": [
            {
                "component_type": _text(fields, "data_point_label", UNKNOWN),
                "pin_position": _text(fields, "pin", PIN_POSITION_NONE),
                "value": _number(fields.get("value")),
                "unit": _text(fields, "unit", ""),
                # The old service checked no value.
                "quality": int(Quality.NOT_EVALUATED),
            }
        ],
    }


def _text(fields: dict[str, Any], name: str, default: str | None) -> str:
    value = fields.get(name)
    if value is None:
        return default or ""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # pins come as numbers
    raise Reject(ReasonCode.LEGACY_INVALID, f"{name} is no text: {value!r:.100}")


def _number(value: Any) -> float | None:
    if value is None:
        return None
    given = number_of(value) if isinstance(value, str) else value
    try:
        number = float(given) if isinstance(given, int | float) else math.nan
    except OverflowError:
        number = math.nan
    if not math.isfinite(number):
        raise Reject(ReasonCode.LEGACY_INVALID, f"value is no finite number: {value!r:.100}")
    return number
