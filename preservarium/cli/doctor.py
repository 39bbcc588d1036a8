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
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import click

from preservarium import urls
from preservarium.cli import system
from preservarium.cli.output import console, print_json
from preservarium.embedded.running import find, named
from preservarium.errors import PreservariumError, reason
from preservarium.settings import PREFIX, Settings, SettingsError, secrets
from preservarium.stores import connections

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
    try:
        existing = next(p for p in (directory, *directory.parents) if p.exists())
    except OSError as e:
        return Finding("disk", State.RED, f"{str(data_dir)[:100]!r}: {e.strerror}", f"Set {PREFIX}DATA_DIR.")
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


def check_system(settings: Settings) -> Finding:
    """Whose servers are looked at."""
    where = system.shown(Path(settings.data_dir).absolute())
    found = find(Path(settings.data_dir).absolute())
    if found is not None and found.state != "running":
        return Finding(
            "system", State.YELLOW, f"`preservarium up` is {found.state} in {where}", "Try again in a moment."
        )
    if found is not None and system.running(settings) is not None:
        return Finding("system", State.GREEN, f"`preservarium up` runs in {where}: {found.web}")
    if found is not None:
        return Finding("system", State.GREEN, f"the settings' own servers; another one runs in {where}: {found.web}")
    given = sorted(named(settings))
    whose = f"given for {', '.join(given)}" if given else "given for none, so the defaults are looked at"
    return Finding("system", State.GREEN, f"no `preservarium up` runs in {where}; addresses are {whose}")


async def check_kafka(settings: Settings) -> list[Finding]:
    """Brokers, and whether our topics are there."""
    from aiokafka.admin import AIOKafkaAdminClient

    from preservarium.streaming import kafka_clients

    servers = settings.kafka.bootstrap_servers
    # Its log repeats each refused connection; the finding says it once.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    admin = AIOKafkaAdminClient(**kafka_clients.connection(settings.kafka), request_timeout_ms=int(PROBE_S * 1000))
    try:
        await asyncio.wait_for(admin.start(), PROBE_S)
        brokers = (await asyncio.wait_for(admin.describe_cluster(), PROBE_S))["brokers"]
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
    return [*found, await _topics(settings)]


async def _topics(settings: Settings) -> Finding:
    """Whether our topics are there, with what they need."""
    from preservarium.streaming import topics_admin

    try:
        async with asyncio.timeout(2 * PROBE_S):
            compared = await topics_admin.compare(settings)
    except (PreservariumError, TimeoutError) as e:
        return Finding("topics", State.YELLOW, f"not told: {_cause(e)}")
    total, absent = len(compared.topics), len(compared.missing)
    if absent:
        return Finding("topics", State.YELLOW, f"{absent} of {total} are missing", "Run: preservarium migrate")
    if needs := compared.needs():
        text = "; ".join(
            f"{name} needs {', '.join(f'{k}={v}' for k, v in each.items())}" for name, each in needs.items()
        )
        advice = "`preservarium migrate` sets it, where its user may (AlterConfigs); else Kafka's own tools do."
        return Finding("topics", State.YELLOW, text, advice)
    return Finding("topics", State.GREEN, f"all {total} are there")


async def check_postgres(settings: Settings) -> list[Finding]:
    """PostgreSQL, TimescaleDB and its background jobs, the clocks."""
    import asyncpg

    url = urls.read(settings.postgres.dsn, "postgresql", "postgres", wants_host=False, many=True)
    hosts = urls.places(url.netloc.rpartition("@")[2], wants_host=False)
    place = ",".join(f"{host or settings.postgres.host}:{port or 5432}" for host, port in hosts) + url.path
    try:
        connections.forget()
        link = await connections.look(settings.postgres.dsn, timeout=PROBE_S)
        # One transaction, without statements that outlive it: that works through every pooler.
        connection = await asyncpg.connect(
            settings.postgres.dsn, timeout=PROBE_S, command_timeout=PROBE_S, statement_cache_size=0
        )
        await connection.execute("BEGIN")
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
        found.append(await _link(settings, link))
        row = await connection.fetchrow(
            "SELECT default_version, installed_version FROM pg_available_extensions WHERE name = 'timescaledb'"
        )
        if row is None:
            advice = "Tables are partitioned by PostgreSQL itself; compression and roll-ups need TimescaleDB."
            found.append(Finding("timescaledb", State.YELLOW, "not installed on the server", advice))
        elif await _is_laid_out_without(connection):
            advice = "Tables are partitioned by PostgreSQL itself; that was decided at the first migration, and stays."
            found.append(Finding("timescaledb", State.YELLOW, "not used by this database", advice))
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


