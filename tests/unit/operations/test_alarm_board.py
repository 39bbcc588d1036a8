"""The operators' API over a board that is fed by hand: lists, cursors, actions, access, answers, links, description."""

import asyncio
import re
from importlib import resources
from types import SimpleNamespace

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from console_support import body
from prometheus_client import REGISTRY

from preservarium import metrics
from preservarium.clock import ManualClock
from preservarium.console.commands import Commands
from preservarium.console.devices import DeviceViews
from preservarium.console.follower import BoardFollower
from preservarium.console.openapi import DOCUMENT
from preservarium.console.operators import BODY_BYTES_MAX, Operators
from preservarium.console.refusals import RefusalViews
from preservarium.console.tables import TableReader
from preservarium.domain.alarms.action import ACTIONS, ActionDoc, AnswerDoc
from preservarium.domain.alarms.line import StandingDoc
from preservarium.domain.alarms.machine import TRANSITIONS, State
from preservarium.errors import Retry
from preservarium.notices.links import acknowledge_link
from preservarium.operations.alarm_board import ANSWERS_MAX, SORTS, STANDING_MAX, STATES, Board, Desk, Filter, sort_key
from preservarium.operations.command_desk import REQUEST_FIELDS, CommandDesk
from preservarium.operations.refusals import Refusals
from preservarium.settings import Web, load

T = 1_760_000_000_000_000
S = 1_000_000
EVIL = '<script>alert("x")</script>'
SECRET = "0123456789abcdef"


def alarm(n=1, **fields):
    return {
        "alarm_id": f"a{n}", "device_id": f"dev/{n}", "device_name": "Box", "rule": "hot", "pin_position": "-1", "severity": "major",
        "state": "unacknowledged", "transition": "raised", "occurred_at": T + n * S, "detected_at": T + n * S, "transition_at": T + n * S,
        "value": 31.0, "threshold": 30.0, "unit": "°C", "message": f"too hot {EVIL}", "active": True, "shelved_until": None,
        "cleared_at": None, "component_type": "temp",
    } | fields  # fmt: skip


def stand(board, *alarms):
    for each in alarms:
        board.put((each["device_id"], each["rule"], each["pin_position"]), each)


def answer_of(action_id, outcome="done", **fields):
    return orjson.dumps({"action_id": action_id, "outcome": outcome, "reason": "", "state": "acknowledged"} | fields)


class Reads:
    down = False
    history = ()

    async def alarms(self, *, active, before, limit, **wanted):
        return {"alarms": [], "next": None, "total": 0}

    async def standing(self, limit):
        if self.down:
            raise Retry("PostgreSQL: refused")
        return [alarm(7, state="latched")]

    async def alarm_history(self, *, device_id, rule, pin_position, limit):
        if self.down:
            raise Retry("PostgreSQL: refused")
        return [*self.history]


@pytest.fixture
def board():
    board = Board()
    board.ready.set()
    board.trouble = ""
    return board


def test_a_board_is_asked_by_any_spelling_of_an_address(board):
    stand(board, alarm(1, device_id="70B3D57ED0AA0001"), alarm(2, device_id="70B3D57ED0AA0002"))
    for spelled in ("70B3D57ED0AA0001", "70b3d57ed0aa0001", "70:b3:d5:7e:d0:aa:00:01"):
        assert board.get((spelled, "hot", "-1"))["alarm_id"] == "a1"
        assert board.get((spelled, "cold", "-1")) is None
        for wanted in (Filter(device_id=spelled), Filter(q=spelled)):
            assert [a["alarm_id"] for a in board.page(wanted, after=None, limit=9).alarms] == ["a1"]
    assert board.page(Filter(device_id="70b3d57ed0aa"), after=None, limit=9).total == 0
    assert board.page(Filter(q="70b3d57ed0aa"), after=None, limit=9).total == 2


@pytest.fixture
def host():
    host = SimpleNamespace(settings=SimpleNamespace(web=Web()), clock=ManualClock(), sent=[], fails=None)
    host.live = lambda: host.settings

    async def publish(sends):
        if host.fails:
            raise host.fails
        host.sent += sends

    host.publish = publish
    return host


@pytest.fixture
def reads():
    return Reads()


