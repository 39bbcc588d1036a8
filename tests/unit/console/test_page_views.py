"""The views behind the pages of explore, registry, messages, tables and unknown devices: what they take, refuse and answer."""

import asyncio
import functools
import re
import time
from types import SimpleNamespace

import orjson
import pages_support
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from console_support import body

from preservarium.clock import SystemClock
from preservarium.console import access
from preservarium.console.messages import MessageViews
from preservarium.console.openapi_pages import PATHS
from preservarium.console.registry import RegistryViews
from preservarium.console.replies import wrapped
from preservarium.console.state import StateViews
from preservarium.console.streams import Streams
from preservarium.console.tables import TableReader
from preservarium.console.workers import Workers
from preservarium.errors import Retry
from preservarium.operations.refusals import Refusals
from preservarium.serving.rights import Right
from preservarium.settings import Settings, Web
from preservarium.stores.events import ConflictError


class Reads(pages_support.Series):
    def __init__(self):
        self.asked = []

    def _up(self):
        pass

    def _devices(self):
        value = {"series_id": 7, "component_type": "t", "pin_position": "-1", "value": 1.5, "unit": "°C", "quality": 1, "timestamp": 5}  # fmt: skip
        return [{"device_id": "d", "name": "D", "type": "T", "values": [value]}]


@pytest.fixture
def host():
    whole = Settings()
    settings = SimpleNamespace(web=Web(), sandbox=whole.sandbox, normalize=whole.normalize, kafka=whole.kafka)
    return SimpleNamespace(live=lambda: settings, clock=SystemClock(), settings=settings)


@pytest.fixture
async def site(host, monkeypatch):
    reads, refusals, asked = Reads(), Refusals(), []
    application = web.Application()
    more = pages_support.mount(application, host, refusals, reads, Workers(), monkeypatch, asked)
    async with TestClient(TestServer(application)) as client:
        yield SimpleNamespace(
            client=client, reads=reads, refusals=refusals, asked=asked, registry=more.registry, host=host
        )
    await more.bench.close()


async def post(site, path, line, status=200, **headers):
    response = await site.client.post(path, data=orjson.dumps(line), headers={"Content-Type": "application/json", **headers})  # fmt: skip
    assert response.status == status, await response.text()
    return await response.json()


def test_the_description_is_of_these_routes_and_of_what_they_answer(host, monkeypatch):
    application = web.Application()
    pages_support.mount(application, host, Refusals(), Reads(), Workers(), monkeypatch, [])
    routes = {
        (route.resource.canonical, route.method.lower())
        for route in application.router.routes()
        if route.method in ("GET", "POST")
    } - {("/api/tables/{name}", "get"), ("/api/trace", "get")}
    assert {(path, method) for path, item in PATHS.items() for method in item} == routes
    for path, item in PATHS.items():
        for operation in item.values():
            named = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"}
            assert named == set(re.findall(r"{(\w+)}", path))


@pytest.mark.parametrize(
    "path",
    [
        "/api/series?label=area=north", "/api/series/components", "/api/series/curves?series=7", "/api/series/sparks?series=7", "/api/devices/d/corrections?series=7",
        "/api/topics", "/api/topics/iot_raw_data/messages", "/api/state", "/api/state/device_configs/a1", "/api/unknown-devices", "/api/registry", "/api/registry/parser",
        "/api/registry/parser/ex-script", "/api/registry/parser/ex-script/versions?stream=parser/ex-script@2",
    ],
)  # fmt: skip
async def test_an_answer_has_the_fields_that_are_described(site, path):
    found = await body(site.client, path)
    template = next(t for t in PATHS if re.fullmatch(re.sub(r"{\w+}", "[^/?]+", re.escape(t).replace(r"\{", "{").replace(r"\}", "}")), path.split("?")[0]))  # fmt: skip
    described = PATHS[template]["get"]["responses"]["200"]["content"]["application/json"]["schema"]["properties"]
    assert set(described) <= set(found)
    if found.get("next_cursor"):
        await body(site.client, path + ("&" if "?" in path else "?") + f"cursor={found['next_cursor']}")


