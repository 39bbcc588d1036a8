"""Answers of the console's views, and reading what was asked: limits, texts, cursors."""

import asyncio
import base64
import binascii
import http
from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NoReturn, cast

import orjson
import structlog
from aiohttp import web

from preservarium.console import access
from preservarium.errors import Retry, reason
from preservarium.serving.rights import Handler, Right, needs
from preservarium.settings import Settings

log = structlog.get_logger(__name__)

#: Rows of one answer: a page of the console shows 25, a script may ask for more.
LIMIT_DEFAULT: Final = 50
LIMIT_MAX: Final = 200
#: Longest search text and table key: longer than any address or name.
TEXT_MAX: Final = 256
#: Longest time that a view waits for the database: the page asks again in two seconds.
READ_TIMEOUT_S: Final = 5.0

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

#: Longest cursor: the position of a thousand partitions.
PACKED_MAX: Final = 16_384

#: Media type of problem details, RFC 9457.
PROBLEM: Final = "application/problem+json"

#: Under this the request has who asks, as far as a token proves it; else "".
OPERATOR: Final = web.RequestKey("operator", str)


def wrapped(
    handler: Handler,
    right: Right,
    live: Callable[[], Settings],
    *,
    timeout_s: float = READ_TIMEOUT_S,
    problems: bool = False,
) -> Handler:
    """The handler for those who have the right, with our headers on each answer, a limit on its time, and errors as JSON.

    With `problems`, errors are problem details (RFC 9457), which say `error` besides, as those of all other views.
    """

    async def view(request: web.Request) -> web.StreamResponse:
        try:
            request[OPERATOR] = access.admit(request, live().web, right)
            async with asyncio.timeout(timeout_s):
                response = await handler(request)
        except web.HTTPException as e:
            if problems and e.text and e.content_type == "application/json":
                e.text = orjson.dumps(_problem(e.status, orjson.loads(e.text)["error"])).decode()
                e.content_type = PROBLEM
            e.headers.update(access.HEADERS)
            raise
        except (Retry, TimeoutError) as e:
            response = answer({"error": f"not available now: {reason(e)}"}, status=503)
        except (web.RequestPayloadError, ConnectionError) as e:
            if isinstance(e, ConnectionError) and not _gone(request):
                raise
            # A sender that went away, or chunks that are none: no fault of ours.
            response = answer({"error": "the body did not come to its end"}, status=400)
        except Exception:
            # What went wrong is for the log, not for whoever asks.
            log.exception("console_view_failed", path=request.path)
            response = answer({"error": "internal error"}, status=500)
        if problems and response.status >= 400 and isinstance(response, web.Response) and response.body:
            said = orjson.loads(cast("bytes", response.body))
            response = answer({**_problem(response.status, said["error"]), **said}, status=response.status)
            response.content_type = PROBLEM
        for name, value in access.HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    return needs(right, view)


def _problem(status: int, detail: str) -> dict[str, Any]:
    return {
        "type": "about:blank",
        "title": http.HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "error": detail,
    }


def _gone(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


def answer(value: Any, status: int = 200) -> web.Response:
    """JSON."""
    # Raw values of tables are shown as they are, so bytes that are no JSON have been made text before.
    return web.Response(
        body=orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS),
        status=status,
        content_type="application/json",
        charset="utf-8",
    )


def bad(message: str) -> NoReturn:
    """Refuse with 400 and a reason."""
    raise web.HTTPBadRequest(text=orjson.dumps({"error": message}).decode(), content_type="application/json") from None


def missing(message: str) -> NoReturn:
    """Refuse with 404 and a reason."""
    raise web.HTTPNotFound(text=orjson.dumps({"error": message}).decode(), content_type="application/json") from None


def limit_of(request: web.Request) -> int:
    """The query's `limit`, cut to what is allowed."""
    text = request.query.get("limit", str(LIMIT_DEFAULT))
    if not (text.isascii() and text.isdigit() and len(text) <= 6) or int(text) < 1:
        message = f"limit is a number from 1 to {LIMIT_MAX}"
        bad(message)
    return min(int(text), LIMIT_MAX)


def text_of(request: web.Request, name: str) -> str:
    """A text of the query, without blanks around it."""
    text = request.query.get(name, "").strip()
    # PostgreSQL takes no NUL in a text.
    if len(text) > TEXT_MAX or "\x00" in text:
        message = f"{name} is at most {TEXT_MAX} characters, without NUL"
        bad(message)
    return text


def pack(position: list[Any]) -> str:
    """A cursor: where the next page begins, opaque to the caller."""
    return base64.urlsafe_b64encode(orjson.dumps(position)).decode().rstrip("=")


def unpack(text: str) -> list[Any] | None:
    """What `pack` packed; None where it is not one of ours."""
    if len(text) > PACKED_MAX:
        return None
    try:
        position = orjson.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, binascii.Error):
        return None
    return position if isinstance(position, list) else None


def cursor_of(request: web.Request) -> list[Any] | None:
    """The query's `cursor`, unpacked."""
    text = request.query.get("cursor", "")
    if not text:
        return None
    position = unpack(text)
    if not position:
        bad("cursor is not one of ours")
    return position


def number_of(request: web.Request, name: str, default: int, least: int, most: int) -> int:
    """A whole number of the query."""
    text = request.query.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and least <= int(text) <= most):
        message = f"{name} is a whole number from {least} to {most}"
        bad(message)
    return int(text)


def one_of(request: web.Request, name: str, words: Collection[str], default: str) -> str:
    """A word of the query, one of those that there are."""
    text = request.query.get(name, "") or default
    if text != default and text not in words:
        message = f"{name} is one of {', '.join(words)}"
        bad(message)
    return text


def instant_of(request: web.Request, name: str, default_us: int) -> int:
    """An instant of the query: µs since the epoch, or RFC 3339 with its zone."""
    text = request.query.get(name, "").strip()
    if not text:
        return default_us
    if text.isascii() and text.isdigit() and len(text) <= 18:
        return int(text)
    try:
        # A `+` in a query is a blank, where nobody has escaped it.
        instant = datetime.fromisoformat(text.replace(" ", "+") if "T" in text else text)
        if instant.tzinfo is None:
            raise ValueError
        return (instant - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError):
        message = f"{name} is an instant: µs since the epoch, or like 2026-01-31T12:00:00Z"
        bad(message)
