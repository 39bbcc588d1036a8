"""The views of devices over reads that are made here: what is asked of the database, what is refused at the door, and files."""

import base64
import csv
import io
from types import SimpleNamespace

import aiohttp
import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from console_support import body

from preservarium.clock import ManualClock
from preservarium.console.devices import DAY_US, S_US, SPAN_US_MAX, DeviceViews
from preservarium.console.openapi import DOCUMENT
from preservarium.console.tables import TableReader
from preservarium.errors import Retry
from preservarium.settings import Web
from preservarium.stores.device_reads import EXPORT_ROWS_MAX, SORTS, STATES

READING = {"timestamp": 1_760_000_000_000_001, "received_at": 1_760_000_001_000_000, "value": 1.5, "value_text": None, "unit": "°C", "quality": 1,
           "flags": None, "component_type": "t", "pin_position": "-1", "connector_mode": "HTTP"}  # fmt: skip


class Reads:
    """Notes what is asked."""

    def __init__(self):
        self.asked = []
        self.pages = [[READING]]
        self.fails = None

    def _take(self, *asked):
        self.asked.append(asked)
        if self.fails:
            raise self.fails

    async def devices(self, **wanted):
        self._take("devices", wanted)
        return {"devices": [], "next": (7, "d"), "total": 9, "refreshed_at": 3}

    async def fleet(self):
        self._take("fleet")
        return {
            "devices": 0,
            "states": dict.fromkeys(STATES, 0),
            "types": [],
            "silent_after_s": 3600,
            "refreshed_at": None,
        }

    async def device(self, device_id):
        self._take("device", device_id)
        if device_id == "none":
            return None
        return {
            "device_id": device_id,
            "registered": True,
            "enabled": True,
            "last_seen": None,
            "series": [],
            "rules": [],
        }

    async def curves(self, device_id, **wanted):
        self._take("curves", device_id, wanted)
        return None if device_id == "none" else {"series": [], "alarms": []}

    async def readings(self, device_id, **wanted):
        self._take("readings", device_id, wanted)
        return None if device_id == "none" else {"readings": [], "next": (5, 2)}

    async def export(self, device_id, **wanted):
        self._take("export", device_id, wanted)
        for page in self.pages:
            if isinstance(page, Exception):
                raise page
            yield page


@pytest.fixture
def reads():
    return Reads()


@pytest.fixture
async def client(reads):
    settings = SimpleNamespace(web=Web())
    host = SimpleNamespace(clock=ManualClock(), live=lambda: settings)
    application = web.Application()
    DeviceViews(host, reads, TableReader(dict, lambda key: 0)).mount(application)
    async with TestClient(TestServer(application)) as made:
        made.stand = host
        yield made


async def test_what_is_wanted_of_the_list_reaches_the_database_and_the_cursor_belongs_to_the_order(client, reads):
    query = {"q": " Hall ", "state": "silent", "type": "t/1", "sort": "seen", "limit": "7"}
    page = await body(client, "/api/devices", params=query)
    assert reads.asked.pop() == ("devices", {"q": "Hall", "state": "silent", "type_name": "t/1", "sort": "seen", "descending": True, "after": None, "limit": 7})  # fmt: skip
    assert set(page) == set(DOCUMENT["components"]["schemas"]["Devices"]["properties"])
    await body(client, "/api/devices", params={**query, "cursor": page["next_cursor"]})
    assert reads.asked.pop()[1]["after"] == (7, "d")
    for other in ({**query, "sort": "name"}, {**query, "order": "asc"}):
        await body(client, "/api/devices", 400, params={**other, "cursor": page["next_cursor"]})
    await body(client, "/api/devices?sort=name")
    assert reads.asked.pop()[1]["descending"] is False
    assert set(await body(client, "/api/fleet")) == set(DOCUMENT["components"]["schemas"]["Fleet"]["properties"])


def cursor(*position):
    return base64.urlsafe_b64encode(orjson.dumps(position)).decode()


