"""What operators do, against a real worker: through HTTP, the command line and a link; and what is kept of it."""

import asyncio
from typing import Any

import aiohttp
import asyncpg
import orjson
import pytest
from click.testing import CliRunner, Result
from operators_support import Plant
from worker_support import until

from preservarium.__main__ import cli
from preservarium.notices.links import acknowledge_link
from preservarium.stores import events

DEVICES = ("dev-1", "dev/2", "dev-3", "dev-4", "dev-5")


@pytest.fixture
async def plant(kafka: str, topic_prefix: str, pg_dsn: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Plant(kafka, topic_prefix, pg_dsn, tmp_path)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    await made.open(*DEVICES)
    yield made
    await made.close()


@pytest.fixture
async def http() -> Any:
    async with aiohttp.ClientSession() as session:
        yield session


async def listed(http: Any, url: str, query: str = "") -> dict[str, Any]:
    async with http.get(f"{url}/api/alarms?{query}") as response:
        page = await response.json()
        assert response.status == 200, page
        return {a["device_id"]: a for a in page["alarms"]}


async def act(http: Any, url: str, device: str, action: str, **fields: Any) -> dict[str, Any]:
    line = {"device_id": device, "rule": "hot", "action": action, "actor": "ann", **fields}
    async with http.post(f"{url}/api/alarms/actions", json=line) as response:
        said = await response.json()
        assert response.status == 202, said
    async with http.get(f"{url}{said['answer']}?wait_s=20") as response:
        return await response.json()


async def command(*arguments: str) -> Result:
    # In a thread: commands have an event loop of their own.
    return await asyncio.to_thread(CliRunner().invoke, cli, ["alarms", *arguments])


async def chain(dsn: str, device: str, length: int) -> list[Any]:
    connection = await asyncpg.connect(dsn)
    found: list[Any] = []

    async def long_enough() -> bool:
        found[:] = await events.read(connection, f"alarm/{device}")
        return len(found) >= length

    try:
        await until(long_enough, 90, lambda: str(found))
        assert (await events.verify(connection)).faults == []
        return found
    finally:
        await connection.close()


async def test_operators_work_through_any_worker_any_way_and_all_is_kept(plant: Plant, http: Any, pg_dsn: str) -> None:
    url = await plant.start()
    await plant.raises(*DEVICES)

    # HTTP: done, refused with the reason, done once.
    answer = await act(http, url, "dev-1", "acknowledge", comment="on my way", action_id="one")
    assert (answer["outcome"], answer["state"], answer["actor"]) == ("done", "acknowledged", "ann")
    answer = await act(http, url, "dev-1", "acknowledge")
    assert (answer["outcome"], answer["code"], answer["reason"]) == (
        "refused", "already_acknowledged", "the alarm is acknowledged already",
    )  # fmt: skip
    assert (await act(http, url, "dev-1", "acknowledge", action_id="one"))["outcome"] == "done"
    other = await act(http, url, "dev-1", "comment", comment="x", alarm_id="another")
    assert (other["outcome"], other["code"]) == ("refused", "other_occurrence")

    # The command line, on the same state, without the worker's web port.
    done = await command("acknowledge", "dev/2", "hot", "--actor", "bob", "--json")
    assert done.exit_code == 0, done.output
    assert orjson.loads(done.stdout)["state"] == "acknowledged"
    refused = await command("clear", "dev/2", "hot")
    assert (refused.exit_code, "refused: the condition is still true" in refused.stderr) == (1, True)
    shelved = await command("shelve", "dev-3", "hot", "--for", "30m", "--comment", "noisy")
    assert (shelved.exit_code, shelved.stdout) == (0, "done: dev-3 hot is shelved\n")
    unknown = await command("acknowledge", "dev-9", "hot")
    assert (unknown.exit_code, "no such rule watches the device" in unknown.stderr) == (1, True)
    page = orjson.loads((await command("list", "--json")).stdout)
    assert {a["device_id"]: a["state"] for a in page["alarms"]} == {
        "dev-1": "acknowledged", "dev/2": "acknowledged", "dev-3": "shelved", "dev-4": "unacknowledged", "dev-5": "unacknowledged",
    }  # fmt: skip
    assert [a["device_id"] for a in page["alarms"]][-1] == "dev-3"
    assert "dev-4" in (await command("list", "--state", "waiting")).stdout
    assert "dev-1" not in (await command("list", "--state", "waiting")).stdout

    # A link.
    alarms = await listed(http, url)
    settings = plant.settings.model_copy(update={"web": plant.settings.web.model_copy(update={"public_url": url})})
    link = acknowledge_link(alarms["dev-4"], "eve@example.org", settings)
    async with http.get(link) as response:
        assert "Acknowledge this alarm?" in await response.text()
    assert (await listed(http, url))["dev-4"]["state"] == "unacknowledged"
    async with http.post(f"{url}/ack", data={"token": link.partition("token=")[2]}) as response:
        assert "Acknowledged." in await response.text()
    assert (await listed(http, url))["dev-4"]["actor"] == "eve@example.org"

    # What never was raised can be taken out of service, and shows.
    await plant.reads("dev-5", 20)
    assert (await act(http, url, "dev-5", "acknowledge"))["state"] == "normal"
    assert (await act(http, url, "dev-5", "out_of_service"))["outcome"] == "done"
    assert (await listed(http, url, "state=out-of-service"))["dev-5"]["alarm_id"] == ""

    # Who did what when.
    kept = await chain(pg_dsn, "dev-1", 3)
    assert [(e.type, e.actor, e.data["action"], e.data["comment"]) for e in kept] == [
        ("action_done", "ann", "acknowledge", "on my way"),
        ("action_refused", "ann", "acknowledge", ""),
        ("action_refused", "ann", "comment", "x"),
    ]
    async with http.get(f"{url}/api/alarms/dev%2F2/hot/-1") as response:
        found = await response.json()
    assert (found["state"], found["history"] is not None) == ("acknowledged", True)
    shown = await command("show", "dev/2", "hot")
    assert "bob" in shown.stdout
    assert "refused: the condition is still true" in shown.stdout


async def test_many_at_once_by_filter_over_http_and_by_the_command_line(plant: Plant, http: Any) -> None:
    url = await plant.start()
    await plant.raises(*DEVICES)
    assert (await act(http, url, "dev-1", "acknowledge"))["outcome"] == "done"

    async def standing() -> dict[str, str]:
        return {device: a["state"] for device, a in (await listed(http, url)).items()}

    async with http.get(f"{url}/api/alarms?limit=200") as response:
        seen = (await response.json())["seen"]
    # It returns and comes again after the list was read: another occurrence, which nobody has seen.
    await act(http, url, "dev-5", "acknowledge")
    await plant.reads("dev-5", 20)

    async def gone() -> bool:
        return "dev-5" not in await standing()

    await until(gone, 60, plant.log)
    await plant.raises("dev-5")
    asked = {"action": "acknowledge", "actor": "ann", "filter": {"rule": "hot", "state": "standing", "q": "dev"}, "seen": seen, "wait_s": 20,
             "request_id": "shift-1", "comment": "all of the hall"}  # fmt: skip
    async with http.post(f"{url}/api/alarms/bulk", json=asked) as response:
        said = await response.json()
    assert (response.status, said["matched"], said["newer"]) == (202, 4, 1), said
    outcomes = {r["device_id"]: (r["outcome"], r["code"]) for r in said["results"]}
    assert outcomes == {
        "dev-1": ("refused", "already_acknowledged"), "dev/2": ("done", ""), "dev-3": ("done", ""), "dev-4": ("done", ""),
    }  # fmt: skip
    assert (await standing())["dev-5"] == "unacknowledged"
    async with http.post(f"{url}/api/alarms/bulk", json=asked) as response:
        again = await response.json()
    assert {r["action_id"] for r in again["results"]} == {r["action_id"] for r in said["results"]}
    assert {r["device_id"]: r["outcome"] for r in again["results"]} == {d: o for d, (o, _) in outcomes.items()}

    # The command line: asked first, then each with its result.
    no = await asyncio.to_thread(
        CliRunner().invoke, cli, ["alarms", "acknowledge", "--rule", "hot", "--severity", "major"], input="n\n"
    )
    assert (no.exit_code, "1 alarms: 1 major" in no.stderr, "acknowledge 1? [y/N]" in no.stderr) == (1, True, True)
    assert (await standing())["dev-5"] == "unacknowledged"
    done = await command("acknowledge", "--rule", "hot", "--severity", "major", "--yes", "--actor", "bob")
    assert (done.exit_code, done.stdout) == (0, "done: 1, refused: 0\n"), done.output
    shelved = await command("shelve", "--device", "dev-3", "--for", "30m", "--yes", "--json")
    assert (orjson.loads(shelved.stdout)["done"], (await standing())["dev-3"]) == (1, "shelved")
    refused = await command("acknowledge", "--rule", "hot", "--state", "standing", "--yes")
    assert (refused.exit_code, refused.stdout) == (1, "done: 0, refused: 5\n")
    assert "refused: dev-5 hot: the alarm is acknowledged already" in refused.stderr
    unshelved = await command("unshelve", "--search", "box dev-3", "--yes", "--json")
    assert [r["state"] for r in orjson.loads(unshelved.stdout)["results"]] == ["unacknowledged"]
    nothing = await command("unshelve", "--search", "nothing like that", "--json")
    assert (nothing.exit_code, orjson.loads(nothing.stdout)["matched"]) == (0, 0)
    for wrong in (["dev-1"], ["dev-1", "hot", "--rule", "hot"], [], ["--rule", "hot", "--alarm-id", "x"]):
        assert (await command("acknowledge", *wrong)).exit_code == 2


async def test_another_worker_shows_and_does_the_same_and_a_restart_forgets_nothing(plant: Plant, http: Any) -> None:
    first = await plant.start()
    await plant.raises(*DEVICES)

    async def all_there(url: str) -> bool:
        return set(await listed(http, url)) == set(DEVICES)

    answer = await act(http, first, "dev-1", "acknowledge", action_id="through-the-first")
    assert answer["outcome"] == "done"
    second = await plant.start()
    await until(lambda: all_there(second), 90, lambda: plant.log(1))
    assert (await listed(http, second))["dev-1"]["state"] == "acknowledged"
    # An answer to what was sent through another worker is known here, too.
    async with http.get(f"{second}/api/alarms/actions/through-the-first?wait_s=10") as response:
        assert (await response.json())["outcome"] == "done"
    for device in DEVICES[1:]:
        assert (await act(http, second, device, "acknowledge"))["outcome"] == "done"
    for device in DEVICES:
        await plant.reads(device, 20)

    async def empty() -> bool:
        return await listed(http, first) == {} == await listed(http, second)

    await until(empty, 90, plant.log)


async def test_nothing_that_operators_do_waits_for_the_database(plant: Plant, http: Any, pg_dsn: str) -> None:
    url = await plant.start(PRESERVARIUM_POSTGRES__URL="postgresql://nobody@127.0.0.1:1/none")
    await plant.raises("dev-1")
    assert (await act(http, url, "dev-1", "acknowledge", comment="seen"))["outcome"] == "done"
    assert (await act(http, url, "dev-1", "clear"))["outcome"] == "refused"
    async with http.get(f"{url}/api/alarms") as response:
        page = await response.json()
    assert (page["source"], page["complete"], page["note"]) == ("kafka", True, None)
    async with http.get(f"{url}/api/alarms/dev-1/hot/-1") as response:
        found = await response.json()
    assert (found["state"], found["history"], "does not answer" in found["history_note"]) == (
        "acknowledged",
        None,
        True,
    )
    async with http.get(f"{url}/api/status") as response:
        guards = (await response.json())["guards"]
    assert guards["breakers"]["postgres"]["state"] in ("open", "half_open", "closed")
    assert {"alarm", "alarm-actions", "sink-actions"} <= set(guards["fuses"])
    # The database comes back: what was done meanwhile is kept.
    plant.processes[0].terminate()
    plant.processes[0].wait(20)
    await plant.start()
    assert [e.type for e in await chain(pg_dsn, "dev-1", 2)] == ["action_done", "action_refused"]


async def test_every_worker_shows_the_others_and_which_is_gone(plant: Plant, http: Any) -> None:
    first, second = await plant.start(), await plant.start()

    async def others(url: str) -> list[dict[str, Any]]:
        async with http.get(f"{url}/api/status") as response:
            said = await response.json()
        assert said["worker"]["id"] not in {w["worker"] for w in said["workers"]}
        return said["workers"]

    async def heard(url: str, gone: bool) -> bool:
        return [w["gone"] for w in await others(url)] == [gone]

    await until(lambda: heard(first, False), 60, lambda: plant.log(0)[-2_000:])
    await until(lambda: heard(second, False), 60, lambda: plant.log(1)[-2_000:])
    (seen,) = await others(first)
    assert seen["worker"].endswith(f":{plant.processes[1].pid}")
    assert seen["console"] == second.removeprefix("http://")
    assert seen["guards"]["fuses"]["alarm"]["blown"] is False
    assert seen["age_s"] < 20
    # Killed: it is marked, and a worker that has just started knows of it too.
    plant.processes[1].kill()
    plant.processes[1].wait(20)
    await until(lambda: heard(first, True), 60, lambda: plant.log(0)[-2_000:])
    third = await plant.start()

    async def both() -> bool:
        return sorted(w["gone"] for w in await others(third)) == [False, True]

    await until(both, 60, lambda: plant.log(2)[-2_000:])
    # One that leaves says so.
    plant.processes[2].terminate()
    plant.processes[2].wait(60)
    await until(lambda: heard(first, True), 15, lambda: plant.log(2)[-3_000:])