@pytest.fixture
async def client(host, board, reads):
    application = web.Application()
    Operators(host, Desk(board, host.publish, host.clock), reads).mount(application)
    Commands(host, CommandDesk(host.publish, host.clock), reads).mount(application)
    DeviceViews(host, reads, TableReader(dict, lambda key: 0)).mount(application)
    RefusalViews(host, Refusals(), lambda: None).mount(application)
    async with TestClient(TestServer(application)) as client:
        client.application = application
        yield client


async def act(client, status=202, headers=None, **fields):
    line = {"device_id": "dev/1", "rule": "hot", "action": "acknowledge", "actor": "ann"} | fields
    line = {k: v for k, v in line.items() if v is not None}
    response = await client.post("/api/alarms/actions", json=line, headers=headers or {})
    assert response.status == status, await response.text()
    return await response.json()


# --- the list ---


async def test_what_needs_somebody_comes_first(client, board):
    stand(
        board,
        alarm(1, state="shelved", severity="critical"),
        alarm(2, state="acknowledged", severity="critical"),
        alarm(3, state="returned_unacknowledged", severity="minor"),
        alarm(4, severity="minor"),
        alarm(5, severity="critical"),
    )
    page = await body(client, "/api/alarms")
    assert [a["alarm_id"] for a in page["alarms"]] == ["a5", "a4", "a3", "a2", "a1"]
    assert (page["total"], page["source"], page["complete"], page["note"]) == (5, "kafka", True, None)
    assert page["counts"]["severity"] == {"critical": 2, "major": 0, "minor": 2, "warning": 0, "indeterminate": 0}
    assert page["counts"]["waiting"]["minor"] == 2
    assert page["counts"]["state"]["shelved"] == 1


@pytest.mark.parametrize("order", SORTS)
async def test_pages_have_no_gap_and_no_repeat_in_any_order(client, board, order):
    stand(board, *(alarm(n, occurred_at=T + n % 3, severity=["minor", "major"][n % 2]) for n in range(20)))
    seen, cursor = [], None
    while True:
        params = {"sort": order, "limit": "7"} | ({"cursor": cursor} if cursor else {})
        page = await body(client, "/api/alarms", params=params)
        seen += page["alarms"]
        if (cursor := page["next_cursor"]) is None:
            break
    assert len(seen) == len({a["alarm_id"] for a in seen}) == page["total"] == 20
    assert [sort_key(a, order) for a in seen] == sorted(sort_key(a, order) for a in seen)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("state=unacknowledged", {1, 4}), ("state=returned-unacknowledged", {2}), ("state=shelved,acknowledged", {3, 5}), ("state=latched", {6}),
        ("state=waiting", {1, 2, 4, 6}), ("state=silent", {3}), ("state=standing", {1, 2, 3, 4, 5, 6}), ("severity=critical,minor", {4, 5}),
        ("device=dev/2", {2}), ("rule=cold", {5}), ("q=DEV%2F3", {3}), ("q=greenhouse", {4}), ("q=zzz", set()),
        ("state=active&severity=major", {1}),
    ],
)  # fmt: skip
async def test_filters(client, board, query, found):
    stand(
        board, alarm(1), alarm(2, state="returned_unacknowledged"), alarm(3, state="shelved"),
        alarm(4, severity="critical", device_name="Greenhouse"), alarm(5, state="acknowledged", severity="minor", rule="cold"),
        alarm(6, state="latched_unacknowledged"),
    )  # fmt: skip
    page = await body(client, f"/api/alarms?{query}")
    assert {a["alarm_id"] for a in page["alarms"]} == {f"a{n}" for n in found}
    assert page["total"] == len(found)


@pytest.mark.parametrize(
    "query",
    [
        "state=normal",
        "state=",
        "state=shelved,",
        "severity=bad",
        "sort=colour",
        "limit=0",
        "cursor=WzEsMl0",
        "cursor=WyJwcmlvcml0eSIsInh4Il0",
        "q=a%00",
    ],
)
async def test_a_bad_question_is_refused_with_a_reason(client, board, query):
    stand(board, alarm(1))
    if query == "state=":
        assert (await body(client, f"/api/alarms?{query}"))["total"] == 1
    else:
        assert (await body(client, f"/api/alarms?{query}", 400))["error"]


