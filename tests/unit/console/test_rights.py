"""Who may ask what: every route of the web port, Faust's own too, with and without operators, from this machine and from elsewhere."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from preservarium.connectors import wiring as connectors
from preservarium.connectors.envelopes import FORMATS
from preservarium.console import access
from preservarium.console import wiring as console
from preservarium.console.replies import OPERATOR
from preservarium.serving.rights import Right, right_of
from preservarium.settings import LiveSettings, Settings, load
from preservarium.streaming.app import App

OPEN, READ, OPERATE, SENDER, LINK = Right.OPEN, Right.READ, Right.OPERATE, Right.SENDER, Right.LINK

#: Everything that a worker serves, and for whom. A route that is not here fails the first test.
MATRIX: dict[str, Right] = {
    "GET /": OPEN,
    "GET /console/console.css": OPEN,
    "GET /console/common.js": OPEN,
    "GET /console/list.js": OPEN,
    "GET /console/console.js": OPEN,
    "GET /console/uplot.css": OPEN,
    "GET /console/uplot.js": OPEN,
    "GET /devices": OPEN,
    "GET /devices/{device_id}": OPEN,
    "GET /console/devices.js": OPEN,
    "GET /console/device.js": OPEN,
    "GET /console/plots.js": OPEN,
    "GET /refusals": OPEN,
    "GET /console/refusals.js": OPEN,
    "GET /alarms": OPEN,
    "GET /console/alarms.js": OPEN,
    "GET /commands": OPEN,
    "GET /console/commands.js": OPEN,
    "GET /health": OPEN,
    "GET /ready": OPEN,
    "GET /metrics": OPEN,
    "GET /api/openapi.json": OPEN,
    "GET /api/status": READ,
    "GET /api/devices": READ,
    "GET /api/fleet": READ,
    "GET /api/devices/{device_id}": READ,
    "GET /api/devices/{device_id}/series": READ,
    "GET /api/devices/{device_id}/readings": READ,
    "GET /api/devices/{device_id}/readings.csv": READ,
    "GET /api/refusals": READ,
    "GET /api/refusals/{refusal_id}": READ,
    "GET /api/errors": READ,
    "GET /api/trace": READ,
    "GET /api/alarms": READ,
    "GET /api/alarms/{device_id}/{rule}/{pin_position}": READ,
    "GET /api/alarms/actions": READ,
    "GET /api/alarms/actions/{action_id}": READ,
    "POST /api/alarms/actions": OPERATE,
    "POST /api/alarms/bulk": OPERATE,
    "POST /api/fuses/{stage}/reset": OPERATE,
    "GET /api/tables": OPERATE,
    "GET /api/tables/{name}": OPERATE,
    "GET /api/tables/{name}/{key}": OPERATE,
    "GET /api/dashboards": OPERATE,
    "GET /api/dashboards/{name}": OPERATE,
    "GET /api/commands": OPERATE,
    "GET /api/devices/{device_id}/commands": OPERATE,
    "POST /api/devices/{device_id}/commands": OPERATE,
    "GET /api/devices/{device_id}/commands/choices": OPERATE,
    "GET /api/devices/{device_id}/commands/{command_id}": OPERATE,
    "POST /api/devices/{device_id}/commands/{command_id}/cancel": OPERATE,
    "GET /ack": LINK,
    "POST /ack": LINK,
    "POST /ingest": SENDER,
    "POST /write": SENDER,
    "POST /api/v2/write": SENDER,
    "POST /query": SENDER,
    "GET /query": SENDER,
    "GET /ping": SENDER,
    **{f"POST /ingest/{name}": SENDER for name in FORMATS},
    "GET /ingest/commands": SENDER,
    # Faust's own: they say nothing of who may ask, so they are for operators.
    "GET /router/": OPERATE,
    "GET /router/topics": OPERATE,
    "GET /router/{name}/": OPERATE,
    "GET /router/{name}/{key}/": OPERATE,
    # Behind our own page: never reached.
    "GET / (faust)": OPERATE,
}  # fmt: skip

#: Nobody, and everybody who might pretend to be somebody.
ANYBODY: dict[str, dict[str, str]] = {
    "no token": {},
    "a wrong token": {"Authorization": "Bearer wrong"},
    "no scheme": {"Authorization": "t-ann"},
    "another scheme": {"Authorization": "Basic t-ann"},
    "an empty token": {"Authorization": "Bearer "},
    "a name for a token": {"Authorization": "Bearer ann"},
    "the sender's token": {"Authorization": "Bearer sender"},
    "bytes": {"Authorization": "Bearer \udcff"},
}
TOKENS = {"ann": {"operators": "ann:t-ann, bob:t-bob"}, "bob": {"operators": "ann:t-ann, bob:t-bob", "operator_token": "shared"},
          "": {"operator_token": "shared"}, "shared beside names": {"operators": "ann:t-ann", "operator_token": "shared"}}  # fmt: skip
SHOWN = {"ann": "t-ann", "bob": "t-bob", "": "shared", "shared beside names": "shared"}


class Worker:
    """A worker's web application, which no broker and no database stands behind."""

    def __init__(self, *, as_they_are: bool = False, **web_settings: Any) -> None:
        self.live = LiveSettings(Settings(web=web_settings, http={"token": "sender"}, clickhouse={"enabled": True}))
        app = App(self.live)
        console.install(app)
        connectors.install(app)
        app.finalize()
        app.web.init_server()
        self.application = app.web.web_app
        self.application.cleanup_ctx.clear()  # the sampling of counters
        self.runner = app.web._runner
        #: of the request that was let through, who asks
        self.passed: list[str | None] = []
        self.routes = {
            self._name(route, count): route
            for count, route in enumerate(self.application.router.routes())
            if route.method != "HEAD"
        }
        # What handlers do is for their own tests: whether they are asked at all is the question here.
        for route in () if as_they_are else self.routes.values():
            self._stand_in(route)

    def _name(self, route: web.AbstractRoute, count: int) -> str:
        assert route.resource is not None
        name = f"{route.method} {route.resource.canonical}"
        first = next(
            r
            for r in self.application.router.routes()
            if r.method == route.method and r.resource and r.resource.canonical == route.resource.canonical
        )
        return name if first is route else f"{name} (faust)"

    def _stand_in(self, route: Any) -> None:
        async def passed(request: web.Request) -> web.Response:
            self.passed.append(request.get(OPERATOR))
            return web.Response(status=299)

        view, right = route.handler, right_of(route.handler)
        if right in (READ, OPERATE, OPEN, LINK):
            # The check and what surrounds it stay as they are; the handler itself is behind the closure.
            cell = next(
                c for name, c in zip(view.__code__.co_freevars, view.__closure__, strict=True) if name == "handler"
            )
            cell.cell_contents = passed
        elif right is None:
            route._handler = passed

    async def ask(self, client: TestClient[Any, Any], name: str, **headers: str) -> int:
        method, path = name.removesuffix(" (faust)").split(" ")
        async with client.request(
            method, re.sub(r"\{\w+\}", "x", path), headers=headers, allow_redirects=False
        ) as response:
            return response.status


