"""The services of one machine together: those that the settings do not name, started and stopped at the same time."""

import asyncio
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import asyncpg

from preservarium.embedded.clickhouse import ClickHouse
from preservarium.embedded.kafka import Kafka, MockKafka, kafka_for
from preservarium.embedded.mail import MailDirectory
from preservarium.embedded.mosquitto import Mosquitto
from preservarium.embedded.postgres import USER, Postgres
from preservarium.embedded.running import named
from preservarium.embedded.service import Interrupted, Service, ServiceError
from preservarium.settings import PREFIX, Settings

#: Of the embedded PostgreSQL.
DATABASE: Final = "preservarium"


class Ensemble:
    """Services in a data directory.

    Args:
        directory: of the data.
        say: tells people something in one line.

    Attributes:
        reach: service -> the variables by which it is reached, of those that were started. Passwords stand in files.
        mail: where mail lies, when no mail server is given.
    """

    def __init__(self, directory: Path, say: Callable[[str], None]) -> None:
        self.directory = directory
        self.reach: dict[str, dict[str, str]] = {}
        self.mail: MailDirectory | None = None
        self._say = say
        self._services: list[Service] = []
        self._interrupted = threading.Event()

    @property
    def variables(self) -> dict[str, str]:
        """All that reach something."""
        return {name: value for reach in self.reach.values() for name, value in reach.items()}

    async def start(self, given: Settings, *, mqtt: bool) -> None:
        """Start what the settings do not name.

        Args:
            given: the settings.
            mqtt: also an MQTT broker.

        Raises:
            Interrupted: `interrupt` was called meanwhile.
            ServiceError: a service did not start. What has started is to be stopped.
        """
        here = named(given)
        directory = self.directory
        starting = []
        if "kafka" not in here:
            if given.kafka.security_protocol != "PLAINTEXT":
                message = (
                    f"{PREFIX}KAFKA__SECURITY_PROTOCOL is {given.kafka.security_protocol}, but no "
                    f"{PREFIX}KAFKA__BOOTSTRAP_SERVERS are given: a broker of our own is not secured"
                )
                raise ServiceError(message)
            kafka, notice = await asyncio.to_thread(kafka_for, directory, interrupted=self._interrupted)
            if notice:
                self._say(notice)
            if isinstance(kafka, MockKafka):
                # Its offsets begin at 0 each time: whatever remembers offsets of another run must be new as well.
                self.directory = directory = directory / "volatile"
                await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
            starting.append(self._kafka(kafka))
        if "postgres" not in here:
            starting.append(self._postgres(Postgres(directory / "postgres")))
        if given.clickhouse.enabled and "clickhouse" not in here:
            starting.append(self._clickhouse(ClickHouse(directory / "clickhouse")))
        if mqtt:
            self.reach["mqtt"] = {f"{PREFIX}MQTT__ENABLED": "true"}
            if "mqtt" not in here:
                starting.append(self._mosquitto(Mosquitto(directory / "mosquitto")))
        # All of them end before anything is stopped, also where one fails: a thread cannot be cancelled.
        results = await asyncio.gather(*starting, return_exceptions=True)
        failed = [result for result in results if isinstance(result, BaseException)]
        if failed:
            # Why one failed says more than that the others were given up for it.
            raise next((e for e in failed if not isinstance(e, Interrupted)), failed[0])
        if not given.mail.host:
            self.mail = MailDirectory(directory / "mail")
            await self.mail.start()
            self.reach["mail"] = {
                f"{PREFIX}MAIL__HOST": "127.0.0.1",
                f"{PREFIX}MAIL__PORT": str(self.mail.port),
                f"{PREFIX}MAIL__SECURITY": "none",
            }

    def interrupt(self) -> None:
        """Have a start that is under way give up within a moment."""
        self._interrupted.set()
        for service in self._services:
            service.interrupt()

    async def stop(self) -> None:
        """Stop all at the same time: whoever uses them has ended before."""
        if self.mail is not None:
            await self.mail.stop()
        await asyncio.gather(*(asyncio.to_thread(service.stop) for service in self._services))

    async def _start(self, service: Service) -> None:
        self._services.append(service)
        if self._interrupted.is_set():
            service.interrupt()
        try:
            await asyncio.to_thread(service.start)
        except BaseException:
            self.interrupt()  # without one of them, the others are of no use
            raise
        self._say(f"  {service.name:<11} started in {service.started_s or 0:.1f} s")

    async def _kafka(self, kafka: Kafka | MockKafka) -> None:
        await self._start(kafka)
        self.reach["kafka"] = {f"{PREFIX}KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap_servers}
        if isinstance(kafka, MockKafka):
            self.reach["kafka"][f"{PREFIX}KAFKA__PARTITIONS"] = str(kafka.partitions)

    async def _postgres(self, postgres: Postgres) -> None:
        await self._start(postgres)
        await _create_database(postgres.dsn(), DATABASE)
        self.reach["postgres"] = {
            f"{PREFIX}POSTGRES__HOST": "127.0.0.1",
            f"{PREFIX}POSTGRES__PORT": str(postgres.port),
            f"{PREFIX}POSTGRES__DATABASE": DATABASE,
            f"{PREFIX}POSTGRES__USER": USER,
            f"{PREFIX}POSTGRES__PASSWORD_FILE": str(postgres.password_file),
        }

    async def _clickhouse(self, clickhouse: ClickHouse) -> None:
        await self._start(clickhouse)
        self.reach["clickhouse"] = {f"{PREFIX}CLICKHOUSE__URL_FILE": str(clickhouse.url_file)}

    async def _mosquitto(self, mosquitto: Mosquitto) -> None:
        await self._start(mosquitto)
        self.reach["mqtt"][f"{PREFIX}MQTT__URL"] = mosquitto.url


async def _create_database(dsn: str, name: str) -> None:
    connection = await asyncpg.connect(dsn, timeout=10)
    try:
        if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", name):
            await connection.execute(f'CREATE DATABASE "{name}"')
    finally:
        await connection.close()
