"""Prometheus remote write and OTLP over HTTP: as the tools send them, and as nobody should."""

import cramjam
import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from connector_fakes import MemoryPublisher, OurServer
from google.protobuf import json_format
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)

from preservarium.clock import ManualClock
from preservarium.connectors import http
from preservarium.connectors.metric_writes import Request1, Request2
from preservarium.domain.decoders import examples
from preservarium.domain.decoders.kinds import compile_parser
from preservarium.errors import Reject
from preservarium.settings import Connector, Http, LiveSettings, Settings

NOW_US = 1_795_993_300_000_000
AT_MS = 1_795_200_000_123
NAN = float("nan")


class Door:
    def __init__(self, tags: str = "device,host,host_name", **settings) -> None:
        self.publisher = MemoryPublisher()
        live = LiveSettings(Settings(http=Http(**settings), connector=Connector(device_tags=tags)))
        app = web.Application()
        app.add_routes(http.routes(self.publisher, live, ManualClock(NOW_US)))
        self.client = TestClient(OurServer(app, live))

    async def write(self, path, data, **headers):
        async with self.client.post(path, data=data, headers=headers) as response:
            self.headers = response.headers
            return response.status, await response.read()


@pytest.fixture
async def door():
    door = Door()
    async with door.client:
        yield door


SERIES = [
    ({"__name__": "load1", "host": "a", "job": "node"}, [(0.5, AT_MS), (0.75, AT_MS + 1_000)]),
    ({"__name__": "cpu_total", "host": "a", "cpu": "0", "mode": "idle"}, [(12.0, AT_MS)]),
    ({"__name__": "load1", "host": "b"}, [(NAN, AT_MS)]),
    ({"__name__": "up", "host": "b"}, [(1.0, AT_MS)]),
]
V1 = {
    "Content-Type": "application/x-protobuf",
    "Content-Encoding": "snappy",
    "X-Prometheus-Remote-Write-Version": "0.1.0",
}
V2 = {**V1, "Content-Type": "application/x-protobuf;proto=io.prometheus.write.v2.Request"}


def first(series):
    request = Request1()
    for labels, samples in series:
        one = request.timeseries.add()
        for name, value in labels.items():
            one.labels.add(name=name, value=value)
        for value, at in samples:
            one.samples.add(value=value, timestamp=at)
    return packed(request)


def second(series):
    symbols = [""]

    def ref(text):
        if text not in symbols:
            symbols.append(text)
        return symbols.index(text)

    request = Request2()
    for labels, samples in series:
        one = request.timeseries.add()
        for name, value in labels.items():
            one.labels_refs.extend([ref(name), ref(value)])
        one.metadata.unit_ref = ref("seconds") if labels["__name__"] == "cpu_total" else 0
        for value, at in samples:
            one.samples.add(value=value, timestamp=at)
    request.symbols.extend(symbols)
    return packed(request)


def packed(request):
    return bytes(cramjam.snappy.compress_raw(request.SerializeToString()))


@pytest.mark.parametrize(("made", "headers"), [(first, V1), (second, V2)])
async def test_a_request_of_prometheus_is_a_message_a_device(door, made, headers):
    assert await door.write("/api/v1/write", made(SERIES), **headers) == (204, b"")
    assert door.headers["X-Prometheus-Remote-Write-Samples-Written"] == "4"
    a, b = door.publisher.lines()
    assert (a["device"], b["device"]) == ("a", "b")
    assert a["payload"]["metrics"][0] == {
        "name": "load1", "labels": {"host": "a", "job": "node"}, "value": 0.5, "time": AT_MS * 1_000,
    }  # fmt: skip
    assert len(a["payload"]["metrics"]) == 3
    assert a["payload"]["metrics"][2].get("unit") == ("seconds" if made is second else None)
    # A stale marker is no value.
    assert [m["name"] for m in b["payload"]["metrics"]] == ["up"]


async def test_series_that_no_rule_names_are_refused_and_the_others_taken(door):
    status, text = await door.write(
        "/api/v1/write", first([*SERIES, ({"__name__": "x"}, [(1.0, AT_MS)]), ({"host": "a"}, [])]), **V1
    )
    assert status == 400
    assert b"2 series or samples cannot be taken" in text
    assert len(door.publisher.lines()) == 2


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\xff\xff\xff", 400),
        (bytes(cramjam.snappy.compress_raw(b"no protobuf\xff")), 400),
        (b"\xff\xff\xff\x7f\x00", 413),
    ],
)
async def test_bodies_that_are_none(door, data, status):
    assert (await door.write("/api/v1/write", data, **V1))[0] == status
    assert door.publisher.sends == []


async def test_symbols_that_are_not_there(door):
    request = Request2()
    request.symbols.extend(["", "__name__"])
    request.timeseries.add().labels_refs.extend([1, 7])
    assert (await door.write("/api/v1/write", packed(request), **V2))[0] == 400


async def test_a_token_is_asked_for():
    door = Door(token="s3cret")
    async with door.client:
        assert (await door.write("/api/v1/write", first(SERIES), **V1))[0] == 401
        assert (await door.write("/api/v1/write", first(SERIES), **V1, Authorization="Bearer s3cret"))[0] == 204


