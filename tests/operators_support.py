"""A real worker with alarms in it: devices, one rule, readings, and its web port. For what operators see and do."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from worker_support import ROOT, until

from preservarium import topics
from preservarium.embedded.service import free_port
from preservarium.settings import LiveSettings, load
from preservarium.stores.migrate import migrate_postgres
from preservarium.streaming import topics_admin
from preservarium.streaming.publish import Publisher
from preservarium.streaming.stage import Send

PARTITIONS = 3


def now_us() -> int:
    return time.time_ns() // 1_000


class Plant:
    """Topics, settings and workers of one test. Devices send °C; the rule `hot` raises above 30."""

    def __init__(self, kafka: str, prefix: str, dsn: str, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            "PRESERVARIUM_ENV_FILE": "/dev/null",
            "PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS": kafka,
            "PRESERVARIUM_KAFKA__TOPIC_PREFIX": prefix,
            "PRESERVARIUM_KAFKA__GROUP": f"{prefix}plant",
            "PRESERVARIUM_KAFKA__PARTITIONS": str(PARTITIONS),
            "PRESERVARIUM_KAFKA__SESSION_TIMEOUT_S": "6",
            "PRESERVARIUM_POSTGRES__URL": dsn,
            "PRESERVARIUM_CLICKHOUSE__ENABLED": "false",
            "PRESERVARIUM_AGENTS__ENABLED": "registry,alarm,sink",
            "PRESERVARIUM_HTTP__ENABLED": "false",
            "PRESERVARIUM_WEB__LINK_SECRET": "a secret of this test",
            "PRESERVARIUM_LOG_FORMAT": "json",
        }
        self.processes: list[subprocess.Popen[bytes]] = []
        self.urls: list[str] = []
        self._offset = 0
        saved = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            self.settings = load()
        finally:
            for name, value in saved.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        self._publisher = Publisher(LiveSettings(self.settings))

    async def open(self, *devices: str) -> None:
        """Topics, tables, the registry's records."""
        await topics_admin.create(self.settings)
        await migrate_postgres(self.settings)
        datatype = {"name": "temp", "rev": 1, "kind": "number", "unit": "°C"}
        rule = {"name": "hot", "rev": 2, "component_type": "temp", "kind": "high", "severity": "major", "threshold": 30, "acknowledge": True,
                "message": "{name}: {value} {unit}"}  # fmt: skip
        sends = [
            Send(topics.TYPE_REGISTRY, b"datatype/temp", orjson.dumps(datatype)),
            Send(topics.TYPE_REGISTRY, b"rule/hot", orjson.dumps(rule)),
        ]
        for n, device in enumerate(devices, 3):
            document = {
                "device_id": device,
                "rev": n,
                "type": "box",
                "enabled": True,
                "rules": {"hot": {}},
                "name": f"Box {device}",
            }
            sends.append(Send(topics.DEVICE_REGISTRY, device.encode(), orjson.dumps(document)))
        await self._publisher.publish(sends)

    async def start(self, **extra: str) -> str:
        """Start a worker; the address of its web port."""
        number, port = len(self.processes), free_port()
        with (self.directory / f"plant-{number}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "faust", "-A", "preservarium", "worker"],
                cwd=ROOT,
                env={
                    **os.environ, **self.environment, "PRESERVARIUM_WEB__PORT": str(port), "PYTHONPATH": str(ROOT),
                    "PRESERVARIUM_DATA_DIR": str(self.directory / f"data-{number}"), **extra,
                },
                stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.processes.append(process)
        self.urls.append(f"http://127.0.0.1:{port}")
        await until(lambda: "worker_ready" in self.log(number), 90, lambda: self.log(number)[-3_000:])
        return self.urls[-1]

    def log(self, number: int = 0) -> str:
        return (self.directory / f"plant-{number}.log").read_text(errors="replace")

    async def reads(self, device: str, value: float) -> None:
        """A validated message of a device arrives."""
        self._offset += 1
        message: dict[str, Any] = {
            "device_id": device, "connector_mode": "MQTT", "topic": "t/1", "timestamp": now_us(), "received_at": now_us(),
            "raw_partition": 0, "raw_offset": self._offset, "raw_index": 0, "parser": "p@1", "config_rev": 1, "generation": 0,
            "readings": [{"component_type": "temp", "pin_position": "-1", "value": value, "unit": "°C", "quality": 1}],
        }  # fmt: skip
        await self._publisher.publish([Send(topics.VALIDATED, device.encode(), orjson.dumps(message))])

    async def raises(self, *devices: str) -> None:
        """The alarm of each device stands, as the last worker sees it.

        A reading is sent until it does: the first one may come before the worker has heard of the device.
        """
        async with aiohttp.ClientSession() as http:

            async def stand() -> bool:
                async with http.get(f"{self.urls[-1]}/api/alarms?limit=200") as response:
                    there = (
                        {a["device_id"] for a in (await response.json())["alarms"]} if response.status == 200 else set()
                    )
                for device in set(devices) - there:
                    await self.reads(device, 35)
                return set(devices) <= there

            await until(stand, 90, lambda: self.log(len(self.processes) - 1)[-3_000:])

    async def act(self, device: str, action: str) -> None:
        """Bob does something, elsewhere."""
        line = {"device_id": device, "rule": "hot", "action": action, "actor": "bob", "at": now_us()}
        await self._publisher.publish([Send(topics.ALARM_ACTIONS, device.encode(), orjson.dumps(line))])

    async def close(self) -> None:
        await self._publisher.on_stop()
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
