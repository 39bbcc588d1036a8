"""Everything that can be set, in one frozen object that is checked at start.

Names are `PRESERVARIUM_<SECTION>__<FIELD>` in the environment or in `.env`; a secret may stand in a file named by the
same variable with `_FILE` behind it. `preservarium config` prints `.env.example` from this module.
Fields marked `reload` change on SIGHUP without a restart.

It is one file, although a long one: most of it is a list, and whoever looks for a setting searches in one place.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote, unquote, urlencode

from dotenv import dotenv_values
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from preservarium import urls
from preservarium.errors import reason

PREFIX = "PRESERVARIUM_"

RELOAD: dict[str, Any] = {"reload": True}

#: Shortest secret of signed links: 16 random characters are beyond guessing.
LINK_SECRET_CHARS_MIN = 16


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


#: Settings that only an encrypted connection, or only one that logs in to Kafka, has a use for.
TLS_FIELDS = ("ssl_ca_file", "ssl_cert_file", "ssl_key_file", "ssl_key_password")
SASL_FIELDS = ("sasl_username", "sasl_password")


def _given(value: str | SecretStr) -> bool:
    return bool(value.get_secret_value() if isinstance(value, SecretStr) else value)


def _checked(url: SecretStr, *schemes: str, alone: str = "", several: bool = False) -> SecretStr:
    """A URL that reads as it is meant, or is empty.

    Raises:
        ValueError: one sentence that says what to do, and nothing of the URL.
    """
    if given := url.get_secret_value():
        try:
            urls.read(given, *schemes, wants_host=not several, many=several)
        except ValueError as e:
            message = f"{e}{f', or the password stands alone in {alone}' if alone else ''}"
            raise ValueError(message) from None
    return url


class Kafka(_Section):
    """Apache Kafka."""

    bootstrap_servers: str = Field("localhost:9092", description="Brokers, host:port, separated by commas.")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT",
        description="Of every client: SSL is encrypted, SASL logs in; Kafka's word, as its listener has it.",
    )
    ssl_ca_file: str = Field(
        "", description="PEM of the authority that the brokers' certificates are of; empty: the system's."
    )
    ssl_cert_file: str = Field("", description="PEM of our certificate, where brokers ask for one.")
    ssl_key_file: str = Field("", description="PEM of its key; empty: it stands in ssl_cert_file.")
    ssl_key_password: SecretStr = Field(SecretStr(""), description="Password of that key.")
    ssl_check_hostname: bool = Field(True, description="Brokers' certificates must name the host in bootstrap_servers.")
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field("PLAIN", description="How SASL logs in.")
    sasl_username: str = Field("", description="User that SASL logs in.")
    sasl_password: SecretStr = Field(
        SecretStr(""), description="Its password; better in PRESERVARIUM_KAFKA__SASL_PASSWORD_FILE."
    )
    topic_prefix: str = Field("", description="Put before every topic name, e.g. `site1.`.")
    group: str = Field("preservarium", description="Consumer group of the app; the sinks add `-sink`, `-sync`, …")
    partitions: int = Field(
        12, ge=1, le=1000, description="Partitions of every topic; tables and streams need them equal."
    )
    replication: int = Field(1, ge=1, le=9, description="Replicas of every topic; 3 in production.")
    session_timeout_s: float = Field(20.0, gt=1, description="A silent worker is replaced after this time.")
    static_membership: bool = Field(
        False,
        description="A worker that is started again takes its partitions back at once, also after a kill, and no other worker has them "
        "meanwhile; one that is stopped for good is replaced only after session_timeout_s. Its name in the group is kept in its "
        "directory under data_dir, which must not be copied to another worker.",
    )
    commit_interval_s: float = Field(1.0, gt=0, description="Acknowledged offsets are committed this often.")
    linger_ms: int = Field(
        20,
        ge=0,
        le=1000,
        description="Single sends (Faust's own) wait this long for company; stages send whole batches and wait for none.",
    )
    fetch_bytes_max: int = Field(262_144, ge=65_536, description="Most bytes of one partition in one fetch.")
    record_bytes_max: int = Field(1_000_000, ge=10_000, description="Largest record; brokers take 1 MiB by default.")
    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = Field("zstd", description="Of what we produce.")

    @field_validator("bootstrap_servers")
    @classmethod
    def _servers(cls, bootstrap_servers: str) -> str:
        urls.places(",".join(entry for entry in bootstrap_servers.split(",") if entry.strip()))
        return bootstrap_servers

    @property
    def tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.security_protocol in ("SSL", "SASL_SSL")

    @property
    def sasl(self) -> bool:
        """Whether connections log in with a user and a password."""
        return self.security_protocol in ("SASL_PLAINTEXT", "SASL_SSL")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        # A setting that would have no effect is refused: whoever gave it believes in a protection that is not there.
        given = {name for name in TLS_FIELDS + SASL_FIELDS if _given(getattr(self, name))}
        wrong = ""
        if not self.tls and (useless := [name for name in TLS_FIELDS if name in given]):
            wrong = f"{useless[0]} is given, but security_protocol {self.security_protocol} is not encrypted: SSL and SASL_SSL are"
        elif not self.sasl and (useless := [name for name in SASL_FIELDS if name in given]):
            wrong = (
                f"{useless[0]} is given, but security_protocol {self.security_protocol} does not log in: SASL_SSL does"
            )
        elif self.sasl and (missing := [name for name in SASL_FIELDS if name not in given]):
            wrong = f"{missing[0]} is missing: security_protocol {self.security_protocol} needs it"
        elif "ssl_cert_file" not in given and (useless := sorted(given & {"ssl_key_file", "ssl_key_password"})):
            wrong = f"{useless[0]} is given, but no ssl_cert_file"
        if wrong:
            raise ValueError(wrong)
        return self


class Postgres(_Section):
    """PostgreSQL or TimescaleDB: registry, measurements, alarms."""

    host: str = Field("localhost", description="Host name, or the directory of a Unix socket.")
    port: int = Field(5432, ge=1, le=65535, description="TCP port.")
    database: str = Field("timeseries", description="Database name.")
    user: str = Field("preservarium", description="Role.")
    password: SecretStr = Field(SecretStr(""), description="Password; better in PRESERVARIUM_POSTGRES__PASSWORD_FILE.")
    ssl_mode: Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"] = Field(
        "prefer",
        description="libpq's sslmode. Only verify-full keeps an attacker out: prefer takes what the server offers, whoever it is.",
    )
    ssl_ca_file: str = Field(
        "", description="PEM of the authority that the server's certificate is of; for verify-ca and verify-full."
    )
    url: SecretStr = Field(
        SecretStr(""), description="A postgresql:// URL, with ?sslmode=… where need be; wins over the fields above."
    )
    direct_url: SecretStr = Field(
        SecretStr(""),
        description="Where `url` or `host` is a pooler in transaction mode: the server itself, for what needs a session of its own (migrate, relay, extract, reports).",
    )
    pool_max: int = Field(6, ge=1, le=100, description="Connections a worker may hold.")
    command_timeout_s: float = Field(30.0, gt=0, description="A statement that takes longer is cancelled.")
    connect_timeout_s: float = Field(5.0, gt=0, description="A connection must stand within this time.")

    @property
    def dsn(self) -> str:
        """A postgresql:// URL with the password in it: for drivers, never for logs."""
        if url := self.url.get_secret_value():
            return urls.escaped(url)
        auth = quote(self.user, safe="")
        if password := self.password.get_secret_value():
            auth += ":" + quote(password, safe="")
        if self.host.startswith("/"):
            return f"postgresql://{auth}@/{quote(self.database, safe='')}?host={quote(self.host, safe='/')}&port={self.port}"
        ssl = {"sslmode": "" if self.ssl_mode == "prefer" else self.ssl_mode, "sslrootcert": self.ssl_ca_file}
        query = urlencode({name: value for name, value in ssl.items() if value}, quote_via=quote, safe="/")
        place = f"{urls.bracketed(self.host)}:{self.port}"
        return f"postgresql://{auth}@{place}/{quote(self.database, safe='')}{query and '?'}{query}"

    @property
    def session_dsn(self) -> str:
        """Where a session of one's own is to be had: `direct_url`, where it is given."""
        direct = self.direct_url.get_secret_value()
        return urls.escaped(direct) if direct else self.dsn

    @field_validator("host")
    @classmethod
    def _host(cls, host: str) -> str:
        return host if host.startswith("/") else urls.host(host)

    @field_validator("url", "direct_url")
    @classmethod
    def _read(cls, url: SecretStr) -> SecretStr:
        return _checked(url, "postgresql", "postgres", alone="PRESERVARIUM_POSTGRES__PASSWORD", several=True)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if _given(self.url) and (self.ssl_mode != "prefer" or self.ssl_ca_file):
            message = "ssl_mode and ssl_ca_file have no effect beside url: write ?sslmode=…&sslrootcert=… into it"
            raise ValueError(message)
        if self.ssl_ca_file and self.ssl_mode not in ("require", "verify-ca", "verify-full"):
            message = f"ssl_ca_file is given, but ssl_mode {self.ssl_mode} checks no certificate: verify-full does"
            raise ValueError(message)
        return self


