"""Fixtures of every test: real services, each started at most once in a session, and only when a test asks for it.

| fixture | scope | gives |
|---|---|---|
| `kafka` | session | bootstrap servers of a real Apache Kafka |
| `kafka_service` | session | its object: `stop()`, `kill()`, `start()`; leave it running |
| `own_kafka` | test | a broker that the test may harm |
| `topic_prefix` | test | a prefix that no other test has: topics and groups of the shared broker do not meet |
| `postgres` | session | DSN of the maintenance database of a real PostgreSQL |
| `postgres_service` | session | its object |
| `pg_dsn` | test | DSN of a fresh, empty database |
| `pg_dsn_module` | module | the same, shared by the tests of a module |
| `dsn` | test | DSN of a fresh database with the whole schema |
| `clickhouse` | session | URL (with user and password) of ClickHouse's engine behind its HTTP interface |
| `clickhouse_service` | session | its object |
| `clickhouse_database` | test | name of a fresh, empty database |
| `mosquitto` | session | mqtt:// URL of a real Mosquitto |
| `mosquitto_service` | session | its object |
| `mongodb_service` | session | a server that speaks MongoDB's protocol with change streams; not MongoDB's own (tests/mongodb_support.py) |
| `told` | test | says a line in the summary at the end |
| `smtp` | test | a real SMTP server: `.host`, `.port`, `.messages`, `.refuse` |

A server given in the environment is used instead of the embedded one: TEST_KAFKA_BOOTSTRAP_SERVERS, TEST_POSTGRES_URL,
TEST_CLICKHOUSE_URL. What is not to be had on the machine skips with "missing: …", and the summary names it.
"""

import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.parser import BytesParser
from email.policy import default as email_policy
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import hypothesis
import pytest
import structlog
from thread_support import in_thread

from preservarium.embedded.service import Service, ServiceUnavailable, free_port
from preservarium.settings import LEGACY_NAMES, PREFIX

if TYPE_CHECKING:
    from mongodb_support import MongoStandIn

    from preservarium.embedded.clickhouse import ClickHouse
    from preservarium.embedded.kafka import Kafka
    from preservarium.embedded.mosquitto import Mosquitto
    from preservarium.embedded.postgres import Postgres

# A busy machine must not decide a property: neither how long an example takes nor how long it takes to make one.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

# A developer's own settings must not decide a test: neither the environment nor a .env in the checkout.
for _name in [*os.environ]:
    if _name.startswith(PREFIX) or _name in LEGACY_NAMES:
        del os.environ[_name]
os.environ[f"{PREFIX}ENV_FILE"] = os.devnull
# Nor must the `preservarium up` that may run in the checkout: commands look for one in the data directory.
os.environ[f"{PREFIX}DATA_DIR"] = str(Path(tempfile.gettempdir()) / "preservarium-tests-of-no-system")

# structlog's own default draws tracebacks with local variables: a second each.
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ]
)

MISSING = "missing: "


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


#: Tests that use a fixture are selectable by the service behind it.
_MARKS = {
    "kafka_service": "kafka",
    "kafka": "kafka",
    "own_kafka": "kafka",
    "postgres": "postgres",
    "clickhouse": "clickhouse",
    "mosquitto_service": "mosquitto",
}


#: What needs no server comes first, so that a mistake shows early; then what takes longest, so that the processes that share the
#: files end together.
_FIRST = ("unit", "agents", "cases", "migrations", "contract", "adversity", "browser")


def _turn(item: pytest.Item) -> int:
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    return _FIRST.index(folder) if folder in _FIRST else len(_FIRST)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=_turn)
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in _MARKS:
                item.add_marker(_MARKS[fixture])
    if not config.getoption("--slow"):
        slow = [i for i in items if i.get_closest_marker("slow")]
        if slow:
            config.hook.pytest_deselected(items=slow)
            items[:] = [i for i in items if i not in slow]


