"""`preservarium doctor`: is everything there that a worker (or `preservarium up`) needs, and what to do where not."""

import asyncio
import importlib.metadata
import logging
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import click

from preservarium.cli.output import console, print_json
from preservarium.settings import PREFIX, Settings, load

PYTHON_MIN: Final = (3, 11)
#: Kafka and PostgreSQL stop on a full disk; half of what one hour of a busy site writes is the last warning.
DISK_RED_BYTES: Final = 1 << 30
DISK_YELLOW_BYTES: Final = 10 << 30
#: `preservarium up` runs a broker (0.4 GB), PostgreSQL (0.2), ClickHouse's engine (0.4 to 0.8), a worker (0.5) and more.
MEMORY_UP_BYTES: Final = 2 << 30
#: RocksDB keeps up to 512 files of each partition's table open.
FILES_YELLOW: Final = 4096
#: Timestamps of the worker and of the database are compared with each other in rules and roll-ups.
SKEW_YELLOW_S: Final = 1.0
SKEW_RED_S: Final = 30.0
#: A machine whose clock was never set starts at the epoch, or at its firmware's date.
CLOCK_MIN_S: Final = 1_735_689_600  # 2025-01-01 UTC
#: A server that does not answer within this time is down for our purpose.
PROBE_S: Final = 5.0


class State(StrEnum):
    """How a check came out."""

    GREEN = "green"  #: as it should be
    YELLOW = "yellow"  #: it works, with something missing or close to a limit
    RED = "red"  #: a worker cannot do its work


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    name: str
    state: State
    found: str  #: the fact
    advice: str = ""  #: what to do; empty where it is green


def check_python() -> Finding:
    """The interpreter."""
    found = f"{platform.python_implementation()} {platform.python_version()}, {platform.system()} {platform.machine()}"
    if sys.version_info < PYTHON_MIN:
        return Finding("python", State.RED, found, f"Python {'.'.join(map(str, PYTHON_MIN))} or newer is needed.")
    return Finding("python", State.GREEN, found)


def check_versions() -> Finding:
    """Preservarium and the libraries whose private parts it leans on."""
    names = ("preservarium", "faust-streaming", "aiokafka", "rocksdict", "asyncpg", "clickhouse-connect")
    found, missing = [], []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding("packages", State.RED, ", ".join(found), f"Not installed: {', '.join(missing)}. Run: make venv")
    return Finding("packages", State.GREEN, ", ".join(found))


def check_files() -> Finding:
    """How many files the process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    if soft != resource.RLIM_INFINITY and soft < FILES_YELLOW:
        return Finding(
            "open files", State.YELLOW, text, f"Raise it to {FILES_YELLOW} or more: ulimit -n {FILES_YELLOW}"
        )
    return Finding("open files", State.GREEN, text)


def check_disk(data_dir: str | Path) -> Finding:
    """Free space where RocksDB (and, under `up`, everything else) writes."""
    directory = Path(data_dir).absolute()
    existing = next(p for p in (directory, *directory.parents) if p.exists())
    usage = shutil.disk_usage(existing)
    found = f"{usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.1f} GiB at {existing}"
    if not os.access(existing, os.W_OK):
        return Finding("disk", State.RED, found, f"{existing} is not writable; set {PREFIX}DATA_DIR.")
    if usage.free < DISK_RED_BYTES:
        return Finding("disk", State.RED, found, f"Free some, or set {PREFIX}DATA_DIR to a larger disk.")
    if usage.free < DISK_YELLOW_BYTES:
        return Finding("disk", State.YELLOW, found, f"Below {DISK_YELLOW_BYTES >> 30} GiB a busy day may fill it.")
    return Finding("disk", State.GREEN, found)


def check_clock(now_s: float | None = None) -> Finding:
    """Whether the clock was ever set; how well it agrees is seen against the database's."""
    now_s = time.time() if now_s is None else now_s
    found = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now_s))
    if now_s < CLOCK_MIN_S:
        return Finding("clock", State.RED, found, "The clock is not set: readings would be stamped in the past.")
    return Finding("clock", State.GREEN, found)


