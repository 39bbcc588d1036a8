"""Logging in by OpenID Connect: the authorization code flow with PKCE, by Authlib.

The provider's keys and addresses are read from its discovery document once, its keys again where a token is signed by one that is not known.
What is believed is the ID token, after its signature, issuer, audience, time and nonce were checked; a claim that it does not have is asked for at
the provider's userinfo, for the same subject.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import structlog

from preservarium.errors import Retry, reason
from preservarium.settings import ROLES, SettingsError, Web

log = structlog.get_logger(__name__)

#: One answer of the provider.
ANSWER_S: Final = 5.0
NAME_CHARS_MAX: Final = 255


class OidcRefused(Exception):
    """The provider, or what it says, lets nobody in; the message is for whoever wanted in."""


@dataclass(frozen=True, slots=True)
class Known:
    """Whom the provider knows."""

    name: str
    role: str
    subject: str


@dataclass(frozen=True, slots=True)
class Leaving:
    """Where to send a browser, and what must be known when it comes back."""

    url: str
    state: str
    nonce: str
    verifier: str


def check(settings: Web) -> None:
    """Refuse settings that need what is not installed.

    Raises:
        SettingsError: `web.oidc_issuer` is set, and Authlib is missing.
    """
    if settings.oidc_issuer:
        try:
            _client_class()
        except ImportError as e:
            message = f"PRESERVARIUM_WEB__OIDC_ISSUER needs Authlib: pip install 'preservarium[oidc]' ({e})"
            raise SettingsError(message) from None


def _client_class() -> Any:
    # Loaded when it is needed: most have no provider, and httpx and cryptography take 30 MB.
    from authlib.integrations.base_client.async_app import AsyncOAuth2Mixin
    from authlib.integrations.base_client.async_openid import AsyncOpenIDMixin
    from authlib.integrations.httpx_client import AsyncOAuth2Client

    class Client(AsyncOAuth2Mixin, AsyncOpenIDMixin):  # type: ignore[misc,unused-ignore]
        client_cls = AsyncOAuth2Client

        async def get(self, url: str, **options: Any) -> Any:
            return await self.request("GET", url, **options)

    return Client


class Provider:
    """The provider of the settings, as they are now."""

    def __init__(self) -> None:
        self._client: Any = None
        self._made_of: tuple[str, ...] = ()

    def _of(self, settings: Web) -> Any:
        made_of = (
            settings.oidc_issuer,
            settings.oidc_client_id,
            settings.oidc_client_secret.get_secret_value(),
            settings.oidc_scopes,
        )
        if self._client is None or made_of != self._made_of:
            issuer, client_id, secret, scopes = made_of
            self._client = _client_class()(
                None,
                name="preservarium",
                client_id=client_id,
                client_secret=secret or None,
                server_metadata_url=f"{issuer.rstrip('/')}/.well-known/openid-configuration",
                client_kwargs={
                    "scope": scopes,
                    "code_challenge_method": "S256",
                    "timeout": ANSWER_S,
                    **({} if secret else {"token_endpoint_auth_method": "none"}),
                },
                user_agent="preservarium",
            )
            self._made_of = made_of
        return self._client

    async def leave(self, settings: Web, redirect_uri: str) -> Leaving:
        """Where somebody logs in.

        Raises:
            Retry: the provider does not answer.
            OidcRefused: it is another one than the settings say.
        """
        client = self._of(settings)
        try:
            metadata = await client.load_server_metadata()
            # OpenID Connect Discovery 4.3: it must be exactly the issuer that was asked.
            if metadata.get("issuer") != settings.oidc_issuer:
                self._client = None
                message = f"the provider calls itself {str(metadata.get('issuer'))[:200]!r}: PRESERVARIUM_WEB__OIDC_ISSUER must be exactly that"
                raise OidcRefused(message)
            made = await client.create_authorization_url(redirect_uri)
        except OidcRefused:
            raise
        except Exception as e:
            message = f"the provider does not answer: {reason(e)}"
            raise Retry(message) from e
        return Leaving(made["url"], made["state"], made["nonce"], made["code_verifier"])

    async def known(self, settings: Web, redirect_uri: str, code: str, verifier: str, nonce: str) -> Known:
        """Whom a code is of.

        Raises:
            Retry: the provider does not answer.
            OidcRefused: the code or the token is not right, or who it is of may not.
        """
        client = self._of(settings)
        try:
            token = await client.fetch_access_token(redirect_uri, code=code, code_verifier=verifier)
            claims = await client.parse_id_token(
                token,
                nonce,
                {
                    "iss": {"essential": True, "values": [settings.oidc_issuer]},
                    "aud": {"essential": True, "value": settings.oidc_client_id},
                },
            )
            if claims is None:
                message = "the provider gave no ID token: is `openid` among PRESERVARIUM_WEB__OIDC_SCOPES?"
                raise OidcRefused(message)
            said: dict[str, Any] = dict(claims)
            wanted = (settings.oidc_name_claim, settings.oidc_role_claim)
            if any(_claim(said, name) is None for name in wanted) and client.server_metadata.get("userinfo_endpoint"):
                more = dict(await client.userinfo(token=token))
                # OpenID Connect Core 5.3.2: another subject's must not be used.
                if more.get("sub") == said["sub"]:
                    said = {**more, **said}
        except OidcRefused:
            raise
        except Exception as e:
            module = type(e).__module__.partition(".")[0]
            if isinstance(e, OSError | asyncio.TimeoutError) or module.startswith(("httpx", "httpcore")):
                message = f"the provider does not answer: {reason(e)}"
                raise Retry(message) from e
            # What it is exactly is for the log: a token stands in some of these.
            log.warning("oidc_login_refused", error=type(e).__name__, description=str(getattr(e, "error", ""))[:200])
            message = "the provider's answer does not prove who you are: try again"
            raise OidcRefused(message) from e
        return _known(settings, said)


def _known(settings: Web, said: Mapping[str, Any]) -> Known:
    name, subject = _claim(said, settings.oidc_name_claim), str(said.get("sub", ""))
    if not isinstance(name, str) or not 0 < len(name.strip()) <= NAME_CHARS_MAX or not name.isprintable():
        message = f"the provider does not say your name: the claim {settings.oidc_name_claim} is missing"
        raise OidcRefused(message)
    role = role_of(settings, _claim(said, settings.oidc_role_claim))
    if not role:
        message = f"{name} may not: nothing in the claim {settings.oidc_role_claim} is a role here"
        raise OidcRefused(message)
    return Known(name.strip(), role, subject[:NAME_CHARS_MAX])


def _claim(said: Mapping[str, Any], path: str) -> Any:
    """A claim by its name, or by its way into objects. A name with dots in it comes first, as those that are URLs have."""
    if path in said:
        return said[path]
    found: Any = said
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def role_of(settings: Web, value: Any) -> str:
    """The highest role that what somebody is at the provider makes; "" for none."""
    values = value if isinstance(value, list) else [value]
    made = [settings.role_of[each] for each in values if isinstance(each, str) and each in settings.role_of]
    return max(made, key=ROLES.index, default=settings.oidc_default_role)
