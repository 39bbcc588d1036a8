"""What the pages ask beside devices, alarms and commands, as OpenAPI paths: series, topics, state tables, the registry, decoding.

Literal, as `openapi.py`, which puts them into the one description. A test holds paths and parameters equal to the routes.
"""

from typing import Any, Final

from preservarium.console.acting import ACTOR_CHARS_MAX
from preservarium.console.openapi_words import CURSOR as _CURSOR
from preservarium.console.openapi_words import FLAG as _FLAG
from preservarium.console.openapi_words import INSTANT as _AT
from preservarium.console.openapi_words import LIMIT as _LIMIT
from preservarium.console.openapi_words import TEXT as _TEXT
from preservarium.console.openapi_words import answers
from preservarium.console.openapi_words import query as _query
from preservarium.stores.device_reads import POINTS_MAX, POINTS_MIN
from preservarium.stores.registry_reads import KINDS
from preservarium.stores.series_reads import MAP_SERIES_MAX, SPARKS_MAX

_WORD: Final = {"type": "string", "maxLength": 256}
_WHOLE: Final = {"type": "integer", "minimum": 0}
_ANY: Final[dict[str, Any]] = {}


def _path(name: str, description: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "description": description, "schema": schema or _WORD}


def _answers(description: str, fields: dict[str, Any], *errors: int, kind: str = "application/json") -> dict[str, Any]:
    schema = {"type": "object", "required": sorted(fields), "properties": fields} if fields else _TEXT
    found = answers(description, schema, *errors)
    found["200"]["content"] = {kind: {"schema": schema}}
    return found


def _get(operation: str, summary: str, parameters: list[Any], responses: dict[str, Any]) -> dict[str, Any]:
    return {"get": {"operationId": operation, "summary": summary, "parameters": parameters, "responses": responses}}


def _post(operation: str, summary: str, fields: dict[str, Any], responses: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "additionalProperties": False, "properties": fields}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"post": {"operationId": operation, "summary": summary, "requestBody": body, "responses": responses}}


_FROM: Final = _query("from", "Begin: µs since the epoch, or RFC 3339; a day before the end where it is missing", _TEXT)
_TO: Final = _query("to", "End: µs since the epoch, or RFC 3339; now where it is missing", _TEXT)
_IDS: Final = {"type": "string", "pattern": "^[0-9,]*$"}
_LIST: Final = {"type": "array", "items": {"type": "object"}}
_NEXT: Final = {"type": ["string", "null"]}
_DEVICE: Final = _path("device_id", "Address of the device, in any spelling")
_KIND: Final = _path("kind", "Kind of document", {"type": "string", "enum": list(KINDS)})
_NAME: Final = _path("name", "Name of the document; of a device its address")
_TOPIC: Final = _path("name", "One of our topics, as GET /api/topics names it")
_FILTER: Final = [
    _query("partition", "Of this partition alone", _WHOLE),
    _query("key", "With this key; an address in any spelling", _WORD),
    _query("text", "With this text in the value", _WORD),
]
_ACTOR: Final = {"type": "string", "maxLength": ACTOR_CHARS_MAX, "description": "Who asks, where nothing proves it"}
_PAYLOAD: Final = {
    "refusal": {**_TEXT, "description": "Id of a refusal, whose payload is meant"},
    "hex": _TEXT,
    "text": _TEXT,
    "json": _ANY,
    "port": {"type": ["integer", "null"], "minimum": 0, "maximum": 255},
}
_CHANGE: Final = {
    "yaml": {**_TEXT, "description": "A registry file, of one document or of many"},
    "actor": _ACTOR,
    "expected": {"type": "object", "additionalProperties": _WHOLE, "description": "Stream -> version that it must have still; 0: must not be there"},
}  # fmt: skip
_CHANGED: Final = {"ok": _FLAG, "problems": _LIST, "changes": _LIST, "saved": _FLAG}

