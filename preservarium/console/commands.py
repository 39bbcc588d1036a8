"""Commands to devices over HTTP.

| request | what it does |
|---|---|
| `POST /api/devices/{device}/commands` | asks for a command: 202 with its id, once Kafka has acknowledged it |
| `GET /api/devices/{device}/commands` | lists, newest first: `?state`, `?limit`, `?cursor` |
| `GET /api/devices/{device}/commands/{id}` | one command with its events |
| `POST /api/devices/{device}/commands/{id}/cancel` | asks to cancel: 202, once Kafka has acknowledged it |
| `GET /api/devices/{device}/commands/choices` | the commands that the registry gives the device |
| `GET /api/commands` | lists those of all devices, newest first: `?device`, `?state`, `?limit`, `?cursor` |

The idempotency key is the header `Idempotency-Key` or the field `idempotency_key`: a request with the same key is the same
command. Lists are PostgreSQL's, a moment behind; asking waits for no database. All of it is for operators.
"""

import functools
from typing import Any, NoReturn, cast

import orjson
from aiohttp import web

from preservarium.console.host import Host
from preservarium.console.replies import OPERATOR, answer, bad, cursor_of, limit_of, missing, pack, text_of, wrapped
from preservarium.domain.commands.lines import LINE_BYTES_MAX
from preservarium.domain.commands.machine import State
from preservarium.domain.commands.profile import compile_profile
from preservarium.domain.readings.address import same_address
from preservarium.domain.registry.device import DeviceDoc, DeviceTypeDoc
from preservarium.errors import ReasonCode, Reject
from preservarium.operations.command_desk import CommandDesk
from preservarium.serving.rights import Right
from preservarium.stores.views import Views

#: The acknowledgement of Kafka is waited for so long; then the caller is to repeat with the same key, which is harmless.
SEND_TIMEOUT_S = 20.0
#: Events of one command: one for each try and report; ten tries have some forty.
EVENTS_MAX = 200
NAME_CHARS_MAX = 255


class Commands:
    """The views."""

    def __init__(self, host: Host, desk: CommandDesk, reads: Views) -> None:
        self._host = host
        self._desk = desk
        self._reads = reads

    def mount(self, application: web.Application) -> None:
        """Add every route to an aiohttp application that has not started."""
        get, post = application.router.add_get, application.router.add_post
        base = "/api/devices/{device_id}/commands"
        view = functools.partial(wrapped, right=Right.OPERATE, live=self._host.live)
        get("/api/commands", view(self.list))
        get(base, view(self.list))
        get(f"{base}/choices", view(self.choices))
        post(base, view(self.request, timeout_s=SEND_TIMEOUT_S))
        get(f"{base}/{{command_id}}", view(self.show))
        post(f"{base}/{{command_id}}/cancel", view(self.cancel, timeout_s=SEND_TIMEOUT_S))

    async def list(self, request: web.Request) -> web.Response:
        """Commands, of the device that the path or the query names, or of all."""
        states = [word.strip() for word in text_of(request, "state").lower().split(",") if word.strip()]
        if set(states) - set(State):
            bad(f"state is one or more of {', '.join(State)}")
        cursor, before = cursor_of(request), None
        if cursor is not None:
            if len(cursor) != 2 or type(cursor[0]) is not int or not isinstance(cursor[1], str):
                bad("cursor is not one of ours")
            before = (cursor[0], cursor[1])
        device_id = _name(request, "device_id") if request.match_info else text_of(request, "device")
        page = await self._reads.commands(device_id=device_id, states=states, before=before, limit=limit_of(request))
        return answer({"commands": page["commands"], "next_cursor": pack(list(page["next"])) if page["next"] else None})

    async def choices(self, request: web.Request) -> web.Response:
        """What the registry says of a device's commands: for a form to choose from, not a limit to what may be asked."""
        device_id = _name(request, "device_id")
        found = await self._reads.registered(device_id)
        if found is None:
            missing("the registry knows no such device")
        device, device_type = found
        device_id = device["device_id"]
        profile = compile_profile(
            cast("DeviceDoc", device), cast("DeviceTypeDoc | None", device_type), self._host.live().commands.topic
        )
        return answer(
            {
                "device_id": device_id,
                "name": device.get("name"),
                "type": device["type"],
                "problem": profile.problem or None,
                "format": profile.format,
                "sleeps": profile.sleeps,
                "given": profile.given,
                "commands": [{"command": name, **preset} for name, preset in sorted(profile.commands.items())],
            }
        )

    async def show(self, request: web.Request) -> web.Response:
        """One command with its events."""
        found = await self._reads.command(_name(request, "command_id"), limit=EVENTS_MAX)
        if found is None or not same_address(found["device_id"], _name(request, "device_id")):
            missing("the database knows no such command of this device (yet)")
        return answer(found)

    async def request(self, request: web.Request) -> web.Response:
        """Ask for a command."""
        name = request[OPERATOR]
        asked = await _body(request)
        if "idempotency_key" not in asked and (key := request.headers.get("Idempotency-Key")):
            asked["idempotency_key"] = key
        asked["actor"] = _actor(name, asked.get("actor"))
        device_id = _name(request, "device_id")
        try:
            made = await self._desk.request(device_id, asked)
        except Reject as e:
            status = 404 if e.code == ReasonCode.UNKNOWN_DEVICE else 400
            return answer({"error": str(e), "code": str(e.code)}, status=status)
        made["command"] = f"{request.path.rstrip('/')}/{made['command_id']}"
        response = answer(made, status=202)
        response.headers["Location"] = made["command"]
        return response

    async def cancel(self, request: web.Request) -> web.Response:
        """Ask to cancel a command."""
        name = request[OPERATOR]
        body = await _body(request) if request.can_read_body else {}
        try:
            await self._desk.cancel(
                _name(request, "device_id"), _name(request, "command_id"), _actor(name, body.get("actor"))
            )
        except Reject as e:
            return answer({"error": str(e), "code": str(e.code)}, status=400)
        return answer({"command_id": _name(request, "command_id"), "asked": "cancel"}, status=202)


def _name(request: web.Request, name: str) -> str:
    text = request.match_info[name]
    if len(text) > NAME_CHARS_MAX or "\0" in text:
        bad(f"{name} is at most {NAME_CHARS_MAX} characters, without NUL")
    return text


def _actor(proven: str, given: Any) -> str:
    """Who acts: what the token proves, else what the request says."""
    if proven and given not in (None, "", proven):
        _refuse(web.HTTPForbidden, f"this token is {proven}'s: actor must be {proven}, or left out")
    return proven or (given if isinstance(given, str) and given else "operator")


def _refuse(kind: type[web.HTTPException], message: str) -> NoReturn:
    raise kind(text=orjson.dumps({"error": message}).decode(), content_type="application/json")


async def _body(request: web.Request) -> dict[str, Any]:
    if request.content_type != "application/json":
        # A page of a stranger can send a form or plain text across origins, and JSON only after asking.
        _refuse(web.HTTPUnsupportedMediaType, "send application/json")
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > LINE_BYTES_MAX:
            text = f'{{"error": "a command has at most {LINE_BYTES_MAX} bytes"}}'
            raise web.HTTPRequestEntityTooLarge(LINE_BYTES_MAX, len(body), text=text, content_type="application/json")
    try:
        asked = orjson.loads(bytes(body))
    except orjson.JSONDecodeError as e:
        bad(f"the body is no JSON: {e}")
    if not isinstance(asked, dict):
        bad("the body is a JSON object")
    return asked
