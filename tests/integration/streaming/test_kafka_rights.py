"""What a worker and the release step need on a broker with access lists: those that docs/OPERATING.md prints, and nothing else."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from click.testing import CliRunner
from conftest import running
from documented import ROOT
from worker_support import until

from preservarium.__main__ import cli
from preservarium.embedded.kafka import LOG4J, Kafka
from preservarium.embedded.service import free_port

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

PREFIX, GROUP = "plant.", "engine"
USERS = {"worker": "worker secret", "release": "release secret"}
#: One line of the authorizer's log.
_DECISION = re.compile(
    r"Principal = User:(\S+) is (\w+) operation = (\w+) from host = \S+ on resource = (\w+):LITERAL:(\S+) for request = (\w+)"
)


class GuardedKafka(Kafka):
    """A broker that lets its own user do everything, and others what its lists say, over a listener with a log-in."""

    name = "kafka-guarded"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, java_options=("-XX:TieredStopAtLevel=1",))
        self.sasl_port = free_port()

    def properties(self) -> str:
        addresses = f"PLAINTEXT://127.0.0.1:{self.port},SASL_PLAINTEXT://127.0.0.1:{self.sasl_port}"
        users = " ".join(f'user_{name}="{password}"' for name, password in USERS.items())
        lines = {
            "listeners": f"{addresses},CONTROLLER://127.0.0.1:{self.remembered_port('controller_port')}",
            "advertised.listeners": addresses,
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT",
            "sasl.enabled.mechanisms": "PLAIN",
            "listener.name.sasl_plaintext.plain.sasl.jaas.config": f"org.apache.kafka.common.security.plain.PlainLoginModule required {users};",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            # Who comes without a log-in: the broker itself, and this test.
            "super.users": "User:ANONYMOUS",
        }
        return super().properties() + "".join(f"{name}={value}\n" for name, value in lines.items())

    def prepare(self) -> None:
        super().prepare()
        told = "logger.acl.name = kafka.authorizer.logger\nlogger.acl.level = debug\n"
        (self.directory / "log4j2.properties").write_text(LOG4J.format(directory=self.directory) + told)

    def decisions(self, word: str) -> set[tuple[str, ...]]:
        """(user, operation, kind of resource, its name, request) of what was allowed, or denied."""
        text = (self.directory / "server.log").read_text()
        return {
            (user, what, kind, name, request)
            for user, said, what, kind, name, request in _DECISION.findall(text)
            if said == word and user in USERS
        }


#: Who a line of the page's table is about -> the user of this test.
WHO = {"workers": "worker", "`preservarium migrate`": "release", "`preservarium registry apply`": "release"}
NAMES = {
    "kafka.topic_prefix": PREFIX,
    "<kafka.group>-": f"{GROUP}-",
    "kafka.group": GROUP,
    "normalize.decoded_topic": "decoded_iot_data",
}


def documented() -> list[tuple[str, str, str, bool, list[str]]]:
    """(user, kind of resource, name, whether that is a prefix, operations) of each line of the page's table."""
    page = (ROOT / "docs/OPERATING.md").read_text()
    table = page[page.index("With access lists") :].partition("\n\n")[2].partition("\n\n")[0]
    found = []
    for row in table.splitlines()[2:]:
        who, on, needs = (cell.strip() for cell in row.strip("|").split("|"))
        name = re.search(r"`([^`]+)`", on)
        assert name is not None, row
        kind = "group" if on.startswith("groups") else "topic"
        found.append((WHO[who.partition(",")[0]], kind, NAMES[name[1]], "prefix" in on, needs.split(", ")))
    return found


def grant(broker: GuardedKafka) -> None:
    """Exactly what the page says."""
    from confluent_kafka.admin import (  # fmt: skip
        AclBinding,
        AclOperation,
        AclPermissionType,
        AdminClient,
        NewTopic,
        ResourcePatternType,
        ResourceType,
    )

    admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
    bindings = [
        AclBinding(
            getattr(ResourceType, kind.upper()), name, ResourcePatternType.PREFIXED if prefix else ResourcePatternType.LITERAL,
            f"User:{user}", "*", getattr(AclOperation, re.sub(r"(?<=[a-z])(?=[A-Z])", "_", what).upper()), AclPermissionType.ALLOW,
        )
        for user, kind, name, prefix, needs in documented() for what in needs
    ]  # fmt: skip
    for done in admin.create_acls(bindings).values():
        done.result(30)
    # Somebody else has made these, and otherwise; Faust made changelogs like that.
    others = [NewTopic(f"{PREFIX}worker_status", 2, 1), NewTopic(f"{GROUP}-series_states-changelog", 2, 1, config={"cleanup.policy": "compact"})]  # fmt: skip
    for done in admin.create_topics(others).values():
        done.result(30)


