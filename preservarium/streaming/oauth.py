"""Tokens by which Kafka's clients log in with OAUTHBEARER: asked for, kept while they are good, asked for again before they end.

| `kafka.sasl_oauth` | where a token comes from |
|---|---|
| `oidc` | a token endpoint, with client id and secret (OAuth's client credentials): Azure, Keycloak, Confluent Cloud, … |
| `file` | a file that somebody else keeps fresh: Kubernetes' projected tokens, a sidecar |
| `aws` | the machine's or pod's AWS role, signed for Amazon MSK's IAM (needs aws-msk-iam-sasl-signer-python) |
| `gcp` | the machine's or pod's Google service account, for Google's managed Kafka (extra `gcp`) |

One provider for all clients of a process with the same settings, from whichever thread or event loop they ask.
"""

import asyncio
import base64
import calendar
import functools
import json
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import structlog
from aiokafka.abc import AbstractTokenProvider
from aiokafka.errors import KafkaConnectionError

from preservarium.errors import reason
from preservarium.settings import Kafka, SettingsError

log = structlog.get_logger(__name__)

#: An endpoint that has not answered for so long is down; a client that connects waits for it.
ANSWER_S: Final = 10.0
#: A token is asked for anew when so much of its life is over: a connection made at the end of it would be closed at once.
FRESH_SHARE: Final = 0.8
#: A token that does not say when it ends is asked for again after this time.
LIFE_UNKNOWN_S: Final = 300.0
#: After a failure nobody asks again for so long: a dozen clients that reconnect must not bring an endpoint down.
FAILED_S: Final = 1.0
#: Tokens have some KiB; brokers take no more than some hundred.
TOKEN_BYTES_MAX: Final = 100_000


class Token(NamedTuple):
    """A token and when it ends."""

    text: str
    until_s: float  #: seconds since the epoch


class NoToken(KafkaConnectionError):  # type: ignore[misc]
    """No token can be had. Clients treat it as a broker that cannot be reached, and try again."""