async def test_every_state_can_be_asked_for():
    assert {s.value for s in State if s is not State.NORMAL} <= set(STATES)
    assert STATES["standing"] == {s.value for s in State} - {"normal"}


async def test_the_list_says_when_it_may_be_old(client, board):
    stand(board, alarm(1))
    board.trouble = "Kafka: no answer"
    page = await body(client, "/api/alarms")
    assert (page["total"], page["complete"]) == (1, False)
    assert "may be old" in page["note"]


async def test_before_kafka_was_read_the_database_is_shown_and_that_is_said(client, board, reads):
    board.ready.clear()
    board.trouble = "not read yet"
    page = await body(client, "/api/alarms")
    assert [a["alarm_id"] for a in page["alarms"]] == ["a7"]
    assert (page["source"], page["complete"]) == ("postgres", False)
    assert "database" in page["note"]
    reads.down = True
    assert "not available now" in (await body(client, "/api/alarms", 503))["error"]


# --- the board ---


def test_records_become_what_stands_and_wrong_ones_nothing(board):
    key = orjson.dumps(["dev/1", "hot", "-1"])
    assert board.stand(key, orjson.dumps(alarm(1))) == ("dev/1", "hot", "-1")
    for bad_key, value in ((b"x", b"{}"), (key, b"{"), (key, b"[]"), (key, orjson.dumps(alarm(2))), (b'["a"]', None)):
        assert board.stand(bad_key, value) is None
    assert [a["alarm_id"] for a in board.alarms()] == ["a1"]
    assert board.stand(key, None) == ("dev/1", "hot", "-1")
    assert board.alarms() == []


def test_a_board_has_limits_and_says_so(board):
    stand(board, *(alarm(n) for n in range(STANDING_MAX + 3)))
    assert (len(board.alarms()), len(board.dropped), board.complete) == (STANDING_MAX, 3, False)
    assert "3 are not in this list" in board.note()
    board.put((f"dev/{STANDING_MAX}", "hot", "-1"), None)
    assert len(board.dropped) == 2
    for n in range(ANSWERS_MAX + 10):
        board.answer(answer_of(f"x{n}"))
    assert board.answered("x9") is None
    assert board.answered("x10") is not None
    assert [a["action_id"] for a in board.answers(2)] == [f"x{ANSWERS_MAX + 9}", f"x{ANSWERS_MAX + 8}"]


def test_reading_anew_forgets_what_is_gone(board):
    stand(board, alarm(1), alarm(2))
    board.keep([("dev/2", "hot", "-1")])
    assert [a["alarm_id"] for a in board.alarms()] == ["a2"]


def test_a_flood_begins_above_ten_in_ten_minutes_and_ends_below_five(board):
    stand(board, *(alarm(n, detected_at=T + n * 30 * S) for n in range(10)))
    assert board.flood(T + 300 * S) == {"on": False, "raised": 10, "window_s": 600, "limit": 10}
    stand(board, alarm(10, detected_at=T + 300 * S))
    stand(board, alarm(10, detected_at=T + 300 * S, transition="acknowledged", state="acknowledged"))
    assert board.flood(T + 300 * S)["on"] is True
    assert board.flood(T + 740 * S) == {"on": True, "raised": 6, "window_s": 600, "limit": 10}
    assert board.flood(T + 870 * S)["on"] is False


def test_what_stands_is_measured(board):
    def value(name, **labels):
        return REGISTRY.get_sample_value(f"preservarium_{name}", labels)

    stand(board, *(alarm(n, detected_at=T + n * S, recipients=["measured"]) for n in range(11)))
    stand(board, alarm(11, state="acknowledged", transition="acknowledged", chattering=True))
    board.measure(T + 20 * S)
    assert value("alarm_flood", recipient="") == value("alarm_flood", recipient="measured") == 1
    assert value("alarms_recent", recipient="measured") == 11
    counts = board.counts()
    assert {s: value("alarms_standing", severity=s) for s in counts["severity"]} == counts["severity"]
    assert {s: value("alarms_waiting", severity=s) for s in counts["waiting"]} == counts["waiting"]
    assert sum(counts["waiting"].values()) == 11
    assert value("alarms_chattering") == 1
    board.measure(T + 700 * S)
    assert value("alarm_flood", recipient="measured") == value("alarms_recent", recipient="measured") == 0


