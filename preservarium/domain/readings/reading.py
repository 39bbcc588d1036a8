"""The records of the pipeline as plain typed dictionaries: what a line of a topic holds.

TypedDicts and not classes: the hot path hands orjson's dictionaries from stage to stage without a copy.
All instants are whole microseconds since the epoch, UTC. See docs/ARCHITECTURE.md, "Records".
"""

from enum import IntEnum
from typing import Any, Final, Literal, NotRequired, TypedDict

#: Instants outside these bounds are no device's time (the database has the same CHECK). 2000-01-01 … 2100-01-01.
TIMESTAMP_MIN_US: Final = 946_684_800_000_000
TIMESTAMP_MAX_US: Final = 4_102_444_800_000_000

#: Used where a device or a mapping names none; part of the natural key, which has no NULLs.
PIN_POSITION_NONE: Final = "-1"
UNKNOWN: Final = "unknown"


class Quality(IntEnum):
    """QARTOD primary flags (IOOS QARTOD manual, "Flags for Real-Time Data")."""

    GOOD = 1
    NOT_EVALUATED = 2
    SUSPECT = 3
    FAIL = 4
    MISSING = 9


class Reading(TypedDict):
    """One value of one series at one instant."""

    component_type: str  #: the datatype's name: what is measured
    pin_position: str  #: which of several equal components; "-1" where there is one
    value: NotRequired[float | None]  #: the number, in `unit`
    value_text: NotRequired[str | None]  #: strings, enumerations; exclusive with `value`
    unit: str  #: canonical unit, "" where the value has none
    timestamp: NotRequired[int]  #: µs, where it differs from the message's
    quality: NotRequired[int]  #: QARTOD flag, after validate
    flags: NotRequired[list[str]]  #: names of the tests that did not say good
    derived: NotRequired[bool]  #: made by validate of other readings of the series, e.g. a counter's consumption
    revised: NotRequired[bool]  #: an earlier reading once more, with a verdict that only this message could bring
    replaces: NotRequired[
        float | str | None
    ]  #: of a revised reading: the value that it overwrites, where that is another


class Message(TypedDict):
    """A standardized or validated message: one device message with its readings."""

    device_id: str  #: the device's address: EUI, MAC, topic part, serial
    connector_mode: str  #: how it came: LoRaWAN, MQTT, HTTP, …
    topic: str  #: the original (MQTT) topic, "" where there is none
    timestamp: int  #: device time, µs
    received_at: int  #: when the connector took it, µs
    raw_partition: int  #: with raw_offset and raw_index the identity of the message
    raw_offset: int  #: offset in iot_raw_data
    raw_index: int  #: line within the record, 0 for the first
    parser: str  #: name@version
    config_rev: int  #: revision of the device's configuration
    generation: int  #: 0 live; a deliberate replay opens a new one
    experiment_id: NotRequired[str | None]  #: laboratory experiment
    clock: NotRequired[Literal["device", "received"]]  #: "received" where the device has no clock of its own
    moved_from: NotRequired[int]  #: after validate: the timestamp as it came, where another message had that instant
    clock_skew: NotRequired[int]  #: µs that the device's clock is ahead, estimated; where that is more than is allowed
    attempt: NotRequired[int]  #: 2 and more where the raw message was redriven
    repeated: NotRequired[list[Reading]]  #: after validate: readings of a message that came before; `readings` is empty
    circular: NotRequired[dict[str, float]]  #: after validate: component type -> period, of readings that are circular
    released: NotRequired[list[int]]  #: after validate: [offset, place] where it was put into order
    readings: list[Reading]


class RawMessage(TypedDict):
    """A line of `iot_raw_data`, after parsing, with its coordinates."""

    device: str  #: address
    received_at: int  #: µs
    connector: str  #: name of the connector that took it
    mode: str  #: connector mode
    topic: str  #: original topic, "" where there is none
    port: int | None  #: LoRaWAN fPort
    payload: Any  #: bytes, or any JSON value
    meta: dict[str, Any]  #: RSSI, gateway, device time where the network gives one, …
    experiment_id: str | None
    raw_partition: int
    raw_offset: int
    raw_index: int
    generation: int


class ErrorLine(TypedDict):
    """A line of `iot_errors`."""

    stage: str  #: which agent said so
    code: str  #: ReasonCode
    message: str  #: what exactly, for people
    device_id: NotRequired[str | None]
    topic: str  #: Kafka topic that the input came from (without prefix)
    partition: int
    offset: int
    index: int  #: line within the record
    part: NotRequired[
        int
    ]  #: which of the parts of one message that could not be read, from 1; then `raw` is that part …
    envelope: NotRequired[dict[str, Any]]  #: … and this is what was around it, as `raw_line` takes it
    raw: NotRequired[str]  #: the original line where it is text
    raw_b64: NotRequired[str]  #: the original bytes where it is not
    raw_partition: NotRequired[int]  #: coordinates in iot_raw_data where known
    raw_offset: NotRequired[int]
    raw_index: NotRequired[int]
    received_at: NotRequired[int]  #: µs: when Kafka took the record, where that is one of `iot_raw_data`
    attempt: int  #: 1 for the first time; a redrive adds one
    parser: NotRequired[str | None]
    config_rev: NotRequired[int | None]
    generation: int
    first_seen: int  #: µs
    last_seen: int  #: µs
