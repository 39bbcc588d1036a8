"""The only mapping between Kafka record values and lines: newline-delimited JSON through orjson.

A value is one line or many; every line of ours is a JSON object. What strangers can write (`iot_raw_data`) is parsed
record by record and line by line, so that one bad line takes nothing else with it. Topics that only we write are
parsed in one call for a whole batch.

| file | what |
|---|---|
| lines.py | lines of topics that only we write: packed, split, parsed for a whole batch |
| raw.py | lines of `iot_raw_data`: how they are recognised, the envelope |
| error_lines.py | lines of `iot_errors` |
| metadata.py | what a record says besides its value: device, generation, attempt, trace |
| strict_json.py | one JSON value that a stranger wrote |
"""

from preservarium.streaming.records.error_lines import (
    ERROR_MESSAGE_CHARS_MAX,
    ERROR_RAW_BYTES_MAX,
    RECORD_BYTES_MAX,
    error_line,
    error_send,
    message_error,
    refuse,
)
from preservarium.streaming.records.lines import (
    ParseArray,
    lines_of,
    message_count,
    pack,
    parse_alone,
    parse_objects,
    parse_trusted,
    split,
)
from preservarium.streaming.records.metadata import (
    ATTEMPT_HEADER,
    ATTEMPT_MAX,
    DEVICE_CHARS_MAX,
    GENERATION_HEADER,
    GENERATION_MAX,
    RECEIVED_HEADER,
    TRACE_HEADER,
    attempt_of,
    generation_of,
    headers_of,
    received_ms,
)
from preservarium.streaming.records.raw import (
    ENVELOPE_BYTES_MAX,
    FOREIGN_CONNECTOR,
    NAME_CHARS_MAX,
    PORT_MAX,
    TOPIC_CHARS_MAX,
    around,
    is_envelope,
    line_bytes_max,
    original_line,
    parse_envelope,
    parse_raw,
    raw_line,
)
from preservarium.streaming.records.strict_json import DEPTH_MAX, loads, payload_of

__all__ = [
    "ATTEMPT_HEADER",
    "ATTEMPT_MAX",
    "DEPTH_MAX",
    "DEVICE_CHARS_MAX",
    "ENVELOPE_BYTES_MAX",
    "ERROR_MESSAGE_CHARS_MAX",
    "ERROR_RAW_BYTES_MAX",
    "FOREIGN_CONNECTOR",
    "GENERATION_HEADER",
    "GENERATION_MAX",
    "NAME_CHARS_MAX",
    "PORT_MAX",
    "RECEIVED_HEADER",
    "RECORD_BYTES_MAX",
    "TOPIC_CHARS_MAX",
    "TRACE_HEADER",
    "ParseArray",
    "around",
    "attempt_of",
    "error_line",
    "error_send",
    "generation_of",
    "headers_of",
    "is_envelope",
    "line_bytes_max",
    "lines_of",
    "loads",
    "message_count",
    "message_error",
    "original_line",
    "pack",
    "parse_alone",
    "parse_envelope",
    "parse_objects",
    "parse_raw",
    "parse_trusted",
    "payload_of",
    "raw_line",
    "received_ms",
    "refuse",
    "split",
]
