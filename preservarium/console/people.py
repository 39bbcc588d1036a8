"""Logging in and out, who there is, and what was done at the door.

| request | what it does |
|---|---|
| `GET /login` | the page to log in |
| `GET /api/v1/session` | who asks, what they may, and which ways there are to log in |
| `POST /api/v1/session` | logs in by name and password: sets the cookie |
| `DELETE /api/v1/session` | logs out |
| `GET /login/oidc`, `GET /login/oidc/callback` | to the OIDC provider, and back |
| `GET /api/v1/people` | users with their roles, tokens with their scopes, for administrators |
| `GET /api/v1/people/events` | what was done: who logged in, who was refused, …, newest first: `?name`, `?limit`, `?cursor` |
"""

import asyncio
import functools
import hmac
from typing import Any, Final
from urllib.parse import urlsplit

import orjson
from aiohttp import web

from preservarium.console import access, pages
from preservarium.console.audit import Audit, known
from preservarium.console.host import Host
from preservarium.console.oidc import OidcRefused, Provider
from preservarium.console.replies import answer, bad, cursor_of, limit_of, pack, refuse, text_of, wrapped
from preservarium.errors import Retry
from preservarium.serving import hosts, people, sessions
from preservarium.serving.attempts import Attempts
from preservarium.serving.clients import client_of
from preservarium.serving.rights import Right
from preservarium.settings import Web
from preservarium.stores.people_log import PeopleLog

#: A name and a password.
BODY_BYTES_MAX: Final = 4_096
#: Hashes that are compared at once, in threads: 20 ms and 19 MiB each, beside the stages.
HASHES_MAX: Final = 1
#: Log-ins that wait for their turn; each further one is refused at once.
WAITING_MAX: Final = 32
#: A page after the log-in; longer ones are not gone back to.
NEXT_CHARS_MAX: Final = 2_000
OIDC_PATH: Final = "/login/oidc"
CALLBACK_PATH: Final = "/login/oidc/callback"