def old_message(broker: GuardedKafka) -> None:
    """The service that we replace says something."""
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": broker.bootstrap_servers})
    message = {"mac_address": "old-1", "data_point_label": "temp", "value": 21.5, "timestamp": time.time()}
    producer.produce("decoded_iot_data", json.dumps(message), "old-1")
    assert producer.flush(30) == 0


@pytest.fixture(scope="module")
def broker(services_directory: Path) -> Iterator[GuardedKafka]:
    yield from running(GuardedKafka(services_directory / "kafka-guarded"))


REGISTRY = """
manufacturers: [{name: Generic}]
datatypes: [{name: temperature, kind: number, unit: "°C"}]
parsers: [{name: json, version: 1, kind: json, source: {}}]
rules: [{name: hot, component_type: temperature, kind: high, severity: major, threshold: 30}]
device_types: [{name: box, manufacturer: Generic, parser: json, mode: MQTT, rules: [hot]}]
devices: [{device_id: box-1, type: box, name: Box}]
"""


async def test_what_the_page_lists_is_enough_and_all_of_it_is_used(
    broker: GuardedKafka, pg_dsn: str, tmp_path: Path
) -> None:
    await asyncio.to_thread(grant, broker)
    port = free_port()

    def environment(user: str) -> dict[str, str]:
        kafka = {
            "BOOTSTRAP_SERVERS": f"127.0.0.1:{broker.sasl_port}", "SECURITY_PROTOCOL": "SASL_PLAINTEXT", "SASL_MECHANISM": "PLAIN", "SASL_USERNAME": user, "SASL_PASSWORD": USERS[user],
            "TOPIC_PREFIX": PREFIX, "GROUP": GROUP, "PARTITIONS": "2", "SESSION_TIMEOUT_S": "6",
        }  # fmt: skip
        return {
            "PYTHONPATH": str(ROOT), "PRESERVARIUM_ENV_FILE": os.devnull, "PRESERVARIUM_POSTGRES__URL": pg_dsn, "PRESERVARIUM_CLICKHOUSE__ENABLED": "false", "PRESERVARIUM_ANOMALY__ENABLED": "true",
            "PRESERVARIUM_WEB__PORT": str(port), "PRESERVARIUM_DATA_DIR": str(tmp_path / "data"), "PRESERVARIUM_LOG_FORMAT": "json", **{f"PRESERVARIUM_KAFKA__{name}": value for name, value in kafka.items()},
        }  # fmt: skip

    async def command(user: str, *arguments: str, code: int = 0) -> str:
        result = await asyncio.to_thread(CliRunner(env=environment(user)).invoke, cli, arguments)
        assert result.exit_code == code, result.output
        return result.output

    await command("release", "migrate")
    # What was there has by now what our guarantees need; other differences are told.
    differs = await command("release", "topics", code=1)
    assert "worker_status: retention.ms" in differs
    assert "message.timestamp.type" not in differs
    assert "min.compaction.lag.ms" not in differs
    (tmp_path / "registry.yaml").write_text(REGISTRY)
    await command("release", "registry", "apply", str(tmp_path / "registry.yaml"))
    log = tmp_path / "worker.log"
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [sys.executable, "-m", "faust", "-A", "preservarium", "worker"],
            env={**os.environ, **environment("worker")}, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    connection = await asyncpg.connect(pg_dsn)
    try:
        await until(
            lambda: "worker_ready" in log.read_text() or worker.poll() is not None, 90, lambda: log.read_text()[-3000:]
        )
        assert worker.poll() is None, log.read_text()[-3000:]
        url = f"http://127.0.0.1:{port}"
        async with aiohttp.ClientSession() as http:
            async with http.post(f"{url}/ingest", json={"device": "box-1", "payload": {"temperature": 35}}) as response:
                assert response.status == 202, await response.text()

            async def stored() -> bool:
                found = await connection.fetch("SELECT DISTINCT device_id FROM iot_measurements")
                return {row["device_id"] for row in found} == {"box-1", "old-1"}

            async def alarm() -> Any:
                async with http.get(f"{url}/api/alarms") as response:
                    return (await response.json())["alarms"]

            await asyncio.to_thread(old_message, broker)
            await until(stored, 60, lambda: log.read_text()[-3000:])
            await until(alarm, 40, lambda: log.read_text()[-3000:])
        await command("worker", "alarms", "acknowledge", "box-1", "hot")
        await command("worker", "dlq", "list")
    finally:
        await connection.close()
        worker.terminate()
        await asyncio.to_thread(worker.wait, 30)
    assert broker.decisions("Denied") == set()
    # What nothing has asked for would not have to stand in the list.
    asked = broker.decisions("Allowed")
    for user, kind, name, prefix, needs in documented():
        for what in needs:
            of = {what.upper(), re.sub(r"(?<=[a-z])(?=[A-Z])", "_", what).upper()}
            assert any(
                user == who and operation in of and resource.lower() == kind and (named.startswith(name) if prefix else named == name)
                for who, operation, resource, named, _ in asked
            ), (user, what, kind, name)  # fmt: skip