def test_a_filter_takes_everything_by_default():
    assert all(Filter().takes(alarm(state=state)) for state in STATES["standing"])


async def test_a_board_that_cannot_be_followed_says_why():
    board = Board()
    stand(board, alarm(1), alarm(2, state="shelved"))
    follower = BoardFollower(board, lambda: load(kafka={"bootstrap_servers": "127.0.0.1:1"}))
    await follower.start()
    async with asyncio.timeout(20):
        while "Kafka" not in board.trouble:
            await asyncio.sleep(0.02)
    await follower.stop()
    assert metrics.ALARM_BOARD_CURRENT._value.get() == 0
    assert not board.complete
    assert "may be old" in board.note()


# --- one alarm ---


async def test_one_alarm_comes_with_its_history(client, board, reads):
    stand(board, alarm(1))
    reads.history = ({"what": "transition", "name": "raised", "at": T},)
    found = await body(client, "/api/alarms/dev%2F1/hot/-1")
    assert (found["state"], found["alarm"]["alarm_id"], len(found["history"])) == ("unacknowledged", "a1", 1)
    assert (await body(client, "/api/alarms/dev%2F2/hot/-1"))["state"] == "normal"
    reads.history = ()
    await body(client, "/api/alarms/dev%2F2/hot/-1", 404)
    reads.down = True
    found = await body(client, "/api/alarms/dev%2F1/hot/-1")
    assert found["history"] is None
    assert "does not answer" in found["history_note"]


# --- actions ---


async def test_an_action_is_sent_to_its_device_with_the_servers_time(client, host):
    said = await act(client, comment="seen", alarm_id="a1")
    (send,) = host.sent
    assert (send.topic.name, send.key) == ("alarm_actions", b"dev/1")
    assert orjson.loads(send.value) == {
        "device_id": "dev/1", "rule": "hot", "action": "acknowledge", "actor": "ann", "comment": "seen", "alarm_id": "a1",
        "action_id": said["action_id"], "at": host.clock.now_us(),
    }  # fmt: skip
    assert said["answer"] == f"/api/alarms/actions/{said['action_id']}"


@pytest.mark.parametrize(
    "fields",
    [
        {"action": "explode"}, {"actor": None}, {"actor": ""}, {"device_id": None}, {"rule": "x" * 300}, {"action": "comment"},
        {"action": "shelve", "duration_s": 0}, {"action": "shelve", "duration_s": 1e9}, {"at": 5}, {"surprise": 1}, {"action_id": "x" * 65},
        {"one_shot": "yes"}, {"comment": "x" * 2001}, {"action_id": ""},
    ],
)  # fmt: skip
async def test_an_action_that_is_not_well_formed_is_refused_and_not_sent(client, host, fields):
    if fields == {"action_id": ""}:
        assert (await act(client, **fields))["action_id"]
        return
    assert (await act(client, 400, **fields))["error"]
    assert host.sent == []


@pytest.mark.parametrize(
    ("data", "kind", "status"),
    [(b"{", "application/json", 400), (b"[]", "application/json", 400), (b"{}", "text/plain", 415), (b"{}", "application/x-www-form-urlencoded", 415),
     (b"x" * (BODY_BYTES_MAX + 1), "application/json", 413)],
)  # fmt: skip
async def test_a_body_that_is_no_action_is_refused(client, host, data, kind, status):
    response = await client.post("/api/alarms/actions", data=data, headers={"Content-Type": kind})
    assert response.status == status
    assert (await response.json())["error"]
    assert host.sent == []


async def test_the_answer_can_be_asked_and_waited_for(client, board):
    action_id = (await act(client))["action_id"]
    assert (await body(client, f"/api/alarms/actions/{action_id}", 404))["outcome"] == "pending"
    waiting = asyncio.create_task(body(client, f"/api/alarms/actions/{action_id}?wait_s=20"))
    while not board._waiting:
        await asyncio.sleep(0)
    board.answer(answer_of(action_id, "refused", reason="the alarm is normal"))
    assert (await waiting)["reason"] == "the alarm is normal"
    assert (await body(client, "/api/alarms/actions"))["actions"][0]["action_id"] == action_id
    assert board._waiting == {}
    assert (await body(client, "/api/alarms/actions/none?wait_s=0.01", 404))["outcome"] == "pending"
    assert board._waiting == {}
    await body(client, f"/api/alarms/actions/{action_id}?wait_s=nan", 400)
    await body(client, f"/api/alarms/actions/{action_id}?wait_s=999", 400)


