"""Words of the descriptions of the API (openapi.py, openapi_pages.py, openapi_worker.py): schemas that recur, parameters, answers."""

from typing import Any, Final

from preservarium.domain.alarms.action import NAME_CHARS_MAX

TEXT: Final = {"type": "string"}
NAME: Final = {"type": "string", "maxLength": NAME_CHARS_MAX}
INSTANT: Final = {"type": "integer", "format": "int64", "description": "µs since the epoch, UTC"}
NUMBER: Final = {"type": ["number", "null"]}
FLAG: Final = {"type": "boolean"}


def maybe(schema: dict[str, Any]) -> dict[str, Any]:
    """The same, or null."""
    return {**schema, "type": [schema["type"], "null"]}


def object_of(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    """An object with these properties, of which some are always there; it may have more."""
    return {"type": "object", "required": list(required), "properties": properties}


def ref(name: str) -> dict[str, str]:
    """A schema of the components."""
    return {"$ref": f"#/components/schemas/{name}"}


def answers(description: str, schema: Any, *errors: int, status: int = 200) -> dict[str, Any]:
    """Answers of an operation. Every refusal is problem details; those that anything may be given stand under `default`."""
    said = {
        400: "The question or the action is not well formed",
        401: "Nothing proves who asks: log in, or show a token",
        403: "Who asks may not; or it is asked by a page of another origin, or without X-CSRF-Token; or nobody is configured, and it is not this machine that asks",
        404: "There is none",
        409: "Somebody else changed it meanwhile",
        413: "The body is too large",
        415: "The body is no JSON",
        503: "Kafka or the database cannot be reached now; repeat",
    }
    found: dict[str, Any] = {
        str(status): {"description": description, "content": {"application/json": {"schema": schema}}}
    }
    for code in dict.fromkeys((*errors, 400, *((403,) if 401 in errors else ()))):
        found[str(code)] = _problem(said[code])
    found["default"] = _problem("Not now, or not so: 408, 413, 415, 429, 500, 503")
    return found


def _problem(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/problem+json": {"schema": ref("Problem")}}}


def query(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter of the query."""
    return {"name": name, "in": "query", "description": description, "schema": schema}


def path_of(name: str, description: str) -> dict[str, Any]:
    """A part of the path."""
    return {"name": name, "in": "path", "required": True, "description": description, "schema": NAME}


LIMIT: Final = query("limit", "Most rows", {"type": "integer", "minimum": 1, "default": 50})
CURSOR: Final = query("cursor", "`next_cursor` of the page before", TEXT)