@pytest.mark.parametrize(
    "path",
    [
        "/api/series?label=area", "/api/series?cursor=WzFd", "/api/series/curves", "/api/series/curves?series=x", "/api/series/curves?series=7&points=1",
        f"/api/series/curves?series={','.join(['1'] * 61)}", "/api/topics/iot_raw_data/messages?from=0&offset=5", "/api/topics/iot_raw_data/messages?partition=-1",
        "/api/topics/iot_raw_data/messages?cursor=WzFd", "/api/topics/iot_raw_data/messages?offset=abc", "/api/registry/parser?cursor=WzFd", "/api/registry/parser/ex-script/versions?stream=device/x",
    ],
)  # fmt: skip
async def test_what_is_no_question_is_refused_as_a_problem(site, path):
    said = await body(site.client, path, 400)
    assert said["status"] == 400
    assert said["detail"]


@pytest.mark.parametrize("path", ["/api/registry/nothing", "/api/registry/parser/none", "/api/state/none/a1", "/api/topics/nobody/live"])  # fmt: skip
async def test_what_is_not_there_is_said(site, path):
    assert (await body(site.client, path, 404))["status"] == 404


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("/api/decode", {}), ("/api/decode", {"hex": "00", "text": "a", "parser": "ex-script"}), ("/api/decode", {"hex": "0", "parser": "ex-script"}), ("/api/decode", {"hex": "00"}),
        ("/api/decode", {"hex": "00", "kind": "javascript", "source": {}}), ("/api/decode", {"hex": "00", "parser": "ex-script", "port": 300}), ("/api/decode", {"hex": "00", "unknown": 1}),
        ("/api/decode", {"hex": 5, "parser": "ex-script"}), ("/api/registry/check", {}), ("/api/registry/check", {"yaml": 5}), ("/api/registry/save", {"yaml": "a: 1"}),
        ("/api/registry/plan", {"yaml": "a: 1", "expected": [1]}),
    ],
)  # fmt: skip
async def test_what_is_no_action_is_refused_and_does_nothing(site, path, line):
    assert (await post(site, path, line, 400))["error"]
    assert site.asked == []


async def test_a_form_of_a_strangers_page_is_no_action(site):
    for path in ("/api/decode", "/api/registry/save"):
        response = await site.client.post(path, data=b'{"hex": "00", "yaml": ""}', headers={"Content-Type": "text/plain"})  # fmt: skip
        assert response.status == 415
    assert site.asked == []


async def test_a_payload_goes_through_a_parser_of_the_registry_or_one_that_is_written_down(site):
    found = await post(site, "/api/decode", {"hex": "00d7", "parser": "ex-script", "port": 1})
    assert found["error"] is None
    assert [(r["component_type"], r["value"]) for r in found["readings"]] == [("air-temperature", 21.5)]
    assert (found["parser"], found["type"]) == ("ex-script@2", "EX-1")
    source = "function decodeUplink(input) { throw new Error('no'); }"
    found = await post(site, "/api/decode", {"hex": "00d7", "kind": "javascript", "source": source, "port": 1})
    assert found["error"]["code"] == "script_fault"
    assert found["readings"] == []
    # A script that never ends is killed, and the next one runs.
    endless = await post(site, "/api/decode", {"hex": "00", "kind": "javascript", "source": "function decodeUplink(i) { for (;;) {} }", "port": 1})  # fmt: skip
    assert endless["error"]["code"] == "script_timeout"
    assert (await post(site, "/api/decode", {"hex": "00d7", "parser": "ex-script", "port": 1}))["error"] is None
    assert (await post(site, "/api/decode", {"hex": "00", "parser": "nobody"}, 404))["error"]
    found = await post(site, "/api/decode", {"text": '[{"n": "t", "u": "Cel", "v": 21.5}]', "parser": "senml"})
    assert found["parser"] == "senml"


