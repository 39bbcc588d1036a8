"""docs/guides: what they print is what happens, from the registry file to the series; and the files to begin with."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from click.testing import CliRunner
from connector_fakes import MemoryPublisher
from record_fakes import RawRec

from preservarium.__main__ import cli
from preservarium.cli.registry import STARTS as OFFERED
from preservarium.clock import ManualClock
from preservarium.connectors import http
from preservarium.connectors.base import Limits
from preservarium.connectors.mqtt import patterns_of, sends_of
from preservarium.domain.readings.instant import iso_us
from preservarium.domain.readings.normalize import compile_device, normalize
from preservarium.registry.file import read
from preservarium.registry.starting import STARTS, start_text
from preservarium.settings import LiveSettings, Settings
from preservarium.stores.registry import check
from preservarium.streaming.records import parse_raw

ROOT = Path(__file__).resolve().parents[3]
NOW_US = 1_795_993_300_000_000
LIMITS = Limits(payload_bytes_max=100_000, record_bytes_max=1_000_000)
#: Page -> its file to begin with; the path of HTTP, where it has one.
GUIDES = {
    "things-stack": ("ttn", "/ingest/ttn"),
    "chirpstack": ("chirpstack", "/ingest/chirpstack"),
    "zigbee2mqtt": ("zigbee2mqtt", None),
}
LINES_MAX = 12


def page(name: str) -> str:
    return (ROOT / f"docs/guides/{name}.md").read_text(encoding="utf-8")


def block(text: str, language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return found


def bare(name: str) -> str:
    return "".join(line for line in start_text(name).splitlines(keepends=True) if not line.startswith("#"))


def registry_of(text: str, directory: Path) -> Any:
    path = directory / "registry.yaml"
    path.write_text(text, encoding="utf-8")
    file = read(path)
    check(file)
    assert file.problems == []
    return file.documents


def readings(documents: Any, sends: Any) -> dict[str, tuple[Any, str, int]]:
    """What the messages of connectors become: component type -> (value, unit, instant)."""
    (send,) = sends
    (raw,), errors = parse_raw(RawRec(send.value, send.key), "iot_raw_data", 0, payload_bytes_max=100_000)
    assert errors == []
    (device,), (kind,), (parser,) = documents["device"], documents["type"], documents["parser"]
    assert send.key.decode() in (device["device_id"], device["device_id"].lower())
    datatypes = {d["name"]: d for d in documents.get("datatype", ())}
    compiled = compile_device(
        {"rev": 1, **device}, {"rev": 1, **kind}, {"rev": 1, "version": 1, "hash": "h", **parser}, datatypes.get
    )
    message, refused = normalize(raw, compiled, NOW_US)
    assert refused == ()
    return {r["component_type"]: (r.get("value"), r["unit"], message["timestamp"]) for r in message["readings"]}


@cache
def sample_datatypes() -> dict[str, Any]:
    return {d["name"]: d for d in read(ROOT / "examples/registry.yaml").documents["datatype"]}


def table_of(text: str) -> dict[str, dict[str, str]]:
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    header, *rest = rows
    return {row[0]: dict(zip(header, row, strict=True)) for row in rest}


@pytest.mark.parametrize("name", GUIDES)
async def test_a_guide_leads_to_the_series_that_it_prints(name, tmp_path):
    start, path = GUIDES[name]
    text = page(name)
    yaml, message = block(text, "yaml"), block(text, "json").encode()
    assert yaml == bare(start)
    assert len(yaml.splitlines()) <= LINES_MAX
    documents = registry_of(yaml, tmp_path)
    pattern = re.findall(r"PRESERVARIUM_MQTT__SUBSCRIPTIONS=(\S+)", text)[0]
    topic = {"ttn": "v3/farm@ttn/devices/cold-store/up"}.get(start) or re.findall(r"on `([^`]+)`", text)[0]
    found = [readings(documents, sends_of(patterns_of(pattern), topic, message, LIMITS, "MQTT", lambda: NOW_US))]
    if path is not None:
        assert f"127.0.0.1:6066{path}" in text
        publisher = MemoryPublisher()
        app = web.Application()
        app.add_routes(http.routes(publisher, LiveSettings(Settings()), ManualClock(NOW_US)))
        async with TestClient(TestServer(app)) as client:
            assert (await client.post(path, data=message, headers={"Content-Type": "application/json"})).status == 202
        found.append(readings(documents, publisher.sends))
    printed = table_of(text)
    for one in found:
        assert {name: (f"{value:g}", unit) for name, (value, unit, _) in one.items()} == {
            name: (row["value"], row["unit"]) for name, row in printed.items()
        }
        for component, (_, _, at) in one.items():
            assert at == (iso_us(printed[component]["timestamp"]) if path else NOW_US)
    for command in ("registry init", "registry apply", "db postgres", "devices unknown"):
        assert f"\npreservarium {command}" in text


@pytest.mark.parametrize("name", STARTS)
def test_a_file_to_begin_with_is_right_and_says_of_datatypes_what_the_sample_says(name, tmp_path):
    documents = registry_of(start_text(name), tmp_path)
    sample = sample_datatypes()
    assert [d for d in documents["datatype"] if d != sample[d["name"]]] == []
    assert len(bare(name).splitlines()) <= LINES_MAX


def test_the_plain_file_reads_what_its_comment_shows(tmp_path):
    documents = registry_of(start_text("plain"), tmp_path)
    shown = re.findall(r"here (\{.*?\})\.", start_text("plain"))[0]
    sends = sends_of(
        patterns_of("devices/{device}/up"), "devices/board-1/up", shown.encode(), LIMITS, "", lambda: NOW_US
    )
    at = iso_us("2026-11-26T09:00:00Z")
    assert readings(documents, sends) == {"air_temperature": (21.4, "°C", at), "humidity": (48, "%", at)}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("ttn", "of kind javascript"),
        ("ChirpStack", "of kind network"),
        ("jsn", "did you mean json"),
        ("x", "there are bthome"),
    ],
)
def test_a_kind_of_parser_that_is_none_is_told_what_to_write(kind, said, tmp_path):
    path = tmp_path / "registry.yaml"
    path.write_text(f"parsers: [{{name: c, kind: {kind}, source: {{}}}}]\n", encoding="utf-8")
    file = read(path)
    check(file)
    assert any(said in problem.message for problem in file.errors)


def test_init_writes_the_file_once_and_touches_no_other(tmp_path):
    assert OFFERED == STARTS
    path = tmp_path / "first.yaml"
    run = CliRunner()
    done = run.invoke(cli, ["registry", "init", str(path), "--for", "ttn"])
    assert (done.exit_code, done.output.split(":")[0]) == (0, "Written")
    assert path.read_text(encoding="utf-8") == start_text("ttn")
    assert run.invoke(cli, ["registry", "init", str(path), "--for", "ttn"]).output.startswith("Already there")
    other = run.invoke(cli, ["registry", "init", str(path), "--for", "plain"])
    assert other.exception is not None
    assert path.read_text(encoding="utf-8") == start_text("ttn")
    assert run.invoke(cli, ["registry", "init"]).output == start_text("plain")
    assert run.invoke(cli, ["registry", "init", str(tmp_path / "no" / "where.yaml")]).exception is not None


def test_the_example_of_local_time_and_of_points_are_right(tmp_path):
    text = page("README")
    for yaml in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        registry_of(yaml, tmp_path)
    tasmota, _ = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    documents = registry_of(tasmota, tmp_path)
    sensor = orjson.dumps({"Time": "2026-09-18T11:19:21", "ENERGY": {"Power": [52, 5], "Voltage": 235}})
    (send,) = sends_of(patterns_of("tele/#"), "tele/dual-meter/SENSOR", sensor, LIMITS, "", lambda: NOW_US)
    assert readings(documents, [send])["energy_voltage"] == (235, "", iso_us("2026-09-18T09:19:21Z"))


def test_every_format_is_in_the_table():
    from preservarium.connectors.envelopes import FORMATS

    rows = re.findall(r"^\| `(\w+)` \|", page("README"), re.MULTILINE)
    assert sorted(rows) == sorted(FORMATS)