class ClickHouse(_Section):
    """ClickHouse over HTTP: a server, a cluster, or the embedded engine."""

    enabled: bool = Field(True, description="Off where there is no ClickHouse: sync does not run.")
    url: SecretStr = Field(
        SecretStr("http://localhost:8123"),
        description="http(s)://[user[:password]@]host:port; its user and password win over the fields below.",
    )
    user: str = Field("default", description="User.")
    password: SecretStr = Field(
        SecretStr(""), description="Password; better in PRESERVARIUM_CLICKHOUSE__PASSWORD_FILE."
    )
    ssl_ca_file: str = Field("", description="PEM of an authority that is trusted besides the system's, for https.")
    database: str = Field("preservarium", description="Database; migrations make it.")
    cluster: str = Field("", description="Cluster name for ON CLUSTER and replicated engines; empty for one server.")
    timeout_s: float = Field(30.0, gt=0, description="A request that takes longer fails and is retried.")
    pool_max: int = Field(8, ge=1, le=100, description="HTTP connections a worker may hold.")

    @property
    def parts(self) -> tuple[str, int, str, str, bool]:
        """(host, port, user, password, secure)."""
        url = urls.read(self.url.get_secret_value(), "http", "https")
        user, password = urls.user_of(url)
        secure = url.scheme == "https"
        port = url.port or (8443 if secure else 8123)
        if password is None and not user:
            password = self.password.get_secret_value()
        return (url.hostname or "localhost", port, user or self.user, password or "", secure)

    @field_validator("url")
    @classmethod
    def _read(cls, url: SecretStr) -> SecretStr:
        return _checked(url, "http", "https", alone="PRESERVARIUM_CLICKHOUSE__PASSWORD")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.enabled:
            return self
        if not _given(self.url):
            message = "url is empty: http(s)://host:port, or enabled=false where there is no ClickHouse"
            raise ValueError(message)
        if self.ssl_ca_file and not self.parts[-1]:
            message = "ssl_ca_file is given, but url is not of https://"
            raise ValueError(message)
        return self