async def test_all_parsers_are_tried_on_a_payload(site):
    found = await post(site, "/api/decode/all", {"hex": "00d7", "port": 1})
    assert [each["parser"] for each in found["parsers"]] == ["ex-script"]
    assert found["parsers"][0]["types"] == ["EX-1"]


async def test_a_text_is_checked_with_its_examples_in_the_sandbox(site):
    text = (await body(site.client, "/api/registry/parser/ex-script"))["yaml"]
    assert "version" not in text  # a changed source is the next one
    found = await post(site, "/api/registry/check", {"yaml": text})
    assert (found["ok"], found["problems"]) == (True, [])
    assert [each["ok"] for each in found["examples"]] == [True]
    found = await post(site, "/api/registry/check", {"yaml": text.replace("21.5", "99")})
    assert not found["ok"]
    assert found["examples"][0]["differences"]
    assert "hex" in text.splitlines()[found["examples"][0]["line"] - 1]
    found = await post(site, "/api/registry/check", {"yaml": "devices:\n  - device_id: a\n    typo: b\n"})
    assert [each["line"] for each in found["problems"]] == [3] or found["problems"][0]["line"] in (2, 3)
    found = await post(site, "/api/registry/check", {"yaml": "a: [\n"})
    assert not found["ok"]
    assert found["problems"][0]["line"]


async def test_a_text_of_the_browser_cannot_read_files_of_the_server(site):
    text = "parsers:\n  - name: a\n    kind: javascript\n    status: draft\n    file: /etc/passwd\n"
    found = await post(site, "/api/registry/check", {"yaml": text})
    assert "names a file" in found["problems"][0]["message"]
    for file in ("../../etc/passwd", "settings.py", "registry.yaml"):
        found = await post(site, "/api/registry/plan", {"yaml": text.replace("/etc/passwd", file)})
        assert not found["ok"]


async def test_a_change_is_saved_under_a_name_and_not_over_anothers(site, monkeypatch):
    text = 'devices:\n  - device_id: "0018B20000000001"\n    type: EX-1\n    name: New\n    enabled: true\n'
    expected = {"device/0018B20000000001": 2}
    plan = await post(site, "/api/registry/plan", {"yaml": text, "expected": expected})
    assert [change["action"] for change in plan["changes"]] == ["change"]
    assert "Greenhouse 1" in plan["changes"][0]["before"]
    assert "New" in plan["changes"][0]["after"]
    assert site.registry.documents["device"]["0018B20000000001"]["name"] == "Greenhouse 1"
    saved = await post(site, "/api/registry/save", {"yaml": text, "expected": expected, "actor": "ann"})
    assert saved["saved"]
    assert site.asked[-1] == ("apply", "ann", False, ["device/0018B20000000001"], expected)

    async def conflict(*_arguments, **_named):
        raise ConflictError("device/x was changed by someone else meanwhile")

    monkeypatch.setattr("preservarium.console.registry.apply_file", conflict)
    assert "someone else" in (await post(site, "/api/registry/save", {"yaml": text, "actor": "ann"}, 409))["error"]


async def test_where_the_registry_is_kept_in_files_nothing_is_saved(site):
    site.host.settings.web = Web(registry_editing=False)
    text = 'devices:\n  - {device_id: "a", type: EX-1, enabled: true}\n'
    assert "registry_editing" in (await post(site, "/api/registry/save", {"yaml": text, "actor": "ann"}, 403))["error"]
    assert site.asked == []
    assert (await body(site.client, "/api/registry"))["editing"] is False


async def test_the_export_is_a_file_that_says_the_same(site):
    from preservarium.registry.file import read_text

    response = await site.client.get("/api/registry.yaml")
    file = read_text(await response.text())
    assert file.errors == []
    for kind, documents in site.registry.documents.items():
        assert [*documents.values()] == file.documents[kind]