async def _link(settings: Settings, link: connections.Link) -> Finding:
    """Whether a pooler stands before the server, and what that means."""
    reached = f"reached {link}"
    if link is not connections.Link.TRANSACTION:
        return Finding("pooler", State.GREEN, reached)
    needs = "migrate, registry, relay of its changes, extract, overdue jobs and reports need a session of their own"
    if not settings.postgres.direct_url.get_secret_value():
        advice = f"Rows are stored; {needs}: set {PREFIX}POSTGRES__DIRECT_URL to the server itself."
        return Finding("pooler", State.YELLOW, reached, advice)
    try:
        direct = await connections.look(settings.postgres.session_dsn, timeout=PROBE_S)
    except Exception as e:
        advice = f"{PREFIX}POSTGRES__DIRECT_URL does not answer ({_cause(e)}): {needs}."
        return Finding("pooler", State.RED, reached, advice)
    if direct is connections.Link.TRANSACTION:
        advice = f"{PREFIX}POSTGRES__DIRECT_URL leads to a pooler in transaction mode, too: {needs}."
        return Finding("pooler", State.RED, reached, advice)
    return Finding("pooler", State.GREEN, f"{reached}; sessions {direct}")


async def _is_laid_out_without(connection: Any) -> bool:
    """Whether the tables are there, and not TimescaleDB's."""
    if not await connection.fetchval("SELECT to_regclass('schema_facts') IS NOT NULL"):
        return False
    layout = await connection.fetchval("SELECT value FROM schema_facts WHERE name = 'layout'")
    return bool(layout == "plain")


#: Beside TimescaleDB's workers and those of parallel queries a server has its launcher, a scheduler a database, and replication's.
OTHER_WORKERS: Final = 3


async def _timescale_jobs(connection: Any, version: str) -> Finding:
    """Whether TimescaleDB does what it should in the background, and why not."""
    failed, said = await connection.fetchrow(
        "SELECT count(*) FILTER (WHERE s.last_run_status = 'Failed'),"
        "       (SELECT array_agg(DISTINCT coalesce(e.err_message, '')) FROM timescaledb_information.job_errors e"
        "        WHERE e.finish_time > now() - INTERVAL '1 day')"
        " FROM timescaledb_information.job_stats s"
    )
    server, slots, ours, parallel = await connection.fetchrow(
        "SELECT current_setting('server_version'), current_setting('max_worker_processes')::int,"
        " current_setting('timescaledb.max_background_workers')::int, current_setting('max_parallel_workers')::int"
    )
    return jobs_finding(version, server, failed, tuple(said or ()), slots=slots, workers=ours, parallel=parallel)