async def test_an_action_that_was_answered_is_not_sent_again(client, board, host):
    board.answer(answer_of("mine"))
    assert (await act(client, action_id="mine"))["action_id"] == "mine"
    assert host.sent == []


async def test_kafka_down_is_said(client, host):
    host.fails = Retry("Kafka did not acknowledge")
    assert "Kafka did not acknowledge" in (await act(client, 503))["error"]


# --- many at once ---


def fed(board, *alarms, start=0):
    """As Kafka brings them: one partition, offsets from `start`."""
    for offset, each in enumerate(alarms, start):
        key = orjson.dumps([each["device_id"], each["rule"], each["pin_position"]])
        assert board.stand(key, orjson.dumps(each), (0, offset)) is not None


async def bulk(client, status=202, headers=None, **fields):
    asked = {"action": "acknowledge", "actor": "ann"} | fields
    response = await client.post(
        "/api/alarms/bulk", json={k: v for k, v in asked.items() if v is not None}, headers=headers or {}
    )
    assert response.status == status, await response.text()
    return await response.json()


def sent_to(host):
    return [orjson.loads(send.value)["device_id"] for send in host.sent]


async def test_each_of_many_alarms_gets_an_action_of_its_own(client, host, board):
    alarms = [alarm(1), alarm(2), alarm(3, alarm_id="", state="shelved"), alarm(1)]
    said = await bulk(client, alarms=alarms, comment="seen", request_id="r1")
    assert (said["matched"], said["newer"], said["pending"], len(said["results"])) == (4, 0, 3, 3)
    lines = [orjson.loads(send.value) for send in host.sent]
    assert [send.key for send in host.sent] == [b"dev/1", b"dev/2", b"dev/3"]
    assert lines[0] == {
        "device_id": "dev/1", "rule": "hot", "pin_position": "-1", "alarm_id": "a1", "action": "acknowledge", "actor": "ann",
        "comment": "seen", "action_id": said["results"][0]["action_id"], "at": host.clock.now_us(),
    }  # fmt: skip
    assert lines[2]["alarm_id"] is None
    assert len({line["action_id"] for line in lines}) == 3
    # The same request is the same actions; what was answered is not sent again, and said.
    board.answer(answer_of(lines[0]["action_id"]))
    board.answer(answer_of(lines[1]["action_id"], "refused", code="already_acknowledged", reason="it is acknowledged"))
    again = await bulk(client, alarms=alarms, comment="seen", request_id="r1")
    assert [r["action_id"] for r in again["results"]] == [r["action_id"] for r in said["results"]]
    assert [(r["outcome"], r.get("reason")) for r in again["results"]] == [
        ("done", ""), ("refused", "it is acknowledged"), ("sent", None),
    ]  # fmt: skip
    assert (again["done"], again["refused"], again["pending"]) == (1, 1, 1)
    assert sent_to(host)[3:] == ["dev/3"]
    other = await bulk(client, alarms=alarms[:1], request_id="r2")
    assert other["results"][0]["action_id"] != said["results"][0]["action_id"]


async def test_what_is_wrong_with_one_alarm_does_not_keep_the_others(client, host):
    wrong = [{"device_id": "dev/2"}, {"device_id": "dev/3", "rule": 5}, "x", {"device_id": "d" * 300, "rule": "hot"}]
    said = await bulk(client, alarms=[alarm(1), *wrong])
    assert [r["outcome"] for r in said["results"]] == ["sent"] + ["refused"] * 4
    assert said["results"][1]["reason"].startswith("rule: None is no text")
    assert (said["refused"], sent_to(host)) == (4, ["dev/1"])


async def test_an_action_that_is_no_word_is_refused_and_no_defect(client, host):
    for word in ({"a": 1}, ["acknowledge"], 5, True):
        said = await bulk(client, status=400, action=word, alarms=[alarm(1)])
        assert said["code"] == "action_invalid"
    assert host.sent == []


