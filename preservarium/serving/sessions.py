"""Sessions: a signed cookie that says who has logged in, and how. The server keeps nothing but those that were ended here.

A cookie is believed for `web.session_s`, and for as long as what it stands on is there: of a user the file's entry with the same password, of
somebody whom the OIDC provider named the provider of the settings. What a role may is asked of the file each time.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Any, Final

import cachetools
from aiohttp import web
from itsdangerous import BadData, URLSafeTimedSerializer

from preservarium.serving import people
from preservarium.serving.people import RIGHTS, Caller
from preservarium.settings import ROLES, Web

#: Browsers send a cookie with this prefix over TLS only, and take it from no neighbouring host.
SECURE_COOKIE: Final = "__Host-preservarium-session"
COOKIE: Final = "preservarium-session"
#: What a request of a session that changes something must bring along.
CSRF_HEADER: Final = "X-CSRF-Token"
#: Between leaving for the provider and coming back.
FLOW_S: Final = 600
FLOW_COOKIE: Final = "preservarium-oidc"
#: Sessions that were ended here and would still be believed.
ENDED_MAX: Final = 100_000

_SALT: Final = "preservarium session v1"
_FLOW_SALT: Final = "preservarium oidc v1"
#: Where neither the settings nor the file have a secret.
_OWN: Final = secrets.token_urlsafe(32)
_ended: Final[cachetools.LRUCache[str, bool]] = cachetools.LRUCache(ENDED_MAX)


@dataclass(frozen=True, slots=True)
class Session:
    """Who has logged in."""

    id: str
    name: str
    how: str  #: password or oidc
    mark: str  #: of a user: of the password; of OIDC: of the provider
    role: str = ""  #: of OIDC; a user's is the file's


def _secret(settings: Web) -> str:
    return settings.session_secret.get_secret_value() or people.current(settings).secret or _OWN


def lasting(settings: Web) -> bool:
    """Whether sessions outlive this worker."""
    return _secret(settings) is not _OWN


def _signer(settings: Web, salt: str) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(
        _secret(settings), salt=salt, signer_kwargs={"digest_method": hashlib.sha256, "key_derivation": "hmac"}
    )


def provider_mark(settings: Web) -> str:
    """Changes where the provider of the settings does."""
    text = f"{settings.oidc_issuer}\0{settings.oidc_client_id}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def begin(settings: Web, name: str, how: str, mark: str, role: str = "") -> tuple[Session, str]:
    """A session and its cookie's value."""
    session = Session(secrets.token_urlsafe(16), name, how, mark, role)
    return session, str(_signer(settings, _SALT).dumps([session.id, name, how, mark, role]))


def of(request: web.Request, settings: Web) -> tuple[Session, Caller] | None:
    """The session of a request, and who that makes it; None where there is none that counts."""
    value = request.cookies.get(SECURE_COOKIE) or request.cookies.get(COOKIE)
    if not value:
        return None
    try:
        said: Any = _signer(settings, _SALT).loads(value, max_age=int(settings.session_s))
        session = Session(*said)
    except (BadData, TypeError):
        return None
    if session.id in _ended:
        return None
    if session.how == "password":
        user = people.current(settings).users.get(session.name)
        if user is None or not hmac.compare_digest(user.mark, session.mark):
            return None
        role = user.role
    elif (
        session.how == "oidc"
        and settings.oidc_issuer
        and session.mark == provider_mark(settings)
        and session.role in ROLES
    ):
        role = session.role
    else:
        return None
    return session, Caller(session.name, RIGHTS[role], session.how, role, csrf(settings, session))


def csrf(settings: Web, session: Session) -> str:
    """What the session's requests that change something must bring along: no page of a stranger can read it."""
    return hmac.new(_secret(settings).encode(), f"csrf\0{session.id}".encode(), hashlib.sha256).hexdigest()


def end(session: Session) -> None:
    """Believe this session no more, in this worker."""
    _ended[session.id] = True


def secure(request: web.Request, settings: Web) -> bool:
    """Whether people reach us by TLS, as far as we know: then the cookie is for TLS alone."""
    return request.secure or settings.public_url.startswith("https://")


def give(response: web.StreamResponse, request: web.Request, settings: Web, value: str) -> None:
    """Set the session's cookie."""
    safe = secure(request, settings)
    # Lax: who follows a link of a mail has logged in; what changes something needs more (CSRF_HEADER).
    response.set_cookie(
        SECURE_COOKIE if safe else COOKIE,
        value,
        max_age=int(settings.session_s),
        path="/",
        secure=safe,
        httponly=True,
        samesite="Lax",
    )


def take(response: web.StreamResponse) -> None:
    """Take the session's cookie back."""
    response.del_cookie(COOKIE, path="/", httponly=True, samesite="Lax")
    response.del_cookie(SECURE_COOKIE, path="/", secure=True, httponly=True, samesite="Lax")


def pack_flow(settings: Web, flow: dict[str, str]) -> str:
    """What must be known again when somebody comes back from the provider, as a cookie's value."""
    return str(_signer(settings, _FLOW_SALT).dumps(flow))


def unpack_flow(settings: Web, value: str) -> dict[str, str] | None:
    """What `pack_flow` packed; None where it is not ours, or too old."""
    try:
        flow = _signer(settings, _FLOW_SALT).loads(value, max_age=FLOW_S)
    except BadData:
        return None
    return flow if isinstance(flow, dict) else None
