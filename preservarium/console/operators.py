"""The operators' views: the alarm list, one alarm with its history, actions and their answers, and the signed link.

The list is the board's (preservarium/operations/alarm_board.py), which follows Kafka: it is of the whole system and needs no database.
Where the board was not read yet, what PostgreSQL holds is shown instead, and the answer says so. Histories, and alarms
that are over, are PostgreSQL's alone.

An action for many alarms at once names them, or gives the filter of a list and that list's `seen`: then it is for those
that the list showed, and for none that came since.

An action is checked, sent to `alarm_actions` and acknowledged by Kafka; whether the machine did it is its answer, which
can be waited for. Whoever repeats an action with the same `action_id` does it once.
"""

import functools
import uuid
from collections.abc import Mapping
from typing import Any, Final, NoReturn

import orjson
from aiohttp import web

from preservarium.console import access, pages
from preservarium.console.host import Host
from preservarium.console.openapi import DOCUMENT
from preservarium.console.replies import (
    OPERATOR,
    TEXT_MAX,
    answer,
    bad,
    cursor_of,
    limit_of,
    pack,
    text_of,
    unpack,
    wrapped,
)
from preservarium.domain.alarms.action import ACTION_ID_CHARS_MAX, ActionDoc
from preservarium.domain.alarms.rule import SEVERITIES
from preservarium.errors import Reject, Retry
from preservarium.notices import links
from preservarium.operations.alarm_board import BULK, BULK_MAX, SORTS, STATES, Board, Desk, Filter, tally
from preservarium.serving.rights import Right
from preservarium.settings import Settings
from preservarium.stores.views import Views

#: An action is a few hundred bytes; its comment is the largest part.
BODY_BYTES_MAX: Final = 16_384
#: Names of as many alarms as a request may have, and some room: a name is 30 characters as a rule.
BULK_BODY_BYTES_MAX: Final = 262_144
#: Longest wait for an answer: proxies cut off a request after 30 or 60 s.
WAIT_S_MAX: Final = 25.0
#: The acknowledgement of Kafka is waited for so long; then the caller is to repeat, which is harmless.
SEND_TIMEOUT_S: Final = 20.0
#: A person who pressed a button waits so long for the machine's answer before the page says that it will come.
LINK_WAIT_S: Final = 10.0
#: Transitions and actions of one alarm that are shown.
HISTORY_MAX: Final = 100

_FIELDS: Final = frozenset(ActionDoc.__annotations__) - {"at"}
_BULK_FIELDS: Final = frozenset(
    (
        "request_id",
        "action",
        "actor",
        "comment",
        "duration_s",
        "one_shot",
        "alarms",
        "filter",
        "seen",
        "limit",
        "wait_s",
    )
)
_FILTER_FIELDS: Final = ("state", "severity", "device", "rule", "q")
_ENDED: Final = {"cleared": False, "all": None}