@pytest.mark.parametrize(
    "path",
    [
        "/api/devices?state=maybe", "/api/devices?sort=1;DROP", "/api/devices?order=up", "/api/devices?type=a%00b", "/api/devices?q=" + "x" * 300,
        f"/api/devices?cursor={cursor('device', 'asc', None, 'd')}", f"/api/devices?cursor={cursor('device', 'asc', 'a', 5)}",
        f"/api/devices?cursor={cursor('device', 'asc', [1], 'd')}", f"/api/devices?cursor={cursor('device', 'asc', True, 'd')}",
        "/api/devices/" + "x" * 256, "/api/devices/a%00b", "/api/devices/d/series?series=1,x", "/api/devices/d/series?series=1,,2",
        "/api/devices/d/series?series=" + ",".join("123456789"), "/api/devices/d/series?series=12345678901", "/api/devices/d/series?points=5",
        "/api/devices/d/series?points=99999", "/api/devices/d/series?from=5&to=5", "/api/devices/d/series?from=yesterday",
        "/api/devices/d/series?from=2026-01-01T00:00:00", f"/api/devices/d/series?from=0&to={SPAN_US_MAX + 1}", "/api/devices/d/series?to=999999999999999999",
        "/api/devices/d/series?to=1e9999", f"/api/devices/d/readings?cursor={cursor(1)}", f"/api/devices/d/readings?cursor={cursor('a', 'b')}",
        f"/api/devices/d/readings?cursor={cursor(-1, 2)}", f"/api/devices/d/readings?cursor={cursor(5, 2**31)}",
        f"/api/devices?sort=seen&cursor={cursor('seen', 'desc', 2**60, 'd')}", f"/api/devices?sort=seen&cursor={cursor('seen', 'desc', -2, 'd')}", "/api/devices/d/readings?from=-5", "/api/devices/d/readings.csv?from=9&to=8",
    ],
)  # fmt: skip
async def test_a_bad_question_is_a_problem_with_a_reason_and_asks_no_database(client, reads, path):
    response = await client.get(path)
    said = await response.json()
    assert (response.status, response.content_type, said["status"]) == (400, "application/problem+json", 400)
    assert said["title"] == "Bad Request"
    assert said["detail"] == said["error"] != ""
    assert set(said) == set(DOCUMENT["components"]["schemas"]["Problem"]["properties"])
    assert reads.asked == []


async def test_what_is_not_there_and_what_does_not_answer_are_problems_too(client, reads):
    for path in ("", "/series", "/readings"):
        assert (await body(client, f"/api/devices/none{path}", 404))["title"] == "Not Found"
    reads.fails = Retry("PostgreSQL: connection refused")
    for path in ("/api/fleet", "/api/devices/d", "/api/devices/d/series", "/api/devices/d/readings", "/api/devices/d/readings.csv"):  # fmt: skip
        said = await body(client, path, 503)
        assert said["detail"] == "not available now: PostgreSQL: connection refused"
    page = await body(client, "/api/devices?sort=seen")
    assert (page["source"], page["sort"], page["total"]) == ("table", "device", None)
    assert "does not answer" in page["note"]
    client.stand.live().web = Web(operators="ann:t")
    response = await client.get("/api/devices/d")
    assert (response.status, response.content_type) == (401, "application/problem+json")
    assert response.headers["WWW-Authenticate"].startswith("Bearer")


async def test_spans_are_the_last_day_or_what_is_named_as_numbers_or_rfc_3339(client, reads):
    now = client.stand.clock.now_us()
    await body(client, "/api/devices/a%2Fb/series")
    assert reads.asked.pop() == ("curves", "a/b", {"series": [], "from_us": now - DAY_US, "to_us": now, "points": 1_000, "now_us": now})  # fmt: skip
    for begin, end in (("2025-10-09T10:53:20+02:00", "2025-10-09T08:53:21.5Z"), ("1760000000000000", "1760000001500000")):  # fmt: skip
        found = await body(client, "/api/devices/d/series", params={"from": begin, "to": end, "series": "3,5", "points": "50"})  # fmt: skip
        _, _, wanted = reads.asked.pop()
        assert (wanted["from_us"], wanted["to_us"]) == (1_760_000_000_000_000, 1_760_000_001_500_000)
        assert (wanted["series"], wanted["points"]) == ([3, 5], 50)
        assert set(found) == set(DOCUMENT["components"]["schemas"]["Curves"]["properties"])
    # A plus sign that nobody escaped.
    await body(client, "/api/devices/d/series?from=2025-10-09T10:53:20+02:00&to=1760000001500000")
    assert reads.asked.pop()[2]["from_us"] == 1_760_000_000_000_000


