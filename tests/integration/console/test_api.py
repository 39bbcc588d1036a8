"""Everything that the API describes is asked by Schemathesis, of a worker's web port over a real PostgreSQL; and what is done at the door is in
the chain. Kafka acknowledges here without being there: what it is sent is for other tests."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import orjson
import pytest
import requests
import schemathesis
from aiohttp import web
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks
from worker_support import ROOT

from preservarium.connectors import wiring as connectors
from preservarium.console import wiring as console
from preservarium.console.audit import Audit
from preservarium.console.openapi import DOCUMENT
from preservarium.serving import people
from preservarium.serving.people_file import edited
from preservarium.settings import LiveSettings, Settings
from preservarium.stores import events
from preservarium.stores.people_log import Done, PeopleLog
from preservarium.streaming.app import App

PASSWORD = "correct horse battery"
TOKEN = "pvt_of_this_test"
#: Of each operation, well formed and not.
EXAMPLES = 4
#: Of all questions, on a machine that does nothing else some 15 s; beside others it may be starved.
BUDGET_S = 240.0
#: The doors of platforms are one door with as many names.
PLATFORMS_ASKED = 1
CHECKS = [
    checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance,
    checks.response_headers_conformance, checks.unsupported_method, checks.negative_data_rejection,
]  # fmt: skip


class Port:
    """A worker's web port."""

    def __init__(self, directory: Path, dsn: str) -> None:
        file = directory / "users.json"
        with edited(file) as document:
            document["users"] = {"ada": {"role": "admin", "password": people.hashed(PASSWORD)}}
            document["tokens"] = {"all": {"scopes": list(people.SCOPES), "sha256": people.token_hash(TOKEN.encode())}}
        self.live = LiveSettings(
            Settings(
                web={"users_file": str(file)},
                postgres={"url": dsn},
                clickhouse={"enabled": False},
                data_dir=str(directory),
            )
        )
        self.app = App(self.live)
        # Before the views take it.
        self.app.publisher.publish = self._acknowledged  # type: ignore[method-assign]
        console.install(self.app)
        connectors.install(self.app)
        self.app.finalize()
        self.app.web.init_server()
        self.sent = 0

    async def _acknowledged(self, sends: Any) -> dict[str, int]:
        self.sent += len(sends)
        return {}

    @property
    def audit(self) -> Audit:
        """What tells of the door; its service does not run here."""
        return next(each for each in self.app._children if isinstance(each, Audit))


@pytest.fixture
async def port(dsn: str, tmp_path: Path) -> AsyncIterator[tuple[Port, str]]:
    made = Port(tmp_path, dsn)
    await made.app.web._runner.setup()
    site = web.TCPSite(made.app.web._runner, "127.0.0.1", 0)
    await site.start()
    yield made, f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[union-attr]
    await made.app.web._runner.cleanup()
    for resource in reversed(made.app._resources):
        await resource.close()


# The budget is of the questions; a database that starts beside others takes its time, too.
@pytest.mark.timeout(600)
async def test_what_is_described_is_what_is_answered(port: tuple[Port, str], told: Any) -> None:
    made, url = port
    asked = await asyncio.to_thread(ask_everything, url)
    assert made.sent
    told(f"{asked} questions of {sum(len(item) for item in DOCUMENT['paths'].values())} operations")