@pytest.fixture
def told(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Tells a line at the end of the run, whichever process the test ran in."""
    return lambda line: record_property(TOLD, line)


TOLD = "told"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            if said := [line for name, line in getattr(report, "user_properties", ()) if name == TOLD]:
                terminalreporter.section(report.nodeid, sep="-")
                for line in said:
                    terminalreporter.line(line)
    lines: dict[str, list[str]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if reason.startswith(MISSING):
            lines.setdefault(reason.removeprefix(MISSING), []).append(report.nodeid)
    if lines:
        terminalreporter.section("NOT RUN: something is missing on this machine", sep="=", yellow=True, bold=True)
        for reason, tests in lines.items():
            terminalreporter.line(f"{reason}: {len(tests)} tests", yellow=True)
            for test in tests:
                terminalreporter.line(f"    {test}")


def missing(what: str) -> None:
    """Skip because the machine lacks something; the summary names it."""
    pytest.skip(f"{MISSING}{what}")


@pytest.fixture(scope="session")
def services_directory() -> Iterator[Path]:
    """Where this session's services keep their data; removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="preservarium-test-"))
    yield path
    # A killed database's last process may still be writing its own end.
    shutil.rmtree(path, ignore_errors=True)


def running(service: Service) -> Iterator[Any]:
    try:
        service.start()
    except ServiceUnavailable as e:
        missing(str(e))
    yield service
    service.stop()


# --- Kafka


@pytest.fixture(scope="session")
def kafka_service(services_directory: Path) -> Iterator["Kafka"]:
    """The embedded Apache Kafka itself."""
    from preservarium.embedded.kafka import Kafka

    # A broker that lives for minutes starts half a second sooner without the optimising compiler.
    yield from running(Kafka(services_directory / "kafka", java_options=("-XX:TieredStopAtLevel=1",)))


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest) -> str:
    """Bootstrap servers of a real Apache Kafka."""
    given = os.environ.get("TEST_KAFKA_BOOTSTRAP_SERVERS")
    return given or request.getfixturevalue("kafka_service").bootstrap_servers


@pytest.fixture
def own_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Kafka"]:
    """A broker of this test's own, for tests that harm it."""
    from preservarium.embedded.kafka import Kafka

    yield from running(Kafka(tmp_path_factory.mktemp("kafka")))


@pytest.fixture
def topic_prefix() -> str:
    """A prefix for the topics and groups of one test."""
    return f"t{uuid.uuid4().hex[:10]}."


# --- PostgreSQL


@pytest.fixture(scope="session")
def postgres_service(services_directory: Path) -> Iterator["Postgres"]:
    """The embedded PostgreSQL itself."""
    from preservarium.embedded.postgres import Postgres

    # What survives a kill -9 of the server is in the page cache: only a power cut needs fsync, and no test cuts power.
    yield from running(Postgres(services_directory / "postgres", settings={"fsync": "off"}))


@pytest.fixture(scope="session")
def postgres(request: pytest.FixtureRequest) -> str:
    """DSN of the maintenance database of a real PostgreSQL."""
    given = os.environ.get("TEST_POSTGRES_URL")
    return given or request.getfixturevalue("postgres_service").dsn()


def _fresh_database(maintenance_dsn: str) -> Iterator[str]:
    import asyncpg

    name = f"test_{uuid.uuid4().hex[:12]}"

    async def execute(statement: str) -> None:
        connection = await asyncpg.connect(maintenance_dsn, timeout=10)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    in_thread(execute(f'CREATE DATABASE "{name}"'))
    yield urlunsplit(urlsplit(maintenance_dsn)._replace(path=f"/{name}"))
    in_thread(execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))


@pytest.fixture
def dsn(postgres: str) -> Iterator[str]:
    """DSN of a database of this test's own with the whole schema."""
    from sink_support import migrated_database

    with migrated_database(postgres) as made:
        yield made