class Normalize(_Section):
    """Raw messages to readings."""

    payload_bytes_max: int = Field(
        262_144, ge=256, json_schema_extra=RELOAD, description="Largest payload that is decoded."
    )
    readings_max: int = Field(
        10_000, ge=1, json_schema_extra=RELOAD, description="Most readings one message may become."
    )
    config_cache_devices_max: int = Field(50_000, ge=100, description="Compiled device configurations kept in memory.")
    config_cache_ttl_s: float = Field(
        600.0, gt=0, description="A compiled configuration is looked up anew after this time."
    )
    unknown_cache_ttl_s: float = Field(10.0, gt=0, description="An unknown device is asked for again after this time.")
    registry_wait_s: float = Field(
        20.0,
        ge=0,
        le=600,
        json_schema_extra=RELOAD,
        description="While the registry's database cannot be asked, messages of devices that are not known here wait so long, and"
        " others of their partition with them; after that they are refused as `unknown_device`.",
    )
    decoded_topic: str = Field(
        "decoded_iot_data",
        description="Input topic of the sink service that this replaces (old message format); empty: not read.",
    )


class Sandbox(_Section):
    """Parser scripts, in processes of their own."""

    cpu_s: float = Field(
        0.1, gt=0, le=60, description="CPU that one call of a script may use; public codecs take 0.001."
    )
    wall_s: float = Field(
        0.5, gt=0, le=600, description="A sandbox process that makes no progress for so long is killed and replaced."
    )
    result_bytes_max: int = Field(1_000_000, ge=1_000, le=64_000_000, description="Characters of one call's result.")
    hard_faults_max: int = Field(
        3, ge=1, description="Calls in a row over time or memory that set a script version aside."
    )
    soft_faults_max: int = Field(100, ge=1, description="Exceptions in a row that set a script version aside.")
    suspend_s: float = Field(
        300.0, gt=0, description="A script version that was set aside is tried with one call after this time."
    )


class Quality(_Section):
    """Quality control of readings (the validate stage)."""

    future_skew_s: float = Field(
        300.0, ge=0, json_schema_extra=RELOAD, description="A device's clock may be this far ahead."
    )
    skew_noted_s: float = Field(
        60.0,
        gt=0,
        json_schema_extra=RELOAD,
        description="A device's clock that is further off has its messages say so (`clock_skew`).",
    )
    store_failed: bool = Field(
        False, json_schema_extra=RELOAD, description="Store values flagged fail too, besides `iot_errors`."
    )
    series_per_device_max: int = Field(500, ge=1, description="Series of one device that keep state.")
    lateness_s: float = Field(
        0.0,
        ge=0,
        le=86_400,
        json_schema_extra=RELOAD,
        description="Messages are held back for so long, by their device's time, and put into event-time order: flags, "
        "windows, alarms and rows are then the same in whatever order they came. 0: nothing waits. A device type or a "
        "device may say otherwise (`lateness_s`).",
    )
    held_per_device_max: int = Field(
        500,
        ge=1,
        json_schema_extra=RELOAD,
        description="Messages of one device held back at once; then the oldest go on.",
    )
    repeats_remembered: int = Field(
        32,
        ge=0,
        le=1_000,
        json_schema_extra=RELOAD,
        description="Last messages of each device, with a clock of its own, by which one sent twice is told; 22 bytes each.",
    )


class Alarm(_Section):
    """Alarms (the alarm stage)."""

    settle_s: float = Field(
        30.0,
        ge=0,
        json_schema_extra=RELOAD,
        description="Silence counts only so long after a worker took a partition over or worked off a backlog.",
    )


class Aggregate(_Section):
    """Windows of each series (the aggregate stage)."""

    windows: str = Field(
        "1h,24h",
        description="Sizes, separated by commas; with a hop as `24h/1h`. Units s, m, h, d. Empty: none are made.",
    )
    lateness_s: float = Field(
        60.0, ge=0, description="A window stays open so long after its end, by the device's time, for what is late."
    )
    horizon_s: float = Field(
        21_600.0, ge=0, description="A closed window takes corrections for so long, by the device's time."
    )
    silence_s: float = Field(
        300.0, gt=0, description="A device that is silent for so long has its windows closed by the clock."
    )
    series_per_device_max: int = Field(500, ge=1, description="Series of one device that have windows.")
    panes_per_series_max: int = Field(
        400, ge=1, description="Parts of windows, one for each hop, that a series keeps; some 70 bytes each."
    )


class Anomaly(_Section):
    """Anomalies of the series whose datatype has a test `anomaly` (the anomaly stage)."""

    enabled: bool = Field(False, description="Run the stage; it reads every validated message.")
    series_per_device_max: int = Field(200, ge=1, description="Series of one device that are judged.")


class Sink(_Section):
    """Writing to PostgreSQL/TimescaleDB."""

    rows_max: int = Field(
        5_000,
        ge=1,
        le=5_000,
        json_schema_extra=RELOAD,
        description="Rows of one batch, gathered of a partition; a larger one would block the event loop.",
    )
    batches_max: int = Field(
        4,
        ge=1,
        le=8,
        json_schema_extra=RELOAD,
        description="Batches of readings that one transaction takes where so many wait, so that a backlog is stored faster.",
    )
    linger_s: float = Field(
        0.1, ge=0, le=60, json_schema_extra=RELOAD, description="A batch waits this long for more rows."
    )
    flights: int = Field(2, ge=1, le=8, description="Transactions under way at once.")
    chunk_days: int = Field(
        1, ge=1, le=30, description="Days in one chunk (TimescaleDB) or partition (plain PostgreSQL)."
    )
    compress_after_days: int = Field(2, ge=1, description="Chunks older than this are compressed (TimescaleDB).")
    retention_days: int = Field(
        90, ge=8, description="Measurements older than this are dropped; must exceed the roll-ups' windows."
    )
    aggregates_retention_days: int = Field(
        1095, ge=1, json_schema_extra=RELOAD, description="Windows (`aggregates`) that ended earlier are deleted."
    )
    events_retention_days: int = Field(
        365, ge=1, json_schema_extra=RELOAD, description="Other stored events that are not alarms are deleted then."
    )
    generation: int = Field(
        0, ge=0, description="Offsets are kept for each; raise it to write what the topics hold once more."
    )

    @property
    def transaction_rows_max(self) -> int:
        """Rows of one transaction of readings."""
        return self.rows_max * self.batches_max