def check_skew(worker_s: float, database_s: float) -> Finding:
    """How far the database's clock is from ours, in seconds."""
    skew_s = database_s - worker_s
    found = f"the database's clock is {abs(skew_s):.2f} s {'ahead' if skew_s > 0 else 'behind'}"
    advice = "Run an NTP client on both machines."
    if abs(skew_s) > SKEW_RED_S:
        return Finding("clock skew", State.RED, found, advice)
    if abs(skew_s) > SKEW_YELLOW_S:
        return Finding("clock skew", State.YELLOW, found, advice)
    return Finding("clock skew", State.GREEN, found)


def check_java() -> Finding:
    """What the embedded Kafka needs."""
    from preservarium.embedded.kafka import find_java, java_version, pinned_version, resolve_jars
    from preservarium.embedded.service import ServiceError

    otherwise = "`preservarium up` then runs an in-memory broker, and nothing in Kafka survives its stop."
    try:
        java = find_java()
    except ServiceError as e:
        return Finding("java", State.YELLOW, "none that Kafka runs on", f"{e}. {otherwise}")
    found = f"Java {java_version(java)}, "
    if home := os.environ.get("KAFKA_HOME"):
        try:
            resolve_jars()
        except ServiceError as e:
            return Finding("java", State.RED, found + f"KAFKA_HOME={home}", str(e))
        return Finding("java", State.GREEN, found + f"Kafka in {home}")
    from preservarium.embedded.kafka import cache_directory

    if (cache_directory(pinned_version()) / "complete").exists():
        return Finding("java", State.GREEN, found + f"Kafka {pinned_version()} fetched")
    if shutil.which("mvn") is None:
        advice = f"Install Maven (Debian: apt install maven), or set KAFKA_HOME. {otherwise}"
        return Finding("java", State.YELLOW, found + "no Maven to fetch Kafka with", advice)
    return Finding("java", State.GREEN, found + f"Maven; Kafka {pinned_version()} is fetched at the first start")


def check_engines() -> Finding:
    """The embedded databases."""
    from importlib.util import find_spec

    from preservarium.embedded.postgres import find_binaries

    found, missing = [], []
    if binaries := find_binaries():
        b = binaries[0]
        found.append(f"PostgreSQL {b.major} of {b.source}{' with TimescaleDB' if b.timescale else ''}")
    else:
        missing.append("PostgreSQL")
    if find_spec("chdb") is not None:
        found.append(f"chDB {importlib.metadata.version('chdb')}")
    else:
        missing.append("chDB")
    if missing:
        advice = f"No {' and no '.join(missing)}: pip install 'preservarium[embedded]'"
        return Finding("engines", State.RED, ", ".join(found) or "none", advice)
    return Finding("engines", State.GREEN, ", ".join(found))


def check_memory() -> Finding:
    """Whether everything that `up` starts fits."""
    import psutil

    free = psutil.virtual_memory().available
    found = f"{free / 2**30:.1f} GiB available"
    if free < MEMORY_UP_BYTES:
        advice = f"`preservarium up` takes about {MEMORY_UP_BYTES >> 30} GiB."
        return Finding("memory", State.YELLOW, found, advice)
    return Finding("memory", State.GREEN, found)