def ask_everything(url: str) -> int:
    """Ask every operation with a token that may everything, and without one; how many questions were asked."""
    schema = schemathesis.openapi.from_dict(orjson.loads(orjson.dumps(DOCUMENT)))
    session, nobody = requests.Session(), requests.Session()
    session.headers["Authorization"] = f"Bearer {TOKEN}"
    asked, platforms, begun_s = 0, 0, time.monotonic()
    for result in schema.get_all_operations():
        operation = result.ok()
        platform = operation.path.startswith("/api/v1/ingest/") and operation.path != "/api/v1/ingest/commands"
        platforms += platform
        if platform and platforms > PLATFORMS_ASKED:
            continue
        for mode in GenerationMode:
            # What takes any JSON has none that is not well formed; looking for some takes a minute.
            if platform and mode is GenerationMode.NEGATIVE:
                continue

            @settings(
                max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                nonlocal asked
                # Nobody waits for what will not come; what is no number at all stays as it is.
                if case.query and isinstance(case.query.get("wait_s"), int | float):
                    case.query["wait_s"] = 0
                if isinstance(case.body, dict) and isinstance(case.body.get("wait_s"), int | float):
                    case.body["wait_s"] = 0
                asked += 1
                response = case.call_and_validate(base_url=url, session=session, checks=CHECKS, timeout=30)
                assert response.status_code != 500, case.as_curl_command()
                if asked % 4 == 0:
                    case.call_and_validate(base_url=url, session=nobody, checks=CHECKS[:4], timeout=30)

            try:
                ask()
            except Unsatisfiable:
                # An operation without parameters and without a body has nothing that could be wrong.
                assert mode is GenerationMode.NEGATIVE, operation.label
        assert time.monotonic() - begun_s < BUDGET_S, f"{asked} questions, and not through"
    return asked


async def test_what_is_done_at_the_door_is_in_the_chain_once(port: tuple[Port, str], dsn: str) -> None:
    made, url = port
    made.audit.look()
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as http:
        for name, password, status in (("ada", "not hers", 401), ("nobody", PASSWORD, 401), ("ada", PASSWORD, 200)):
            async with http.post(f"{url}/api/v1/session", json={"name": name, "password": password}) as response:
                assert response.status == status
                said = await response.json()
        headers = {"X-CSRF-Token": said["csrf"]}
        alarm = {"device_id": "dev-1", "rule": "hot", "action": "comment", "comment": "x", "actor": "somebody else"}
        async with http.post(f"{url}/api/v1/alarms/actions", json=alarm, headers=headers) as response:
            # Who has logged in acts under that name and no other.
            assert response.status == 403
        del alarm["actor"]
        async with http.post(f"{url}/api/v1/alarms/actions", json=alarm, headers=headers) as response:
            assert response.status == 202
            assert (await response.json())["answer"].startswith("/api/v1/alarms/actions/")
        await made.audit.flush()
        made.audit.look()
        assert made.audit.waiting == 0
        async with http.get(f"{url}/api/v1/people/events?limit=3") as response:
            page = await response.json()
        async with http.get(f"{url}/api/v1/people/events", params={"cursor": page["next_cursor"]}) as response:
            rest = await response.json()
    found = [*page["events"], *rest["events"]]
    assert [(each["event"], each["name"]) for each in found] == [
        ("logged_in", "ada"), ("login_refused", "?"), ("login_refused", "ada"), ("users_changed", ""),
    ]  # fmt: skip
    assert found[-1]["detail"]["users"] == {"ada": "admin"}
    log = PeopleLog(lambda: made.live().postgres)
    connection = await asyncpg.connect(dsn)
    try:
        # The answer to a commit was lost, the same is told again; another worker tells of the same file.
        done = Done("the-same", "logged_in", "ada", 1_760_000_000_000_000, {"how": "password"})
        assert [await log.append(done) for _ in range(3)] == [True, False, False]
        digest = found[-1]["detail"]["digest"]
        assert not await log.append(Done("another", "users_changed", "", 1_760_000_000_000_001, {"digest": digest}))
        # Workers that meet in one stream all get their turn.
        several = [Done(f"n{n}", "logged_in", "bob", 1_760_000_000_000_000 + n, {}) for n in range(4)]
        others = [PeopleLog(lambda: made.live().postgres) for _ in several]
        assert (
            await asyncio.gather(*(each.append(one) for each, one in zip(others, several, strict=True))) == [True] * 4
        )
        for each in others:
            await each.close()
        verified = await events.verify(connection, prefix="people")
        assert (verified.faults, verified.events, verified.streams) == ([], 9, 4)
        assert PASSWORD not in str(await connection.fetch("SELECT * FROM event_store"))
    finally:
        await connection.close()
        await log.close()


@pytest.mark.parametrize("bound", [["--web-bind", "0.0.0.0"], []])
def test_a_worker_that_would_show_everybody_everything_does_not_start_and_says_what_to_do(
    bound: list[str], tmp_path: Path
) -> None:
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "PRESERVARIUM_ENV_FILE": os.devnull, "PRESERVARIUM_DATA_DIR": str(tmp_path),
        **({} if bound else {"PRESERVARIUM_WEB__HOST": "0.0.0.0"}),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "faust", "-A", "preservarium", "worker", *bound],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(
        "preservarium: PRESERVARIUM_WEB__HOST: the web port would be open to whoever reaches 0.0.0.0"
    )
    assert "preservarium users add NAME --role admin" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
