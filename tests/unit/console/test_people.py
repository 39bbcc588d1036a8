"""Logging in: passwords, sessions, roles, tokens with scopes; what is refused, how often, and what is told of it."""

import asyncio
import re
import time
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from aiohttp import CookieJar, web
from aiohttp.test_utils import TestClient, TestServer

from preservarium.clock import ManualClock
from preservarium.console import access, api
from preservarium.console.people import PeopleViews, _next
from preservarium.console.replies import OPERATOR, answer, wrapped
from preservarium.errors import Retry
from preservarium.serving import people, server, sessions
from preservarium.serving.attempts import CLIENT_MAX, NAME_MAX, PAIR_MAX, SPAN_S, Attempts
from preservarium.serving.people_file import edited
from preservarium.serving.rights import Right
from preservarium.settings import ROLES, SettingsError, Web

PASSWORDS = {
    "vera": "a viewer's password",
    "otto": "an operator's password",
    "enno": "an engineer's password",
    "ada": "an admin's password",
}
ROLE_OF = dict(zip(PASSWORDS, ROLES, strict=True))
#: 20 ms each; one process needs them once.
HASHES = {name: people.hashed(password) for name, password in PASSWORDS.items()}
LADDER = ("read", "operate", "engineer", "admin")
JSON = {"Content-Type": "application/json"}


