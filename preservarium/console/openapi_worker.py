"""The description of the API, second part: what a worker is and holds, who there is, what senders send."""

from typing import Any, Final

from preservarium.connectors.envelopes import FORMATS
from preservarium.console.openapi_words import (
    CURSOR,
    FLAG,
    INSTANT,
    LIMIT,
    NAME,
    TEXT,
    answers,
    maybe,
    object_of,
    path_of,
    query,
    ref,
)
from preservarium.serving.people import SCOPES
from preservarium.settings import ROLES

_COUNT: Final = {"type": "integer"}
_STRINGS: Final = {"type": "array", "items": TEXT}
_BY_NAME: Final = {"type": "object", "additionalProperties": {"type": "object"}}
_NO_MATTER: Final[dict[str, Any]] = {}
_OPEN: Final[list[dict[str, list[str]]]] = [{}]
_JSON: Final = {"application/json": {"schema": {"type": "object"}}}

_STAGE: Final = object_of(
    ("name", "received_total", "sent_total", "errors_total", "lag", "pending", "fuse_blown", "stalled", "curve"),
    name=TEXT,
    topic=maybe(TEXT),
    group=maybe(TEXT),
    received_total={**_COUNT, "description": "Records, since the worker started"},
    sent_total=_COUNT,
    readings_total=_COUNT,
    errors_total={**_COUNT, "description": "Inputs that it refused"},
    retries_total=_COUNT,
    received_per_s={"type": "number", "description": "Of the last seconds, as the other rates"},
    sent_per_s={"type": "number"},
    readings_per_s={"type": "number"},
    errors_per_s={"type": "number"},
    lag={**_COUNT, "description": "Records that wait in Kafka for it"},
    pending={**_COUNT, "description": "Records that it has taken and not finished yet"},
    paused={**_COUNT, "description": "Partitions that wait for a dependency"},
    commit_age_s={"type": "number"},
    fuse_blown=FLAG,
    stalled={**FLAG, "description": "It has work, and makes no progress"},
    curve={
        "type": "array",
        "items": {"type": "number"},
        "description": "Received a second, a point a second, oldest first",
    },
)
_DEPENDENCY: Final = object_of(
    ("name", "state", "detail"),
    name=TEXT,
    state={"type": "string", "enum": ["up", "trying", "down", "unknown"]},
    detail=TEXT,
)
_ERRORS: Final = {
    "type": "array",
    "items": object_of(("stage", "code", "recent", "total"), stage=TEXT, code=TEXT, recent=_COUNT, total=_COUNT),
}
_ENTRY: Final = object_of(
    ("partition", "key", "value", "bytes"),
    partition=_COUNT,
    key=TEXT,
    value={**_NO_MATTER, "description": "As JSON where it is, else as text"},
    bytes=_COUNT,
    cut=FLAG,
)