class Provider(AbstractTokenProvider):  # type: ignore[misc]
    """Keeps a token, and asks for another one in time. Safe from several threads.

    Args:
        ask: blocks, and gives a token; raises whatever goes wrong.
        extensions: sent along with it.
        clock: seconds since the epoch.
    """

    def __init__(
        self, ask: Callable[[], Token], extensions: dict[str, str] | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._ask = ask
        self._extensions = extensions or {}
        self._clock = clock
        self._lock = threading.Lock()
        self._token: Token | None = None
        self._fresh_until_s = 0.0
        self._failed: tuple[float, str] | None = None

    async def token(self) -> str:
        """The token; asks for it in a thread where need be.

        Raises:
            NoToken: none can be had, and the last one has ended.
        """
        token = self._token
        if token is not None and self._clock() < self._fresh_until_s:
            return token.text
        return await asyncio.to_thread(self._renewed)

    def extensions(self) -> dict[str, str]:
        """What goes along with the token, as Confluent Cloud asks for."""
        return self._extensions

    def _renewed(self) -> str:
        with self._lock:
            now_s = self._clock()
            if self._token is not None and now_s < self._fresh_until_s:
                return self._token.text
            if self._failed is None or now_s - self._failed[0] >= FAILED_S:
                try:
                    token = self._ask()
                    _check(token, now_s)
                except Exception as e:
                    self._failed = now_s, reason(e)
                    log.warning("kafka_token_not_had", error=self._failed[1])
                else:
                    self._token, self._failed = token, None
                    self._fresh_until_s = now_s + (token.until_s - now_s) * FRESH_SHARE
                    return token.text
            if self._token is not None and now_s < self._token.until_s:
                return self._token.text  # it is still good, if not for long
            message = f"no token for OAUTHBEARER: {self._failed[1] if self._failed else 'none was given'}"
            raise NoToken(message)


def _check(token: Token, now_s: float) -> None:
    if not token.text or len(token.text) > TOKEN_BYTES_MAX or not token.text.isascii() or not token.text.isprintable():
        message = "what was given is no token"
        raise ValueError(message)
    if token.until_s <= now_s:
        message = f"the token has ended {now_s - token.until_s:.0f} s ago: does this machine's clock go right?"
        raise ValueError(message)


@functools.lru_cache(maxsize=8)
def provider(kafka: Kafka) -> Provider:
    """The provider of these settings; one for all clients of the process.

    Raises:
        SettingsError: what the settings ask for is not installed, or a file of theirs cannot be used.
    """
    return Provider(_source(kafka), dict(extensions_of(kafka.sasl_oauth_extensions)))


def extensions_of(text: str) -> list[tuple[str, str]]:
    """`name=value` pairs separated by commas."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    return [(name.strip(), value.strip()) for name, _, value in pairs]


def _source(kafka: Kafka) -> Callable[[], Token]:
    if kafka.sasl_oauth == "file":
        return functools.partial(from_file, Path(kafka.sasl_oauth_file))
    if kafka.sasl_oauth == "aws":
        return _aws(kafka.sasl_oauth_region)
    if kafka.sasl_oauth == "gcp":
        return _gcp()
    context = None
    if kafka.sasl_oauth_url.startswith("https:"):
        try:
            context = ssl.create_default_context(cafile=kafka.sasl_oauth_ca_file or None)
        except OSError:  # ssl.SSLError is one
            message = (
                f"PRESERVARIUM_KAFKA__SASL_OAUTH_CA_FILE: no certificate can be read from {kafka.sasl_oauth_ca_file!r}"
            )
            raise SettingsError(message) from None
    return functools.partial(
        from_endpoint,
        kafka.sasl_oauth_url,
        kafka.sasl_username,
        kafka.sasl_password.get_secret_value(),
        kafka.sasl_oauth_scope,
        context,
    )


def from_endpoint(url: str, client: str, secret: str, scope: str, context: Any = None) -> Token:
    """Ask a token endpoint by client credentials; blocks.

    Raises:
        OSError, ValueError: it does not answer, or not with a token. No secret is in the text.
    """
    fields = {"grant_type": "client_credentials", **({"scope": scope} if scope else {})}
    # RFC 6749, 2.3.1: both are form-encoded before they are joined.
    pair = ":".join(urllib.parse.quote_plus(part) for part in (client, secret))
    request = urllib.request.Request(
        url,
        data=urllib.parse.urlencode(fields).encode(),
        headers={
            "Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}",
            "Content-Type": "application/x-www-form-urlencoded",
            "Accept": "application/json",
        },
    )
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _NoRedirect())
    began_s = time.time()
    try:
        with opener.open(request, timeout=ANSWER_S) as response:
            body = response.read(TOKEN_BYTES_MAX + 1)
    except urllib.error.HTTPError as e:
        with e:
            said = _said(e.read(1_000))
        message = f"{url} answers {e.code}{f': {said}' if said else ''}"
        raise OSError(message) from None
    try:
        answer = json.loads(body)
        text, life = answer["access_token"], answer.get("expires_in")
    except (ValueError, KeyError, TypeError):
        message = f"{url} gives no access_token"
        raise ValueError(message) from None
    if not isinstance(text, str):
        message = f"{url} gives an access_token that is no text"
        raise ValueError(message)
    try:
        life_s = float(life)
    except (TypeError, ValueError):
        return Token(text, _ends(text, began_s))
    return Token(text, began_s + life_s)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An endpoint that sends us elsewhere would be given our secret there."""

    def redirect_request(self, *_arguments: Any) -> None:
        """Follow none; the answer is an error then."""
        return


def _said(body: bytes) -> str:
    """What an endpoint says of a refusal, by RFC 6749: `error` and `error_description`."""
    try:
        answer = json.loads(body)
        parts = [str(answer[name]) for name in ("error", "error_description") if answer.get(name)]
    except (ValueError, TypeError, AttributeError):
        return ""
    return " ".join(": ".join(parts).split())[:200]


def from_file(path: Path) -> Token:
    """Read a token that somebody else keeps fresh; blocks.

    Raises:
        OSError, ValueError: the file cannot be read, or holds no token.
    """
    if path.stat().st_size > TOKEN_BYTES_MAX:
        message = f"{path} is too large for a token"
        raise ValueError(message)
    text = path.read_text(encoding="ascii").strip()
    # Whoever writes it renews it well before its end; looking again is cheap.
    now_s = time.time()
    return Token(text, min(_ends(text, now_s), now_s + LIFE_UNKNOWN_S))


def _ends(text: str, now_s: float) -> float:
    """When a token ends, by its own claim `exp`; where it makes none, soon. It is not verified: that is the broker's task."""
    try:
        claims = text.split(".")[1]
        return float(json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["exp"])
    except (IndexError, ValueError, KeyError, TypeError):
        return now_s + LIFE_UNKNOWN_S


def _missing(how: str, package: str, error: ImportError) -> SettingsError:
    return SettingsError(
        f"PRESERVARIUM_KAFKA__SASL_OAUTH={how} needs what is not installed: pip install {package} ({error.name})"
    )


def _aws(region: str) -> Callable[[], Token]:
    """Tokens for Amazon MSK: a request that is signed by the credentials that AWS' own library finds, and never sent."""
    try:
        from aws_msk_iam_sasl_signer import MSKAuthTokenProvider
    except ImportError as e:
        # Not among our extras: it asks for an older python-dateutil than ours is locked with.
        raise _missing(how="aws", package="aws-msk-iam-sasl-signer-python", error=e) from None

    def ask() -> Token:
        text, until_ms = MSKAuthTokenProvider.generate_auth_token(region)
        return Token(text, until_ms / 1_000)

    return ask


def _gcp() -> Callable[[], Token]:
    """Tokens for Google's managed Kafka: an access token in the third part of what looks like a JWT."""
    try:
        import google.auth
        import google.auth.transport.requests
    except ImportError as e:
        raise _missing(how="gcp", package="'preservarium[gcp]'", error=e) from None
    credentials: Any = None

    def ask() -> Token:
        nonlocal credentials
        if credentials is None:
            credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
        credentials.refresh(google.auth.transport.requests.Request())
        return google_token(
            credentials.token, calendar.timegm(credentials.expiry.timetuple()), credentials.service_account_email
        )

    return ask


def google_token(access: str, until_s: float, account: str) -> Token:
    """What Google's brokers take for a token.

    Args:
        access: the access token.
        until_s: its end, seconds since the epoch.
        account: e-mail address of the service account.
    """
    claims = {"exp": int(until_s), "iat": int(time.time()), "iss": "Google", "scope": "kafka", "sub": account}
    parts = (json.dumps({"typ": "JWT", "alg": "GOOG_OAUTH2_TOKEN"}), json.dumps(claims), access)
    return Token(".".join(base64.urlsafe_b64encode(p.encode()).decode().rstrip("=") for p in parts), until_s)