class Told:
    """In the place of the event store."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, dict[str, Any]]] = []
        self.waiting = 0
        self.down = False

    def tell(self, event: str, name: str, **data: Any) -> None:
        self.told.append((event, name, data))

    async def newest(self, *, before: int | None, limit: int, name: str) -> list[dict[str, Any]]:
        if self.down:
            raise Retry("PostgreSQL: refused")
        rows = [
            {"position": n, "event": e, "name": who, "at": 1, "detail": d} for n, (e, who, d) in enumerate(self.told)
        ]
        return [
            row for row in reversed(rows) if (before is None or row["position"] < before) and name in ("", row["name"])
        ][:limit]


class Site:
    """The door, its views, and a route for each right."""

    def __init__(self, **settings: Any) -> None:
        self.settings = SimpleNamespace(web=Web(**settings))
        self.clock, self.told = ManualClock(), Told()
        self.application = web.Application()
        self.runner = server.install(self.application, self.live)
        told: Any = self.told
        PeopleViews(self, told, told).mount(self.application)

        async def who(request: web.Request) -> web.Response:
            return answer({"who": request[OPERATOR]})

        for right in LADDER:
            self.application.router.add_get(f"/api/{right}", wrapped(who, Right(right), self.live))
            self.application.router.add_post(f"/api/{right}", wrapped(who, Right(right), self.live))
        api.mount(self.application)

    def live(self) -> Any:
        return self.settings

    def client(self) -> TestClient[Any, Any]:
        runner = self.runner

        class Ours(TestServer):
            async def _make_runner(self, **_: Any) -> Any:
                return runner

        return TestClient(Ours(self.application), cookie_jar=CookieJar(unsafe=True))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "users.json"
    with edited(path) as document:
        document["users"] = {name: {"role": role, "password": HASHES[name]} for name, role in ROLE_OF.items()}
    return path


@pytest.fixture
def site(file):
    return Site(users_file=str(file))


@pytest.fixture
async def client(site):
    async with site.client() as made:
        yield made


async def log_in(client, name, password=None, status=200, **headers):
    response = await client.post(
        "/api/v1/session",
        json={"name": name, "password": PASSWORDS.get(name) if password is None else password},
        headers=headers,
    )
    said = await response.json()
    assert response.status == status, said
    return said


async def reached(client, method="GET", headers=None):
    """Status of a route of each right."""
    found = {}
    for right in LADDER:
        response = await client.request(method, f"/api/v1/{right}", headers=headers)
        found[right] = response.status
    return found


# --- roles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PASSWORDS)
async def test_a_role_may_what_it_may_and_no_more(client, name):
    assert await reached(client) == dict.fromkeys(LADDER, 401)
    said = await log_in(client, name)
    assert (said["name"], said["role"], said["how"]) == (name, ROLE_OF[name], "password")
    reach = ROLES.index(ROLE_OF[name]) + 1
    allowed = {right: 200 if n < reach else 403 for n, right in enumerate(LADDER)}
    assert said["rights"] == sorted(LADDER[:reach])
    assert await reached(client) == allowed
    assert await reached(client, "POST", {sessions.CSRF_HEADER: said["csrf"]}) == allowed
    response = await client.get("/api/v1/read")
    assert await response.json() == {"who": name}
    response = await client.get("/api/v1/session")
    assert await response.json() == said
    assert (await client.get("/api/v1/people")).status == (200 if name == "ada" else 403)


async def test_a_change_needs_what_no_strangers_page_can_read(client):
    said = await log_in(client, "ada")
    token = {sessions.CSRF_HEADER: said["csrf"]}
    assert await reached(client, "POST") == dict.fromkeys(LADDER, 403)
    assert await reached(client, "POST", {sessions.CSRF_HEADER: "x" * 64}) == dict.fromkeys(LADDER, 403)
    for strange in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "same-site"}):
        assert await reached(client, "POST", {**token, **strange}) == dict.fromkeys(LADDER, 403), strange
        response = await client.post(
            "/api/v1/session", json={"name": "ada", "password": PASSWORDS["ada"]}, headers=strange
        )
        assert response.status == 403
    # Of another session it is another one.
    other = await log_in(client, "ada")
    assert other["csrf"] != said["csrf"]
    assert await reached(client, "POST", token) == dict.fromkeys(LADDER, 403)


async def test_the_cookie_is_for_the_server_alone_and_over_tls_only_where_there_is_tls(file):
    for public_url, name, secure in (
        ("", sessions.COOKIE, False),
        ("https://plant.example", sessions.SECURE_COOKIE, True),
    ):
        site = Site(users_file=str(file), public_url=public_url)
        async with site.client() as client:
            response = await client.post("/api/v1/session", json={"name": "ada", "password": PASSWORDS["ada"]})
            said = response.headers["Set-Cookie"]
            assert said.startswith(f"{name}=")
            assert ("Secure" in said) is secure
            assert {"HttpOnly", "SameSite=Lax", "Path=/"} <= {part.strip() for part in said.split(";")}
            assert "Domain" not in said


# --- what ends a session --------------------------------------------------------------------------------------------------


async def test_a_changed_password_a_removed_user_and_a_changed_role_count_at_once(client, file):
    await log_in(client, "ada")
    with edited(file) as document:
        document["users"]["ada"]["role"] = "viewer"
    assert await reached(client) == {"read": 200, "operate": 403, "engineer": 403, "admin": 403}
    with edited(file) as document:
        # The same password once more is another hash.
        document["users"]["ada"] = {"role": "admin", "password": people.hashed(PASSWORDS["ada"])}
    assert await reached(client) == dict.fromkeys(LADDER, 401)
    await log_in(client, "ada")
    assert (await reached(client))["admin"] == 200
    with edited(file) as document:
        del document["users"]["ada"]
    assert await reached(client) == dict.fromkeys(LADDER, 401)
    await log_in(client, "ada", status=401)


async def test_who_has_logged_out_is_believed_no_more_also_with_the_cookie_kept(site, client):
    said = await log_in(client, "otto")
    kept = {cookie.key: cookie.value for cookie in client.session.cookie_jar}
    assert (await client.delete("/api/v1/session")).status == 403
    response = await client.delete("/api/v1/session", headers={sessions.CSRF_HEADER: said["csrf"]})
    assert (response.status, await response.read()) == (204, b"")
    assert not [c for c in client.session.cookie_jar if c.value]
    for _ in range(2):
        assert (
            await client.get("/api/v1/read", headers={"Cookie": "; ".join(f"{k}={v}" for k, v in kept.items())})
        ).status == 401
        # Logging out twice harms nobody.
        assert (await client.delete("/api/v1/session")).status == 204
    assert [event for event, *_ in site.told.told] == ["logged_in", "logged_out"]


async def test_a_session_ends_by_its_time_and_with_its_secret_and_cannot_be_made_up(site, client, monkeypatch):
    await log_in(client, "ada")
    (kept,) = [c.value for c in client.session.cookie_jar]
    client.session.cookie_jar.clear()
    show = lambda value: client.get("/api/v1/read", headers={"Cookie": f"{sessions.COOKIE}={value}"})  # noqa: E731
    assert (await show(kept)).status == 200
    for wrong in (
        kept[:-1] + ("A" if kept[-1] != "A" else "B"),
        kept.partition(".")[0],
        "",
        "x",
        "é",
        "W10",
        kept.replace(".", ".."),
    ):
        assert (await show(wrong)).status == 401, wrong
    forged = sessions.begin(Web(session_secret="another secret, which is long enough"), "ada", "password", "mark")[1]
    assert (await show(forged)).status == 401
    later = time.time() + site.settings.web.session_s + 5
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: later)
        assert (await show(kept)).status == 401
    site.settings.web = site.settings.web.model_copy(
        update={"session_secret": Web(session_secret="s" * 32).session_secret}
    )
    assert (await show(kept)).status == 401


async def test_workers_that_share_the_file_share_its_sessions(file):
    first, second = Site(users_file=str(file)), Site(users_file=str(file))
    async with first.client() as client, second.client() as other:
        await log_in(client, "vera")
        (cookie,) = client.session.cookie_jar
        assert (await other.get("/api/v1/read", headers={"Cookie": f"{cookie.key}={cookie.value}"})).status == 200
    assert sessions.lasting(first.settings.web)
    assert not sessions.lasting(Web())


# --- who is refused ---------------------------------------------------------------------------------------------------------


async def test_a_wrong_password_and_a_name_that_nobody_has_are_answered_alike_and_told(site, client):
    wrong = await log_in(client, "ada", "not her password", 401)
    nobody = await log_in(client, "my-password-in-the-wrong-field", "x" * 12, 401)
    assert wrong == nobody
    assert wrong["error"] == "the name or the password is wrong"
    assert [(event, name) for event, name, _ in site.told.told] == [("login_refused", "ada"), ("login_refused", "?")]
    assert "wrong-field" not in str(site.told.told)
    assert not list(client.session.cookie_jar)


async def test_who_fails_too_often_waits_and_others_do_not(site, client):
    for _ in range(PAIR_MAX):
        await log_in(client, "ada", "not her password", 401)
    said = await log_in(client, "ada", status=429)
    assert said["error"].startswith("too many log-ins that failed")
    response = await client.post("/api/v1/session", json={"name": "ada", "password": PASSWORDS["ada"]})
    assert 0 < int(response.headers["Retry-After"]) <= SPAN_S
    await log_in(client, "otto")
    site.clock.advance(SPAN_S)
    await log_in(client, "ada")


async def test_many_at_once_are_counted_and_no_more_wait_than_can(site, client, monkeypatch):
    gate = asyncio.Event()

    async def slowly(*_):
        await gate.wait()
        return False

    monkeypatch.setattr("preservarium.console.people.asyncio.to_thread", slowly)
    asked = [
        asyncio.create_task(client.post("/api/v1/session", json={"name": "ada", "password": f"guess number {n}"}))
        for n in range(12)
    ]
    await asyncio.sleep(0.2)
    gate.set()
    statuses = sorted([(await response).status for response in asked])
    assert statuses == [401] * PAIR_MAX + [429] * (12 - PAIR_MAX)


@pytest.mark.parametrize(
    ("data", "headers", "status"),
    [
        (b"{", JSON, 400), (b"[]", JSON, 400), (b"{}", JSON, 400), (b'{"name": "ada"}', JSON, 400), (b'{"name": 1, "password": "x"}', JSON, 400),
        (b'{"name": "", "password": "x"}', JSON, 400), (b'{"name": "ada", "password": "x", "role": "admin"}', JSON, 400),
        (b"x" * 5_000, JSON, 413), (b"name=ada&password=x", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        (b'{"name": "ada", "password": "x"}', {"Content-Type": "text/plain"}, 415),
    ],
)  # fmt: skip
async def test_a_log_in_that_is_not_well_formed_is_a_problem(site, client, data, headers, status):
    response = await client.post("/api/v1/session", data=data, headers=headers)
    said = await response.json()
    assert (response.status, response.content_type, said["status"]) == (status, "application/problem+json", status)
    assert site.told.told == []


def test_attempts_of_a_client_and_of_a_name_have_limits_of_their_own():
    attempts = Attempts()
    for n in range(CLIENT_MAX):
        assert attempts.wait_s("c", f"name-{n}", 0.0) == 0
        attempts.failed("c", f"name-{n}", 0.0)
    assert attempts.wait_s("c", "another", 1.0) == SPAN_S - 1
    for n in range(NAME_MAX):
        attempts.failed(f"c-{n}", "ada", 5.0)
    assert attempts.wait_s("c-new", "ada", 6.0) == SPAN_S - 1
    assert attempts.wait_s("c-new", "otto", 6.0) == 0
    assert attempts.wait_s("c-new", "ada", 5.0 + SPAN_S) == 0
    attempts = Attempts()
    for _ in range(PAIR_MAX - 1):
        attempts.failed("c", "ada", 0.0)
    attempts.failed("c", "ada", 0.0)
    attempts.succeeded("c", "ada")
    assert attempts.wait_s("c", "ada", 0.0) == 0


@pytest.mark.parametrize(
    ("path", "kept"),
    [("/devices?q=a#b", True), ("/", True), ("", False), ("//evil.example", False), ("https://evil.example", False), ("/\\evil.example", False),
     ("javascript:alert(1)", False), ("devices", False), ("/a\nb", False), ("/" + "x" * 3_000, False), ("/a\\b", False)],
)  # fmt: skip
def test_after_the_log_in_it_goes_to_a_page_of_ours(path, kept):
    assert _next(path) == (path if kept else "")


# --- programs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scopes", [("read",), ("operate",), ("read", "operate"), ("engineer",), ("admin",), ("send",), LADDER]
)
async def test_a_token_has_its_scopes_and_no_others(client, file, scopes):
    with edited(file) as document:
        document["tokens"] = {"graf": {"scopes": list(scopes), "sha256": people.token_hash(b"pvt_1")}}
    expected = {right: 200 if right in scopes else 403 for right in LADDER}
    for method in ("GET", "POST"):
        assert (
            await reached(client, method, {"Authorization": "Bearer pvt_1", "Origin": "http://elsewhere.example"})
            == expected
        )
    if "read" in scopes:
        response = await client.get("/api/v1/read", headers={"Authorization": "bearer pvt_1"})
        assert await response.json() == {"who": "graf"}
    assert await reached(client, headers={"Authorization": "Bearer pvt_2"}) == dict.fromkeys(LADDER, 401)
    # The hash is no token.
    assert await reached(client, headers={"Authorization": f"Bearer {people.token_hash(b'pvt_1')}"}) == dict.fromkeys(
        LADDER, 401
    )


async def test_a_token_expires_and_a_wrong_one_beside_a_session_is_refused(client, file):
    await log_in(client, "ada")
    with edited(file) as document:
        document["tokens"] = {
            "old": {"scopes": ["read"], "sha256": people.token_hash(b"old"), "expires_at": "2026-01-01T00:00:00+01:00"},
            "new": {"scopes": ["read"], "sha256": people.token_hash(b"new"), "expires_at": "2999-01-01T00:00:00Z"},
        }
    for token, status in (("old", 401), ("new", 200), ("", 401)):
        assert (await client.get("/api/v1/read", headers={"Authorization": f"Bearer {token}"})).status == status
    assert (await client.get("/api/v1/read", headers={"Authorization": "Basic YWRhOng="})).status == 401
    assert (await client.get("/api/v1/read")).status == 200


async def test_the_settings_operators_stay_operators_and_the_supervisor_reads(file):
    site = Site(users_file=str(file), operators="bob:t-bob", operator_token="shared", supervisor_token="watch")
    async with site.client() as client:
        for token, reach in (("t-bob", 2), ("shared", 2), ("watch", 1)):
            expected = {right: 200 if n < reach else 403 for n, right in enumerate(LADDER)}
            assert await reached(client, headers={"Authorization": f"Bearer {token}"}) == expected
    # A supervisor is nobody who is configured: this machine goes on as before.
    async with Site(supervisor_token="watch").client() as client:
        assert await reached(client) == dict.fromkeys(LADDER, 200)


# --- where nobody is configured ------------------------------------------------------------------------------------------------


async def test_the_first_user_ends_what_this_machine_may_and_the_worker_needs_no_restart(tmp_path):
    path = tmp_path / "users.json"
    site = Site(users_file=str(path))
    async with site.client() as client:
        assert await reached(client) == dict.fromkeys(LADDER, 200)
        response = await client.get("/api/v1/session")
        assert (await response.json())["how"] == "machine"
        with edited(path) as document:
            document["users"] = {"ada": {"role": "admin", "password": HASHES["ada"]}}
        assert await reached(client) == dict.fromkeys(LADDER, 401)
        await log_in(client, "ada")
        assert await reached(client) == dict.fromkeys(LADDER, 200)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.5", "::", "plant.example", ""])
def test_a_port_that_is_open_to_all_is_refused_with_what_to_do(host, tmp_path):
    path = tmp_path / "users.json"
    for settings in ({}, {"users_file": str(path)}, {"supervisor_token": "x"}):
        with pytest.raises(SettingsError) as told:
            access.check(Web(host=host, **settings))
        for word in (
            "PRESERVARIUM_WEB__HOST",
            "PRESERVARIUM_WEB__USERS_FILE",
            "preservarium users add",
            "PRESERVARIUM_WEB__OPERATORS",
            "127.0.0.1",
        ):
            assert word in str(told.value)
    with pytest.raises(SettingsError):
        access.check(Web(), host)
    with edited(path) as document:
        document["tokens"] = {"gate": {"scopes": ["send"], "sha256": people.token_hash(b"x")}}
    with pytest.raises(SettingsError):
        access.check(Web(host=host, users_file=str(path)))
    with edited(path) as document:
        document["tokens"]["graf"] = {"scopes": ["read"], "sha256": people.token_hash(b"y")}
    oidc = {"oidc_issuer": "https://login.example", "oidc_client_id": "p", "oidc_default_role": "viewer"}
    for settings in ({"users_file": str(path)}, {"operators": "a:b"}, {"operator_token": "x"}, oidc):
        access.check(Web(host=host, **settings))
    for own in ("127.0.0.1", "127.9.9.9", "localhost", "::1"):
        access.check(Web(host=own))


# --- the file ---------------------------------------------------------------------------------------------------------------------


HASH = HASHES["ada"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is no JSON"), ("[]", "is a JSON object"), ('{"user": {}}', "there is no 'user'"), ('{"users": []}', "is an object"),
        ('{"users": {"ada": 1}}', "ada is an object"), ('{"users": {"a b": {}}}', "is no name"), ('{"users": {"": {}}}', "is no name"),
        ('{"users": {"ada": {"role": "root", "password": "HASH"}}}', "`role` is one of"), ('{"users": {"ada": {"role": "admin"}}}', "hash of argon2id"),
        ('{"users": {"ada": {"role": "admin", "password": "secret-in-plain-text"}}}', "hash of argon2id"),
        ('{"users": {"ada": {"role": "admin", "password": "HASH", "pasword": "x"}}}', "no 'pasword'"),
        ('{"tokens": {"t": {"scopes": ["root"], "sha256": "0"}}}', "`scopes`"), ('{"tokens": {"t": {"scopes": [], "sha256": "0"}}}', "`scopes`"),
        ('{"tokens": {"t": {"scopes": [1], "sha256": "0"}}}', "`scopes`"), ('{"tokens": {"t": {"scopes": ["read"], "sha256": "0"}}}', "`sha256`"),
        ('{"tokens": {"t": {"scopes": ["read"], "sha256": "SHA", "expires_at": "2027-01-01T00:00:00"}}}', "`expires_at`"),
        ('{"tokens": {"t": {"scopes": ["read"], "sha256": "SHA", "expires_at": 5}}}', "`expires_at`"), ('{"secret": "short"}', "`secret`"),
        ('{"users": {"x": {"role": "admin", "password": "HASH"}}, "tokens": {"x": {"scopes": ["read"], "sha256": "SHA"}}}', "x is a user and a token"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_right_is_refused_in_a_line_without_secrets(tmp_path, text, why):
    path = tmp_path / "users.json"
    path.write_text(text.replace("HASH", HASH).replace("SHA", "0" * 64))
    with pytest.raises(people.PeopleError) as told:
        people.read(path)
    assert why in str(told.value)
    assert "\n" not in str(told.value)
    assert "secret-in-plain-text" not in str(told.value)
    assert HASH not in str(told.value)
    # Nor is it edited: what it was stays.
    with pytest.raises(people.PeopleError), edited(path) as document:
        document["users"] = {}
    assert path.read_text() == text.replace("HASH", HASH).replace("SHA", "0" * 64)
    with pytest.raises(SettingsError, match="USERS_FILE"):
        access.check(Web(users_file=str(path)))


def test_what_cannot_be_read_any_more_changes_nothing_and_is_said(file):
    web_settings = Web(users_file=str(file))
    before = people.current(web_settings)
    file.write_text('{"users": ')
    assert people.current(web_settings) == before
    assert "is no JSON" in people.fault(web_settings)
    file.unlink()
    assert people.current(web_settings) == before
    assert "is gone" in people.fault(web_settings)
    with edited(file) as document:
        document["users"] = {"eva": {"role": "viewer", "password": HASH}}
    assert [*people.current(web_settings).users] == ["eva"]
    assert people.fault(web_settings) == ""


def test_the_file_is_for_its_owner_whole_or_not_at_all_and_keeps_its_secret(file):
    assert file.stat().st_mode & 0o777 == 0o600
    before = orjson.loads(file.read_bytes())
    assert len(before["secret"]) >= 32
    file.chmod(0o640)
    with pytest.raises(ZeroDivisionError), edited(file) as document:
        document["users"] = {"ada": 1 / 0}
    with pytest.raises(people.PeopleError, match="`role`"), edited(file) as document:
        document["users"]["ada"]["role"] = "root"
    assert orjson.loads(file.read_bytes()) == before
    with edited(file) as document:
        document["users"]["ada"]["role"] = "viewer"
    after = orjson.loads(file.read_bytes())
    assert (after["secret"], after["users"]["ada"]["role"]) == (before["secret"], "viewer")
    assert file.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in file.parent.iterdir() if p.name not in ("users.json", "users.json.lock")] == []


@pytest.mark.parametrize("password", ["short", "aaaaaaaaaaaaaaaaa", "ada-ada-ada", "abababababab", "x" * 11, "π" * 600])
def test_a_password_that_is_easily_guessed_is_not_taken(password):
    with pytest.raises(ValueError):
        people.check_password("ada", password)


def test_passwords_of_any_signs_are_hashed_and_compared():
    for password in (
        "correct horse battery",
        "pässwörd with ümlauts",
        "💧💧💧💧 water 💧💧💧",
        " leading and trailing ",
    ):
        people.check_password("ada", password)
        user = people.User("ada", "viewer", people.hashed(password))
        assert people.verified(user, password)
        assert not people.verified(user, password + "x")
        assert not people.verified(None, password)
    assert not people.verified(user, "x" * 5_000)
    assert not people.verified(people.User("ada", "viewer", "$argon2id$broken"), "x")


# --- what is shown of it -----------------------------------------------------------------------------------------------------------


async def test_administrators_see_who_there_is_without_any_secret(site, client, file):
    with edited(file) as document:
        document["tokens"] = {"graf": {"scopes": ["read"], "sha256": people.token_hash(b"x"), "expires_at": None}}
    await log_in(client, "ada")
    response = await client.get("/api/v1/people")
    text = await response.text()
    said = orjson.loads(text)
    assert {user["name"]: user["role"] for user in said["users"]} == ROLE_OF
    assert said["tokens"][0]["scopes"] == ["read"]
    for secret in (*HASHES.values(), people.token_hash(b"x"), orjson.loads(file.read_bytes())["secret"]):
        assert secret not in text


async def test_what_was_done_is_paged(site, client):
    await log_in(client, "ada")
    for n in range(5):
        site.told.tell("logged_in", f"u{n}")
    seen, cursor = [], ""
    while True:
        response = await client.get(
            "/api/v1/people/events", params={"limit": "4", **({"cursor": cursor} if cursor else {})}
        )
        page = await response.json()
        seen += [event["name"] for event in page["events"]]
        if not (cursor := page["next_cursor"]):
            break
    assert seen == ["u4", "u3", "u2", "u1", "u0", "ada"]
    for wrong in ("x", "WzFd1", "WyJhIl0"):
        assert (await client.get("/api/v1/people/events", params={"cursor": wrong})).status == 400
    site.told.down = True
    assert (await client.get("/api/v1/people/events")).status == 503


async def test_the_page_to_log_in_says_no_text_out_of_the_address(client):
    response = await client.get("/login", params={"said": "out"})
    text = await response.text()
    assert "You have logged out." in text
    assert response.headers["Content-Security-Policy"] == access.CONTENT_SECURITY_POLICY
    response = await client.get("/login", params={"said": "<b>evil</b>"})
    assert "evil" not in await response.text()
    response = await client.get("/login/oidc", allow_redirects=False)
    assert response.status == 404
    response = await client.get("/login/oidc/callback?state=x&code=y", allow_redirects=False)
    assert response.status == 400
    assert re.search("Not logged in", await response.text())
