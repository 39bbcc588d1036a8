"""The description of the API of devices and operators (OpenAPI 3.1), served at /api/openapi.json.

A literal document: a test holds its paths, parameters and fields equal to the routes and types. It is one file, although a long
one: all of it is data, and whoever looks for a path searches in one place.
"""

from typing import Any, Final

from preservarium import __version__
from preservarium.domain.alarms.action import (
    ACTION_ID_CHARS_MAX,
    ACTIONS,
    COMMENT_CHARS_MAX,
    NAME_CHARS_MAX,
    SHELVE_S_DEFAULT,
    SHELVE_S_MAX,
)
from preservarium.domain.alarms.rule import SEVERITIES
from preservarium.domain.commands.confirm import CONFIRM_WORDS
from preservarium.domain.commands.device import EXPIRES_S_DEFAULT, TIMEOUT_S_DEFAULT
from preservarium.domain.commands.lines import EXPIRES_S_MAX, PORT_MAX, PRIORITY_MAX, TIMEOUT_S_MAX, TRIES_MAX
from preservarium.domain.commands.machine import State as CommandState
from preservarium.operations.alarm_board import BULK, BULK_MAX, SORTS, STATES
from preservarium.stores.device_reads import EXPORT_ROWS_MAX, POINTS_MAX, POINTS_MIN
from preservarium.stores.device_reads import SORTS as DEVICE_SORTS
from preservarium.stores.device_reads import STATES as DEVICE_STATES

_TEXT: Final = {"type": "string"}
_NAME: Final = {"type": "string", "maxLength": NAME_CHARS_MAX}
_INSTANT: Final = {"type": "integer", "format": "int64", "description": "µs since the epoch, UTC"}
_NUMBER: Final = {"type": ["number", "null"]}
_FLAG: Final = {"type": "boolean"}


def _maybe(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "type": [schema["type"], "null"]}


