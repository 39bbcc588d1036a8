"""The tools themselves write here: a Prometheus that scrapes itself, and OpenTelemetry's SDK with its exporter."""

import asyncio
import shutil
import subprocess
import time

import pytest
from aiohttp import web
from aiohttp.test_utils import unused_port
from connector_fakes import MemoryPublisher
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource

from preservarium.clock import SystemClock
from preservarium.connectors import http
from preservarium.domain.decoders import examples
from preservarium.domain.decoders.kinds import compile_parser
from preservarium.errors import Reject
from preservarium.settings import Connector, LiveSettings, Settings

PARSER = compile_parser({"name": "p", "version": 1, "kind": "metrics", "source": {}})
#: A scrape a second; Prometheus sends what it has after five at the latest.
WAIT_S = 60.0


@pytest.fixture
async def door():
    """(its address, what it handed to Kafka)"""
    publisher = MemoryPublisher()
    live = LiveSettings(Settings(connector=Connector(device_tags="device,host_name,monitor")))
    app = web.Application()
    app.add_routes(http.routes(publisher, live, SystemClock()))
    runner = web.AppRunner(app, auto_decompress=False)
    await runner.setup()
    port = unused_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    yield f"http://127.0.0.1:{port}", publisher
    await runner.cleanup()


def fields(publisher, device):
    lines = [line for line in publisher.lines() if line["device"] == device]
    found = [f for line in lines for f in PARSER.decode(examples.raw_message(line["payload"]))]
    assert not [f for f in found if isinstance(f, Reject)]
    return found


async def test_a_prometheus_writes_what_it_scrapes(door, tmp_path):
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        pytest.skip("missing: prometheus (Debian's package)")
    address, publisher = door
    port = unused_port()
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s, external_labels: {monitor: prom-1}}\n"
        f"scrape_configs: [{{job_name: self, static_configs: [{{targets: ['127.0.0.1:{port}']}}]}}]\n"
        f"remote_write: [{{url: '{address}/api/v1/write', queue_config: {{batch_send_deadline: 1s}}}}]\n"
    )
    process = subprocess.Popen(
        [prometheus, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + WAIT_S
        while not any(f.name == "up" and f.value == 1 for f in fields(publisher, "prom-1")):
            assert time.monotonic() < deadline, "Prometheus wrote nothing"
            await asyncio.sleep(0.2)
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait)
    found = fields(publisher, "prom-1")
    names = {f.name for f in found}
    assert {"up", "scrape_duration_seconds", "process_resident_memory_bytes"} <= names
    assert all(f.timestamp is not None and abs(f.timestamp / 1e6 - time.time()) < 120 for f in found)
    codes = {f.pin for f in found if f.name == "promhttp_metric_handler_requests_total"}
    assert "200" in codes


@pytest.mark.parametrize("compression", [Compression.NoCompression, Compression.Gzip])
async def test_the_sdk_of_opentelemetry_exports(door, compression):
    address, publisher = door
    exporter = OTLPMetricExporter(endpoint=f"{address}/v1/metrics", compression=compression, timeout=20)
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=3_600_000)
    provider = MeterProvider(
        [reader], resource=Resource({"host.name": "boiler-7", "service.name": "heating"}), shutdown_on_exit=False
    )
    meter = provider.get_meter("heating")
    meter.create_counter("pulses", unit="1").add(3, {"meter": "gas"})
    meter.create_histogram("burn", unit="s").record(1.5)
    meter.create_observable_gauge("temperature", [lambda _: [observed(71.5)]], unit="Cel")
    assert await asyncio.to_thread(provider.force_flush, 20_000)
    await asyncio.to_thread(provider.shutdown)
    found = {f.name: (f.value, f.unit, f.pin) for f in fields(publisher, "boiler-7") if not f.name.endswith("_bucket")}
    assert found["pulses"] == (3, "1", "gas")
    assert found["temperature"] == (71.5, "Cel", None)
    assert found["burn_sum"] == (1.5, "s", None)
    assert found["burn_count"][0] == 1


def observed(value):
    from opentelemetry.metrics import Observation

    return Observation(value)