async def test_unknown_devices_come_with_the_parser_that_understands_them(site):
    found = await body(site.client, "/api/unknown-devices")
    (one,) = found["unknown"]
    assert (one["device"], one["count"], one["hex"]) == ("stranger-1", 3, "00d7")
    assert one["parsers"][0]["types"] == ["EX-1"]
    assert found["types"] == ["EX-1"]


async def test_what_comes_is_told_as_events(site):
    site.reads.news_to_tell = [{"series_id": 7, "received_at": 1}]
    async with site.client.get("/api/devices/d/live") as response:
        assert response.content_type == "text/event-stream"
        lines = []
        async for line in response.content:
            if line.startswith(b"data: "):
                lines.append(orjson.loads(line[6:]))
            if len(lines) == 2:
                break
    assert [len(each["values"]) for each in lines] == [0, 1]
    async with site.client.get("/api/topics/iot_raw_data/live?key=a") as response:
        while not (line := await response.content.readline()).startswith(b"data: ") or b"left_out" not in line:
            pass


async def test_streams_are_bounded_and_given_back():
    streams = Streams(1)
    closed = []

    async def events():
        try:
            yield {}
            await asyncio.sleep(60)
        finally:
            closed.append(True)

    async def handler(request):
        return await streams.send(request, events())

    settings = SimpleNamespace(web=Web())
    application = web.Application()
    application.router.add_get("/live", wrapped(handler, Right.READ, lambda: settings, timeout_s=60))
    async with TestClient(TestServer(application)) as client:
        first = await client.get("/live")
        assert await first.content.readline() == b"data: {}\n"
        assert (await client.get("/live")).status == 503
        first.close()
        for _ in range(200):
            if closed:
                break
            await asyncio.sleep(0.02)
        assert closed
        second = await client.get("/live")
        assert second.status == 200
        second.close()


# --- tables of other workers


class _Table(pages_support.Table):
    def __init__(self, content, owned):
        super().__init__(content)
        self._owned = owned

    def owned(self):
        return self._owned


def _reader(content, owned):
    return TableReader(lambda: {"t": _Table(content, owned)}, lambda key: key[0] - ord("0"))