def client_of(worker: Worker) -> TestClient[Any, Any]:
    class Ours(TestServer):
        async def _make_runner(self, **_: Any) -> Any:
            return worker.runner

    return TestClient(Ours(worker.application))


REACHED = [name for name in MATRIX if not name.endswith("(faust)")]
#: What a sender's handler says to one without its token.
REFUSED = {OPEN: 299, LINK: 299, SENDER: 401, READ: 401, OPERATE: 401}


def test_every_route_is_in_the_matrix() -> None:
    worker = Worker()
    assert set(worker.routes) == set(MATRIX)
    said = {name: right_of(route.handler) for name, route in worker.routes.items()}
    assert {name: right or OPERATE for name, right in said.items()} == MATRIX


@pytest.mark.parametrize("configured", TOKENS)
@pytest.mark.parametrize("who", ANYBODY)
async def test_where_operators_are_configured_nobody_else_is_let_in_from_this_machine_either(
    configured: str, who: str
) -> None:
    worker = Worker(**TOKENS[configured])
    async with client_of(worker) as client:
        for name in REACHED:
            right = MATRIX[name]
            if right is SENDER and who == "the sender's token":
                continue
            assert await worker.ask(client, name, **ANYBODY[who]) == REFUSED[right], name
            # A browser of our own page is nobody either.
            own = str(client.make_url("/")).rstrip("/")
            assert await worker.ask(client, name, **ANYBODY[who], Origin=own) == REFUSED[right], name