class Sync(_Section):
    """Writing to ClickHouse."""

    rows_max: int = Field(50_000, ge=1, le=1_000_000, json_schema_extra=RELOAD, description="Rows of one insert.")
    linger_s: float = Field(
        0.3, ge=0, le=60, json_schema_extra=RELOAD, description="An insert waits this long for more rows."
    )
    flights: int = Field(3, ge=1, le=64, description="Inserts under way at once, of each stage.")
    retention_days: int = Field(365, ge=1, description="Rows older than this are dropped by ClickHouse.")
    query_ttl_s: float = Field(2.0, ge=0, le=3600, description="A dashboard's answer is given again for so long.")
    query_cache_bytes_max: int = Field(16_777_216, ge=0, description="Bytes of answers that a worker keeps.")
    query_cache_rows_max: int = Field(10_000, ge=0, description="An answer of more rows is not kept.")


class Extract(_Section):
    """Tasks and employees out of a database that has no change feed."""

    url: SecretStr = Field(
        SecretStr(""), description="postgresql://… or mongodb://… of the database; empty: nothing is extracted."
    )
    tasks_table: str = Field("tasks", description="Table, `schema.table`, or collection of tasks; empty: none.")
    tasks_columns: str = Field(
        "", description="Columns that are named otherwise than the fields of docs/TASKS.md: `field=column, …`."
    )
    employees_table: str = Field("employees", description="Table or collection of employees; empty: none.")
    employees_columns: str = Field("", description="As tasks_columns.")
    time_zone: str = Field("UTC", description="Of timestamps that carry none.")
    channel: str = Field(
        "preservarium_extract", description="PostgreSQL: LISTENed to; its notices wake a look. Empty: none."
    )
    overlap_s: float = Field(
        60.0,
        ge=1,
        le=3_600,
        description="A change may become visible so long after its updated_at; more than clocks differ, and long transactions take.",
    )
    interval_min_s: float = Field(2.0, gt=0, json_schema_extra=RELOAD, description="Between looks while changes come.")
    interval_max_s: float = Field(
        900.0, gt=0, json_schema_extra=RELOAD, description="Between looks when none came for long."
    )
    reconcile_s: float = Field(
        86_400.0,
        gt=0,
        json_schema_extra=RELOAD,
        description="Every key is compared so often: finds rows that were deleted, and changes that left updated_at alone.",
    )

    @field_validator("url")
    @classmethod
    def _read(cls, url: SecretStr) -> SecretStr:
        return _checked(url, "postgresql", "postgres", "mongodb", "mongodb+srv", several=True)

    @property
    def dsn(self) -> str:
        """The URL as drivers take it, never for logs; empty where nothing is extracted."""
        url = self.url.get_secret_value()
        return url and urls.escaped(url)


class Fuse(_Section):
    """Stops a partition when so much of it is refused that the fault must be ours."""

    invalid_ratio_max: float = Field(
        0.5, gt=0, le=1, json_schema_extra=RELOAD, description="Share of refused records that trips the fuse."
    )
    window_records: int = Field(
        1_000, ge=10, json_schema_extra=RELOAD, description="Records that the share is taken over."
    )
    codes: str = Field(
        "handler_failed,store_rejected",
        description="Reason codes that count, separated by commas: those that a bad release of ours would cause.",
    )


class Breaker(_Section):
    """Circuit breaker of each dependency; its partitions are paused while it is open."""

    failures_max: int = Field(3, ge=1, json_schema_extra=RELOAD, description="Failures in a row that open it.")
    open_s: float = Field(2.0, gt=0, json_schema_extra=RELOAD, description="First wait before it is tried again.")
    open_max_s: float = Field(
        30.0, gt=0, json_schema_extra=RELOAD, description="Longest wait; waits double, with jitter."
    )


class Agents(_Section):
    """How every agent handles its batches."""

    records_max: int = Field(
        1_000,
        ge=1,
        json_schema_extra=RELOAD,
        description="Records of one partition handed to an agent at once.",
    )
    pending_records_max: int = Field(
        2_000, ge=100, description="Records of one partition kept in memory before its fetching pauses."
    )
    attempts_max: int = Field(
        5,
        ge=1,
        json_schema_extra=RELOAD,
        description="Tries of a batch whose handler fails for no known reason, before it is bisected.",
    )
    backoff_s: float = Field(0.2, gt=0, description="First wait between tries; waits double, with jitter.")
    backoff_max_s: float = Field(10.0, gt=0, description="Longest wait between tries.")
    clock_skew_max_s: float = Field(
        60.0,
        ge=0,
        json_schema_extra=RELOAD,
        description="A worker whose clock differs more from Kafka's does nothing for reasons of time until it is back; 0: it does.",
    )
    enabled: str = Field("", description="Names of the agents to run in this worker, separated by commas; empty: all.")