def jobs_finding(
    version: str, server: str, failed: int, errors: Sequence[str], *, slots: int, workers: int, parallel: int
) -> Finding:
    """What is wrong with TimescaleDB's background jobs, and the cure.

    Args:
        version: of TimescaleDB.
        server: of PostgreSQL.
        failed: jobs whose last run failed.
        errors: what the runs of the last day said.
        slots: max_worker_processes.
        workers: timescaledb.max_background_workers.
        parallel: max_parallel_workers.
    """
    told = f"{version}, {failed} background jobs failed last" if failed else version
    meanwhile = "A worker's upkeep runs them when they are overdue, one at a time."
    if failed and any("cannot drop portal" in error for error in errors):
        # Seen with TimescaleDB 2.28.3 on PostgreSQL 15.20, and not on 15.18: the work is done, and the job yet fails.
        advice = (
            f"PostgreSQL {server.split()[0]} ends every background job of this TimescaleDB with an error:"
            f" another minor version of PostgreSQL, or a newer TimescaleDB. {meanwhile}"
        )
        return Finding("timescaledb", State.YELLOW, told, advice)
    wanted = workers + parallel + OTHER_WORKERS
    if slots < wanted:
        advice = (
            f"max_worker_processes is {slots}: with timescaledb.max_background_workers {workers} and max_parallel_workers"
            f" {parallel}, jobs find no process and wait for hours. Set it to {wanted} or more, and restart PostgreSQL. {meanwhile}"
        )
        return Finding("timescaledb", State.YELLOW, told, advice)
    if failed:
        first = next((error for error in errors if error), "")
        advice = f"See timescaledb_information.job_errors{f' ({first[:120]})' if first else ''}. {meanwhile}"
        return Finding("timescaledb", State.YELLOW, told, advice)
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

    try:
        url = urls.read(settings.mqtt.url.get_secret_value(), "mqtt", "mqtts")
    except ValueError as e:
        return [Finding("mqtt", State.RED, f"{PREFIX}MQTT__URL {e}", f"Set {PREFIX}MQTT__URL.")]
    host, port = url.hostname, url.port or (8883 if url.scheme == "mqtts" else 1883)
    place = f"{host}:{port}"
    try:
        secure = tls_context(settings.mqtt) if url.scheme == "mqtts" else None
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port, ssl=secure), PROBE_S)
    except Exception as e:
        return [Finding("mqtt", State.RED, f"{place} does not answer ({_cause(e)})", f"Set {PREFIX}MQTT__URL.")]
    writer.close()
    await writer.wait_closed()
    return [Finding("mqtt", State.GREEN, f"{place} accepts connections")]


def _cause(e: BaseException) -> str:
    """A short reason, on one line."""
    return reason(e).split(" (for url ")[0][:160]


async def examine(settings: Settings, *, up: bool) -> list[Finding]:
    """Every check, the remote ones at once. What one stumbles over is a finding, and the others are made all the same."""
    here: dict[str, Callable[[], Finding]] = {
        "python": check_python,
        "packages": check_versions,
        "clock": check_clock,
        "disk": lambda: check_disk(settings.data_dir),
        "open files": check_files,
    }
    if up:
        here |= {"memory": check_memory, "java": check_java, "engines": check_engines}
    else:
        here["system"] = lambda: check_system(settings)
    found: list[Finding] = []
    for name, check in here.items():
        try:
            found.append(check())
        except Exception as e:
            found.append(_stumbled(name, e))
    remote: dict[str, Callable[[Settings], Awaitable[list[Finding]]]] = {
        "kafka": check_kafka,
        "postgres": check_postgres,
        "clickhouse": check_clickhouse,
        "mqtt": check_mqtt,
    }

    async def ask(name: str, check: Callable[[Settings], Awaitable[list[Finding]]]) -> list[Finding]:
        try:
            return await check(settings)
        except Exception as e:
            return [_stumbled(name, e)]

    if not up:
        for findings in await asyncio.gather(*(ask(name, check) for name, check in remote.items())):
            found += findings
    return [_without_secrets(finding, secrets(settings)) for finding in found]


def _stumbled(name: str, e: Exception) -> Finding:
    """A check that could not be made: whatever it is, the doctor says it in a line."""
    if isinstance(e, SettingsError):
        return Finding(name, State.RED, str(e), "Set it right: docs/OPERATING.md.")
    advice = f"See the settings of {name}; where they are right, this is a fault of the doctor's own."
    return Finding(name, State.RED, f"cannot be checked: {_cause(e)}", advice)


def _without_secrets(finding: Finding, known: Iterable[str]) -> Finding:
    """Drivers put into their errors what they were given; nothing else that is said here is a driver's."""
    found = finding.found
    for secret in known if finding.state == State.RED else ():
        found = found.replace(secret, "…")
    return replace(finding, found=found)


MARKS: Final = {State.GREEN: "[green]●[/]", State.YELLOW: "[yellow]▲[/]", State.RED: "[red]■[/]"}


@click.command()
@click.option("--up", is_flag=True, help="Check what `preservarium up` needs, instead of the configured servers.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(up: bool, as_json: bool) -> None:
    """Check versions, servers, disk and clock; say what to do. Exit code 1 where something is red."""
    try:
        settings = system.load_alone() if up else system.load()
    except system.SystemNotReady:
        settings = system.load_alone()  # what it finds says so
    findings = asyncio.run(examine(settings, up=up))
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
