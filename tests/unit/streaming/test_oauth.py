"""Tokens for Kafka: where they come from, how long they are kept, and what is said where none can be had."""

import asyncio
import base64
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from preservarium.settings import Kafka, SettingsError
from preservarium.streaming import faust_parts, kafka_clients, oauth
from preservarium.streaming.oauth import NoToken, Provider, Token

OIDC = {
    "security_protocol": "SASL_SSL",
    "sasl_mechanism": "OAUTHBEARER",
    "sasl_oauth_url": "https://login.example/token",
    "sasl_username": "client",
    "sasl_password": "secret",
}


def jwt(**claims: Any) -> str:
    parts = ({"alg": "none"}, claims)
    return ".".join([*(base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts), "sig"])


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


class Source:
    """Gives tokens of 100 s, or fails."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.asked, self.error = clock, 0, ""

    def __call__(self) -> Token:
        self.asked += 1
        if self.error:
            raise OSError(self.error)
        return Token(f"token-{self.asked}", self.clock() + 100)


async def test_a_token_is_kept_and_asked_for_anew_before_it_ends() -> None:
    clock = Clock()
    source = Source(clock)
    provider = Provider(source, clock=clock)
    assert [await provider.token() for _ in range(3)] == ["token-1"] * 3
    clock.now_s += 79
    assert await provider.token() == "token-1"
    clock.now_s += 2
    assert await provider.token() == "token-2"
    assert source.asked == 2


async def test_many_clients_at_once_ask_once() -> None:
    clock = Clock()
    source = Source(clock)
    provider = Provider(source, clock=clock)
    assert set(await asyncio.gather(*(provider.token() for _ in range(50)))) == {"token-1"}
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(asyncio.run(provider.token()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["token-1"] * 4
    assert source.asked == 1


async def test_a_token_that_is_still_good_bridges_an_outage_and_then_none_is_given() -> None:
    clock = Clock()
    source = Source(clock)
    provider = Provider(source, clock=clock)
    await provider.token()
    source.error = "no answer"
    clock.now_s += 90
    assert await provider.token() == "token-1"
    clock.now_s += 20
    with pytest.raises(NoToken, match="no answer"):
        await provider.token()
    asked = source.asked
    with pytest.raises(NoToken, match="no answer"):
        await provider.token()
    assert source.asked == asked, "a dozen clients that reconnect ask once a second"
    source.error = ""
    clock.now_s += 2
    assert (await provider.token()).startswith("token-")


@pytest.mark.parametrize(
    ("token", "why"),
    [
        (Token("", 9e9), "no token"),
        (Token("x" * 200_000, 9e9), "no token"),
        (Token("a\x01auth=Bearer b", 9e9), "no token"),
        (Token("a\nb", 9e9), "no token"),
        (Token("a", 10.0), "clock go right"),
    ],
)
async def test_what_is_no_token_is_not_sent(token: Token, why: str) -> None:
    with pytest.raises(NoToken, match=why):
        await Provider(lambda: token).token()


# --- from an endpoint


class Endpoint:
    """A token endpoint that answers as it is told."""

    def __init__(self) -> None:
        self.status, self.body, self.location = 200, b"", ""
        self.asked: list[tuple[str, dict[str, list[str]]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                outer.asked.append((self.headers["Authorization"], urllib.parse.parse_qs(body)))
                self.send_response(outer.status)
                if outer.location:
                    self.send_header("Location", outer.location)
                self.end_headers()
                self.wfile.write(outer.body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/token"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.stop()


def test_an_endpoint_is_asked_by_client_credentials(endpoint: Endpoint) -> None:
    endpoint.body = b'{"access_token": "abc", "expires_in": 3600, "token_type": "Bearer"}'
    token = oauth.from_endpoint(endpoint.url, "cli:ent", "s3c ret/é", "kafka.read kafka.write")
    assert token.text == "abc"
    assert 3_500 < token.until_s - time.time() <= 3_600
    authorization, fields = endpoint.asked[0]
    pair = base64.b64decode(authorization.removeprefix("Basic ")).decode()
    assert [urllib.parse.unquote_plus(part) for part in pair.split(":")] == ["cli:ent", "s3c ret/é"]
    assert fields == {"grant_type": ["client_credentials"], "scope": ["kafka.read kafka.write"]}


def test_a_life_that_is_not_told_is_read_from_the_token(endpoint: Endpoint) -> None:
    end = int(time.time()) + 500
    endpoint.body = json.dumps({"access_token": jwt(exp=end)}).encode()
    assert oauth.from_endpoint(endpoint.url, "c", "s", "").until_s == end
    endpoint.body = b'{"access_token": "opaque"}'
    assert 290 < oauth.from_endpoint(endpoint.url, "c", "s", "").until_s - time.time() <= 300


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (401, b'{"error": "invalid_client", "error_description": "no such client"}', "answers 401: invalid_client: no such client"),
        (500, b"<html>", "answers 500"),
        (400, b'["x"]', "answers 400"),
        (200, b"", "no access_token"),
        (200, b"[]", "no access_token"),
        (200, b'{"access_token": 7}', "no text"),
        (200, b'{"token": "x"}', "no access_token"),
    ],
)  # fmt: skip
def test_an_endpoint_that_gives_no_token_is_told_of_without_the_secret(
    endpoint: Endpoint, status: int, body: bytes, why: str
) -> None:
    endpoint.status, endpoint.body = status, body
    with pytest.raises((OSError, ValueError), match=why) as e:
        oauth.from_endpoint(endpoint.url, "c", "s3cret", "")
    assert "s3cret" not in str(e.value)


def test_a_secret_is_not_sent_where_an_endpoint_points_to(endpoint: Endpoint) -> None:
    other = Endpoint()
    try:
        endpoint.status, endpoint.location = 302, other.url
        with pytest.raises(OSError, match="302"):
            oauth.from_endpoint(endpoint.url, "c", "s", "")
        assert other.asked == []
    finally:
        other.stop()


# --- from files and clouds


def test_a_file_is_read_and_looked_at_again_soon(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(jwt(exp=time.time() + 100) + "\n")
    assert 90 < oauth.from_file(path).until_s - time.time() <= 100
    path.write_text(jwt(exp=time.time() + 86_400))
    assert 290 < oauth.from_file(path).until_s - time.time() <= 300
    path.write_text("x" * 200_000)
    with pytest.raises(ValueError, match="too large"):
        oauth.from_file(path)
    with pytest.raises(OSError):
        oauth.from_file(tmp_path / "absent")


def test_googles_token_has_the_access_token_in_its_third_part() -> None:
    header, claims, access = oauth.google_token("ya29.access", 2e9, "worker@project.iam").text.split(".")

    def read(part: str) -> str:
        return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)).decode()

    assert json.loads(read(header)) == {"typ": "JWT", "alg": "GOOG_OAUTH2_TOKEN"}
    assert json.loads(read(claims))["sub"] == "worker@project.iam"
    assert json.loads(read(claims))["exp"] == 2_000_000_000
    assert read(access) == "ya29.access"


async def test_a_role_of_aws_signs_for_the_clusters_region(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aws_msk_iam_sasl_signer", reason="missing: aws-msk-iam-sasl-signer-python")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "example",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    kafka = Kafka(
        security_protocol="SASL_SSL", sasl_mechanism="OAUTHBEARER", sasl_oauth="aws", sasl_oauth_region="eu-central-1"
    )
    text = await oauth.provider(kafka).token()
    url = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
    assert url.startswith("https://kafka.eu-central-1.amazonaws.com/?Action=kafka-cluster%3AConnect")
    assert "X-Amz-Signature=" in url
    assert "example" not in url.replace("AKIDEXAMPLE", "")


def test_what_is_not_installed_is_told_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "aws_msk_iam_sasl_signer", None)
    with pytest.raises(SettingsError, match="pip install aws-msk-iam-sasl-signer-python"):
        oauth._aws("eu-central-1")


# --- settings


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"sasl_oauth_url": ""}, "sasl_oauth_url is missing: sasl_oauth=oidc needs it"),
        ({"sasl_password": ""}, "sasl_password is missing"),
        ({"sasl_oauth_url": "http://login.example/token"}, "https:// is needed"),
        ({"sasl_oauth_url": "https://a:b@login.example/token"}, "stand in sasl_username and sasl_password"),
        ({"sasl_oauth_file": "/x"}, "sasl_oauth_file is given, but sasl_oauth=oidc has no use for it"),
        ({"sasl_oauth": "file"}, "has no use for it"),
        ({"sasl_mechanism": "PLAIN"}, "sasl_oauth_url is given, but sasl_mechanism PLAIN has no use for it"),
        ({"security_protocol": "SSL"}, "does not log in"),
        ({"sasl_oauth_extensions": "logicalCluster"}, "is not name=value"),
        ({"sasl_oauth_extensions": "auth=x"}, "is not name=value"),
        ({"sasl_oauth_extensions": "a=\x01b"}, "is not name=value"),
    ],
)
def test_settings_that_contradict_each_other_end_the_start(changed: dict[str, str], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Kafka(**{**OIDC, **changed})  # type: ignore[arg-type]


def test_a_password_is_still_needed_by_the_others() -> None:
    with pytest.raises(ValidationError, match="sasl_password is missing: security_protocol SASL_SSL needs it"):
        Kafka(security_protocol="SASL_SSL", sasl_username="ann")
    Kafka(security_protocol="SASL_SSL", sasl_mechanism="OAUTHBEARER", sasl_oauth="gcp")


def test_every_client_has_the_same_provider() -> None:
    kafka = Kafka(**OIDC, sasl_oauth_extensions="logicalCluster=lkc-1, identityPoolId=pool-2")  # type: ignore[arg-type]
    ours = kafka_clients.connection(kafka)["sasl_oauth_token_provider"]
    assert kafka_clients.reading(Kafka(**kafka.model_dump()))["sasl_oauth_token_provider"] is ours
    faust = faust_parts.credentials(kafka)
    assert faust is not None
    assert faust.oauth_cb is ours
    assert faust.protocol.value == "SASL_SSL"
    assert ours.extensions() == {"logicalCluster": "lkc-1", "identityPoolId": "pool-2"}