class PeopleViews:
    """The views of one worker."""

    def __init__(self, host: Host, audit: Audit, store: PeopleLog) -> None:
        self._host = host
        self._audit = audit
        self._store = store
        self._attempts = Attempts()
        self._provider = Provider()
        self._hashes = asyncio.Semaphore(HASHES_MAX)
        self._waiting = 0

    def mount(self, application: web.Application) -> None:
        """Add the routes to an aiohttp application that has not started."""
        router, live = application.router, self._host.live
        open_ = functools.partial(wrapped, right=Right.OPEN, live=live)
        admin = functools.partial(wrapped, right=Right.ADMIN, live=live)
        router.add_get("/login", open_(self.page))
        router.add_get(OIDC_PATH, open_(self.leave, timeout_s=15.0))
        router.add_get(CALLBACK_PATH, open_(self.come_back, timeout_s=30.0))
        router.add_get("/api/v1/session", open_(self.session))
        router.add_post("/api/v1/session", open_(self.log_in, timeout_s=15.0))
        router.add_delete("/api/v1/session", open_(self.log_out))
        router.add_get("/api/v1/people", admin(self.people))
        router.add_get("/api/v1/people/events", admin(self.events))

    # --- sessions ---

    async def page(self, request: web.Request) -> web.Response:
        """The page to log in; what it offers, its script asks for."""
        said = _SAID.get(request.query.get("said", ""), "")
        return web.Response(text=pages.page("login_page.html", said=said), content_type="text/html")

    async def session(self, request: web.Request) -> web.Response:
        """Who asks. Asking it proves nothing and changes nothing; whoever shows a wrong token hears so."""
        settings = self._host.live().web
        caller = access.caller_of(request, settings)
        return answer(
            {
                "name": caller.name if caller else None,
                "role": (caller.role or None) if caller else None,
                "how": caller.how if caller else None,
                "rights": sorted(caller.rights) if caller else [],
                "csrf": (caller.csrf or None) if caller else None,
                "ways": _ways(settings),
            }
        )

    async def log_in(self, request: web.Request) -> web.Response:
        """`{"name": …, "password": …}`: 200 with the cookie, 401, or 429 where it was tried too often."""
        settings = self._host.live().web
        if request.content_type != "application/json":
            refuse(415, "send application/json")
        if hosts.from_a_strangers_page(request, settings):
            # It would log somebody in as somebody else, who then finds what was done there.
            refuse(403, "asked by a page of another origin")
        name, password = await _credentials(request)
        client, now_s = client_of(request.remote), self._host.clock.monotonic_s()
        if wait_s := self._attempts.wait_s(client, name, now_s):
            refuse(429, f"too many log-ins that failed: try again in {wait_s} s", {"Retry-After": str(wait_s)})
        if self._waiting >= WAITING_MAX:
            refuse(429, "too many log in at once: try again", {"Retry-After": "2"})
        roll = people.current(settings)
        user = roll.users.get(name)
        self._attempts.failed(client, name, now_s)
        self._waiting += 1
        try:
            async with self._hashes:
                right = await asyncio.to_thread(people.verified, user, password)
        finally:
            self._waiting -= 1
        if user is None or not right:
            self._audit.tell("login_refused", known(roll, name), client=client, how="password")
            refuse(401, "the name or the password is wrong")
        self._attempts.succeeded(client, name)
        self._audit.tell("logged_in", name, client=client, how="password", role=user.role)
        return self._begun(request, settings, *sessions.begin(settings, name, "password", user.mark), role=user.role)

    def _begun(
        self, request: web.Request, settings: Web, session: sessions.Session, cookie: str, *, role: str
    ) -> web.Response:
        rights = sorted(people.RIGHTS[role])
        said = {
            "name": session.name,
            "role": role,
            "how": session.how,
            "rights": rights,
            "csrf": sessions.csrf(settings, session),
        }
        response = answer({**said, "ways": _ways(settings)})
        sessions.give(response, request, settings, cookie)
        return response

    async def log_out(self, request: web.Request) -> web.Response:
        """End the session; harmless where there is none."""
        settings = self._host.live().web
        if hosts.from_a_strangers_page(request, settings):
            refuse(403, "asked by a page of another origin")
        found = sessions.of(request, settings)
        if found is not None:
            given = request.headers.get(sessions.CSRF_HEADER, "")
            if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), found[1].csrf.encode()):
                refuse(403, f"the header {sessions.CSRF_HEADER} is missing or wrong: GET /api/v1/session says it")
            sessions.end(found[0])
            self._audit.tell("logged_out", found[0].name, client=client_of(request.remote), how=found[0].how)
        response = web.Response(status=204)
        sessions.take(response)
        return response

    # --- OIDC ---

    def _redirect_uri(self, request: web.Request, settings: Web) -> str:
        # The Host was looked at by the door: it is one of our names.
        base = settings.public_url.rstrip("/") or f"{request.scheme}://{request.host}"
        return f"{base}{CALLBACK_PATH}"

    async def leave(self, request: web.Request) -> web.StreamResponse:
        """To the provider."""
        settings = self._host.live().web
        if not settings.oidc_issuer:
            refuse(404, "there is no OIDC provider: PRESERVARIUM_WEB__OIDC_ISSUER")
        try:
            leaving = await self._provider.leave(settings, self._redirect_uri(request, settings))
        except (Retry, OidcRefused) as e:
            return self._not_in(request, "-", str(e), status=503)
        flow = {
            "state": leaving.state,
            "nonce": leaving.nonce,
            "verifier": leaving.verifier,
            "next": _next(request.query.get("next", "")),
        }
        response = web.Response(status=302, headers={"Location": leaving.url})
        response.set_cookie(
            sessions.FLOW_COOKIE, sessions.pack_flow(settings, flow), max_age=sessions.FLOW_S, path=OIDC_PATH,
            secure=sessions.secure(request, settings), httponly=True, samesite="Lax",
        )  # fmt: skip
        return response

    async def come_back(self, request: web.Request) -> web.StreamResponse:
        """From the provider: with a code, or with what it has against it."""
        settings = self._host.live().web
        flow = sessions.unpack_flow(settings, request.cookies.get(sessions.FLOW_COOKIE, ""))
        state = request.query.get("state", "")
        if (
            not settings.oidc_issuer
            or flow is None
            or not hmac.compare_digest(state.encode(), flow.get("state", "").encode())
        ):
            return self._not_in(
                request, "state", "nobody left for the provider from here within ten minutes", status=400
            )
        # RFC 9207: where the provider says who it is, it must be ours.
        if request.query.get("iss", settings.oidc_issuer) != settings.oidc_issuer:
            return self._not_in(request, "state", "another provider answered", status=400)
        if "code" not in request.query:
            return self._not_in(
                request,
                "denied",
                f"the provider let nobody in: {request.query.get('error', 'no code')[:80]}",
                status=401,
            )
        try:
            found = await self._provider.known(
                settings, self._redirect_uri(request, settings), request.query["code"], flow["verifier"], flow["nonce"]
            )
        except Retry as e:
            return self._not_in(request, "provider", str(e), status=503)
        except OidcRefused as e:
            return self._not_in(request, "refused", str(e), status=403)
        _, cookie = sessions.begin(settings, found.name, "oidc", sessions.provider_mark(settings), found.role)
        self._audit.tell(
            "logged_in",
            found.name,
            client=client_of(request.remote),
            how="oidc",
            role=found.role,
            subject=found.subject,
            issuer=settings.oidc_issuer,
        )
        # A redirect straight on would be the provider's navigation, to which a browser adds no cookie that is Strict; ours is Lax.
        response = web.Response(status=302, headers={"Location": flow.get("next") or "/"})
        sessions.give(response, request, settings, cookie)
        response.del_cookie(sessions.FLOW_COOKIE, path=OIDC_PATH)
        return response

    def _not_in(self, request: web.Request, word: str, why: str, *, status: int) -> web.Response:
        """The page to log in, which says why it did not."""
        self._audit.tell("login_refused", "?", client=client_of(request.remote), how="oidc", reason=why)
        response = web.Response(
            text=pages.page("login_page.html", said=f"Not logged in: {why}."), status=status, content_type="text/html"
        )
        if word != "-":
            response.del_cookie(sessions.FLOW_COOKIE, path=OIDC_PATH)
        return response

    # --- for administrators ---

    async def people(self, _request: web.Request) -> web.Response:
        """Who there is. Hashes and tokens are not shown."""
        settings = self._host.live().web
        roll = people.current(settings)
        return answer(
            {
                "users": [
                    {
                        "name": user.name,
                        "role": user.role,
                        "created_at": user.created_at or None,
                        "password_changed_at": user.changed_at or None,
                    }
                    for user in sorted(roll.users.values(), key=lambda user: user.name)
                ],
                "tokens": [
                    {
                        "name": token.name,
                        "scopes": list(token.scopes),
                        "created_at": token.created_at or None,
                        "expires_at": token.expires_at,
                    }
                    for token in sorted(roll.tokens.values(), key=lambda token: token.name)
                ],
                "operators": sorted(settings.operator_tokens),
                "operator_token": bool(settings.operator_token.get_secret_value()),
                "oidc": {"issuer": settings.oidc_issuer, "roles": settings.role_of} if settings.oidc_issuer else None,
                "file": settings.users_file or None,
                "note": people.fault(settings) or None,
                "at": self._host.clock.now_us(),
            }
        )

    async def events(self, request: web.Request) -> web.Response:
        """What was done at the door, newest first."""
        name, cursor, limit = text_of(request, "name"), cursor_of(request), limit_of(request)
        if cursor is not None and (len(cursor) != 1 or type(cursor[0]) is not int or not 0 <= cursor[0] < 2**63):
            bad("cursor is not one of ours")
        found = await self._store.newest(before=cursor[0] if cursor else None, limit=limit + 1, name=name)
        page = found[:limit]
        return answer(
            {
                "events": page,
                "next_cursor": pack([page[-1]["position"]]) if len(found) > limit else None,
                "waiting": self._audit.waiting,
                "at": self._host.clock.now_us(),
            }
        )