async def check_kafka(settings: Settings) -> list[Finding]:
    """Brokers, and whether our topics are there."""
    from aiokafka.admin import AIOKafkaAdminClient

    from preservarium import kafka_clients
    from preservarium.topics import TOPICS

    servers = settings.kafka.bootstrap_servers
    # Its log repeats each refused connection; the finding says it once.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    admin = AIOKafkaAdminClient(**kafka_clients.connection(settings.kafka), request_timeout_ms=int(PROBE_S * 1000))
    try:
        await asyncio.wait_for(admin.start(), PROBE_S)
        brokers = (await asyncio.wait_for(admin.describe_cluster(), PROBE_S))["brokers"]
        topics = set(await asyncio.wait_for(admin.list_topics(), PROBE_S))
    except Exception as e:
        advice = f"Start Kafka, or set {PREFIX}KAFKA__BOOTSTRAP_SERVERS; `preservarium up` brings its own."
        if settings.kafka.security_protocol != "PLAINTEXT":
            advice = f"See {PREFIX}KAFKA__SECURITY_PROTOCOL, __SSL_… and __SASL_…, and docs/OPERATING.md."
        reason = await kafka_clients.refusal(settings.kafka, PROBE_S) or f"{servers}: {_cause(e)}"
        return [Finding("kafka", State.RED, f"no connection: {reason}", advice)]
    finally:
        await admin.close()
    found = [Finding("kafka", State.GREEN, f"{len(brokers)} brokers at {servers}")]
    if danger := kafka_clients.insecurity(settings.kafka):
        found.append(
            Finding("security", State.YELLOW, settings.kafka.security_protocol, f"{danger[0].upper()}{danger[1:]}.")
        )
    if settings.kafka.replication > len(brokers):
        advice = f"{PREFIX}KAFKA__REPLICATION={settings.kafka.replication} needs as many brokers."
        found[0] = Finding("kafka", State.RED, found[0].found, advice)
    absent = [t.name for t in TOPICS if t.full(settings.kafka.topic_prefix) not in topics]
    if absent:
        found.append(
            Finding("topics", State.YELLOW, f"{len(absent)} of {len(TOPICS)} are missing", "Run: preservarium migrate")
        )
    else:
        found.append(Finding("topics", State.GREEN, f"all {len(TOPICS)} are there"))
    return found


async def check_postgres(settings: Settings) -> list[Finding]:
    """PostgreSQL, TimescaleDB and its background jobs, the clocks."""
    import asyncpg

    u = urlsplit(settings.postgres.dsn)
    place = f"{u.hostname or settings.postgres.host}:{u.port or 5432}{u.path}"
    try:
        connection = await asyncpg.connect(settings.postgres.dsn, timeout=PROBE_S, command_timeout=PROBE_S)
    except Exception as e:
        advice = f"Start PostgreSQL, or set {PREFIX}POSTGRES__HOST, __DATABASE, __USER, __PASSWORD (or __URL)."
        return [Finding("postgres", State.RED, f"{place} does not answer ({_cause(e)})", advice)]
    try:
        before = time.time()
        now_s = float(await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())"))
        ours_s = (before + time.time()) / 2
        version = await connection.fetchval("SHOW server_version")
        tls = await connection.fetchval("SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid() AND ssl")
        found = [Finding("postgres", State.GREEN, f"PostgreSQL {version} at {place}, {tls or 'not encrypted'}")]
        row = await connection.fetchrow(
            "SELECT default_version, installed_version FROM pg_available_extensions WHERE name = 'timescaledb'"
        )
        if row is None:
            advice = "Tables are partitioned by PostgreSQL itself; compression and roll-ups need TimescaleDB."
            found.append(Finding("timescaledb", State.YELLOW, "not installed on the server", advice))
        elif row["installed_version"] is None:
            found.append(
                Finding("timescaledb", State.YELLOW, f"{row['default_version']} available", "Run: preservarium migrate")
            )
        else:
            found.append(await _timescale_jobs(connection, row["installed_version"]))
        found.append(check_skew(ours_s, now_s))
        return found
    finally:
        await connection.close()


async def _timescale_jobs(connection: Any, version: str) -> Finding:
    failed = await connection.fetchval(
        "SELECT count(*) FROM timescaledb_information.job_stats WHERE last_run_status = 'Failed'"
    )
    if failed:
        # Seen with TimescaleDB 2.28.3 on PostgreSQL 15.20: every background job fails and backs off.
        advice = "See timescaledb_information.job_errors: compression and retention may be behind."
        return Finding("timescaledb", State.YELLOW, f"{version}, {failed} background jobs failed last", advice)
    return Finding("timescaledb", State.GREEN, version)


