"""Who may see and do what, and the headers that keep a browser from being used against us."""

import hmac
import ipaddress
import time
from typing import Final, NoReturn

import orjson
from aiohttp import web
from aiohttp.typedefs import Middleware

from preservarium.serving import hosts, people, sessions
from preservarium.serving.people import Caller
from preservarium.serving.rights import Handler, Right, bearer, right_of
from preservarium.settings import LiveSettings, SettingsError, Web

#: The page is one document with its own script and style and talks to its own origin; nothing else is allowed.
CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

HEADERS: Final = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Everything here is about now: a copy in a cache would lie.
    "Cache-Control": "no-store",
}

#: A request that a proxy passed on comes from the proxy's address, which says nothing about who asks.
_PROXY_HEADERS: Final = ("Forwarded", "X-Forwarded-For", "X-Real-IP")

#: Methods that change nothing.
_SAFE: Final = frozenset(("GET", "HEAD", "OPTIONS"))
#: Where nobody is configured, this machine is everybody.
_ALL: Final = people.RIGHTS["admin"]
#: Right -> who has it, for people.
_WHO: Final = {
    Right.READ: "a viewer",
    Right.OPERATE: "an operator",
    Right.ENGINEER: "an engineer",
    Right.ADMIN: "an administrator",
}
_NOBODY: Final = Caller("", frozenset(), "")

#: A worker that asks another one for a value of a table shows this: when, and a proof over it that needs a secret which workers share. So
#: neither that secret nor a token goes over the network to an address that stands in a topic.
WORKER_HEADER: Final = "X-Preservarium-Worker"
#: What a worker may ask so: nothing but a value to read.
WORKER_PATHS: Final = "/api/tables/"
#: A proof holds for so long, whatever the clocks of two machines differ by.
WORKER_PROOF_US: Final = 60_000_000
_WORKER: Final = Caller("", frozenset((Right.OPERATE,)), "worker")


def _worker_secrets(settings: Web) -> list[str]:
    """What all workers of a system are given alike, the first that is there for asking, any of them for believing."""
    shared = [settings.operator_token.get_secret_value(), *settings.operator_tokens.values()]
    return [each for each in (*shared, settings.supervisor_token.get_secret_value()) if each]


def as_worker(settings: Web, path: str, at_us: int) -> dict[str, str]:
    """Headers that prove to another worker with the same secrets that a worker asks; none where there are no secrets."""
    found = _worker_secrets(settings)
    return {WORKER_HEADER: f"{at_us}:{_proof(found[0], path, at_us)}"} if found else {}


def _proof(secret: str, path: str, at_us: int) -> str:
    return hmac.new(secret.encode(), f"worker GET {path} {at_us}".encode(), "sha256").hexdigest()


def _is_worker(request: web.Request, settings: Web) -> bool:
    given = request.headers.get(WORKER_HEADER, "")
    at, _, proof = given.partition(":")
    path = request.raw_path
    if (
        request.method != "GET"
        or not path.startswith(WORKER_PATHS)
        or not (at.isascii() and at.isdigit() and len(at) < 20)
    ):
        return False
    if abs(time.time_ns() // 1_000 - int(at)) > WORKER_PROOF_US:
        return False
    found = [
        hmac.compare_digest(proof.encode("utf-8", "surrogateescape"), _proof(secret, path, int(at)).encode())
        for secret in _worker_secrets(settings)
    ]
    return any(found)


def check(web_settings: Web, bind: str | None = None) -> None:
    """Refuse a port that would show everybody everything.

    Args:
        web_settings: of the web port.
        bind: the address that is bound, where it is not `web.host`.

    Raises:
        SettingsError: it is bound to more than this machine, and nobody is configured; or the file of users cannot be read.
    """
    bound = web_settings if bind is None else web_settings.model_copy(update={"host": bind})
    try:
        configured = people.configured(bound)
    except people.PeopleError as e:
        message = f"PRESERVARIUM_WEB__USERS_FILE: {e}"
        raise SettingsError(message) from None
    if not bound.loopback and not configured:
        message = (
            f"PRESERVARIUM_WEB__HOST: the web port would be open to whoever reaches {bound.host or 'this machine'}, because nobody is configured who may "
            f"log in; {people.who_to_name()}; or bind it to 127.0.0.1"
        )
        raise SettingsError(message)


def caller_of(request: web.Request, settings: Web) -> Caller | None:
    """Who asks, as far as a token, a session or this machine's own address proves it; None where nothing does.

    Raises:
        web.HTTPUnauthorized: a token is shown, and it is nobody's. Another proof beside it does not count then.
        web.HTTPForbidden: a session asks for a change, and it is not our page that asks.
    """
    # Any header of this name means to prove something, also one of another scheme.
    if "Authorization" in request.headers:
        caller = people.by_token(settings, bearer(request))
        if caller is None and people.configured(settings):
            _unauthorized("the token is wrong, or its time is over")
        if caller is not None:
            return caller
    if found := sessions.of(request, settings):
        if request.method not in _SAFE:
            given = request.headers.get(sessions.CSRF_HEADER, "")
            if hosts.from_a_strangers_page(request, settings):
                _forbid("asked by a page of another origin")
            if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), found[1].csrf.encode()):
                _forbid(f"the header {sessions.CSRF_HEADER} is missing or wrong: GET /api/v1/session says it")
        return found[1]
    if WORKER_HEADER in request.headers and _is_worker(request, settings):
        return _WORKER
    if settings.loopback and not people.configured(settings) and _passed_by_nobody(request):
        return Caller("", _ALL, "machine")
    return None