async def test_answers_of_many_are_waited_for(client, board):
    async def machine():
        while len(board._waiting) < 2:
            await asyncio.sleep(0)
        for action_id in [*board._waiting]:
            board.answer(answer_of(action_id))

    task = asyncio.create_task(machine())
    said = await bulk(client, alarms=[alarm(1), alarm(2)], wait_s=20)
    await task
    assert (said["done"], said["pending"], {r["state"] for r in said["results"]}) == (2, 0, {"acknowledged"})
    assert (await bulk(client, alarms=[alarm(3)], wait_s=0.01))["pending"] == 1
    assert board._waiting == {}


async def test_a_filter_means_what_its_list_showed_and_not_what_came_since(client, host, board):
    """What somebody is to look at anew was not seen: another occurrence, a graver one, one that waits again."""
    stood = [alarm(n) for n in range(1, 5)] + [alarm(5, state="acknowledged"), alarm(6, severity="minor"), alarm(7)]
    fed(board, *stood)
    page = await body(client, "/api/alarms")
    fed(
        board,
        alarm(8),
        alarm(2, alarm_id="another"),
        alarm(3, severity="critical"),
        alarm(5),
        alarm(4, state="returned_unacknowledged"),
        alarm(7, state="acknowledged"),
        start=len(stood),
    )
    wanted = {"rule": "hot", "severity": "major,critical"}
    said = await bulk(client, filter=wanted, seen=page["seen"])
    assert sent_to(host) == ["dev/4", "dev/1"]
    assert (said["matched"], said["newer"]) == (2, 4)
    # The next list shows them; what the filter calls its first ones are the list's first ones.
    page = await body(client, "/api/alarms")
    host.sent.clear()
    said = await bulk(client, filter=wanted, seen=page["seen"], limit=2)
    assert (said["matched"], said["newer"], sent_to(host)) == (6, 0, ["dev/3", "dev/8"])
    # Without a state it is the action's own.
    host.sent.clear()
    await bulk(client, action="comment", comment="x", filter={"device": "dev/7"}, seen=page["seen"])
    assert sent_to(host) == ["dev/7"]


async def test_what_a_list_showed_is_the_same_on_every_worker_and_after_reading_anew(client, board):
    fed(board, alarm(1), alarm(2))
    seen = board.seen()
    fed(board, alarm(3), start=2)
    other = Board()
    # Compacted: the record that raised the first one is gone, so that nobody knows any more what was seen of it.
    for offset, each in ((1, alarm(2)), (2, alarm(3)), (3, alarm(1, state="returned_unacknowledged"))):
        other.stand(orjson.dumps([each["device_id"], "hot", "-1"]), orjson.dumps(each), (0, offset))
    assert [[a["device_id"] for a in b.shown(Filter(), seen, 9)[0]] for b in (board, other)] == [
        ["dev/2", "dev/1"], ["dev/2"],
    ]  # fmt: skip
    fed(board, alarm(1), alarm(2), alarm(3))
    assert board.seen() == [[0, 3]]
    assert board.shown(Filter(), seen, 9)[2] == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"alarms": None}, {"alarms": []}, {"alarms": "x"}, {"alarms": [{}] * 501}, {"filter": {}}, {"action": "out_of_service"}, {"action": None},
        {"actor": None}, {"action": "comment"}, {"action": "shelve", "duration_s": -1}, {"surprise": 1}, {"request_id": "x" * 65}, {"request_id": 5},
        {"wait_s": 26}, {"wait_s": True}, {"limit": 0}, {"limit": 501}, {"alarms": None, "filter": {}}, {"alarms": None, "filter": {}, "seen": "WzFd"},
        {"alarms": None, "filter": {"colour": "red"}, "seen": "W10"}, {"alarms": None, "filter": {"state": "odd"}, "seen": "W10"},
        {"alarms": None, "filter": [], "seen": "W10"}, {"alarms": None, "filter": {"severity": "bad"}, "seen": "W10"},
    ],
)  # fmt: skip
async def test_a_request_for_many_that_is_not_well_formed_is_refused_as_a_whole(client, host, fields):
    assert (await bulk(client, 400, **({"alarms": [alarm(1)]} | fields)))["error"]
    assert host.sent == []