@pytest.mark.parametrize(
    "web_settings",
    [Web(), Web(operators="ann:t-ann, bob:t-bob"), Web(operator_token="shared"), Web(operator_token="shared", supervisor_token="s"), Web(supervisor_token="s")],
)  # fmt: skip
async def test_a_key_is_told_by_whichever_worker_has_it_and_a_copy_where_that_one_is_gone(web_settings):
    settings = SimpleNamespace(web=web_settings)
    host = SimpleNamespace(live=lambda: settings, clock=SystemClock())
    mine, theirs = _reader({0: {b"0a": b"1"}, 1: {b"1a": b'"old"'}}, [0]), _reader({1: {b"1a": b'"new"', b"1/x y": b"7"}}, [1])  # fmt: skip
    workers = Workers()
    workers.trouble = ""

    async def table_key(request):
        from preservarium.console.replies import answer

        return answer(theirs.get(request.match_info["name"], request.match_info["key"].encode()))

    other = web.Application()
    other.router.add_get("/api/tables/{name}/{key}", wrapped(table_key, Right.OPERATE, lambda: settings))
    token = web_settings.operator_token.get_secret_value() or next(iter(web_settings.operator_tokens.values()), "")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with TestServer(other) as server:
        line = {"worker": "w2:1", "console": f"127.0.0.1:{server.port}", "guards": {"breakers": {}, "fuses": {}}, "tables": theirs.held()}  # fmt: skip
        workers.hear(orjson.dumps(line), time.time_ns() // 1_000)
        application = web.Application()
        StateViews(host, mine, workers, "w1:1").mount(application)
        async with TestClient(TestServer(application), headers=headers) as client:
            ask = functools.partial(body, client)
            assert (await ask("/api/state/t/0a"))["worker"] == "w1:1"
            found = await ask("/api/state/t/1a")
            assert (found["value"], found["worker"], found["copy"]) == ("new", "w2:1", False)
            assert (await ask("/api/state/t/1%2Fx%20y"))["value"] == 7
            await ask("/api/state/t/1none", 404)
            (table,) = (await ask("/api/state"))["tables"]
            assert [(p["partition"], p["owner"], p["copies"]) for p in table["partitions"]] == [(0, "w1:1", []), (1, "w2:1", ["w1:1"])]  # fmt: skip
            await server.close()
            found = await ask("/api/state/t/1a")
            assert (found["value"], found["copy"]) == ("old", True)
            assert "cannot be asked" in found["note"]


@pytest.mark.parametrize(
    ("method", "path", "shift_us", "token", "passes"),
    [
        ("GET", "/api/tables/t/k", 0, "s3cret", True), ("GET", "/api/tables/t/k", -59_000_000, "s3cret", True), ("GET", "/api/tables/t/k", -61_000_000, "s3cret", False),
        ("GET", "/api/tables/t/k", 90_000_000, "s3cret", False), ("GET", "/api/tables/t/other", 0, "s3cret", False), ("GET", "/api/tables/t/k", 0, "wrong", False),
        ("POST", "/api/tables/t/k", 0, "s3cret", False), ("GET", "/api/commands", 0, "s3cret", False),
    ],
)  # fmt: skip
async def test_the_proof_of_a_worker_opens_one_value_for_a_minute_and_nothing_else(
    method, path, shift_us, token, passes
):
    settings = SimpleNamespace(web=Web(operators="ann:s3cret"))

    async def handler(_request):
        return web.json_response({})

    application = web.Application()
    for route in ("/api/tables/{name}/{key}", "/api/commands"):
        application.router.add_route("*", route, wrapped(handler, Right.OPERATE, lambda: settings))
    proven = path if path == "/api/commands" else "/api/tables/t/k"
    at_us = time.time_ns() // 1_000 + shift_us
    headers = access.as_worker(Web(operators=f"ann:{token}"), proven, at_us)
    async with TestClient(TestServer(application)) as client:
        assert (await client.request(method, path, headers=headers)).status == (200 if passes else 401)
        for broken in ("", ":", "x:y", f"{at_us}:", f"{'9' * 40}:{'a' * 64}", "\u0663:a"):
            if broken.isascii():
                assert (await client.get("/api/tables/t/k", headers={access.WORKER_HEADER: broken})).status == 401


async def test_kafka_that_does_not_answer_is_a_problem_too(host, monkeypatch):
    async def down(*_arguments):
        raise Retry("Kafka cannot be asked")

    application = web.Application()
    MessageViews(host).mount(application)
    RegistryViews(host, pages_support.Registry(), None).mount(application)
    monkeypatch.setattr("preservarium.operations.browse.listed", down)
    monkeypatch.setattr("preservarium.operations.browse.page", down)
    async with TestClient(TestServer(application)) as client:
        for path in ("/api/topics", "/api/topics/iot_raw_data/messages"):
            assert "Kafka" in (await body(client, path, 503))["detail"]


async def test_operators_look_at_the_registry_and_try_texts_but_only_engineers_change_it(site):
    site.host.settings.web = Web(operators="ann:t-ann")
    proof = {"Authorization": "Bearer t-ann"}
    async with site.client.get("/api/registry", headers=proof) as response:
        found = await response.json()
    assert (found["editing"], found["in_files"]) == (False, False)
    text = 'devices:\n  - {device_id: "a", type: EX-1, enabled: true}\n'
    assert (await post(site, "/api/registry/plan", {"yaml": text}, **proof))["changes"]
    said = await post(site, "/api/registry/save", {"yaml": text, "actor": "ann"}, 403, **proof)
    assert "an engineer" in said["error"]
    assert [each[2] for each in site.asked if each[0] == "apply"] == [True]
