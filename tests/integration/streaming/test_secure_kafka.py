"""A broker that wants TLS and a log-in: every client of a worker, the command line, and what is said of a refusal.

The broker has one listener for each way in; all that the processes under test are told is one of them. A listener's
clients are sent to that same listener for everything else, so nothing here gets by on the open one.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from click.testing import CliRunner
from conftest import running
from tls_support import Authority
from worker_support import ROOT, until

from preservarium.__main__ import cli
from preservarium.cli.doctor import State, check_kafka
from preservarium.embedded.kafka import Kafka
from preservarium.embedded.service import free_port
from preservarium.settings import Settings
from preservarium.streaming import kafka_clients, topics_admin

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

PARTITIONS = 2
PASSWORD = "s3cret, with = and ;"
SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
PLAIN = f'org.apache.kafka.common.security.plain.PlainLoginModule required user_ann="{PASSWORD}";'


class SecureKafka(Kafka):
    """A broker with a listener of each security protocol."""

    name = "kafka-secure"

    def __init__(self, directory: Path, authority: Authority) -> None:
        # A broker that lives for seconds starts sooner without the optimising compiler.
        super().__init__(directory, java_options=("-XX:TieredStopAtLevel=1",))
        self.authority = authority
        self.ports = {name: free_port() for name in ("SSL", "SASL_SSL", "SASL_PLAINTEXT")}
        self.identity = authority.sign("broker", hosts="DNS:localhost")
        self.format_options = [
            f"--add-scram={mechanism}=[name=ann,password={PASSWORD.replace(',', '').replace('=', '')}]"
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
        ]

    def at(self, protocol: str) -> str:
        """Bootstrap server of a listener."""
        return f"localhost:{self.ports.get(protocol, self.port)}"

    def properties(self) -> str:
        addresses = {name: f"{name}://{self.at(name)}" for name in ("PLAINTEXT", *self.ports)}
        controller = f"CONTROLLER://127.0.0.1:{self.remembered_port('controller_port')}"
        mechanisms = "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512"
        lines = {
            "listeners": ",".join([*(a.replace("localhost", "127.0.0.1") for a in addresses.values()), controller]),
            "advertised.listeners": ",".join(addresses.values()),
            "listener.security.protocol.map": ",".join(["CONTROLLER:PLAINTEXT", *(f"{n}:{n}" for n in addresses)]),
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self.identity.both),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.authority.cert),
            "listener.name.ssl.ssl.client.auth": "required",
            "sasl.enabled.mechanisms": mechanisms,
        }
        for listener in ("sasl_ssl", "sasl_plaintext"):
            lines[f"listener.name.{listener}.plain.sasl.jaas.config"] = PLAIN
            lines[f"listener.name.{listener}.scram-sha-256.sasl.jaas.config"] = SCRAM
            lines[f"listener.name.{listener}.scram-sha-512.sasl.jaas.config"] = SCRAM
        return super().properties() + "".join(f"{name}={value}\n" for name, value in lines.items())


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def broker(services_directory: Path, authority: Authority) -> Iterator[SecureKafka]:
    yield from running(SecureKafka(services_directory / "kafka-secure", authority))


@pytest.fixture(scope="module")
def ways_in(broker: SecureKafka, authority: Authority) -> dict[str, dict[str, str]]:
    """Settings of Kafka for each way in that should work."""
    client = authority.sign("worker", password="key secret")
    ca = {"ssl_ca_file": str(authority.cert)}

    def sasl(protocol: str, mechanism: str) -> dict[str, str]:
        password = PASSWORD if mechanism == "PLAIN" else PASSWORD.replace(",", "").replace("=", "")
        login = {"sasl_mechanism": mechanism, "sasl_username": "ann", "sasl_password": password}
        return {"security_protocol": protocol, "bootstrap_servers": broker.at(protocol), **login}

    certificate = {
        "ssl_cert_file": str(client.cert),
        "ssl_key_file": str(client.key),
        "ssl_key_password": "key secret",
    }
    return {
        "scram-256": sasl("SASL_SSL", "SCRAM-SHA-256") | ca,
        "scram-512": sasl("SASL_SSL", "SCRAM-SHA-512") | ca,
        "plain": sasl("SASL_SSL", "PLAIN") | ca,
        "certificate": {"security_protocol": "SSL", "bootstrap_servers": broker.at("SSL"), **ca, **certificate},
        "unencrypted": sasl("SASL_PLAINTEXT", "SCRAM-SHA-512"),
    }


def settings(way: dict[str, Any], **more: Any) -> Settings:
    return Settings(kafka={"topic_prefix": "nobody.", **way, **more})


@pytest.mark.parametrize("way", ["scram-256", "scram-512", "plain", "certificate", "unencrypted"])
async def test_every_way_in_lets_the_doctor_in(ways_in: dict[str, dict[str, str]], way: str) -> None:
    found = {f.name: f for f in await check_kafka(settings(ways_in[way]))}
    assert found["kafka"].state == State.GREEN, found["kafka"]
    assert await kafka_clients.refusal(settings(ways_in[way]).kafka) == ""
    assert ("security" in found) is (way == "unencrypted")
    if way == "unencrypted":
        assert found["security"].state == State.YELLOW


async def refused(way: dict[str, str], **changed: Any) -> str:
    """What the doctor says in one line; no secret is in it."""
    (finding,) = await check_kafka(settings({**way, **changed}))
    assert finding.state == State.RED
    for secret in (PASSWORD, "wrong/one", "key secret"):
        assert secret not in finding.found + finding.advice
    assert "\n" not in finding.found
    assert "KAFKA__SECURITY_PROTOCOL" in finding.advice
    return finding.found


async def test_the_doctor_says_why_a_broker_does_not_let_us_in(
    ways_in: dict[str, dict[str, str]], broker: SecureKafka, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "somebody else")
    for way in ("scram-256", "scram-512", "plain"):
        mechanism = ways_in[way]["sasl_mechanism"]
        said = await refused(ways_in[way], sasl_password="wrong/one")
        assert f"user 'ann' is not let in with {mechanism}: wrong user or password" in said
    said = await refused(ways_in["plain"], ssl_ca_file="")
    assert "its certificate is refused: " in said
    said = await refused(ways_in["plain"], ssl_ca_file=str(stranger.cert))
    assert "its certificate is refused: " in said
    address = broker.at("SASL_SSL").replace("localhost", "127.0.0.1")
    said = await refused(ways_in["plain"], bootstrap_servers=address)
    assert "its certificate is refused: IP address mismatch, certificate is not valid for '127.0.0.1'" in said
    unchecked = settings(ways_in["plain"], bootstrap_servers=address, ssl_check_hostname=False)
    assert [f.state for f in await check_kafka(unchecked)][:2] == [State.GREEN, State.YELLOW]
    none = {"ssl_cert_file": "", "ssl_key_file": "", "ssl_key_password": ""}
    assert "does it ask for a certificate that we do not show" in await refused(ways_in["certificate"], **none)
    said = await refused(ways_in["plain"], bootstrap_servers=broker.at("PLAINTEXT"))
    assert "is it the port of a SASL_SSL listener" in said
    (finding,) = await check_kafka(Settings(kafka={"bootstrap_servers": broker.at("SASL_SSL")}))
    assert "is it the port of a PLAINTEXT listener" in finding.found


async def test_a_release_step_says_why_it_is_not_let_in(ways_in: dict[str, dict[str, str]]) -> None:
    wrong = settings(ways_in["scram-512"], sasl_password="wrong/one")
    with pytest.raises(topics_admin.TopicsError, match="user 'ann' is not let in with SCRAM-SHA-512") as e:
        await topics_admin.compare(wrong)
    assert "wrong/one" not in str(e.value)


class System:
    """Commands and workers with one way in."""

    def __init__(self, environment: dict[str, str], directory: Path) -> None:
        self.environment = environment
        self.directory = directory
        self.logs: list[Path] = []

    async def command(self, *arguments: str) -> tuple[int, Any]:
        # In a thread: commands have an event loop of their own.
        result = await asyncio.to_thread(CliRunner(env=self.environment).invoke, cli, arguments)
        self.said(result.output)
        try:
            return result.exit_code, json.loads(result.stdout)
        except ValueError:
            return result.exit_code, result.output

    def said(self, text: str) -> None:
        assert PASSWORD not in text

    async def worker(self, way: dict[str, str], port: int) -> subprocess.Popen[bytes]:
        path = self.directory / f"worker-{len(self.logs)}.log"
        self.logs.append(path)
        with path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "faust", "-A", "preservarium", "worker"],
                env={
                    **os.environ,
                    **self.environment,
                    **variables(way),
                    "PRESERVARIUM_WEB__PORT": str(port),
                    # Of its own: tables come from their changelogs.
                    "PRESERVARIUM_DATA_DIR": str(self.directory / f"data-{len(self.logs)}"),
                },
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        await until(
            lambda: "worker_ready" in path.read_text() or process.poll() is not None,
            60,
            lambda: path.read_text()[-3000:],
        )
        assert process.poll() is None, path.read_text()[-3000:]
        return process


def variables(way: dict[str, str]) -> dict[str, str]:
    return {f"PRESERVARIUM_KAFKA__{name.upper()}": value for name, value in way.items()}


REGISTRY = """
manufacturers: [{name: Generic}]
datatypes: [{name: temperature, kind: number, unit: "°C"}]
parsers: [{name: json, version: 1, kind: json, examples: [{json: {temperature: 21.5}, expect: {temperature: 21.5}}]}]
rules: [{name: hot, component_type: temperature, kind: high, severity: major, threshold: 30}]
device_types: [{name: box, manufacturer: Generic, parser: json, mode: MQTT, rules: [hot]}]
devices: [{device_id: box-1, type: box, name: Box}]
"""


async def test_a_worker_with_every_agent_and_the_command_line(
    ways_in: dict[str, dict[str, str]], pg_dsn: str, clickhouse: str, clickhouse_database: str, tmp_path: Path
) -> None:
    """Messages go in by HTTP and come out as rows and an alarm, over SCRAM; a second worker goes on with a certificate."""
    secret = tmp_path / "password"
    secret.write_text(ways_in["scram-256"]["sasl_password"] + "\n")
    way = {k: v for k, v in ways_in["scram-256"].items() if k != "sasl_password"}
    common = {
        "PYTHONPATH": str(ROOT),
        "PRESERVARIUM_ENV_FILE": os.devnull,
        "PRESERVARIUM_KAFKA__PARTITIONS": str(PARTITIONS),
        "PRESERVARIUM_KAFKA__SESSION_TIMEOUT_S": "6",
        "PRESERVARIUM_POSTGRES__URL": pg_dsn,
        "PRESERVARIUM_CLICKHOUSE__URL": clickhouse,
        "PRESERVARIUM_CLICKHOUSE__DATABASE": clickhouse_database,
        "PRESERVARIUM_ANOMALY__ENABLED": "true",
        "PRESERVARIUM_LOG_FORMAT": "json",
    }
    scram = System({**common, **variables(way), "PRESERVARIUM_KAFKA__SASL_PASSWORD_FILE": str(secret)}, tmp_path)
    code, said = await scram.command("migrate")
    assert code == 0, said
    file = tmp_path / "registry.yaml"
    file.write_text(REGISTRY)
    code, said = await scram.command("registry", "apply", str(file))
    assert code == 0, said
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    connection = await asyncpg.connect(pg_dsn)
    worker = await scram.worker({}, port)
    other: subprocess.Popen[bytes] | None = None
    try:
        async with aiohttp.ClientSession() as http:

            async def send(device: str, value: float) -> None:
                async with http.post(f"{url}/ingest", json={"device": device, "payload": {"temperature": value}}) as r:
                    assert r.status == 202, await r.text()

            async def alarms() -> list[str]:
                async with http.get(f"{url}/api/alarms") as response:
                    return [a["state"] for a in (await response.json())["alarms"]] if response.status == 200 else []

            async def stored(n: int) -> bool:
                return bool(await connection.fetchval("SELECT count(*) FROM iot_measurements") >= n)

            await send("box-1", 35.5)
            await send("nobody-knows-me", 1)
            await until(lambda: stored(1), 30, lambda: scram.logs[0].read_text()[-3000:])
            await until(alarms, 20)
            before = await alarms()
            listed = await scram.command("alarms", "list", "--json")
            topics = await scram.command("topics", "--json")
            status = await scram.command("sync", "status", "--json")
            doctor = await scram.command("doctor", "--json")
            dlq = await scram.command("dlq", "list", "--json")
            assert (listed[0], [a["device_id"] for a in listed[1]["alarms"]]) == (0, ["box-1"]), listed
            assert topics[0] == 0, topics
            assert status[0] == 0, status
            assert {f["name"]: f["state"] for f in doctor[1]["findings"]}["topics"] == "green", doctor
            assert (dlq[0], "unknown_device" in json.dumps(dlq[1])) == (0, True), dlq
            code, said = await scram.command("alarms", "acknowledge", "box-1", "hot", "--json")
            assert code == 0, said
            worker.terminate()
            assert await asyncio.to_thread(worker.wait, 30) == 0, scram.logs[0].read_text()[-3000:]

            # Another worker, another way in: the alarm's state comes from the changelog.
            certified = System(common, tmp_path)
            certified.logs = scram.logs
            other = await certified.worker(ways_in["certificate"], port)
            await until(alarms, 20)
            assert await alarms() != before, "it is acknowledged"
            await send("box-1", 20)
            await until(lambda: stored(2), 30, lambda: scram.logs[1].read_text()[-3000:])

            async def normal() -> bool:
                return not await alarms()

            await until(normal, 20, lambda: scram.logs[1].read_text()[-3000:])
            async with http.get(f"{url}/metrics") as response:
                scram.said(await response.text())
            async with http.get(f"{url}/api/status") as response:
                scram.said(await response.text())
    finally:
        await connection.close()
        for process in (worker, other):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
    for log in scram.logs:
        text = log.read_text()
        assert '"level": "error", "logger": "preservarium' not in text, text[-3000:]
        for word in (PASSWORD, secret.read_text().strip(), "key secret"):
            assert word not in text