PATHS: Final[dict[str, Any]] = {
    "/api/series": _get(
        "findSeries", "Series of numbers, of any devices",
        [_query("q", "Part of a device's address, name or type", _WORD), _query("type", "Device type", _WORD), _query("component", "Component type", _WORD),
         _query("label", "name=value, as a device's `meta` has it", _WORD), _LIMIT, _CURSOR],
        _answers("A page", {"series": _LIST, "next_cursor": _NEXT, "at": _AT}, 400, 401, 503),
    ),
    "/api/series/components": _get("listComponents", "Component types and units that there are, the most frequent first", [], _answers("All of them", {"components": _LIST}, 401, 503)),
    "/api/series/curves": _get(
        "curvesOfSeries", "Curves of series of any devices",
        [_query("series", f"Ids, separated by commas; at most {MAP_SERIES_MAX}", _IDS), _FROM, _TO,
         _query("points", "Most points of a curve", {"type": "integer", "minimum": POINTS_MIN, "maximum": POINTS_MAX})],
        _answers("The curves", {"series": _LIST, "from": _AT, "to": _AT, "points": _WHOLE, "at": _AT}, 400, 401, 404, 503),
    ),
    "/api/series/sparks": _get(
        "sparks", "The last hour of some series, as small curves", [_query("series", f"Ids, separated by commas; at most {SPARKS_MAX}", _IDS)],
        _answers("Series id -> means, null where nothing came", {"sparks": {"type": "object"}, "points": _WHOLE, "span_s": _WHOLE, "at": _AT}, 400, 401, 503),
    ),
    "/api/devices/{device_id}/corrections": _get(
        "corrections", "Readings of a span that were judged anew or derived again", [_DEVICE, _query("series", "Ids, separated by commas", _IDS), _FROM, _TO],
        _answers("Newest first", {"corrections": _LIST, "from": _AT, "to": _AT, "at": _AT}, 400, 401, 503),
    ),
    "/api/devices/{device_id}/live": _get("deviceLive", "What is new of a device, as server-sent events: {values, at}", [_DEVICE], _answers("Events", {}, 400, 401, 503, kind="text/event-stream")),
    "/api/topics": _get("listTopics", "Our topics, and what Kafka holds of them", [], _answers("All of them", {"topics": _LIST, "at": _AT}, 401, 403, 503)),
    "/api/topics/{name}/messages": _get(
        "listMessages", "Records of a topic: the newest first, or on from a place",
        [_TOPIC, *_FILTER, _query("from", "From this time on, by the record's own: µs or RFC 3339", _TEXT), _query("offset", "From this offset on", _WHOLE), _LIMIT, _CURSOR],
        _answers("A page", {"records": _LIST, "next_cursor": _NEXT, "scanned": _WHOLE, "partitions": _WHOLE, "onward": _FLAG, "at": _AT}, 400, 401, 403, 404, 503),
    ),
    "/api/topics/{name}/live": _get(
        "messagesLive", "What comes into a topic, as server-sent events: {records, left_out}", [_TOPIC, *_FILTER, _query("from", "Not looked at", _TEXT), _query("offset", "Not looked at", _WHOLE), _LIMIT],
        _answers("Events", {}, 400, 401, 403, 404, 503, kind="text/event-stream"),
    ),
    "/api/state": _get(
        "listState", "State tables, and which worker has which partition", [],
        _answers("All of them", {"tables": _LIST, "worker": _TEXT, "workers": _WHOLE, "note": _NEXT, "at": _AT}, 401, 403),
    ),
    "/api/state/{name}/{key}": _get(
        "stateOfKey", "The value of a key of a state table, from whichever worker has it", [_path("name", "Table"), _path("key", "Key; a device's address in any spelling")],
        _answers("The value", {"name": _TEXT, "key": _TEXT, "partition": _WHOLE, "value": _ANY, "bytes": _WHOLE, "worker": _TEXT, "copy": _FLAG, "at": _AT}, 400, 401, 403, 404),
    ),
    "/api/unknown-devices": _get(
        "listUnknownDevices", "Addresses that send and are in no registry, with the parsers that understand them", [_query("device", "One address alone", _WORD), _LIMIT],
        _answers("The busiest first", {"unknown": _LIST, "addresses": _WHOLE, "others": _WHOLE, "types": {"type": "array", "items": _TEXT}, "note": _NEXT, "age_s": {"type": "number"}, "at": _AT}, 400, 401, 403, 503),
    ),
    "/api/registry": _get("listKinds", "Kinds of registry documents, and whether they may be changed here", [], _answers("All of them", {"kinds": _LIST, "editing": {**_FLAG, "description": "Whether who asks may change it here"}, "in_files": {**_FLAG, "description": "Whether nobody may: web.registry_editing is off"}}, 401, 403, 503)),
    "/api/registry.yaml": _get("exportRegistry", "The registry as a file that `preservarium registry apply` takes", [], _answers("YAML", {}, 401, 403, 503, kind="application/yaml")),
    "/api/registry/{kind}": _get(
        "listDocuments", "Documents of a kind, by name", [_KIND, _query("q", "Part of a name or description", _WORD), _LIMIT, _CURSOR],
        _answers("A page", {"kind": _TEXT, "documents": _LIST, "next_cursor": _NEXT, "at": _AT}, 400, 401, 403, 404, 503),
    ),
    "/api/registry/{kind}/{name}": _get(
        "showDocument", "One document as YAML", [_KIND, _NAME],
        _answers("The document", {"kind": _TEXT, "name": _TEXT, "stream": _TEXT, "document": {"type": "object"}, "yaml": _TEXT, "rev": _WHOLE, "version": _WHOLE,
                                  "updated_at": _AT, "updated_by": _TEXT, "editing": _FLAG, "at": _AT}, 400, 401, 403, 404, 503),
    ),
    "/api/registry/{kind}/{name}/versions": _get(
        "listVersions", "A document after each of its events, newest first", [_KIND, _NAME, _query("stream", "Of a parser: name and version, parser/name@2", _WORD)],
        _answers("Its versions", {"stream": _TEXT, "versions": _LIST, "at": _AT}, 400, 401, 403, 404, 503),
    ),
    "/api/registry/check": _post(
        "checkRegistry", "What is wrong with a text by itself, and what its examples show in the sandbox", {"yaml": _CHANGE["yaml"]},
        _answers("The findings", {"ok": _FLAG, "problems": _LIST, "examples": _LIST, "took_ms": {"type": "number"}}, 400, 401, 403, 413, 415, 503),
    ),
    "/api/registry/plan": _post("planRegistry", "What saving a text would change", _CHANGE, _answers("The changes, or what forbids them", _CHANGED, 400, 401, 403, 409, 413, 415, 503)),
    "/api/registry/save": _post("saveRegistry", "Save a text: the same events as by a file", _CHANGE, _answers("What was changed", _CHANGED, 400, 401, 403, 409, 413, 415, 503)),
    "/api/decode": _post(
        "decodeAgain", "What a parser makes of a payload; nothing is sent or stored",
        {**_PAYLOAD, "parser": {**_WORD, "description": "Of the registry"}, "version": {"type": ["integer", "null"], "minimum": 1}, "kind": _WORD, "source": _ANY},
        _answers("Fields and readings", {"fields": _LIST, "readings": _LIST, "refused": _LIST, "error": {"type": ["object", "null"]}, "parser": _TEXT, "type": _NEXT, "took_ms": {"type": "number"}}, 400, 401, 403, 404, 413, 415, 503),
    ),
    "/api/decode/all": _post(
        "decodeByAll", "Which parsers in force take a payload, the best first", _PAYLOAD,
        _answers("The parsers", {"parsers": _LIST, "tried": _WHOLE}, 400, 401, 403, 404, 413, 415, 503),
    ),
}  # fmt: skip
