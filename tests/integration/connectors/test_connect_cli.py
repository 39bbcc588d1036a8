"""The connectors as processes of their own, against real services: started, used, ended by SIGTERM."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import aiomqtt
import orjson
import pytest
from aiokafka import AIOKafkaConsumer

from preservarium.embedded.service import free_port
from preservarium.settings import Kafka, Settings
from preservarium.streaming import topics_admin

ROOT = Path(__file__).parents[3]
PARTITIONS = 3


class Command:
    """`preservarium …` in the environment of one test."""

    def __init__(self, kafka: str, prefix: str, directory: Path) -> None:
        self.bootstrap = kafka
        self.prefix = prefix
        self.environment = {
            **os.environ,
            "PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS": kafka,
            "PRESERVARIUM_KAFKA__TOPIC_PREFIX": prefix,
            "PRESERVARIUM_KAFKA__PARTITIONS": str(PARTITIONS),
            "PRESERVARIUM_DATA_DIR": str(directory),
            "PYTHONPATH": str(ROOT),
        }

    async def start(self, *arguments: str, **environment: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "preservarium",
            *arguments,
            env={**self.environment, **environment},
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def worker(self, **environment: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "faust", "-A", "preservarium", "worker"),
            env={**self.environment, **environment},
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )

    async def run(self, *arguments: str, **environment: str) -> tuple[int | None, str, str]:
        process = await self.start(*arguments, **environment)
        async with asyncio.timeout(60):
            out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()

    async def terminate(self, process: asyncio.subprocess.Process) -> tuple[int | None, str, str]:
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()

    async def raw(self, enough: Callable[[list[Any]], bool]) -> list[Any]:
        consumer = AIOKafkaConsumer(
            f"{self.prefix}iot_raw_data", bootstrap_servers=self.bootstrap, auto_offset_reset="earliest"
        )
        await consumer.start()
        lines: list[Any] = []
        try:
            async with asyncio.timeout(20):
                while not enough(lines):
                    for records in (await consumer.getmany(timeout_ms=200)).values():
                        lines += [orjson.loads(line) for r in records for line in r.value.split(b"\n")]
        finally:
            await consumer.stop()
        return lines


async def line_with(stream: asyncio.StreamReader | None, word: str) -> str:
    assert stream is not None
    seen = ""
    async with asyncio.timeout(30):
        while True:
            line = (await stream.readline()).decode()
            assert line, f"ended without {word!r}: {seen}"
            seen += line
            if word in line:
                return line


@pytest.fixture
async def command(kafka: str, topic_prefix: str, tmp_path: Path) -> Command:
    settings = Settings(kafka=Kafka(bootstrap_servers=kafka, topic_prefix=topic_prefix, partitions=PARTITIONS))
    await topics_admin.create(settings)
    return Command(kafka, topic_prefix, tmp_path)


async def test_http_alone(command: Command) -> None:
    process = await command.start("connect", "http", "--port", "0", "--json", PRESERVARIUM_HTTP__TOKEN="t0ken")
    address = (await line_with(process.stderr, "POST ")).split()[1]
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer t0ken"}) as session:
        async with session.post(address, json=[{"device": "d1", "payload": {"t": 1}}, {"device": "d2"}]) as answer:
            assert answer.status == 202
            body = await answer.json()
        async with session.get(address.replace("/ingest", "/metrics")) as answer:
            metrics = await answer.text()
    assert (body["accepted"], body["refused_count"]) == (1, 1)
    assert 'preservarium_connector_messages_total{connector="http"} 1.0' in metrics
    code, out, _ = await command.terminate(process)
    assert (code, json.loads(out)["taken"]) == (0, 1)
    assert [line["device"] for line in await command.raw(len)] == ["d1"]


async def test_http_alone_takes_another_token_without_a_restart(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first\n")
    process = await command.start("connect", "http", "--port", "0", "--json", PRESERVARIUM_HTTP__TOKEN_FILE=str(file))
    address = (await line_with(process.stderr, "POST ")).split()[1]

    async def post(token: str, **headers: str) -> int:
        shown = {"Authorization": f"Bearer {token}", **headers}
        async with aiohttp.ClientSession(headers=shown) as session, session.post(address, json=[]) as answer:
            return answer.status

    assert (await post("first"), await post("first", Host="evil.example")) == (202, 403)
    file.write_text("second\n")
    process.send_signal(signal.SIGHUP)
    await line_with(process.stderr, "setting_changed")
    assert (await post("first"), await post("second")) == (401, 202)
    code, _, err = await command.terminate(process)
    assert (code, "second" in err) == (0, False)


async def test_mqtt_alone(command: Command, mosquitto: str) -> None:
    root = command.prefix.strip(".")
    process = await command.start(
        "connect",
        "mqtt",
        "--json",
        PRESERVARIUM_MQTT__URL=mosquitto,
        PRESERVARIUM_MQTT__CLIENT_ID=root,
        PRESERVARIUM_MQTT__SUBSCRIPTIONS=f"{root}/{{device}}/up",
    )
    await line_with(process.stderr, "mqtt connected")
    url = urlsplit(mosquitto)
    async with aiomqtt.Client(url.hostname or "", url.port or 1883) as device:
        for i in range(5):
            await device.publish(f"{root}/d{i}/up", b'{"t":1}', qos=1)
    await command.raw(lambda lines: len(lines) == 5)
    code, out, _ = await command.terminate(process)
    assert (code, json.loads(out)["taken"]) == (0, 5)


async def test_files_interrupted_by_sigterm_go_on(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "back.csv"
    path.write_text("device,at,t\n" + "".join(f"d{i % 7},{1_700_000_000 + i},{i}\n" for i in range(500)))
    options = ("connect", "files", str(path), "--device", "device", "--time", "at", "--json")
    process = await command.start(*options, "--rate", "50")
    await command.raw(lambda lines: len(lines) >= 20)
    code, out, _ = await command.terminate(process)
    first = json.loads(out)["files"][0]
    assert (code, first["complete"]) == (1, False)
    assert 20 <= first["sent"] < 500
    code, out, err = await command.run(*options)
    last = json.loads(out)["files"][0]
    assert (code, last["complete"], last["rows"], last["sent"]) == (0, True, 500, 500 - first["sent"]), err
    lines = await command.raw(lambda lines: len(lines) >= 500)
    assert sorted(int(line["payload"]["t"]) for line in lines) == list(range(500))


async def test_simulate_sends_what_it_says(command: Command) -> None:
    code, out, err = await command.run("simulate", "--rate", "200", "--messages", "150", "--json")
    summary = json.loads(out)
    assert (code, summary["messages"]) == (0, 150), err
    lines = await command.raw(lambda lines: len(lines) >= 150)
    assert len(lines) == 150
    assert {line["connector"] for line in lines} == {"simulator"}


async def test_inside_the_worker(command: Command, mosquitto: str) -> None:
    """Enabled connectors share the worker's publisher and its web port."""
    root, port = command.prefix.strip("."), free_port()
    process = await command.worker(
        PRESERVARIUM_KAFKA__GROUP=root,
        PRESERVARIUM_AGENTS__ENABLED="normalize",
        PRESERVARIUM_WEB__PORT=str(port),
        PRESERVARIUM_MQTT__ENABLED="true",
        PRESERVARIUM_MQTT__URL=mosquitto,
        PRESERVARIUM_MQTT__CLIENT_ID=root,
        PRESERVARIUM_MQTT__SUBSCRIPTIONS=f"{root}/{{device}}/up",
    )
    output = asyncio.create_task(process.stdout.read())  # type: ignore[union-attr]
    try:
        url = urlsplit(mosquitto)
        async with asyncio.timeout(60), aiohttp.ClientSession() as session:
            while True:
                assert process.returncode is None, (await output).decode()
                try:
                    async with session.post(f"http://127.0.0.1:{port}/ingest?device=h1", json={"t": 1}) as answer:
                        if answer.status == 202:
                            break
                except aiohttp.ClientConnectorError:
                    await asyncio.sleep(0.1)
            async with session.get(f"http://127.0.0.1:{port}/ingest") as answer:
                assert answer.status == 405
        # Published before the connector subscribed it would go nowhere: sent until it has come.
        arrived = asyncio.create_task(command.raw(lambda lines: {"h1", "m1"} <= {line["device"] for line in lines}))
        async with aiomqtt.Client(url.hostname or "", url.port or 1883) as device:
            while not arrived.done():
                await device.publish(f"{root}/m1/up", b"{}", qos=1)
                await asyncio.wait([arrived], timeout=0.5)
        assert {line["connector"] for line in await arrived} == {"http", "mqtt"}
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(30):
                await process.wait()
        except TimeoutError:
            process.kill()
            pytest.fail((await output).decode())
    assert process.returncode == 0, (await output).decode()


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "message"),
    [
        (("connect", "mqtt"), {"PRESERVARIUM_MQTT__SUBSCRIPTIONS": "a/#/b"}, 2, "PRESERVARIUM_MQTT__SUBSCRIPTIONS"),
        (("connect", "mqtt"), {"PRESERVARIUM_MQTT__URL": "tcp://x"}, 2, "PRESERVARIUM_MQTT__URL"),
        (("connect", "files", "pyproject.toml"), {}, 1, "neither .csv nor .ndjson"),
        (("simulate", "--print-devices"), {}, 2, "--devices"),
    ],
)
async def test_a_mistake_is_one_line_and_an_exit_code(
    tmp_path: Path, arguments: tuple[str, ...], environment: dict[str, str], code: int, message: str
) -> None:
    found, _, err = await Command("127.0.0.1:1", "", tmp_path).run(*arguments, **environment)
    assert (found, message in err, "Traceback" in err) == (code, True, False), err