async def test_many_need_an_operator_and_kafka_and_a_filter_needs_the_list(client, host, board):
    host.fails = Retry("Kafka did not acknowledge")
    assert "Kafka did not acknowledge" in (await bulk(client, 503, alarms=[alarm(1)]))["error"]
    host.fails = None
    board.ready.clear()
    assert "not read from Kafka yet" in (await bulk(client, 503, filter={}, seen="W10"))["error"]
    await bulk(client, 403, alarms=[alarm(1)], headers={"Sec-Fetch-Site": "cross-site"})
    host.settings.web = Web(operators="ann:t1")
    await bulk(client, 401, alarms=[alarm(1)])
    await bulk(client, 403, alarms=[alarm(1)], actor="eve", headers={"Authorization": "Bearer t1"})
    assert host.sent == []
    await bulk(client, alarms=[alarm(1)], actor=None, headers={"Authorization": "Bearer t1"})
    assert orjson.loads(host.sent[0].value)["actor"] == "ann"


# --- who may ---


async def test_strangers_pages_cannot_act_on_this_machine(client, host):
    for headers in (
        {"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Host": "evil.example"},
        {"X-Forwarded-For": "10.0.0.9"}, {"Origin": "null"},
    ):  # fmt: skip
        await act(client, 403, headers=headers)
    assert host.sent == []
    own = str(client.make_url("/")).rstrip("/")
    await act(client, headers={"Origin": own, "Sec-Fetch-Site": "same-origin"})


async def test_a_token_is_asked_for_where_one_is_set(client, host):
    host.settings.web = Web(operator_token="s3cret")
    await act(client, 401)
    await act(client, 401, headers={"Authorization": "Bearer wrong"})
    await act(client, headers={"Authorization": "Bearer s3cret", "Origin": "https://proxy.example"})
    assert len(host.sent) == 1


async def test_an_operators_own_token_says_who_it_is(client, host):
    host.settings.web = Web(operators="ann:t1, bob:t2")
    await act(client, 401)
    await act(client, 401, headers={"Authorization": "Bearer t3"})
    await act(client, 403, actor="ann", headers={"Authorization": "Bearer t2"})
    await act(client, actor=None, headers={"Authorization": "Bearer t2"})
    await act(client, actor="ann", headers={"Authorization": "Bearer t1"})
    assert [orjson.loads(s.value)["actor"] for s in host.sent] == ["bob", "ann"]
    host.settings.web = Web(operators="ann:t1", operator_token="shared")
    await act(client, actor="eve", headers={"Authorization": "Bearer shared"})
    assert orjson.loads(host.sent[-1].value)["actor"] == "eve"


# --- links ---


@pytest.fixture
def link(host):
    host.settings.web = Web(public_url="https://plant.example", link_secret=SECRET)
    return acknowledge_link(alarm(1), "ann@example.org", host.settings).removeprefix("https://plant.example")


async def test_opening_a_link_does_nothing_and_shows_a_button(client, board, host, link):
    stand(board, alarm(1))
    for _ in range(2):
        response = await client.get(link)
        text = await response.text()
        assert response.status == 200
        assert "Acknowledge this alarm?" in text
        assert "&lt;script&gt;" in text
        assert "<script" not in text
        assert "form-action 'self'" in response.headers["Content-Security-Policy"]
        assert response.headers["Referrer-Policy"] == "no-referrer"
    assert (await client.head(link)).status == 200
    assert host.sent == []


async def follow(client, board, link, *, outcome="done", **form):
    token = re.search(r"token=(.+)", link)[1]

    async def machine():
        while not board._waiting:
            await asyncio.sleep(0)
        (action_id,) = board._waiting
        board.answer(answer_of(action_id, outcome, reason="the alarm is acknowledged already"))

    task = asyncio.create_task(machine())
    response = await client.post("/ack", data={"token": token, **form})
    task.cancel()
    return response.status, await response.text()


async def test_the_button_acknowledges_as_the_recipient_once(client, board, host, link):
    stand(board, alarm(1))
    status, text = await follow(client, board, link, comment="on my way")
    assert (status, "Acknowledged." in text) == (200, True)
    sent = orjson.loads(host.sent[0].value)
    assert (sent["action"], sent["actor"], sent["alarm_id"], sent["comment"]) == (
        "acknowledge",
        "ann@example.org",
        "a1",
        "on my way",
    )
    await follow(client, board, link)
    assert len(host.sent) == 1