SCHEMAS: Final[dict[str, Any]] = {
    "Status": object_of(
        ("at", "version", "worker", "readings_per_s", "errors_per_s", "lag", "stages", "dependencies", "guards", "workers", "health", "errors"),
        at=INSTANT,
        version=TEXT,
        worker=object_of(("id", "uptime_s"), id=TEXT, uptime_s={"type": "number"}),
        readings_per_s={"type": "number"},
        errors_per_s={"type": "number"},
        lag=_COUNT,
        stages={"type": "array", "items": _STAGE},
        arriving_per_s={"type": "number"},
        connectors=_BY_NAME,
        stores=_BY_NAME,
        dependencies={"type": "array", "items": _DEPENDENCY},
        guards=object_of(("breakers", "fuses"), breakers=_BY_NAME, fuses=_BY_NAME),
        workers={"type": "array", "items": {"type": "object"}, "description": "The other workers, as each said last"},
        workers_note=maybe(TEXT),
        health=object_of(("alive", "ready", "reasons"), alive=FLAG, ready=FLAG, reasons=_STRINGS),
        errors=_ERRORS,
        errors_span_s={"type": "number"},
    ),
    "Errors": object_of(("errors", "span_s"), errors=_ERRORS, span_s={"type": "number"}),
    "Tables": object_of(
        ("tables",),
        tables={
            "type": "array",
            "items": object_of(("name", "partitions"), name=TEXT, partitions={"type": "array", "items": _COUNT}),
        },
    ),
    "TablePage": object_of(
        ("name", "entries", "next_cursor"), name=TEXT, entries={"type": "array", "items": _ENTRY}, next_cursor=maybe(TEXT)
    ),
    "TableEntry": object_of(
        ("name", "key", "partition", "held", "value", "bytes"),
        name=TEXT,
        key=TEXT,
        partition=_COUNT,
        held={**FLAG, "description": "Whether this worker holds its partition"},
        value=_NO_MATTER,
        bytes=_COUNT,
        cut=FLAG,
    ),
    "Alive": object_of(("alive", "reasons"), alive=FLAG, reasons=_STRINGS),
    "Ready": object_of(
        ("ready", "reasons", "dependencies"), ready=FLAG, reasons=_STRINGS, dependencies={"type": "array", "items": _DEPENDENCY}
    ),
    "Dashboards": object_of(("dashboards",), dashboards={"type": "array", "items": object_of(("name", "meaning", "parameters"), name=TEXT, meaning=TEXT, parameters={"type": "array", "items": {"type": "object"}})}),
    "Session": object_of(
        ("name", "role", "how", "rights", "csrf", "ways"),
        name={**maybe(TEXT), "description": "Null: nobody; empty: nobody whom the proof names"},
        role={"type": ["string", "null"], "enum": [*ROLES, None]},
        how={"type": ["string", "null"], "description": "password, oidc, token, machine (this one, where nobody is configured)"},
        rights=_STRINGS,
        csrf={**maybe(TEXT), "description": "For the header X-CSRF-Token of what changes something"},
        ways={"type": "array", "items": {"type": "string", "enum": ["password", "oidc", "token"]}},
    ),
    "People": object_of(
        ("users", "tokens", "operators", "operator_token", "oidc", "at"),
        users={"type": "array", "items": object_of(("name", "role"), name=TEXT, role={"type": "string", "enum": list(ROLES)}, created_at=maybe(TEXT), password_changed_at=maybe(TEXT))},
        tokens={"type": "array", "items": object_of(("name", "scopes"), name=TEXT, scopes={"type": "array", "items": {"type": "string", "enum": list(SCOPES)}}, created_at=maybe(TEXT), expires_at=maybe(TEXT))},
        operators={**_STRINGS, "description": "Of web.operators"},
        operator_token={**FLAG, "description": "Whether web.operator_token is set"},
        oidc={"type": ["object", "null"]},
        file=maybe(TEXT),
        note={**maybe(TEXT), "description": "Why the file could not be read at its last change"},
        at=INSTANT,
    ),
    "PeopleEvents": object_of(
        ("events", "next_cursor", "waiting", "at"),
        events={
            "type": "array",
            "items": object_of(
                ("position", "event", "name", "at", "detail"), position=_COUNT, event=TEXT,
                name={**TEXT, "description": "`?`: a name that nobody has; empty: the file of users"}, at=INSTANT, detail={"type": "object"},
            ),
        },
        next_cursor=maybe(TEXT),
        waiting={**_COUNT, "description": "That this worker has not stored yet"},
        at=INSTANT,
    ),
    "Taken": object_of(
        ("accepted", "refused", "refused_count"),
        accepted=_COUNT,
        refused={"type": "array", "items": object_of(("index", "code", "message"), index=_COUNT, code=TEXT, message=TEXT)},
        refused_count=_COUNT,
        ignored={**_COUNT, "description": "Events that carry nothing of a device"},
    ),
    "Downlinks": object_of(
        ("downlinks",),
        downlinks={
            "type": "array",
            "items": object_of(("id", "payload_b64"), id=TEXT, command_id=TEXT, attempt=_COUNT, port={"type": ["integer", "null"]}, payload_b64=TEXT, expires_at=INSTANT),
        },
    ),
}  # fmt: skip

_TABLE: Final = path_of("name", "Name of the table")
_SENDER: Final[list[dict[str, list[str]]]] = [{"token": []}, {}]


def _taken(*errors: int) -> dict[str, Any]:
    # Azure's Event Grid is answered what it asked, once.
    return {
        **answers("Kafka has them", ref("Taken"), *errors, 413, 415, 503, status=202),
        **({"200": {"description": "The answer to a handshake", "content": _JSON}} if not errors else {}),
    }


def _ingest(name: str) -> dict[str, Any]:
    return {
        "post": {
            "operationId": f"ingest_{name}",
            "summary": f"What {name} publishes, as it publishes it",
            "security": _SENDER,
            "requestBody": {"required": True, "content": {"application/json": {"schema": _NO_MATTER}}},
            "responses": _taken(),
        }
    }