def admit(request: web.Request, settings: Web, right: Right) -> Caller:
    """Let through who has the right, and say who it is. This is the one check of everything that the web port serves.

    Where somebody is configured (`web.users_file`, `web.oidc_issuer`, `web.operators`, `web.operator_token`), a token or a session proves
    who asks, whoever asks from wherever. Where nobody is, the port is bound to loopback, and this machine itself may do everything:
    from its loopback address, with no proxy in between; what changes something or shows more than a viewer sees, under a loopback name and
    with a page of ours where it is a browser (which sends the machine's own requests for any page that asks it to).

    Args:
        request: the request.
        settings: of the web port, in force now.
        right: what the handler needs. OPEN, LINK and SENDER are not asked for here.

    Returns:
        Who asks. Its name is "" where none is proven: with `web.operator_token`, or from this machine, the actor is whoever the request
        names.

    Raises:
        web.HTTPUnauthorized: nothing proves who asks.
        web.HTTPForbidden: who asks may not, or it is not our page that asks.
    """
    if right in (Right.OPEN, Right.LINK, Right.SENDER):
        return _NOBODY
    caller = caller_of(request, settings)
    if caller is None:
        if settings.loopback and not people.configured(settings):
            _forbid(f"served to this machine only: {people.who_to_name()}")
        _unauthorized("log in, or show a token")
    if right not in caller.rights:
        who = (
            f"{caller.name} is {caller.role}"
            if caller.role and caller.name
            else "this token's scopes do not reach so far"
        )
        _forbid(f"this is for {_WHO[right]}: {who}")
    if caller.how == "machine" and right is not Right.READ:
        if not _by_own_name(request):
            _forbid(f"served to this machine only: {people.who_to_name()}")
        if hosts.from_a_strangers_page(request, settings):
            _forbid("asked by a page of another origin")
    return caller


def closed(live: LiveSettings) -> Middleware:
    """Keeps what says nothing of who may ask it, as Faust's own handlers, for operators. They raise for a table that is none."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.match_info.http_exception is None and right_of(request.match_info.handler) is None:
            admit(request, live().web, Right.OPERATE)
            try:
                return await handler(request)
            except LookupError:
                raise web.HTTPNotFound(
                    text='{"error": "there is no table of that name"}', content_type="application/json"
                ) from None
        return await handler(request)

    return check


def _from_this_machine(request: web.Request) -> bool:
    return _passed_by_nobody(request) and _by_own_name(request)


def _passed_by_nobody(request: web.Request) -> bool:
    """Whether it comes from this machine's loopback address, and no proxy says that it is another's."""
    try:
        address = ipaddress.ip_address(request.remote or "")
    except ValueError:
        return False
    # A socket that is bound to :: shows an IPv4 peer as ::ffff:127.0.0.1, which Python 3.11 does not call loopback.
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback and not any(name in request.headers for name in _PROXY_HEADERS)


def _by_own_name(request: web.Request) -> bool:
    return hosts.host_name(request.host).lower() in hosts.LOOPBACK_NAMES


def _unauthorized(message: str) -> NoReturn:
    raise web.HTTPUnauthorized(
        text=orjson.dumps({"error": message}).decode(),
        content_type="application/json",
        headers={"WWW-Authenticate": 'Bearer realm="preservarium"'},
    )


def _forbid(message: str) -> NoReturn:
    raise web.HTTPForbidden(text=orjson.dumps({"error": message}).decode(), content_type="application/json")