class Mail(_Section):
    """Notices by mail."""

    host: str = Field("", description="SMTP server; empty: no mail is sent.")
    port: int = Field(25, ge=1, le=65535, description="SMTP port.")
    user: str = Field("", description="SMTP user; empty: no authentication.")
    password: SecretStr = Field(SecretStr(""), description="SMTP password; better in PRESERVARIUM_MAIL__PASSWORD_FILE.")
    security: Literal["none", "starttls", "tls"] = Field("none", description="Transport security.")
    ssl_ca_file: str = Field(
        "", description="PEM of the authority that the server's certificate is of; empty: the system's."
    )
    sender: str = Field("preservarium@localhost", description="From address.")
    recipients: str = Field("", description="Default To addresses, separated by commas, where the registry names none.")
    timeout_s: float = Field(20.0, gt=0, description="A mail server must be ready for a mail within this time.")
    recipient_retry_s: float = Field(
        300.0,
        ge=0,
        json_schema_extra=RELOAD,
        description="A recipient whom the server refuses for now is tried for so long; other mail of the partition waits.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.ssl_ca_file and self.security == "none":
            message = "ssl_ca_file is given, but security is none: starttls and tls are encrypted"
            raise ValueError(message)
        return self


class Commands(_Section):
    """Commands to devices; sent through the broker of `mqtt.url`."""

    topic: str = Field(
        "devices/{device}/down",
        description="MQTT topic of plain devices whose type names none; {device} is the address, or a variable's name.",
    )
    wake_s: float = Field(
        30.0, gt=0, json_schema_extra=RELOAD, description="A sleeping device listens for so long after an uplink."
    )
    flights: int = Field(20, ge=1, le=1_000, description="Downlinks under way to the broker at once.")
    puback_timeout_s: float = Field(10.0, gt=0, description="The broker must acknowledge within this time.")


class Notices(_Section):
    """When people are told of alarms, and through which channels; a recipient in the registry may say otherwise."""

    group_by: str = Field(
        "rule",
        description="What a notice puts together, separated by commas: device, rule, severity, group, area, type, component_type, pin, alarm; empty: everything.",
    )
    group_wait_s: float = Field(
        30.0,
        ge=0,
        json_schema_extra=RELOAD,
        description="The first notice of a group waits so long for further alarms.",
    )
    group_interval_s: float = Field(
        300.0, ge=1, json_schema_extra=RELOAD, description="What is new in a group is told this often."
    )
    repeat_interval_s: float = Field(
        14_400.0,
        ge=1,
        json_schema_extra=RELOAD,
        description="A group with an active alarm that nobody has acknowledged is told again after this time.",
    )
    through: str = Field(
        "critical",
        json_schema_extra=RELOAD,
        description="Severities, separated by commas, that neither quiet hours nor a digest hold back.",
    )
    limit_notices: int = Field(
        60, ge=1, le=1_000, json_schema_extra=RELOAD, description="Most notices to one recipient in a window."
    )
    limit_window_s: float = Field(3_600.0, ge=1, json_schema_extra=RELOAD, description="That window.")
    timezone: str = Field("UTC", description="Time zone of quiet hours, digests and the times in notices.")
    private_destinations: str = Field(
        "",
        json_schema_extra=RELOAD,
        description="Networks, addresses and host names, separated by commas, that webhooks and Apprise may reach though they are private, loopback "
        "or link-local: `10.0.0.0/8, tickets.lan, .cluster.local`. Public addresses need no entry.",
    )
    webhook_secret: SecretStr = Field(
        SecretStr(""),
        description="Signs webhooks, 16 characters or more; each recipient's key is made of it (`preservarium notices key`).",
    )
    endpoint_timeout_s: float = Field(10.0, gt=0, description="A webhook must have answered within this time.")
    endpoint_retry_s: float = Field(
        3_600.0,
        ge=0,
        json_schema_extra=RELOAD,
        description="A webhook that is down is tried for so long; other webhooks of its partition wait.",
    )
    plot_hours: float = Field(
        24.0,
        ge=0,
        le=24 * 31,
        json_schema_extra=RELOAD,
        description="A mail draws the series over so long; 0: not at all.",
    )
    plot_timeout_s: float = Field(
        2.0, gt=0, description="The database must have answered within this time, or the mail goes without the picture."
    )

    @field_validator("private_destinations")
    @classmethod
    def _read(cls, private_destinations: str) -> str:
        urls.networks_and_names(private_destinations)
        return private_destinations

    @field_validator("webhook_secret")
    @classmethod
    def _long_enough(cls, secret: SecretStr) -> SecretStr:
        if 0 < len(secret.get_secret_value()) < LINK_SECRET_CHARS_MIN:
            message = f"must have at least {LINK_SECRET_CHARS_MIN} characters"
            raise ValueError(message)
        return secret


class Mqtt(_Section):
    """The MQTT connector."""

    enabled: bool = Field(False, description="Run the connector inside the worker.")
    url: SecretStr = Field(SecretStr("mqtt://localhost:1883"), description="mqtt(s)://[user[:password]@]host[:port].")
    ssl_ca_file: str = Field(
        "", description="PEM of the authority that the broker's certificate is of; empty: the system's."
    )
    ssl_cert_file: str = Field("", description="PEM of our certificate, where the broker asks for one.")
    ssl_key_file: str = Field("", description="PEM of its key; empty: it stands in ssl_cert_file.")
    ssl_key_password: SecretStr = Field(SecretStr(""), description="Password of that key.")
    client_id: str = Field(
        "preservarium",
        description="Stable, so that the broker keeps the session and redelivers; two connectors must not share one.",
    )
    subscriptions: str = Field(
        "devices/{device}/up",
        description="Topic patterns, separated by commas; {device} marks the address, {mode} the connector mode, {port} the port, + any level.",
    )
    mode: str = Field("MQTT", description="Connector mode where the pattern names none.")
    inflight_max: int = Field(1_000, ge=1, le=65_535, description="Messages taken and not yet acknowledged.")
    keepalive_s: int = Field(60, ge=5, le=65_535, description="A silent connection is tested after this time.")

    @field_validator("url")
    @classmethod
    def _read(cls, url: SecretStr) -> SecretStr:
        return _checked(url, "mqtt", "mqtts")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [name for name in TLS_FIELDS if _given(getattr(self, name))]
        if given and not self.url.get_secret_value().lower().startswith("mqtts://"):
            message = f"{given[0]} is given, but url is not of mqtts://"
            raise ValueError(message)
        if "ssl_cert_file" not in given and (useless := [name for name in given if "key" in name]):
            message = f"{useless[0]} is given, but no ssl_cert_file"
            raise ValueError(message)
        return self


class Connector(_Section):
    """What the MQTT and the HTTP connector have in common."""

    format: str = Field(
        "auto",
        description="Envelopes that are looked for, separated by commas (ttn, chirpstack, zigbee2mqtt, …); one: everything is of it; auto: all.",
    )
    device_tags: str = Field(
        "device,device_id,host",
        description="Tag that names the device of a point of line protocol, or a template ({site}-{host}); separated by commas, the first that is there counts.",
    )


class Http(_Section):
    """The HTTP connector: POST /ingest."""

    enabled: bool = Field(True, description="Serve POST /ingest on the worker's web port.")
    body_bytes_max: int = Field(
        5_000_000, ge=1_000, json_schema_extra=RELOAD, description="Largest body, unpacked; more is refused with 413."
    )
    inflight_max: int = Field(
        64, ge=1, json_schema_extra=RELOAD, description="Requests under way at once; more are refused with 429."
    )
    client_inflight_max: int = Field(
        32,
        ge=1,
        json_schema_extra=RELOAD,
        description="Of one client address (IPv6: /64), so that none takes all; behind a proxy, which is one, as inflight_max.",
    )
    token: SecretStr = Field(
        SecretStr(""),
        json_schema_extra=RELOAD,
        description="Bearer token that senders must show; empty: none is asked.",
    )


class Web(_Section):
    """Console, health and metrics."""

    host: str = Field(
        "127.0.0.1",
        description="Address the worker's web server binds; 0.0.0.0 to be reachable from outside.",
    )
    port: int = Field(6066, ge=1, le=65535, description="Port of the worker's web server.")
    allowed_hosts: str = Field(
        "",
        json_schema_extra=RELOAD,
        description="Names under which the web ports are asked for, separated by commas, besides localhost, this machine's, that of public_url, "
        "and addresses; `.example.org`: all names below it; `*`: any, which lets in pages of strangers.",
    )
    client_connections_max: int = Field(
        256,
        ge=1,
        json_schema_extra=RELOAD,
        description="Connections of one client address (IPv6: /64); behind a proxy, which is one, as many as it opens.",
    )
    operator_token: SecretStr = Field(
        SecretStr(""),
        json_schema_extra=RELOAD,
        description="Token of operators whose actions are recorded under the name that they give.",
    )
    operators: SecretStr = Field(
        SecretStr(""),
        json_schema_extra=RELOAD,
        description="Operators with a token each, `name:token`, separated by commas: what they do is recorded under that name. With neither of "
        "the two, everybody may read, and this machine alone may act.",
    )
    public_url: str = Field(
        "",
        description="https://host under which people reach this web port, for links in notices; empty: no links.",
        pattern=r"^(https?://[^\s?#@]+)?$",
    )
    link_secret: SecretStr = Field(
        SecretStr(""),
        description="Signs the acknowledge links in notices, the same in every worker, 16 characters or more; empty: no links.",
    )
    link_ttl_s: float = Field(
        259_200.0, gt=0, json_schema_extra=RELOAD, description="An acknowledge link works for so long."
    )

    @property
    def operator_tokens(self) -> dict[str, str]:
        """Name -> token of each operator."""
        entries = (entry.partition(":") for entry in self.operators.get_secret_value().split(",") if entry.strip())
        return {name.strip(): token.strip() for name, _, token in entries}

    @property
    def any_token(self) -> str:
        """A token that opens what is for operators, for programs of our own; "" where none is asked for."""
        return self.operator_token.get_secret_value() or next(iter(self.operator_tokens.values()), "")

    @property
    def allowed_names(self) -> tuple[str, ...]:
        """Entries of `allowed_hosts`."""
        entries = (entry.strip().lower().rstrip(".") for entry in self.allowed_hosts.split(","))
        return tuple(entry for entry in entries if entry)

    @field_validator("public_url")
    @classmethod
    def _public(cls, public_url: str) -> str:
        if public_url:
            urls.read(public_url, "http", "https")
        return public_url

    @field_validator("allowed_hosts")
    @classmethod
    def _names(cls, allowed_hosts: str) -> str:
        for entry in filter(None, (entry.strip() for entry in allowed_hosts.split(","))):
            if entry != "*" and not re.fullmatch(r"\.?[\w-]+(\.[\w-]+)*\.?", entry):
                message = f"{entry!r} is no name: give host names without scheme and port, separated by commas"
                raise ValueError(message)
        return allowed_hosts

    @field_validator("operators")
    @classmethod
    def _named(cls, operators: SecretStr) -> SecretStr:
        for entry in operators.get_secret_value().split(","):
            name, _, token = (part.strip() for part in entry.partition(":"))
            if entry.strip() and not (name and token):
                message = "is `name:token`, separated by commas"
                raise ValueError(message)
        return operators

    @field_validator("link_secret")
    @classmethod
    def _long_enough(cls, secret: SecretStr) -> SecretStr:
        # A signature is as strong as its secret, and a mail gives an attacker all the time there is to guess it.
        if 0 < len(secret.get_secret_value()) < LINK_SECRET_CHARS_MIN:
            message = f"must have at least {LINK_SECRET_CHARS_MIN} characters"
            raise ValueError(message)
        return secret


class Settings(BaseSettings):
    """Preservarium's settings."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid", env_file=None
    )

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", json_schema_extra=RELOAD, description="Least severe level that is logged."
    )
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="`auto`: console on a terminal, JSON elsewhere."
    )
    data_dir: str = Field(
        ".preservarium",
        description="RocksDB tables and, under `preservarium up`, the embedded services' data.",
    )
    kafka: Kafka = Kafka()
    postgres: Postgres = Postgres()
    clickhouse: ClickHouse = ClickHouse()
    agents: Agents = Agents()
    normalize: Normalize = Normalize()
    sandbox: Sandbox = Sandbox()
    quality: Quality = Quality()
    alarm: Alarm = Alarm()
    aggregate: Aggregate = Aggregate()
    anomaly: Anomaly = Anomaly()
    sink: Sink = Sink()
    sync: Sync = Sync()
    extract: Extract = Extract()
    fuse: Fuse = Fuse()
    breaker: Breaker = Breaker()
    mail: Mail = Mail()
    commands: Commands = Commands()
    notices: Notices = Notices()
    connector: Connector = Connector()
    mqtt: Mqtt = Mqtt()
    http: Http = Http()
    web: Web = Web()

    @property
    def ingest_open(self) -> bool:
        """Whether whoever reaches this machine may send readings: POST /ingest bound beyond loopback, without a token."""
        loopback = self.web.host == "localhost" or self.web.host.startswith("127.") or self.web.host == "::1"
        return self.http.enabled and not loopback and not _given(self.http.token)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Sources by precedence: arguments, environment and `.env`, then the replaced sink's names."""
        variables = _variables()
        return (
            init_settings,
            _Nested(settings_cls, _own(variables)),
            _Nested(settings_cls, _legacy(variables)),
        )


class SettingsError(Exception):
    """A setting is wrong. The message is one line that names the field; the command line exits with 2."""


#: Environment names of the Kafka-TimescaleDB sink that this replaces -> (section, field).
LEGACY_NAMES: Mapping[str, tuple[str, str]] = {
    "KAFKA_BOOTSTRAP_SERVERS": ("kafka", "bootstrap_servers"),
    "KAFKA_INPUT_TOPIC": ("normalize", "decoded_topic"),
    "TIMESCALE_HOST": ("postgres", "host"),
    "TIMESCALE_PORT": ("postgres", "port"),
    "TIMESCALE_DB": ("postgres", "database"),
    "TIMESCALE_USER": ("postgres", "user"),
    "TIMESCALE_PASSWORD": ("postgres", "password"),
    "BATCH_SIZE": ("sink", "rows_max"),
    "BATCH_TIMEOUT": ("sink", "linger_s"),
}


class _Nested(PydanticBaseSettingsSource):
    """A settings source over a nested mapping made beforehand."""

    def __init__(self, settings_cls: type[BaseSettings], values: dict[str, Any]) -> None:
        super().__init__(settings_cls)
        self._values = values

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self._values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._values


def _variables() -> dict[str, str]:
    """`.env` (or the file that PRESERVARIUM_ENV_FILE names) under the environment."""
    file = os.environ.get(f"{PREFIX}ENV_FILE", ".env")
    try:
        found = {k: v for k, v in dotenv_values(file).items() if v is not None} if Path(file).is_file() else {}
    except (OSError, UnicodeDecodeError) as e:
        message = f"{PREFIX}ENV_FILE: cannot read {file!r}: {reason(e)}"
        raise SettingsError(message) from e
    variables = {**found, **os.environ}
    for name in (name for name in variables if name.startswith(PREFIX) or name in LEGACY_NAMES):
        # Bytes that are no UTF-8 come as half surrogate pairs, which nothing can be written with.
        if not variables[name].isprintable() and any("\ud800" <= sign <= "\udfff" for sign in variables[name]):
            message = f"{name}: is not UTF-8"
            raise SettingsError(message)
    return variables


def _own(variables: Mapping[str, str]) -> dict[str, Any]:
    """The PRESERVARIUM_ variables as a nested mapping; `…_FILE` is replaced by the file's text."""
    values: dict[str, Any] = {}
    for name, value in sorted(variables.items()):
        if not name.startswith(PREFIX) or name == f"{PREFIX}ENV_FILE":
            continue
        path = name.removeprefix(PREFIX).lower()
        text = value
        if path.endswith("_file") and not _is_field(path):
            path = path.removesuffix("_file")
            try:
                # An editor's line end is no part of a secret; a blank may be.
                text = Path(value).read_text(encoding="utf-8").rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as e:
                message = f"{name}: cannot read {value!r}: {reason(e)}"
                raise SettingsError(message) from e
        section, separator, field = path.partition("__")
        if not separator:
            values[section] = text
        elif isinstance(values.setdefault(section, {}), dict):
            values[section][field] = text
        else:
            message = f"{name}: {PREFIX}{section.upper()} is a value, not a section"
            raise SettingsError(message)
    return values


def _is_field(path: str) -> bool:
    """Whether `section__field` is a setting: one whose own name ends with `_file` takes a path."""
    section, _, field = path.partition("__")
    info = Settings.model_fields.get(section)
    return info is not None and field in getattr(info.annotation, "model_fields", {})


def _legacy(variables: Mapping[str, str]) -> dict[str, Any]:
    """The replaced sink's variables as a nested mapping."""
    values: dict[str, Any] = {}
    for name, (section, field) in LEGACY_NAMES.items():
        if name in variables:
            value = variables[name]
            if name == "BATCH_SIZE" and value.isascii() and value.isdigit():
                # The old service took any size; ours is limited because a larger batch blocks the event loop.
                value = str(min(int((value.lstrip("0") or "0")[:9]), 5_000))
            values.setdefault(section, {})[field] = value
    return values


def load(**overrides: Any) -> Settings:
    """Read and check every setting.

    Raises:
        SettingsError: one line that names the first wrong field as its environment variable.
    """
    try:
        return Settings(**overrides)
    except ValidationError as e:
        first = e.errors()[0]
        name = PREFIX + "__".join(str(part) for part in first["loc"]).upper()
        unknown = first["type"] == "extra_forbidden"
        what = "no such setting" if unknown else first["msg"].removeprefix("Value error, ")
        # Of an unknown name nobody knows whether it holds a secret, and a whole section holds some.
        secret = unknown or isinstance(first.get("input"), (Mapping, BaseModel))
        secret |= any(word in name.lower() for word in ("password", "url", "token", "secret", "operators"))
        # An address with a password in it may have been given to a setting that takes none, and a line of a file may run on
        # into the next one, which sets a secret.
        secret |= any(mark in str(first.get("input")) for mark in "@=\n")
        given = "" if secret else f" (given: {first.get('input')!r:.80})"
        more = f"; {len(e.errors()) - 1} more are wrong" if len(e.errors()) > 1 else ""
        message = f"{name}: {what}{given}{more}"
        raise SettingsError(message) from None


def secrets(settings: Settings) -> list[str]:
    """Everything that no text for people may hold: secrets, and passwords in URLs, as they are meant and as they are written.

    The longest come first, so that none is replaced in part. What is shorter than four characters is no secret and would
    be found in every word.
    """
    found: set[str] = set()
    for field in fields():
        value = (
            getattr(getattr(settings, field.section), field.name) if field.section else getattr(settings, field.name)
        )
        if not isinstance(value, SecretStr):
            continue
        text = value.get_secret_value()
        found.add(text)
        if "://" in text:
            written = text.partition("://")[2].rpartition("@")[0].partition(":")[2]
            found |= {written, unquote(written)}
    return sorted((text for text in found if len(text) > 3), key=len, reverse=True)


@dataclass(frozen=True, slots=True)
class FieldDoc:
    """One setting as it is documented."""

    section: str  #: "" for the top level
    name: str
    variable: str  #: environment variable
    default: str
    description: str
    reload: bool  #: changes on SIGHUP


def fields() -> Iterator[FieldDoc]:
    """Every setting, in the order of the documentation."""
    for name, info in Settings.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            for inner, inner_info in section.model_fields.items():
                yield _field_doc(name, inner, inner_info)
        else:
            yield _field_doc("", name, info)


def _field_doc(section: str, name: str, info: FieldInfo) -> FieldDoc:
    default = info.default
    text = default.get_secret_value() if isinstance(default, SecretStr) else str(default)
    if isinstance(default, bool):
        text = str(default).lower()
    extra = info.json_schema_extra
    variable = PREFIX + (f"{section}__{name}" if section else name).upper()
    return FieldDoc(
        section,
        name,
        variable,
        text,
        info.description or "",
        isinstance(extra, dict) and bool(extra.get("reload")),
    )


def env_example() -> str:
    """The commented `.env.example`: every setting with its default."""
    lines = [
        "# Preservarium's settings. A commented-out value is the default. Copy to .env and change what you need.",
        "# A secret may stand in a file: put _FILE behind the variable's name and give the path.",
        "# [reload]: changes on SIGHUP, without a restart.",
    ]
    section = None
    for field in fields():
        if field.section != section:
            section = field.section
            if section:
                cls = Settings.model_fields[section].annotation
                lines += ["", f"# --- {section}: {(cls.__doc__ or '').strip().splitlines()[0]}"]
        lines += [
            "",
            f"# {field.description}{' [reload]' if field.reload else ''}",
            f"# {field.variable}={field.default}",
        ]
    lines += [
        "",
        "# --- Names of the Kafka-TimescaleDB sink that this replaces; a PRESERVARIUM_ name wins over them.",
    ]
    lines += [f"# {name}: same as {PREFIX}{s.upper()}__{f.upper()}" for name, (s, f) in LEGACY_NAMES.items()]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that a reload changed, or would have."""

    variable: str
    old: str
    new: str
    applied: bool  #: False where the setting needs a restart


class LiveSettings:
    """The settings in force. `reload` swaps in new values of the fields that may change while running."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __call__(self) -> Settings:
        """The settings in force now; ask each time, keep no copy of a reloadable value."""
        return self._settings

    def reload(self) -> list[Change]:
        """Read the sources again and apply what may change.

        Raises:
            SettingsError: a value is wrong; then nothing was changed.
        """
        new = load()
        changes: list[Change] = []
        merged: dict[str, Any] = {}
        for field in fields():
            before, after = (
                getattr(getattr(s, field.section), field.name) if field.section else getattr(s, field.name)
                for s in (self._settings, new)
            )
            if before != after:
                changes.append(Change(field.variable, str(before), str(after), field.reload))
            value = after if field.reload else before
            if field.section:
                merged.setdefault(field.section, {})[field.name] = value
            else:
                merged[field.name] = value
        self._settings = Settings(**merged)
        return changes