async def test_the_machines_refusal_is_shown_and_the_button_works_again(client, board, host, link):
    stand(board, alarm(1))
    status, text = await follow(client, board, link, outcome="refused")
    assert (status, "Not acknowledged: the alarm is acknowledged already." in text) == (409, True)
    assert (await follow(client, board, link))[0] == 200
    first, second = (orjson.loads(s.value) for s in host.sent)
    assert first["action_id"] != second["action_id"]
    assert first["alarm_id"] == second["alarm_id"]


@pytest.mark.parametrize(
    ("standing", "said"),
    [([], "over"), ([alarm(1, alarm_id="another")], "over"), ([alarm(1, state="acknowledged")], "is acknowledged")],
)
async def test_a_link_to_what_needs_nobody_says_so_and_has_no_button(client, board, link, standing, said):
    stand(board, *standing)
    text = await (await client.get(link)).text()
    assert said in text
    assert "<form" not in text


async def test_wrong_and_old_links(client, host, link):
    for query in ("", "?token=", "?token=abc", link[4:-3]):
        assert (await client.get(f"/ack{query}")).status == 403
    assert (await client.post("/ack", data={"token": "abc"})).status == 403
    host.settings.web = Web(public_url="https://plant.example", link_secret=SECRET, link_ttl_s=0.1)
    old = link
    while (response := await client.get(old)).status == 200:
        await asyncio.sleep(0.2)
    assert response.status == 410
    assert host.sent == []


# --- the page ---


def test_the_page_offers_what_the_machine_allows():
    """Each button of a state is an action that the table takes there, and each lift and answer has its button."""
    script = (resources.files("preservarium.console") / "page" / "alarms.js").read_text()
    block = script[script.index("const ALLOWED = {") : script.index("};", script.index("const ALLOWED = {"))]
    offered = {s: re.findall(r'"(\w+)"', words) for s, words in re.findall(r"(\w+): \[(.*?)\]", block)}
    assert set(offered) == {state.value for state in State}
    for state, words in offered.items():
        allowed = {word for word, event in ACTIONS.items() if isinstance(TRANSITIONS[State(state)][event], State)}
        assert set(words) <= allowed, state
        # Suppression by design is the plant's, not a button's.
        assert allowed - set(words) <= {"suppress"}, state


# --- the description ---


async def test_the_description_is_of_these_routes(client):
    assert await body(client, "/api/openapi.json") == orjson.loads(orjson.dumps(DOCUMENT))
    routes = {
        (route.resource.canonical, route.method.lower())
        for route in client.application.router.routes()
        if route.method in ("GET", "POST") and route.resource.canonical.startswith("/api/")
    }
    described = {(path, method) for path, item in DOCUMENT["paths"].items() for method in item}
    assert described == routes | {("/api/trace", "get")}, "mounted in tests/integration/operations/test_lineage.py"
    for path, method in described:
        operation = DOCUMENT["paths"][path][method]
        in_path = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"}
        assert in_path == set(re.findall(r"{(\w+)}", path))
        assert operation["summary"]
    ids = [DOCUMENT["paths"][path][method]["operationId"] for path, method in described]
    assert len(set(ids)) == len(ids)


def test_a_command_is_described_as_it_is_taken():
    assert set(DOCUMENT["components"]["schemas"]["CommandRequest"]["properties"]) == REQUEST_FIELDS


def test_every_reference_leads_somewhere():
    schemas = DOCUMENT["components"]["schemas"]
    references = re.findall(rb'"#/components/schemas/(\w+)"', orjson.dumps(DOCUMENT))
    assert {r.decode() for r in references} == set(schemas)


def test_the_described_fields_are_those_of_the_records():
    schemas = DOCUMENT["components"]["schemas"]
    assert set(schemas["Alarm"]["properties"]) == set(StandingDoc.__annotations__)
    assert set(schemas["Action"]["properties"]) == set(ActionDoc.__annotations__) - {"at"}
    assert set(schemas["Answer"]["properties"]) == set(AnswerDoc.__annotations__)


async def test_lists_have_the_fields_that_are_described(client, board, reads):
    stand(board, alarm(1))
    schemas = DOCUMENT["components"]["schemas"]
    assert set(await body(client, "/api/alarms")) == set(schemas["Alarms"]["properties"])
    assert set(await body(client, "/api/alarms/dev%2F1/hot/-1")) == set(schemas["OneAlarm"]["properties"])