EXPORT = {
    "resourceMetrics": [{
        "resource": {"attributes": [{"key": "host.name", "value": {"stringValue": "a"}}, {"key": "process.pid", "value": {"intValue": "7"}}]},
        "scopeMetrics": [{"metrics": [
            {"name": "temperature", "unit": "Cel", "gauge": {"dataPoints": [
                {"timeUnixNano": "1795200000123456789", "asDouble": 21.5, "attributes": [{"key": "room", "value": {"stringValue": "1"}}]},
                {"timeUnixNano": "1795200000123456789", "asInt": "22", "attributes": [{"key": "room", "value": {"stringValue": "2"}}]},
                {"timeUnixNano": "1795200000123456789", "flags": 1},
            ]}},
            {"name": "pulses", "sum": {"isMonotonic": True, "dataPoints": [{"asInt": "3", "timeUnixNano": "1795200000123456000"}]}},
            {"name": "wait", "unit": "s", "histogram": {"dataPoints": [
                {"count": "3", "sum": 1.5, "min": 0.1, "max": 1.0, "bucketCounts": ["1", "2"], "explicitBounds": [0.5], "timeUnixNano": "1795200000123456000"}]}},
            {"name": "old", "summary": {"dataPoints": [
                {"count": "2", "sum": 4.0, "quantileValues": [{"quantile": 0.5, "value": 1.25}], "timeUnixNano": "1795200000123456000"}]}},
            {"name": "exp", "exponentialHistogram": {"dataPoints": [{"count": "2", "sum": 4.0, "scale": 1, "timeUnixNano": "1795200000123456000"}]}},
            {"name": "nothing"},
        ]}],
    }],
}  # fmt: skip
PROTOBUF = json_format.ParseDict(EXPORT, ExportMetricsServiceRequest()).SerializeToString()


@pytest.mark.parametrize(
    ("data", "kind"), [(orjson.dumps(EXPORT), "application/json"), (PROTOBUF, "application/x-protobuf")]
)
async def test_an_export_of_opentelemetry(door, data, kind):
    status, body = await door.write("/v1/metrics", data, **{"Content-Type": kind})
    assert status == 200
    said = ExportMetricsServiceResponse()
    said = json_format.Parse(body, said) if kind == "application/json" else said.FromString(body)
    assert said.partial_success.rejected_data_points == 1
    (line,) = door.publisher.lines()
    found = {
        (m["name"], m["labels"].get("room") or m["labels"].get("le") or m["labels"].get("quantile")): m["value"]
        for m in line["payload"]["metrics"]
    }
    assert line["device"] == "a"
    assert found == {
        ("temperature", "1"): 21.5, ("temperature", "2"): 22, ("pulses", None): 3, ("wait_count", None): 3, ("wait_sum", None): 1.5,
        ("wait_min", None): 0.1, ("wait_max", None): 1.0, ("wait_bucket", "0.5"): 1, ("wait_bucket", "+Inf"): 3,
        ("old_count", None): 2, ("old_sum", None): 4.0, ("old", "0.5"): 1.25, ("exp_count", None): 2, ("exp_sum", None): 4.0,
    }  # fmt: skip
    assert line["payload"]["metrics"][0]["time"] == 1_795_200_000_123_456
    fields = compile_parser({"name": "p", "version": 1, "kind": "metrics", "source": {}}).decode(
        examples.raw_message(line["payload"])
    )
    assert [(f.name, f.value, f.unit, f.pin) for f in fields[:3]] == [
        ("temperature", 21.5, "Cel", "1"), ("temperature", 22, "Cel", "2"), ("pulses", 3, None, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "kind"), [(b"{", "application/json"), (b"[]", "application/json"), (b"\xff", "application/x-protobuf")]
)
async def test_exports_that_are_none(door, data, kind):
    assert (await door.write("/v1/metrics", data, **{"Content-Type": kind}))[0] == 400
    assert door.publisher.sends == []


# --- the parser ---


def decode(payload, source=None):
    return compile_parser({"name": "p", "version": 1, "kind": "metrics", "source": source or {}}).decode(
        examples.raw_message(payload)
    )


def test_pins_are_labels():
    payload = {"metrics": [{"name": "cpu", "value": 1, "labels": {"mode": "idle", "cpu": "0", "job": "j"}, "time": 5}]}
    assert [(f.pin, f.timestamp) for f in decode(payload)] == [("0,idle", 5)]
    assert [f.pin for f in decode(payload, {"pin": ["mode"]})] == ["idle"]
    assert [f.pin for f in decode(payload, {"pin": []})] == [None]
    assert [f.pin for f in decode(payload, {"without": ["mode"]})] == ["0,j"]
    for wrong in ({"pin": "mode"}, {"without": [1]}, {"pins": []}):
        with pytest.raises(Reject):
            decode(payload, wrong)


def test_samples_that_are_none_are_refused_and_the_others_read():
    found = decode(
        {
            "metrics": [
                {"name": "a", "value": 1},
                {"value": 1},
                {"name": "b", "value": "x"},
                {"name": "c", "value": 1, "time": "x"},
                5,
            ]
        }
    )
    assert [isinstance(one, Reject) for one in found] == [False, True, True, True, True]
    for payload in (None, {}, {"metrics": []}, [], "x"):
        with pytest.raises(Reject):
            decode(payload)