async def test_readings_are_paged(client, reads):
    page = await body(client, "/api/devices/d/readings?series=4&from=77&limit=3")
    assert reads.asked.pop() == ("readings", "d", {"series": [4], "from_us": 77, "before": None, "limit": 3})
    await body(client, f"/api/devices/d/readings?cursor={page['next_cursor']}")
    assert reads.asked.pop()[2]["before"] == (5, 2)


@pytest.mark.parametrize(
    ("device", "state"),
    [
        ({"enabled": False, "last_seen": 0, "quality": 4}, "off"), ({"enabled": True, "last_seen": None, "quality": 1}, "never"),
        ({"enabled": True, "last_seen": 3601, "quality": 4}, "silent"), ({"enabled": True, "last_seen": 3599, "quality": 4}, "failing"),
        ({"enabled": True, "last_seen": 1, "quality": 3}, "sending"),
    ],
)  # fmt: skip
async def test_a_device_is_in_one_state(client, reads, device, state):
    now = client.stand.clock.now_us()
    seen = None if device["last_seen"] is None else now - device["last_seen"] * S_US

    async def devices(**_):
        one = {"device_id": "d", "enabled": device["enabled"], "last_seen": seen, "values": [{"quality": 1}, {"quality": device["quality"]}]}  # fmt: skip
        return {"devices": [one], "next": None, "total": 1, "refreshed_at": None}

    reads.devices = devices
    assert (await body(client, "/api/devices"))["devices"][0]["state"] == state
    assert state in STATES
    assert "device" in SORTS


async def test_a_file_has_a_line_for_each_reading_and_no_formula(client, reads):
    evil = {**READING, "value": None, "value_text": '=HYPERLINK("http://x")', "unit": "", "flags": ["spike", "late"], "quality": 3}  # fmt: skip
    negative = {**READING, "value": -4.25, "value_text": None}
    reads.pages = [[READING, evil], [negative]]
    response = await client.get("/api/devices/a%2F1/readings.csv?from=5&to=9&series=7")
    assert reads.asked == [("export", "a/1", {"series": [7], "from_us": 5, "to_us": 9})]
    assert response.content_type == "text/csv"
    assert response.headers["Content-Disposition"] == 'attachment; filename="a-1.csv"'
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    lines = list(csv.DictReader(io.StringIO(await response.text())))
    assert [line["value"] for line in lines] == ["1.5", "", "-4.25"]
    assert lines[0]["timestamp"] == "2025-10-09T08:53:20.000001Z"
    assert lines[1]["value_text"] == '\'=HYPERLINK("http://x")'
    assert (lines[1]["flags"], lines[0]["pin_position"]) == ("spike late", "-1")


async def test_a_file_that_is_cut_says_so_and_one_that_breaks_off_is_no_file(client, reads):
    reads.pages = [[READING], [{"cut": True}]]
    text = await (await client.get("/api/devices/d/readings.csv")).text()
    assert text.splitlines()[-1] == f"# cut after {EXPORT_ROWS_MAX} readings: ask for a shorter span"
    reads.pages = [[READING], Retry("PostgreSQL: gone")]
    with pytest.raises(aiohttp.ClientError):
        await (await client.get("/api/devices/d/readings.csv")).text()
    # What stood in its way stands in nobody else's.
    reads.pages = [[READING]]
    assert (await client.get("/api/devices/d/readings.csv")).status == 200