@pytest.mark.parametrize("configured", TOKENS)
async def test_an_operators_token_opens_everything_but_the_senders_doors_from_anywhere(configured: str) -> None:
    worker = Worker(**TOKENS[configured], allowed_hosts="plant.example")
    proof = {"Authorization": f"Bearer {SHOWN[configured]}"}
    elsewhere = {"Host": "plant.example", "X-Forwarded-For": "10.0.0.9", "Origin": "https://dashboards.example"}
    async with client_of(worker) as client:
        for name in REACHED:
            right = MATRIX[name]
            for more in ({}, elsewhere):
                worker.passed.clear()
                assert await worker.ask(client, name, **proof, **more) == (401 if right is SENDER else 299), name
                if right in (READ, OPERATE) and not name.startswith("GET /router"):
                    assert worker.passed == [configured if configured in ("ann", "bob") else ""], name


#: Not this machine itself, or not our page: where there are no operators, these may read.
NOT_THIS_MACHINE = [
    {"X-Forwarded-For": "127.0.0.1"}, {"Forwarded": "for=127.0.0.1"}, {"X-Real-IP": "127.0.0.1"}, {"Host": "10.0.0.5:6066"}, {"Host": "plant.example"},
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
]  # fmt: skip


async def test_without_operators_everybody_reads_and_this_machine_operates() -> None:
    worker = Worker(allowed_hosts="plant.example")
    async with client_of(worker) as client:
        for name in REACHED:
            right = MATRIX[name]
            if right is SENDER:
                continue
            assert await worker.ask(client, name) == 299, name
            for headers in NOT_THIS_MACHINE:
                assert await worker.ask(client, name, **headers) == (403 if right is OPERATE else 299), (name, headers)


async def test_no_route_is_served_under_a_strangers_name() -> None:
    for settings in ({}, *TOKENS.values()):
        worker = Worker(**settings)
        async with client_of(worker) as client:
            for name in REACHED:
                for host in ("evil.example", "localhost.evil.example:6066"):
                    assert await worker.ask(client, name, Host=host, Authorization="Bearer t-ann") == 403, name
            assert worker.passed == []
            assert await worker.ask(client, "GET /nothing/there", Host="evil.example") == 403
            assert await worker.ask(client, "GET /nothing/there") == 404
            assert await worker.ask(client, "GET /table/device_configs") == 404


async def test_a_table_that_is_none_is_not_found_at_fausts_own_views_either() -> None:
    worker = Worker(as_they_are=True)
    async with client_of(worker) as client, client.get("/router/no_such/") as response:
        assert (response.status, await response.json()) == (404, {"error": "there is no table of that name"})


async def test_tokens_are_changed_without_a_restart(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "operators"
    file.write_text("ann:t-ann\n")
    monkeypatch.setenv("PRESERVARIUM_WEB__OPERATORS_FILE", str(file))
    worker = Worker()
    worker.live._settings = load()
    async with client_of(worker) as client:
        assert await worker.ask(client, "GET /api/tables", Authorization="Bearer t-ann") == 299
        file.write_text("bob:t-bob\n")
        assert [(c.variable, c.applied) for c in worker.live.reload()] == [("PRESERVARIUM_WEB__OPERATORS", True)]
        assert await worker.ask(client, "GET /api/tables", Authorization="Bearer t-ann") == 401
        assert await worker.ask(client, "GET /api/tables", Authorization="Bearer t-bob") == 299


@pytest.mark.parametrize(("remote", "own"), [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("::ffff:127.0.0.1", True), ("::ffff:10.0.0.1", False),
                                             ("10.0.0.1", False), ("::2", False), ("", False), (None, False), ("localhost", False)])  # fmt: skip
def test_this_machine_is_told_by_its_loopback_addresses(remote: str | None, own: bool) -> None:
    request: Any = SimpleNamespace(remote=remote, host="localhost:6066", headers={})
    assert access._from_this_machine(request) is own