def _object(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _answers(description: str, schema: Any, *errors: int, status: int = 200, problems: bool = False) -> dict[str, Any]:
    said = {
        400: "The question or the action is not well formed",
        401: "The operator token is missing or wrong",
        403: "No operators are configured, and it is not asked from this machine or by our page; or another operator's token",
        404: "There is none",
        413: "The body is too large",
        415: "The body is no JSON",
        503: "Kafka or the database cannot be reached now; repeat",
    }
    found: dict[str, Any] = {
        str(status): {"description": description, "content": {"application/json": {"schema": schema}}}
    }
    kind, error = ("application/problem+json", "Problem") if problems else ("application/json", "Error")
    for code in errors:
        found[str(code)] = {"description": said[code], "content": {kind: {"schema": _ref(error)}}}
    return found


def _query(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": description, "schema": schema}


def _path(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "description": description, "schema": _NAME}


_LIMIT: Final = _query("limit", "Most rows", {"type": "integer", "minimum": 1, "default": 50})
_CURSOR: Final = _query("cursor", "`next_cursor` of the page before", _TEXT)

_ALARM: Final = _object(
    ("device_id", "rule", "pin_position", "severity", "state"),
    alarm_id={**_TEXT, "description": "The occurrence; empty where it was set aside without having been raised"},
    transition_id=_TEXT,
    sequence={"type": "integer"},
    device_id=_NAME,
    device_name=_TEXT,
    rule=_NAME,
    rule_rev={"type": "integer"},
    kind=_TEXT,
    group={**_TEXT, "description": "Suppression group"},
    first_out={**_FLAG, "description": "The first of its group"},
    chattering={**_FLAG, "description": "Raised three times a minute or more"},
    component_type=_TEXT,
    pin_position=_TEXT,
    severity={"type": "string", "enum": list(SEVERITIES)},
    transition={**_TEXT, "description": "The last one"},
    state=_TEXT,
    occurred_at=_INSTANT,
    detected_at=_INSTANT,
    cleared_at=_maybe(_INSTANT),
    transition_at=_INSTANT,
    value=_NUMBER,
    unit=_TEXT,
    threshold=_NUMBER,
    reason={**_TEXT, "description": "Why it ended although nothing was measured: its device or rule is gone"},
    message=_TEXT,
    recipients={"type": "array", "items": _TEXT},
    former={
        "type": "array",
        "items": _TEXT,
        "description": "Who was told of the alarm, and is no recipient of its rule any more",
    },
    actor={"type": ["string", "null"], "description": "Who did the last transition, where a person did"},
    comment={"type": ["string", "null"]},
    raw_partition={"type": ["integer", "null"]},
    raw_offset={"type": ["integer", "null"]},
    raw_index={"type": ["integer", "null"]},
    generation={"type": "integer"},
    active={**_FLAG, "description": "Whether the condition is true, also while it is not annunciated"},
    active_at=_maybe(_INSTANT),
    shelved_until=_maybe(_INSTANT),
    one_shot=_FLAG,
)

_ACTION: Final = _object(
    ("device_id", "rule", "action"),
    action_id={
        "type": "string",
        "maxLength": ACTION_ID_CHARS_MAX,
        "description": "Of the sender's making; the same again is done once",
    },
    device_id=_NAME,
    rule=_NAME,
    pin_position={**_NAME, "default": "-1"},
    action={"type": "string", "enum": list(ACTIONS)},
    actor={**_NAME, "description": "Who; needed unless the token proves a name"},
    comment={"type": "string", "maxLength": COMMENT_CHARS_MAX},
    duration_s={
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": SHELVE_S_MAX,
        "default": SHELVE_S_DEFAULT,
        "description": "shelve: for how long",
    },
    one_shot={**_FLAG, "description": "shelve: until the condition returns to normal, at the latest"},
    alarm_id={**_NAME, "description": "The occurrence that the operator saw: another one is not touched"},
)

_ANSWER: Final = _object(
    ("action_id", "outcome"),
    action_id=_TEXT,
    device_id=_TEXT,
    rule=_TEXT,
    pin_position=_TEXT,
    alarm_id=_TEXT,
    action=_TEXT,
    actor=_TEXT,
    comment=_TEXT,
    at=_INSTANT,
    until=_maybe(_INSTANT),
    one_shot=_FLAG,
    outcome={"type": "string", "enum": ["done", "refused"]},
    code={**_TEXT, "description": "Why it was refused, for programs"},
    reason={**_TEXT, "description": "Why it was refused, for people"},
    state={**_TEXT, "description": "Of the alarm, afterwards"},
    transitions={"type": "array", "items": _TEXT},
    answered_at=_INSTANT,
)

_BULK: Final = _object(
    ("action",),
    request_id={
        "type": "string",
        "maxLength": ACTION_ID_CHARS_MAX,
        "description": "Of the sender's making; the same request may be sent again: the ids of its actions are made of it",
    },
    action={"type": "string", "enum": list(BULK)},
    alarms={
        "type": "array",
        "minItems": 1,
        "maxItems": BULK_MAX,
        "description": "Which; or `filter`. `alarm_id` is the occurrence that was seen: another one is not touched. Whole "
        "alarms of the list will do",
        "items": _object(
            ("device_id", "rule"), device_id=_NAME, rule=_NAME, pin_position=_NAME, alarm_id=_maybe(_NAME)
        ),
    },
    filter={
        "type": "object",
        "description": "Which, in the words of the list; where it names no state: "
        + ", ".join(f"{action} {state}" for action, state in BULK.items()),
        "properties": dict.fromkeys(("state", "severity", "device", "rule", "q"), _TEXT),
        "additionalProperties": False,
    },
    seen={**_TEXT, "description": "Needed with a filter: `seen` of the list. What was raised since is not touched"},
    limit={
        "type": "integer",
        "minimum": 1,
        "maximum": BULK_MAX,
        "default": BULK_MAX,
        "description": "Of a filter's alarms",
    },
    actor=_ACTION["properties"]["actor"],
    comment=_ACTION["properties"]["comment"],
    duration_s=_ACTION["properties"]["duration_s"],
    one_shot=_ACTION["properties"]["one_shot"],
    wait_s={"type": "number", "minimum": 0, "maximum": 25, "default": 0, "description": "Wait for the answers"},
)

_BULK_ANSWER: Final = _object(
    ("request_id", "matched", "newer", "done", "refused", "pending", "results"),
    request_id=_TEXT,
    matched={"type": "integer", "description": "Alarms that were meant, also beyond the limit"},
    newer={"type": "integer", "description": "Alarms that the filter takes, left alone because they came after `seen`"},
    done={"type": "integer"},
    refused={"type": "integer"},
    pending={"type": "integer", "description": "Not answered yet"},
    results={
        "type": "array",
        "items": _object(
            ("action_id", "outcome"),
            device_id={},
            rule={},
            pin_position={},
            alarm_id={},
            action_id=_TEXT,
            outcome={"type": "string", "enum": ["sent", "done", "refused"]},
            code=_TEXT,
            reason=_TEXT,
            state=_TEXT,
        ),
    },
)

_ONE_ALARM: Final = [
    _path("device_id", "Address of the device"),
    _path("rule", "Name of the rule"),
    _path("pin_position", "Pin; -1 where the device has none"),
]

_REQUEST: Final = _object(
    (),
    command={**_TEXT, "description": "Name of a command of the device's type; needed unless content is given"},
    idempotency_key={**_NAME, "description": "The same key is the same command; or the header Idempotency-Key"},
    actor={**_NAME, "description": "Who; unless the token proves a name"},
    fields={"type": "object", "description": "For the encoder of the device type's codec"},
    payload={"description": "JSON that is sent as it is; a text as its UTF-8"},
    payload_b64={**_TEXT, "description": "Bytes, base64"},
    port={"type": "integer", "minimum": 1, "maximum": PORT_MAX},
    confirmed={**_FLAG, "description": "LoRaWAN: the device is to acknowledge"},
    confirm={
        "description": f"What makes it successful: {', '.join(CONFIRM_WORDS)}, or an object that describes readings"
    },
    timeout_s={"type": "number", "exclusiveMinimum": 0, "maximum": TIMEOUT_S_MAX, "default": TIMEOUT_S_DEFAULT},
    tries={"type": "integer", "minimum": 1, "maximum": TRIES_MAX, "default": 1},
    expires_s={"type": "number", "minimum": 0, "maximum": EXPIRES_S_MAX, "default": EXPIRES_S_DEFAULT},
    priority={"type": "integer", "minimum": 0, "maximum": PRIORITY_MAX, "default": 0},
)

_COMMAND: Final = _object(
    ("command_id", "device_id", "command", "state"),
    command_id=_TEXT,
    device_id=_NAME,
    command=_TEXT,
    state={"type": "string", "enum": list(CommandState)},
    reason=_TEXT,
    attempt={"type": "integer", "description": "Tries so far"},
    priority={"type": "integer"},
    requested_at=_INSTANT,
    requested_by=_TEXT,
    idempotency_key=_TEXT,
    cause={"type": ["string", "null"], "description": "The alarm transition that asked for it"},
    expires_at=_INSTANT,
    ended_at=_maybe(_INSTANT),
    updated_at=_INSTANT,
    content={"type": "object"},
    confirm={},
    events={
        "type": "array",
        "items": {"type": "object"},
        "description": "Of one command: its transitions, oldest first",
    },
)

_DEVICE: Final = _path("device_id", "Address of the device")
_COMMAND_LIST: Final = [
    _query("state", f"One or more, separated by commas: {', '.join(CommandState)}", _TEXT),
    _LIMIT,
    _CURSOR,
]
_COMMAND_PATHS: Final[dict[str, Any]] = {
    "/api/commands": {
        "get": {
            "operationId": "listAllCommands",
            "summary": "Commands of all devices, newest first",
            "parameters": [_query("device", "Address of a device", _TEXT), *_COMMAND_LIST],
            "responses": _answers("A page", _ref("Commands"), 400, 401, 403, 503),
        },
    },
    "/api/devices/{device_id}/commands/choices": {
        "get": {
            "operationId": "listChoices",
            "summary": "The commands that the registry gives a device",
            "parameters": [_DEVICE],
            "responses": _answers("What there is to choose from", _ref("Choices"), 400, 401, 403, 404, 503),
        },
    },
    "/api/devices/{device_id}/commands": {
        "get": {
            "operationId": "listCommands",
            "summary": "Commands of a device, newest first",
            "parameters": [_DEVICE, *_COMMAND_LIST],
            "responses": _answers("A page", _ref("Commands"), 400, 401, 403, 503),
        },
        "post": {
            "operationId": "requestCommand",
            "summary": "Ask a device to do something",
            "parameters": [_DEVICE],
            "requestBody": {"required": True, "content": {"application/json": {"schema": _ref("CommandRequest")}}},
            "responses": _answers(
                "Kafka has acknowledged it",
                _object(("command_id", "idempotency_key", "command"), command_id=_TEXT, idempotency_key=_TEXT, command=_TEXT),
                400, 401, 403, 404, 413, 415, 503,
                status=202,
            ),
        },
    },
    "/api/devices/{device_id}/commands/{command_id}": {
        "get": {
            "operationId": "showCommand",
            "summary": "One command with its events",
            "parameters": [_DEVICE, _path("command_id", "Id of the command")],
            "responses": _answers("The command", _ref("Command"), 400, 401, 403, 404, 503),
        }
    },
    "/api/devices/{device_id}/commands/{command_id}/cancel": {
        "post": {
            "operationId": "cancelCommand",
            "summary": "Ask to cancel a command",
            "parameters": [_DEVICE, _path("command_id", "Id of the command")],
            "responses": _answers(
                "Kafka has acknowledged it",
                _object(("command_id", "asked"), command_id=_TEXT, asked=_TEXT),
                400, 401, 403, 413, 415, 503,
                status=202,
            ),
        }
    },
}  # fmt: skip

_COORDINATES: Final = {
    "partition": {"type": "integer"},
    "offset": {"type": "integer", "format": "int64"},
}
_TRACED: Final = _object(
    ("device_id", "connector_mode", "component_type", "pin_position", "timestamp"),
    device_id=_NAME,
    connector_mode=_NAME,
    component_type=_NAME,
    pin_position=_NAME,
    timestamp={**_INSTANT, "description": "The device's time, µs since the epoch, UTC"},
)
#: Of a reading or of a raw record: what both have, and either.
_TRACE: Final = _object(
    ("raw",),
    raw=_object(
        ("topic", "partition", "offset"),
        topic=_TEXT,
        **_COORDINATES,
        line={"type": ["integer", "null"]},
        available={**_FLAG, "description": "Whether Kafka still has it"},
        gone={**_TEXT, "description": "Why not, for people"},
        kafka_time=_INSTANT,
        received_at=_INSTANT,
        connector=_TEXT,
        bytes={"type": "integer"},
        sha256=_TEXT,
        text={**_TEXT, "description": "The line, where it is text"},
        b64={**_TEXT, "description": "Its bytes, where it is not"},
    ),
    reading=_TRACED,
    derivation_id=_TEXT,
    parser=_object(("parser",), parser=_TEXT, kind=_maybe(_TEXT), hash=_maybe(_TEXT), status=_TEXT),
    decoded={"type": ["object", "null"], "description": "The fields that the parser found"},
    mapping={
        "type": ["object", "null"],
        "description": "Which field became the reading, by whose word, and the conversion as fractions",
    },
    validated={"type": "object", "description": "Value, quality, flags, and the bounds of the tests that said so"},
    rederivation=_object(
        ("status", "text"),
        status={"type": "string", "enum": ["identical", "different", "unverifiable"]},
        why=_maybe(_TEXT),
        text={**_TEXT, "description": "For people"},
        registry_as_of={
            "type": ["integer", "null"],
            "description": "µs since the epoch: the registry of then gave it; null: that of now",
        },
        differences={"type": "array", "items": {"type": "object"}},
    ),
    windows={"type": "array", "items": {"type": "object"}},
    rollups={"type": "array", "items": {"type": "object"}},
    alarms={"type": "array", "items": {"type": "object"}, "description": "Transitions that the message brought"},
    notices={"type": "array", "items": {"type": "object"}, "description": "Who was told of them"},
    stored={"type": "object", "description": "The rows in PostgreSQL and in ClickHouse, with their times"},
    messages={"type": "array", "items": {"type": "object"}, "description": "Of a raw record: what became of each line"},
    lines_not_shown={"type": "integer"},
    errors={"type": "array", "items": {"type": "object"}, "description": "Of a raw record: its lines of iot_errors"},
    errors_complete={**_FLAG, "description": "Whether every line that may be one was looked at"},
)

_TRACE_PATHS: Final[dict[str, Any]] = {
    "/api/trace": {
        "get": {
            "operationId": "trace",
            "summary": "Where a stored reading comes from, or what became of a raw record",
            "parameters": [
                _query("device", "Address of the device, in any spelling", _NAME),
                _query("type", "Component type of the reading", _NAME),
                _query(
                    "at", "Its instant: µs since the epoch, or ISO 8601; to the second or millisecond will do", _TEXT
                ),
                _query("pin", "Its pin, where several are meant", _NAME),
                _query("mode", "Its connector mode, where several are meant", _NAME),
                _query("raw", "Instead of all these: PARTITION:OFFSET[:LINE] of iot_raw_data", _TEXT),
            ],
            "responses": _answers("The chain", _ref("Trace"), 400, 401, 404, 503),
        }
    },
}
_SERIES: Final = _query(
    "series",
    "Ids of series, separated by commas; none: all, of curves the first 8",
    {"type": "string", "pattern": r"^[0-9,]*$"},
)
_FROM: Final = _query("from", "Begin: µs since the epoch, or RFC 3339; a day before the end where it is missing", _TEXT)
_TO: Final = _query(
    "to", "End, exclusive: µs since the epoch, or RFC 3339; now where it is missing. At most five years later", _TEXT
)
_QUALITY: Final = {
    "type": ["integer", "null"],
    "description": "QARTOD: 1 good, 2 not evaluated, 3 suspect, 4 fail, 9 missing",
}

_LISTED: Final = _object(
    ("device_id", "type", "enabled", "state", "values"),
    device_id=_NAME,
    name={"type": ["string", "null"]},
    type={"type": ["string", "null"]},
    enabled=_FLAG,
    state={"type": "string", "enum": list(DEVICE_STATES)},
    last_seen={**_maybe(_INSTANT), "description": "When its last reading was received, µs; null: never"},
    quality={**_QUALITY, "description": "The worst of the last values, as old as `refreshed_at`"},
    values={
        "type": "array",
        "description": "The last value of each series",
        "items": _object(
            ("series_id", "component_type", "pin_position"),
            series_id={"type": "integer"},
            component_type=_TEXT,
            pin_position=_TEXT,
            value=_NUMBER,
            value_text={"type": ["string", "null"]},
            unit=_TEXT,
            timestamp=_INSTANT,
            quality=_QUALITY,
        ),
    },
)
_DEVICE_PATHS: Final[dict[str, Any]] = {
    "/api/devices": {
        "get": {
            "operationId": "listDevices",
            "summary": "Devices with their last values",
            "parameters": [
                _query("q", "Part of an address, a name or a type, any case; or an address in any spelling", {"type": "string", "maxLength": 256}),
                _query("state", "In this state", {"type": "string", "enum": list(DEVICE_STATES)}),
                _query("type", "Of this device type", _TEXT),
                _query("sort", "Order; quality and seen are as old as `refreshed_at`", {"type": "string", "enum": list(DEVICE_SORTS), "default": "device"}),
                _query("order", "Which way: seen and quality begin with the newest and the worst", {"type": "string", "enum": ["asc", "desc"]}),
                _LIMIT,
                _CURSOR,
            ],
            "responses": _answers("A page", _ref("Devices"), 400, 401, 503, problems=True),
        }
    },
    "/api/fleet": {
        "get": {
            "operationId": "showFleet",
            "summary": "How many devices there are in each state, and of each type",
            "responses": _answers("The fleet", _ref("Fleet"), 401, 503, problems=True),
        }
    },
    "/api/devices/{device_id}": {
        "get": {
            "operationId": "showDevice",
            "summary": "One device: its registry, its series with their last readings, what they are held to, the rules that watch it",
            "parameters": [_DEVICE],
            "responses": _answers("The device", _ref("Device"), 400, 401, 404, 503, problems=True),
        }
    },
    "/api/devices/{device_id}/series": {
        "get": {
            "operationId": "showCurves",
            "summary": "Curves of a device's series, of at most so many points each, and the alarms of the span",
            "parameters": [
                _DEVICE, _SERIES, _FROM, _TO,
                _query("points", "Most points of a curve", {"type": "integer", "minimum": POINTS_MIN, "maximum": POINTS_MAX, "default": 1000}),
            ],
            "responses": _answers("The curves", _ref("Curves"), 400, 401, 404, 503, problems=True),
        }
    },
    "/api/devices/{device_id}/readings": {
        "get": {
            "operationId": "listReadings",
            "summary": "Readings of a device with flags, parser and raw coordinates, newest first",
            "parameters": [_DEVICE, _SERIES, _query("from", "Not before: µs since the epoch, or RFC 3339", _TEXT), _LIMIT, _CURSOR],
            "responses": _answers("A page", _ref("Readings"), 400, 401, 404, 503, problems=True),
        }
    },
    "/api/devices/{device_id}/readings.csv": {
        "get": {
            "operationId": "exportReadings",
            "summary": f"The readings of a span as CSV, series by series; at most {EXPORT_ROWS_MAX}, then the last line is `# cut …`",
            "parameters": [_DEVICE, _SERIES, _FROM, _TO],
            "responses": {
                "200": {"description": "The file", "content": {"text/csv": {"schema": _TEXT}}},
                **{code: said for code, said in _answers("", {}, 400, 401, 503, problems=True).items() if code != "200"},
            },
        }
    },
    "/api/refusals": {
        "get": {
            "operationId": "listRefusals",
            "summary": "What was refused within the last day: causes over time, and the newest with their original bytes",
            "parameters": [
                _query("stage", "Refused by this stage", _TEXT), _query("code", "With this reason code", _TEXT),
                _query("device", "Of this device", _TEXT), _LIMIT, _CURSOR,
            ],
            "responses": _answers("Causes and a page", _ref("Refusals"), 400, 401, 503, problems=True),
        }
    },
    "/api/refusals/{refusal_id}": {
        "get": {
            "operationId": "showRefusal",
            "summary": "One refusal with its original bytes, out of iot_raw_data where its line has none",
            "parameters": [_path("refusal_id", "Partition and offset in iot_errors, as 3:1042")],
            "responses": _answers("The refusal", _ref("Refusal"), 401, 404, 503, problems=True),
        }
    },
}  # fmt: skip
_REFUSAL: Final = {
    **_object(
        ("id", "stage", "code", "message", "original"),
        id=_TEXT,
        stage=_TEXT,
        code=_TEXT,
        message=_TEXT,
        device_id={"type": ["string", "null"]},
        at=_INSTANT,
        original={
            "type": ["object", "null"],
            "description": "Null where its line has none: `/api/refusals/{id}` looks for them",
            "properties": {
                "bytes": {"type": "integer", "description": "How many there are"},
                "hex": {**_TEXT, "description": "Of a list the first 2,048, of one refusal the first 65,536"},
                "text": _TEXT,
                "cut": _FLAG,
            },
        },
    ),
    "description": "And what else its error line has: topic, partition, offset, raw coordinates, parser, attempt, …",
}
_NULLABLE_NUMBERS: Final = {"type": ["array", "null"], "items": _NUMBER}
_DEVICE_SCHEMAS: Final[dict[str, Any]] = {
    "Devices": _object(
        ("devices", "next_cursor", "total", "sort", "order", "refreshed_at", "source", "note", "at"),
        devices={"type": "array", "items": _LISTED},
        next_cursor={"type": ["string", "null"]},
        total={"type": ["integer", "null"], "description": "Devices that are wanted; null where the database is away"},
        sort=_TEXT,
        order=_TEXT,
        refreshed_at={**_maybe(_INSTANT), "description": "How old order and filters are, µs"},
        source={"type": "string", "enum": ["postgres", "table"]},
        note={"type": ["string", "null"], "description": "Why it is not everything, for people"},
        at=_INSTANT,
    ),
    "Fleet": _object(
        ("devices", "states", "types", "silent_after_s", "refreshed_at", "at"),
        devices={"type": "integer"},
        states={"type": "object", "properties": {name: {"type": "integer"} for name in DEVICE_STATES}},
        types={"type": "array", "items": _object(("type", "devices"), type=_TEXT, devices={"type": "integer"})},
        silent_after_s={"type": "integer"},
        refreshed_at=_maybe(_INSTANT),
        at=_INSTANT,
    ),
    "Device": _object(
        ("device_id", "registered", "state", "series", "rules"),
        device_id=_NAME,
        registered=_FLAG,
        state=_TEXT,
        name={"type": ["string", "null"]},
        enabled={"type": ["boolean", "null"]},
        type={"type": ["string", "null"]},
        manufacturer={"type": ["string", "null"]},
        description={"type": ["string", "null"]},
        parser={"type": ["string", "null"], "description": "name@version, of the active version"},
        parser_kind={"type": ["string", "null"]},
        meta={"type": "object"},
        rev={"type": ["integer", "null"]},
        updated_at=_maybe(_INSTANT),
        updated_by={"type": ["string", "null"]},
        last_seen=_maybe(_INSTANT),
        series={"type": "array", "items": {"type": "object"}, "description": "Each with its last reading and its `datatype`, under overrides"},
        rules={"type": "array", "items": {"type": "object"}},
        at=_INSTANT,
    ),
    "Curves": _object(
        ("series", "alarms", "from", "to", "points", "at"),
        series={
            "type": "array",
            "items": _object(
                ("series_id", "level", "width_us", "gap_us", "at", "mean", "min", "max", "n", "quality"),
                series_id={"type": "integer"},
                component_type=_TEXT,
                pin_position=_TEXT,
                connector_mode=_TEXT,
                unit=_TEXT,
                circular={**_NUMBER, "description": "Period of a circular quantity: it has means of directions and no extremes"},
                level={"type": "string", "enum": ["raw", "1m", "1h", "1d"], "description": "What it is drawn from"},
                width_us={"type": "integer", "description": "Of a point; 0: single readings"},
                gap_us={"type": "integer", "description": "Points further apart than this are not to be joined; 0: not known"},
                at={"type": "array", "items": _INSTANT},
                mean={"type": "array", "items": _NUMBER},
                min=_NULLABLE_NUMBERS,
                max=_NULLABLE_NUMBERS,
                n=_NULLABLE_NUMBERS,
                quality={"type": ["array", "null"], "items": _QUALITY, "description": "The worst of a point; roll-ups have none"},
            ),
        },
        alarms={"type": "array", "items": {"type": "object"}, "description": "Raised within the span, or standing in it"},
        **{"from": _INSTANT, "to": _INSTANT},
        points={"type": "integer"},
        at=_INSTANT,
    ),
    "Readings": _object(
        ("readings", "next_cursor"),
        readings={"type": "array", "items": {"type": "object"}},
        next_cursor={"type": ["string", "null"]},
    ),
    "Refusal": _REFUSAL,
    "Refusals": _object(
        ("causes", "span_s", "bucket_s", "refusals", "next_cursor", "unknown_devices", "since", "complete", "note", "at"),
        causes={
            "type": "array",
            "items": _object(
                ("stage", "code", "day", "hour", "last_at", "counts", "meaning", "remedy"),
                stage=_TEXT, code=_TEXT, day={"type": "integer"}, hour={"type": "integer"}, last_at=_INSTANT,
                counts={"type": "array", "items": {"type": "integer"}, "description": "By `bucket_s`, oldest first"}, meaning=_TEXT, remedy=_TEXT,
            ),
        },
        span_s={"type": "integer"},
        bucket_s={"type": "integer"},
        refusals={"type": "array", "items": _ref("Refusal")},
        next_cursor={"type": ["string", "null"]},
        unknown_devices={"type": "integer", "description": "That sent and are in no registry"},
        since={**_maybe(_INSTANT), "description": "The oldest that was read"},
        complete={**_FLAG, "description": "Whether this is everything of the span, and of now"},
        note={"type": ["string", "null"], "description": "Why it is not, for people"},
        at=_INSTANT,
    ),
    "Problem": {
        **_object(
            ("type", "title", "status", "detail", "error"),
            type=_TEXT, title=_TEXT, status={"type": "integer"}, detail=_TEXT, error={**_TEXT, "description": "As `detail`"},
        ),
        "description": "RFC 9457",
    },
}  # fmt: skip

DOCUMENT: Final[dict[str, Any]] = {
    "openapi": "3.1.0",
    "info": {
        "title": "Preservarium: devices, alarms, commands, refusals and lineage",
        "version": __version__,
        "description": "What devices say, what is not normal, what people do about it, and where numbers come from. Where operators are configured, all of it needs a token of "
        "`web.operators` or `web.operator_token`; where none are, everybody may read, and this machine may act.",
    },
    "security": [{"token": []}, {}],
    "paths": {
        **_COMMAND_PATHS,
        **_TRACE_PATHS,
        **_DEVICE_PATHS,
        "/api/alarms": {
            "get": {
                "operationId": "listAlarms",
                "summary": "Alarms that are not normal, of the whole system, or the past",
                "parameters": [
                    _query(
                        "state",
                        f"One or more, separated by commas: {', '.join(sorted(STATES))}. Or one of cleared, all: the past, newest "
                        "first, from the database; `sort` says nothing there.",
                        {"type": "string", "default": "standing"},
                    ),
                    _query("severity", f"One or more, separated by commas: {', '.join(SEVERITIES)}", _TEXT),
                    _query("device", "Address of a device", _TEXT),
                    _query("rule", "Name of a rule", _TEXT),
                    _query("q", "Part of an address, a name, a rule or a message", _TEXT),
                    _query("sort", "Order", {"type": "string", "enum": list(SORTS), "default": "priority"}),
                    _LIMIT,
                    _CURSOR,
                ],
                "responses": _answers("A page", _ref("Alarms"), 400, 401, 503),
            }
        },
        "/api/alarms/{device_id}/{rule}/{pin_position}": {
            "get": {
                "operationId": "showAlarm",
                "summary": "One alarm as it stands, and its history",
                "parameters": [*_ONE_ALARM, _LIMIT],
                "responses": _answers("The alarm", _ref("OneAlarm"), 400, 401, 404, 503),
            }
        },
        "/api/alarms/actions": {
            "get": {
                "operationId": "listAnswers",
                "summary": "The last answers, newest first",
                "parameters": [_LIMIT],
                "responses": _answers(
                    "Answers",
                    _object(
                        ("actions",), actions={"type": "array", "items": _ref("Answer")}, note={"type": ["string", "null"]}
                    ),
                    400, 401,
                ),
            },
            "post": {
                "operationId": "act",
                "summary": "Acknowledge, shelve, comment, … an alarm",
                "requestBody": {"required": True, "content": {"application/json": {"schema": _ref("Action")}}},
                "responses": _answers(
                    "Kafka has it; the answer will tell whether it was done",
                    _object(("action_id", "answer"), action_id=_TEXT, answer={**_TEXT, "description": "Where to ask"}),
                    400, 401, 403, 413, 415, 503,
                    status=202,
                ),
            },
        },
        "/api/alarms/bulk": {
            "post": {
                "operationId": "actOnMany",
                "summary": "Acknowledge, shelve, unshelve or comment many alarms: an action for each, and a result",
                "requestBody": {"required": True, "content": {"application/json": {"schema": _ref("Bulk")}}},
                "responses": _answers(
                    "Kafka has them; what was answered within wait_s is there, the rest can be asked for by action_id",
                    _ref("BulkAnswer"),
                    400, 401, 403, 413, 415, 503,
                    status=202,
                ),
            },
        },
        "/api/alarms/actions/{action_id}": {
            "get": {
                "operationId": "showAnswer",
                "summary": "What became of an action; 404 while that is not known",
                "parameters": [
                    _path("action_id", "As given or received"),
                    _query("wait_s", "Wait for it, at most so long", {"type": "number", "minimum": 0, "maximum": 25}),
                ],
                "responses": _answers("The answer", _ref("Answer"), 400, 401, 404),
            }
        },
        "/api/openapi.json": {
            "get": {
                "operationId": "describe",
                "summary": "This document",
                "responses": _answers("OpenAPI 3.1", {"type": "object"}),
            }
        },
    },
    "components": {
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        "schemas": {
            **_DEVICE_SCHEMAS,
            "Command": _COMMAND,
            "CommandRequest": _REQUEST,
            "Commands": _object(
                ("commands", "next_cursor"),
                commands={"type": "array", "items": _ref("Command")},
                next_cursor={"type": ["string", "null"]},
            ),
            "Choices": _object(
                ("device_id", "type", "commands"),
                device_id=_NAME,
                name={"type": ["string", "null"]},
                type=_TEXT,
                problem={"type": ["string", "null"], "description": "Why it can take none, for people"},
                format=_TEXT,
                sleeps={**_FLAG, "description": "It is sent to when it has been heard"},
                given={"type": "object", "description": "What a command has where it says nothing"},
                commands={"type": "array", "items": _object(("command",), command=_TEXT)},
            ),
            "Trace": _TRACE,
            "Alarm": _ALARM,
            "Action": {**_ACTION, "additionalProperties": False},
            "Answer": _ANSWER,
            "Bulk": {**_BULK, "additionalProperties": False},
            "BulkAnswer": _BULK_ANSWER,
            "Error": _object(("error",), error=_TEXT, code=_TEXT),
            "Alarms": _object(
                ("alarms", "next_cursor", "total", "source"),
                alarms={"type": "array", "items": _ref("Alarm")},
                next_cursor={"type": ["string", "null"]},
                total={"type": "integer"},
                counts={"type": "object", "description": "Of all that stands: by severity, by state, waiting for somebody"},
                flood={"type": "object", "description": "Whether more alarms come than people can work through"},
                source={"type": "string", "enum": ["kafka", "postgres"]},
                complete={**_FLAG, "description": "Whether this is everything, and of now"},
                note={"type": ["string", "null"], "description": "Why it is not, for people"},
                seen={"type": ["string", "null"], "description": "For an action on what this list shows"},
                at=_INSTANT,
            ),
            "OneAlarm": _object(
                ("device_id", "rule", "pin_position", "state"),
                device_id=_TEXT,
                rule=_TEXT,
                pin_position=_TEXT,
                alarm={"oneOf": [_ref("Alarm"), {"type": "null"}]},
                state=_TEXT,
                history={
                    "type": ["array", "null"],
                    "items": {"type": "object"},
                    "description": "Transitions and actions, newest first; null where the database does not answer",
                },
                history_note={"type": ["string", "null"]},
                source={"type": "string", "enum": ["kafka", "postgres"]},
                note={"type": ["string", "null"]},
                at=_INSTANT,
            ),
        },
    },
}  # fmt: skip