#: `?said=` of /login -> what it says; no other text is taken out of an address.
_SAID: Final = {"out": "You have logged out.", "over": "Your log-in is over: log in again."}


def _ways(settings: Web) -> list[str]:
    """How one can log in: by password, oidc, token; none where nobody is configured."""
    roll = people.current(settings)
    tokens = bool(settings.operator_tokens or settings.operator_token.get_secret_value() or roll.tokens)
    return [
        way for way, there in (("password", roll.users), ("oidc", settings.oidc_issuer), ("token", tokens)) if there
    ]


def _next(path: str) -> str:
    """A page of ours to go to after the log-in; "" for anything else."""
    parts = urlsplit(path) if len(path) <= NEXT_CHARS_MAX and path.isprintable() else None
    ours = (
        parts is not None
        and not parts.scheme
        and not parts.netloc
        and path.startswith("/")
        and not path.startswith(("//", "/\\"))
    )
    return path if ours and "\\" not in path else ""


async def _credentials(request: web.Request) -> tuple[str, str]:
    body = await request.content.read(BODY_BYTES_MAX + 1)
    while len(body) <= BODY_BYTES_MAX and (more := await request.content.read(BODY_BYTES_MAX)):
        body += more
    if len(body) > BODY_BYTES_MAX:
        refuse(413, f"this takes at most {BODY_BYTES_MAX} bytes")
    try:
        said: Any = orjson.loads(body)
    except orjson.JSONDecodeError as e:
        bad(f"the body is no JSON: {e}")
    if (
        not isinstance(said, dict)
        or said.keys() != {"name", "password"}
        or not all(isinstance(each, str) for each in said.values())
    ):
        bad("the body is {name, password}, both texts")
    if not 0 < len(said["name"]) <= 255:
        bad("a name has 1 to 255 characters")
    return said["name"], said["password"]