async def check_clickhouse(settings: Settings) -> list[Finding]:
    """ClickHouse over HTTP."""
    if not settings.clickhouse.enabled:
        return [Finding("clickhouse", State.GREEN, "switched off")]
    import clickhouse_connect

    host, port, user, password, secure = settings.clickhouse.parts
    logging.getLogger("clickhouse_connect").setLevel(logging.CRITICAL)
    try:
        client = await asyncio.wait_for(
            clickhouse_connect.get_async_client(
                host=host,
                port=port,
                username=user,
                password=password,
                secure=secure,
                connect_timeout=int(PROBE_S),
                ca_cert=settings.clickhouse.ssl_ca_file or None,
            ),
            PROBE_S * 2,
        )
    except Exception as e:
        advice = f"Start ClickHouse, set {PREFIX}CLICKHOUSE__URL, or {PREFIX}CLICKHOUSE__ENABLED=false."
        return [Finding("clickhouse", State.RED, f"{host}:{port} does not answer ({_cause(e)})", advice)]
    try:
        return [Finding("clickhouse", State.GREEN, f"ClickHouse {client.server_version} at {host}:{port}")]
    finally:
        await client.close()


async def check_mqtt(settings: Settings) -> list[Finding]:
    """The MQTT broker, where the connector is on."""
    if not settings.mqtt.enabled:
        return []
    from preservarium.connectors.mqtt import tls_context

    u = urlsplit(settings.mqtt.url.get_secret_value())
    place = f"{u.hostname}:{u.port or (8883 if u.scheme == 'mqtts' else 1883)}"
    try:
        secure = tls_context(settings.mqtt) if u.scheme == "mqtts" else None
        _, writer = await asyncio.wait_for(asyncio.open_connection(*place.rsplit(":", 1), ssl=secure), PROBE_S)
    except Exception as e:
        return [Finding("mqtt", State.RED, f"{place} does not answer ({_cause(e)})", f"Set {PREFIX}MQTT__URL.")]
    writer.close()
    await writer.wait_closed()
    return [Finding("mqtt", State.GREEN, f"{place} accepts connections")]


def _cause(e: BaseException) -> str:
    """A short reason, on one line, without a URL that may hold a password."""
    if isinstance(e, TimeoutError):
        return "no answer in time"
    text = " ".join(str(e).split()).split(" (for url ")[0]
    return text[:160] or type(e).__name__


async def examine(settings: Settings, *, up: bool) -> list[Finding]:
    """Every check, the remote ones at once."""
    found = [
        check_python(),
        check_versions(),
        check_clock(),
        check_disk(settings.data_dir),
        check_files(),
    ]
    if up:
        return [*found, check_memory(), check_java(), check_engines()]
    checks: list[Callable[[Settings], Awaitable[list[Finding]]]] = [
        check_kafka,
        check_postgres,
        check_clickhouse,
        check_mqtt,
    ]
    for findings in await asyncio.gather(*(check(settings) for check in checks)):
        found += findings
    return found


MARKS: Final = {State.GREEN: "[green]●[/]", State.YELLOW: "[yellow]▲[/]", State.RED: "[red]■[/]"}


@click.command()
@click.option("--up", is_flag=True, help="Check what `preservarium up` needs, instead of the configured servers.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(up: bool, as_json: bool) -> None:
    """Check versions, servers, disk and clock; say what to do. Exit code 1 where something is red."""
    findings = asyncio.run(examine(load(), up=up))
    worst = max(findings, key=lambda f: list(State).index(f.state)).state
    if as_json:
        print_json({"state": worst, "findings": [asdict(f) for f in findings]})
    else:
        from rich.markup import escape

        screen = console()
        for f in findings:
            screen.print(f"{MARKS[f.state]} {f.name:<12} {f.state:<7} {escape(f.found)}", soft_wrap=True)
            if f.advice:
                screen.print(f"{'':>22} → {escape(f.advice)}", soft_wrap=True)
    if worst == State.RED:
        raise SystemExit(1)


commands: list[click.Command] = [doctor]