@pytest.fixture
def pg_dsn(postgres: str) -> Iterator[str]:
    """DSN of an empty database of this test's own."""
    yield from _fresh_database(postgres)


@pytest.fixture(scope="module")
def pg_dsn_module(postgres: str) -> Iterator[str]:
    """DSN of an empty database of this module's own."""
    yield from _fresh_database(postgres)


# --- ClickHouse


@pytest.fixture(scope="session")
def clickhouse_service(services_directory: Path) -> Iterator["ClickHouse"]:
    """The process that owns the chDB engine."""
    from preservarium.embedded.clickhouse import ClickHouse

    yield from running(ClickHouse(services_directory / "clickhouse"))


@pytest.fixture(scope="session")
def clickhouse(request: pytest.FixtureRequest) -> str:
    """URL of ClickHouse's HTTP interface, user and password in it."""
    given = os.environ.get("TEST_CLICKHOUSE_URL")
    return given or request.getfixturevalue("clickhouse_service").url


@pytest.fixture
def clickhouse_database(clickhouse: str) -> Iterator[str]:
    """Name of an empty database of this test's own."""
    import clickhouse_connect

    name = f"test_{uuid.uuid4().hex[:12]}"
    u = urlsplit(clickhouse)
    client = clickhouse_connect.get_client(
        host=u.hostname, port=u.port, username=u.username or "default", password=u.password or "", dedicated_pool=True
    )
    client.command(f"CREATE DATABASE `{name}`")
    yield name
    client.command(f"DROP DATABASE IF EXISTS `{name}` SYNC")
    client.close()


# --- Mosquitto


@pytest.fixture(scope="session")
def mosquitto_service(services_directory: Path) -> Iterator["Mosquitto"]:
    """The Mosquitto broker itself."""
    from preservarium.embedded.mosquitto import Mosquitto

    yield from running(Mosquitto(services_directory / "mosquitto"))


@pytest.fixture
def mosquitto(mosquitto_service: "Mosquitto") -> str:
    """mqtt:// URL of a real Mosquitto. Sessions and retained messages are shared: use client ids of your own."""
    return mosquitto_service.url


# --- MongoDB


@pytest.fixture(scope="session")
def mongodb_service(services_directory: Path) -> Iterator["MongoStandIn"]:
    """mongo-java-server, a stand-in for MongoDB; leave it running."""
    from mongodb_support import MongoStandIn

    yield from running(MongoStandIn(services_directory / "mongodb"))


# --- SMTP


@dataclass
class Smtp:
    """A real SMTP server in a thread, recording what it takes."""

    host: str
    port: int
    messages: list[EmailMessage] = field(default_factory=list)
    envelopes: list[tuple[str, list[str]]] = field(default_factory=list)  #: (sender, recipients), beside `messages`
    #: What DATA is answered with instead of 250, e.g. "451 try later" (temporary) or "550 no" (for good); "": accept.
    refuse: str = ""
    refused: int = 0
    arrived: threading.Event = field(default_factory=threading.Event)
    stop: Callable[[], None] = lambda: None
    start: Callable[[], None] = lambda: None

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:
        if self.refuse:
            self.refused += 1
            return self.refuse
        self.messages.append(BytesParser(policy=email_policy).parsebytes(envelope.content))  # type: ignore[arg-type]
        self.envelopes.append((envelope.mail_from, list(envelope.rcpt_tos)))
        self.arrived.set()
        return "250 OK"


@pytest.fixture
def smtp() -> Iterator[Smtp]:
    """A real SMTP server; `.stop()` and `.start()` take it down and up on the same port."""
    from aiosmtpd.controller import Controller

    server = Smtp("127.0.0.1", free_port())
    running: list[Controller] = []

    def start() -> None:
        controller = Controller(server, hostname=server.host, port=server.port, data_size_limit=10_000_000)
        controller.start()
        running.append(controller)

    def stop() -> None:
        while running:
            running.pop().stop()

    server.start, server.stop = start, stop
    start()
    yield server
    stop()