class Operators:
    """The views."""

    def __init__(self, host: Host, desk: Desk, reads: Views) -> None:
        self._host = host
        self._desk = desk
        self._board = desk.board
        self._reads = reads

    def mount(self, application: web.Application) -> None:
        """Add every route to an aiohttp application that has not started."""
        get, post = application.router.add_get, application.router.add_post
        live = self._host.live
        read = functools.partial(wrapped, right=Right.READ, live=live)
        operate = functools.partial(wrapped, right=Right.OPERATE, live=live)
        link = functools.partial(wrapped, right=Right.LINK, live=live)
        get("/api/openapi.json", wrapped(self.openapi, Right.OPEN, live))
        get("/api/alarms", read(self.alarms))
        get("/api/alarms/actions", read(self.answers))
        post("/api/alarms/actions", operate(self.act, timeout_s=SEND_TIMEOUT_S))
        post("/api/alarms/bulk", operate(self.act_many, timeout_s=SEND_TIMEOUT_S + WAIT_S_MAX))
        get("/api/alarms/actions/{action_id}", read(self.answered, timeout_s=WAIT_S_MAX + 5))
        get("/api/alarms/{device_id}/{rule}/{pin_position}", read(self.alarm))
        get(links.PATH, link(self.link))
        post(links.PATH, link(self.follow_link, timeout_s=SEND_TIMEOUT_S + LINK_WAIT_S))

    async def openapi(self, _request: web.Request) -> web.Response:
        """The description of this API."""
        return answer(DOCUMENT)

    # --- asking ---

    async def alarms(self, request: web.Request) -> web.Response:
        """What is not normal, of the whole system; with `state=cleared` or `all`, the past too."""
        limit, cursor = limit_of(request), cursor_of(request)
        state = text_of(request, "state") or "standing"
        wanted = Filter(
            STATES["standing"] if state in _ENDED else _states(state),
            _severities(text_of(request, "severity")),
            text_of(request, "device"),
            text_of(request, "rule"),
            text_of(request, "q"),
        )
        if state in _ENDED:
            return await self._past(_ENDED[state], wanted, cursor, limit)
        order = request.query.get("sort", "priority")
        if order not in SORTS:
            bad(f"sort is one of {', '.join(SORTS)}")
        if cursor is not None and cursor[0] != order:
            bad("cursor is not one of ours, or of another sort")
        board, source, note = await self._shown()
        try:
            page = board.page(wanted, order=order, after=cursor[1:] if cursor else None, limit=limit)
        except TypeError:
            bad("cursor is not one of ours, or of another sort")
        return answer(
            {
                "alarms": page.alarms,
                "next_cursor": pack([order, *page.next]) if page.next else None,
                "total": page.total,
                "counts": board.counts(),
                "flood": self._board.flood(self._host.clock.now_us()),
                "source": source,
                "complete": source == "kafka" and board.complete,
                "note": note,
                "seen": pack(board.seen()) if source == "kafka" else None,
                "at": self._host.clock.now_us(),
            }
        )

    async def _shown(self) -> tuple[Board, str, str | None]:
        """The board, or what the database has where the board was not read yet; where from; what is to be said."""
        board = self._board
        if board.ready.is_set():
            return board, "kafka", board.note()
        stored = Board()
        for alarm in await self._reads.standing(limit=STORED_MAX):
            stored.put((alarm["device_id"], alarm["rule"], alarm["pin_position"]), alarm)
        return stored, "postgres", (
            f"The alarm list was not read from Kafka yet ({board.trouble}): these are the alarms that the database knows."
        )  # fmt: skip

    async def _past(self, active: bool | None, wanted: Filter, cursor: list[Any] | None, limit: int) -> web.Response:
        before = None
        if cursor:
            if len(cursor) != 2 or type(cursor[0]) is not int or not isinstance(cursor[1], str):
                bad("cursor is not one of ours")
            before = (cursor[0], cursor[1])
        page = await self._reads.alarms(
            active=active,
            before=before,
            limit=limit,
            device_id=wanted.device_id,
            rule=wanted.rule,
            severities=sorted(wanted.severities),
            q=wanted.q,
        )
        return answer(
            {
                "alarms": page["alarms"],
                "next_cursor": pack(list(page["next"])) if page["next"] else None,
                "total": page["total"],
                "source": "postgres",
            }
        )

    async def alarm(self, request: web.Request) -> web.Response:
        """One alarm as it stands, and its history where the database can be asked."""
        device_id, rule, pin = (request.match_info[name] for name in ("device_id", "rule", "pin_position"))
        if any(len(text) > 255 or "\0" in text for text in (device_id, rule, pin)):
            bad("a name is at most 255 characters, without NUL")
        board, source, note = self._board, "kafka", self._board.note()
        if not board.ready.is_set():
            board, source, note = await self._shown()
        history, history_note = None, None
        try:
            history = await self._reads.alarm_history(
                device_id=device_id, rule=rule, pin_position=pin, limit=min(limit_of(request), HISTORY_MAX)
            )
        except Retry as e:
            history_note = f"The history is the database's, which does not answer: {e}"
        alarm = board.get((device_id, rule, pin))
        if alarm is not None:
            device_id = alarm["device_id"]
        if alarm is None and history == []:
            raise web.HTTPNotFound(text='{"error": "no such alarm was ever raised"}', content_type="application/json")
        return answer(
            {
                "device_id": device_id,
                "rule": rule,
                "pin_position": pin,
                "alarm": alarm,
                "state": alarm["state"] if alarm else "normal",
                "history": history,
                "history_note": history_note,
                "source": source,
                "note": note,
                "at": self._host.clock.now_us(),
            }
        )

    async def answers(self, request: web.Request) -> web.Response:
        """The last answers, newest first."""
        return answer({"actions": self._board.answers(limit_of(request)), "note": self._board.trouble or None})

    async def answered(self, request: web.Request) -> web.Response:
        """What became of an action; `wait_s` waits for it."""
        text = request.query.get("wait_s", "0")
        try:
            wait_s = float(text)
        except ValueError:
            wait_s = -1.0
        if not 0 <= wait_s <= WAIT_S_MAX:
            bad(f"wait_s is a number from 0 to {WAIT_S_MAX:g}")
        action_id = request.match_info["action_id"]
        found = await self._board.wait(action_id, wait_s)
        if found is None:
            return answer({"action_id": action_id, "outcome": "pending", "error": "no answer yet"}, status=404)
        return answer(found)

    # --- acting ---

    async def act(self, request: web.Request) -> web.Response:
        """Send an action: 202 with its id, once Kafka has acknowledged it."""
        line = await self._line(request, _FIELDS, BODY_BYTES_MAX)
        try:
            action_id = await self._desk.act(line)
        except Reject as e:
            return answer({"error": str(e), "code": str(e.code)}, status=400)
        where = f"/api/alarms/actions/{action_id}"
        return web.Response(
            status=202,
            body=orjson.dumps({"action_id": action_id, "answer": where}),
            content_type="application/json",
            headers={"Location": where},
        )

    async def act_many(self, request: web.Request) -> web.Response:
        """Send an action for many alarms: 202 with a result for each, once Kafka has acknowledged those that are well formed.

        `wait_s` waits for the machine's answers.
        """
        asked = await self._line(request, _BULK_FIELDS, BULK_BODY_BYTES_MAX)
        request_id = asked.pop("request_id", None) or uuid.uuid4().hex
        if not isinstance(request_id, str) or len(request_id) > ACTION_ID_CHARS_MAX:
            bad(f"request_id is a text of at most {ACTION_ID_CHARS_MAX} characters")
        wait_s = asked.pop("wait_s", 0)
        if type(wait_s) not in (int, float) or not 0 <= wait_s <= WAIT_S_MAX:
            bad(f"wait_s is a number from 0 to {WAIT_S_MAX:g}")
        given, limit = [asked.pop(name, None) for name in ("alarms", "filter", "seen")], asked.pop("limit", BULK_MAX)
        if type(limit) is not int or not 0 < limit <= BULK_MAX:
            bad(f"limit is a number from 1 to {BULK_MAX}")
        alarms, matched, newer = self._meant(str(asked.get("action")), *given, limit=limit)
        try:
            results = await self._desk.act_many(request_id, asked, alarms)
        except Reject as e:
            return answer({"error": str(e), "code": str(e.code)}, status=400)
        await self._desk.wait_many(results, wait_s)
        said = {"request_id": request_id, "matched": matched, "newer": newer, **tally(results), "results": results}
        return answer(said, status=202)

    def _meant(
        self, action: str, alarms: Any, wanted: Any, seen: Any, *, limit: int
    ) -> tuple[list[dict[str, Any]], int, int]:
        """The alarms that a request names or filters; how many they are without the limit; how many are too new."""
        if (alarms is None) == (wanted is None):
            bad("give either `alarms` or `filter`")
        if wanted is None:
            if not isinstance(alarms, list) or not alarms:
                bad("`alarms` is a list of alarms")
            return alarms, len(alarms), 0
        if not isinstance(wanted, dict) or not all(
            name in _FILTER_FIELDS and isinstance(text, str) and len(text) <= TEXT_MAX for name, text in wanted.items()
        ):
            bad(f"`filter` has texts for {', '.join(_FILTER_FIELDS)}, as the list")
        position = unpack(seen) if isinstance(seen, str) else None
        if position is None or not all(
            isinstance(each, list) and len(each) == 2 and all(type(n) is int for n in each) for each in position
        ):
            bad("a filter needs `seen`, as the list gave it: what came since was seen by nobody")
        if not self._board.ready.is_set():
            message = f"the alarm list was not read from Kafka yet ({self._board.trouble})"
            raise Retry(message)
        state, severity, device, rule, q = (wanted.get(name, "").strip() for name in _FILTER_FIELDS)
        state = state or BULK.get(action, "standing")
        return self._board.shown(Filter(_states(state), _severities(severity), device, rule, q), position, limit)

    async def _line(self, request: web.Request, fields: frozenset[str], bytes_max: int) -> dict[str, Any]:
        """What an operator asks for, with the actor that the token proves."""
        name = request[OPERATOR]
        if request.content_type != "application/json":
            # A page of a stranger can send a form or plain text across origins, and JSON only after asking.
            _refuse(web.HTTPUnsupportedMediaType, "send application/json")
        body = await _body(request, bytes_max)
        try:
            line = orjson.loads(body)
        except orjson.JSONDecodeError as e:
            bad(f"the body is no JSON: {e}")
        if not isinstance(line, dict):
            bad("the body is a JSON object")
        if unknown := sorted(set(line) - fields):
            bad(f"no such field: {', '.join(unknown)[:200]}; there are {', '.join(sorted(fields))}")
        if name:
            if line.get("actor") not in (None, "", name):
                _refuse(web.HTTPForbidden, f"this token is {name}'s: actor must be {name}, or left out")
            line["actor"] = name
        return line

    # --- the link in a notice ---

    async def link(self, request: web.Request) -> web.Response:
        """What the link would do, and a button. Opening it does nothing: mail scanners open every link."""
        settings = self._host.live()
        opened = self._opened(request.query.get("token", ""), settings)
        if isinstance(opened, web.Response):
            return opened
        alarm = self._board.get((opened.device_id, opened.rule, opened.pin_position))
        same = alarm is not None and alarm.get("alarm_id") == opened.alarm_id
        said = ""
        if self._board.complete and not same:
            said = "This alarm is over: there is nothing left to acknowledge."
        elif same and alarm is not None and alarm["state"] not in STATES["waiting"]:
            said = f"Nothing to do: the alarm is {alarm['state'].replace('_', ' ')}."
        return self._page(opened, alarm if same else None, said=said, token="" if said else request.query["token"])

    async def follow_link(self, request: web.Request) -> web.Response:
        """Acknowledge what the link names, as its recipient."""
        settings = self._host.live()
        if (request.content_length or 0) > BODY_BYTES_MAX:
            raise web.HTTPRequestEntityTooLarge(BODY_BYTES_MAX, request.content_length or 0)
        form = await request.post()
        token, comment = form.get("token", ""), form.get("comment", "")
        opened = self._opened(token if isinstance(token, str) else "", settings)
        if isinstance(opened, web.Response):
            return opened
        alarm = self._board.get((opened.device_id, opened.rule, opened.pin_position))
        tried = self._board.answered(opened.action_id)
        # Pressed twice is one action; but what was refused then (a shelved alarm) may be right now.
        again = tried is not None and tried["outcome"] != "done"
        try:
            action_id = await self._desk.act(
                {
                    "action": "acknowledge",
                    "action_id": uuid.uuid4().hex if again else opened.action_id,
                    "alarm_id": opened.alarm_id,
                    "device_id": opened.device_id,
                    "rule": opened.rule,
                    "pin_position": opened.pin_position,
                    "actor": opened.recipient,
                    **({"comment": comment} if isinstance(comment, str) and comment.strip() else {}),
                }
            )
        except Reject as e:
            return self._page(opened, alarm, said=str(e), status=400)
        found = await self._board.wait(action_id, LINK_WAIT_S)
        if found is None:
            return self._page(opened, alarm, said="Sent. The alarm will be acknowledged in a moment.", status=202)
        if found["outcome"] == "done":
            return self._page(opened, alarm, said="Acknowledged. Thank you.")
        return self._page(opened, alarm, said=f"Not acknowledged: {found['reason']}.", status=409)

    def _opened(self, token: str, settings: Settings) -> "links.Acknowledgement | web.Response":
        try:
            return links.opened(token, settings)
        except links.LinkExpired:
            return self._page(None, None, said="This link is too old. Look at the alarm on the console.", status=410)
        except links.LinkError:
            return self._page(None, None, said="This link is not valid.", status=403)

    def _page(
        self,
        opened: "links.Acknowledgement | None",
        alarm: Mapping[str, Any] | None,
        *,
        said: str,
        token: str = "",
        status: int = 200,
    ) -> web.Response:
        html = pages.page("ack.html", opened=opened, alarm=alarm, said=said, token=token, path=links.PATH)
        # The one page with a form that the browser sends itself.
        policy = access.CONTENT_SECURITY_POLICY.replace("form-action 'none'", "form-action 'self'")
        headers = {"Content-Security-Policy": policy}
        return web.Response(text=html, status=status, content_type="text/html", headers=headers)


#: Alarms that are taken from the database while the board is not there: several screens full.
STORED_MAX: Final = 1_000


def _states(text: str) -> frozenset[str]:
    found: set[str] = set()
    for word in text.replace("-", "_").split(","):
        states = STATES.get(word.strip())
        if states is None:
            bad(f"state is one or more of {', '.join(sorted(STATES))}, or one of {', '.join(_ENDED)}")
        found |= states
    return frozenset(found)


def _severities(text: str) -> frozenset[str]:
    found = frozenset(word.strip() for word in text.split(",") if word.strip())
    if found - set(SEVERITIES):
        bad(f"severity is one or more of {', '.join(SEVERITIES)}")
    return found


def _refuse(kind: type[web.HTTPException], message: str) -> NoReturn:
    raise kind(text=orjson.dumps({"error": message}).decode(), content_type="application/json")


async def _body(request: web.Request, bytes_max: int) -> bytes:
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > bytes_max:
            raise web.HTTPRequestEntityTooLarge(
                bytes_max,
                len(body),
                text=f'{{"error": "this takes at most {bytes_max} bytes"}}',
                content_type="application/json",
            )
    return bytes(body)