PATHS: Final[dict[str, Any]] = {
    "/api/status": {
        "get": {
            "operationId": "showStatus",
            "summary": "This worker: stages with rates, lag and errors; stores, dependencies, breakers and fuses, and the other workers",
            "responses": answers("The status", ref("Status"), 401),
        }
    },
    "/api/errors": {
        "get": {
            "operationId": "countErrors",
            "summary": "What this worker refused, by stage and code: of the last minutes and since it started",
            "responses": answers("Counts", ref("Errors"), 401),
        }
    },
    "/api/tables": {
        "get": {"operationId": "listTables", "summary": "State tables, and the partitions that this worker holds", "responses": answers("The tables", ref("Tables"), 401)}
    },
    "/api/tables/{name}": {
        "get": {
            "operationId": "browseTable",
            "summary": "Keys and values of the partitions that this worker holds",
            "parameters": [_TABLE, LIMIT, CURSOR],
            "responses": answers("A page", ref("TablePage"), 401, 404),
        }
    },
    "/api/tables/{name}/{key}": {
        "get": {
            "operationId": "showTableEntry",
            "summary": "The value of one key, where this worker holds its partition",
            "parameters": [_TABLE, path_of("key", "The key; a device by any spelling of its address")],
            "responses": answers("The value", ref("TableEntry"), 401, 404),
        }
    },
    "/api/fuses/{stage}/reset": {
        "post": {
            "operationId": "closeFuse",
            "summary": "Close a blown fuse of this worker, once its cause is mended",
            "parameters": [path_of("stage", "Name of the stage")],
            "requestBody": {"content": _JSON},
            "responses": answers("It is closed", object_of(("stage", "reset"), stage=TEXT, reset=FLAG), 401, 404, 415),
        }
    },
    "/api/dashboards": {
        "get": {"operationId": "listDashboards", "summary": "The queries that dashboards use", "responses": answers("Dashboards", ref("Dashboards"), 401, 404)}
    },
    "/api/dashboards/{name}": {
        "get": {
            "operationId": "askDashboard",
            "summary": "One of them, answered by ClickHouse; the query string has its parameters",
            "parameters": [path_of("name", "Name of the dashboard"), {"name": "parameters", "in": "query", "schema": {"type": "object", "additionalProperties": TEXT}, "style": "form", "explode": True}],
            "responses": answers("Rows", {"type": "object"}, 401, 404, 503),
        }
    },
    "/api/health": {
        "get": {
            "operationId": "isAlive",
            "summary": "Whether this worker should live; a dependency that is down is no reason",
            "security": _OPEN,
            "responses": {**answers("It should", ref("Alive")), "503": {"description": "Start it again", "content": {"application/json": {"schema": ref("Alive")}}}},
        }
    },
    "/api/ready": {
        "get": {
            "operationId": "isReady",
            "summary": "Whether this worker, and what it depends on, can work now",
            "security": _OPEN,
            "responses": {**answers("It can", ref("Ready")), "503": {"description": "Not now", "content": {"application/json": {"schema": ref("Ready")}}}},
        }
    },
    "/api/session": {
        "get": {"operationId": "showSession", "summary": "Who asks, what they may, and how one can log in", "responses": answers("Who asks", ref("Session"), 401)},
        "post": {
            "operationId": "logIn",
            "summary": "Log in by name and password: the answer sets the cookie",
            "security": _OPEN,
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {**object_of(("name", "password"), name={"type": "string", "minLength": 1, "maxLength": 255}, password=TEXT), "additionalProperties": False}}},
            },
            "responses": answers("Logged in", ref("Session"), 401, 413, 415),
        },
        "delete": {
            "operationId": "logOut",
            "summary": "Log out: the session is believed no more by this worker, and its cookie is taken back",
            "security": [{"session": []}, {}],
            "responses": {**{code: said for code, said in answers("", {}, 401).items() if code != "200"}, "204": {"description": "Logged out, or nobody was"}},
        },
    },
    "/api/people": {
        "get": {"operationId": "listPeople", "summary": "Users with their roles, tokens with their scopes; for administrators", "responses": answers("Who there is", ref("People"), 401)}
    },
    "/api/people/events": {
        "get": {
            "operationId": "listPeopleEvents",
            "summary": "What was done at the door, newest first: who logged in, who was refused, whom the file named; for administrators",
            "parameters": [query("name", "Of this name alone", NAME), LIMIT, CURSOR],
            "responses": answers("A page", ref("PeopleEvents"), 401, 503),
        }
    },
    "/api/ingest": {
        "post": {
            "operationId": "ingest",
            "summary": "Readings: envelopes of ours or of a platform, an array of them, or one a line; or the payload of the device that the query names",
            "security": _SENDER,
            "parameters": [
                query("device", "Address of the device: then the body is its payload", NAME),
                query("port", "Port of the payload", {"type": "string", "pattern": r"^[0-9]{0,3}$"}),
                query("mode", "Connector mode", NAME),
            ],
            "requestBody": {
                "required": True,
                "description": "May be packed (Content-Encoding: gzip, deflate, zstd)",
                "content": {
                    "application/json": {"schema": {"type": ["object", "array"]}},
                    **{kind: {"schema": TEXT} for kind in ("application/x-ndjson", "application/json-seq", "application/octet-stream")},
                },
            },
            "responses": _taken(401),
        }
    },
    **{f"/api/ingest/{name}": _ingest(name) for name in FORMATS},
    "/api/ingest/commands": {
        "get": {
            "operationId": "fetchCommands",
            "summary": "What waits for a device that fetches its commands",
            "security": _SENDER,
            "parameters": [
                {**query("device", "Address of the device", NAME), "required": True},
                query("has", "Id of the last downlink that the device has", NAME),
                query("wait_s", "Wait for one, at most so long", {"type": "number", "minimum": 0, "maximum": 25, "default": 5}),
            ],
            "responses": {**answers("What waits, in order", ref("Downlinks"), 401, 503), "204": {"description": "Nothing"}},
        }
    },
}  # fmt: skip
