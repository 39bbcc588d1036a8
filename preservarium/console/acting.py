"""What views share that carry something out: the body of a request, and who asks."""

from typing import Any, Final

import orjson
from aiohttp import web

from preservarium.console.replies import OPERATOR, bad

#: A name of a person or a program, as the event store keeps it.
ACTOR_CHARS_MAX: Final = 255


async def body_of(request: web.Request, bytes_max: int) -> dict[str, Any]:
    """The JSON object that a request carries.

    A form of a stranger's page cannot send `application/json`, so nothing else is taken.

    Raises:
        web.HTTPUnsupportedMediaType: it is no JSON by its own word.
        web.HTTPRequestEntityTooLarge: it is larger than `bytes_max`.
        web.HTTPBadRequest: it is no JSON object.
    """
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text='{"error": "send application/json"}', content_type="application/json")
    body = bytearray()
    async for chunk in request.content.iter_chunked(65_536):
        body += chunk
        if len(body) > bytes_max:
            text = orjson.dumps({"error": f"the body is larger than {bytes_max} bytes"}).decode()
            raise web.HTTPRequestEntityTooLarge(bytes_max, len(body), text=text, content_type="application/json")
    try:
        asked = orjson.loads(bytes(body))
    except orjson.JSONDecodeError as e:
        bad(f"the body is no JSON: {e}")
    if not isinstance(asked, dict):
        bad("the body is a JSON object")
    return asked


def only(asked: dict[str, Any], fields: frozenset[str]) -> None:
    """Refuse fields that nobody knows: a word that is misspelt would be passed over."""
    if unknown := sorted(asked.keys() - fields):
        bad(f"unknown field {unknown[0]!r}; there are {', '.join(sorted(fields))}")


def string(asked: dict[str, Any], name: str, most: int, *, default: str | None = None) -> str:
    """A text of the body, without blanks around it."""
    value = asked.get(name, default)
    if not isinstance(value, str) or len(value) > most or "\0" in value:
        bad(f"{name} is a text of at most {most} characters, without NUL")
    if not _encodes(value):
        bad(f"{name} holds half a character (a surrogate)")
    return value.strip()


def whole(asked: dict[str, Any], name: str, least: int, most: int) -> int | None:
    """A whole number of the body; None where it is not given."""
    value = asked.get(name)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        bad(f"{name} is a whole number from {least} to {most}")
    return value


def flag(asked: dict[str, Any], name: str, *, default: bool) -> bool:
    """A truth value of the body."""
    value = asked.get(name, default)
    if not isinstance(value, bool):
        bad(f"{name} is true or false")
    return value


def actor_of(request: web.Request, asked: dict[str, Any]) -> str:
    """Who acts: the name that is proven, else the one that is given; what was done is kept under it."""
    proven = request.get(OPERATOR) or ""
    named = string(asked, "actor", ACTOR_CHARS_MAX, default="")
    if not proven and not named:
        bad("actor says who asks: what was done is kept under that name")
    return proven or named


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
