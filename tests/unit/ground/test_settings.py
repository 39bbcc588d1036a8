"""Settings: sources and their precedence, secrets in files, one line for what is wrong, reload."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from pydantic import SecretStr, ValidationError

from preservarium.__main__ import cli
from preservarium.settings import (
    LEGACY_NAMES,
    Change,
    LiveSettings,
    Postgres,
    Settings,
    SettingsError,
    env_example,
    fields,
    load,
)

ROOT = Path(__file__).parents[3]
P = "PRESERVARIUM_"


def test_the_example_file_is_what_the_program_prints() -> None:
    file = ROOT / ".env.example"
    assert file.read_text(encoding="utf-8") == env_example(), "run: .venv/bin/preservarium config > .env.example"
    assert CliRunner().invoke(cli, ["config"]).output == env_example()


def test_the_example_with_every_line_uncommented_is_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line.removeprefix("# ") for line in env_example().splitlines() if line.startswith(f"# {P}")]
    file = tmp_path / ".env"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.setenv(f"{P}ENV_FILE", str(file))
    assert len(lines) == len(list(fields()))
    assert load() == Settings()


def test_every_setting_is_described_and_its_variable_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in fields():
        assert field.description, field.variable
        assert field.description.rstrip().endswith((".", "…")), f"{field.variable}: a sentence"
    monkeypatch.setenv(f"{P}KAFKA__LINGER_MS", "7")
    monkeypatch.setenv(f"{P}LOG_LEVEL", "DEBUG")
    monkeypatch.setenv(f"{P}MQTT__ENABLED", "true")
    s = load()
    assert (s.kafka.linger_ms, s.log_level, s.mqtt.enabled) == (7, "DEBUG", True)


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings"
    file.write_text(f"{P}SINK__ROWS_MAX=11\n{P}SINK__LINGER_S=0.5\nUNRELATED=1\n")
    monkeypatch.setenv(f"{P}ENV_FILE", str(file))
    monkeypatch.setenv(f"{P}SINK__ROWS_MAX", "22")
    assert (load().sink.rows_max, load().sink.linger_s) == (22, 0.5)


def test_a_file_that_is_no_text_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings"
    file.write_bytes(b"A=\xff\n")
    monkeypatch.setenv(f"{P}ENV_FILE", str(file))
    with pytest.raises(SettingsError, match=r"cannot read .*: it is not text in UTF-8"):
        load()


LEGACY = {
    "KAFKA_BOOTSTRAP_SERVERS": ("one:9092,two:9092", "one:9092,two:9092"),
    "KAFKA_INPUT_TOPIC": ("decoded", "decoded"),
    "TIMESCALE_HOST": ("db", "db"),
    "TIMESCALE_PORT": ("5433", 5433),
    "TIMESCALE_DB": ("iot", "iot"),
    "TIMESCALE_USER": ("sink", "sink"),
    "TIMESCALE_PASSWORD": ("p@ss", SecretStr("p@ss")),
    "BATCH_SIZE": ("100", 100),
    "BATCH_TIMEOUT": ("2", 2.0),
}


@pytest.mark.parametrize("name", LEGACY_NAMES)
def test_the_replaced_services_names_are_understood(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = LEGACY[name]
    monkeypatch.setenv(name, text)
    section, field = LEGACY_NAMES[name]
    assert getattr(getattr(load(), section), field) == value


def test_our_own_name_wins_over_the_replaced_services(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMESCALE_HOST", "old")
    monkeypatch.setenv("TIMESCALE_PORT", "1111")
    monkeypatch.setenv(f"{P}POSTGRES__HOST", "new")
    s = load()
    assert (s.postgres.host, s.postgres.port) == ("new", 1111)


def test_a_batch_size_of_the_replaced_service_is_cut_to_our_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, rows_max in (("100000", 5000), ("9" * 5_000, 5000), ("007", 7)):
        monkeypatch.setenv("BATCH_SIZE", given)
        assert load().sink.rows_max == rows_max
    for wrong in ("²", "0", "x"):
        monkeypatch.setenv("BATCH_SIZE", wrong)
        with pytest.raises(SettingsError):
            load()


def test_a_secret_may_stand_in_a_file_and_never_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secret"
    file.write_text("hush/hush\n")
    monkeypatch.setenv(f"{P}POSTGRES__PASSWORD_FILE", str(file))
    s = load()
    assert s.postgres.password.get_secret_value() == "hush/hush"
    assert "hush" not in repr(s)
    assert ":hush%2Fhush@" in s.postgres.dsn


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("KAFKA__PARTITIONS", "none", "KAFKA__PARTITIONS"),
        ("KAFKA__PARTITIONS", "0", "KAFKA__PARTITIONS"),
        ("KAFKA__COMPRESSION", "rar", "KAFKA__COMPRESSION"),
        ("SINK__ROWS_MAX", "5001", "SINK__ROWS_MAX"),
        ("LOG_LEVEL", "LOUD", "LOG_LEVEL"),
        ("KAFKA__PARTITION", "3", "KAFKA__PARTITION: no such setting"),
        ("NOTHING", "3", "NOTHING: no such setting"),
        ("POSTGRES__PASSWORD_FILE", "/nowhere/at/all", "POSTGRES__PASSWORD_FILE: cannot read"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_variable(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(P + name, value)
    with pytest.raises(SettingsError, match=f"^{P}{words}") as e:
        load()
    assert "\n" not in str(e.value)
    run = CliRunner().invoke(cli, ["config", "show"])
    assert (run.exit_code, run.stdout) == (2, "")
    assert [P + name in line for line in run.stderr.splitlines()] == [True]


def test_a_wrong_secret_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError):
        Postgres(password=["hush"])  # type: ignore[arg-type]
    monkeypatch.setenv(f"{P}POSTGRES__PASSWORD__DEEPER", "hush")
    with pytest.raises(SettingsError) as e:
        load()
    assert "hush" not in str(e.value)


def test_settings_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().sink.rows_max = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("postgres", "dsn"),
    [
        (Postgres(), "postgresql://preservarium@localhost:5432/timeseries"),
        (
            Postgres(host="h", port=1, user="a b", password=SecretStr("p/@"), database="d/x"),
            "postgresql://a%20b:p%2F%40@h:1/d%2Fx",
        ),
        (
            Postgres(host="/run/pg", user="u", database="d"),
            "postgresql://u@/d?host=/run/pg&port=5432",
        ),
        (Postgres(url=SecretStr("postgresql://x/y"), host="ignored"), "postgresql://x/y"),
    ],
)
def test_the_dsn(postgres: Postgres, dsn: str) -> None:
    assert postgres.dsn == dsn


def test_the_clickhouse_url_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load().clickhouse.parts == ("localhost", 8123, "default", "", False)
    monkeypatch.setenv(f"{P}CLICKHOUSE__URL", "https://us%40er:p%2Fw@ch.example")
    assert load().clickhouse.parts == ("ch.example", 8443, "us@er", "p/w", True)


def test_a_reload_applies_what_may_change_and_tells_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    live = LiveSettings(load())
    monkeypatch.setenv(f"{P}SINK__ROWS_MAX", "123")
    monkeypatch.setenv(f"{P}LOG_LEVEL", "WARNING")
    monkeypatch.setenv(f"{P}KAFKA__BOOTSTRAP_SERVERS", "elsewhere:9092")
    changes = live.reload()
    assert set(changes) == {
        Change(f"{P}SINK__ROWS_MAX", "5000", "123", applied=True),
        Change(f"{P}LOG_LEVEL", "INFO", "WARNING", applied=True),
        Change(f"{P}KAFKA__BOOTSTRAP_SERVERS", "localhost:9092", "elsewhere:9092", applied=False),
    }
    s = live()
    assert (s.sink.rows_max, s.log_level, s.kafka.bootstrap_servers) == (123, "WARNING", "localhost:9092")
    assert [c for c in live.reload() if c.applied] == [], "the second reload finds nothing new to apply"


def test_a_reload_with_a_wrong_value_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    live = LiveSettings(load())
    before = live()
    monkeypatch.setenv(f"{P}SINK__LINGER_S", "0.9")
    monkeypatch.setenv(f"{P}SINK__ROWS_MAX", "many")
    with pytest.raises(SettingsError):
        live.reload()
    assert live() is before


def test_a_reload_tells_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    live = LiveSettings(load())
    monkeypatch.setenv(f"{P}POSTGRES__PASSWORD", "hush")
    assert "hush" not in repr(live.reload())


SASL = {"KAFKA__SECURITY_PROTOCOL": "SASL_SSL", "KAFKA__SASL_USERNAME": "ann", "KAFKA__SASL_PASSWORD": "hush"}


def test_kafka_over_tls_with_a_log_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hush\n")
    for name, value in (SASL | {"KAFKA__SSL_CA_FILE": "/etc/ca.pem", "KAFKA__SASL_MECHANISM": "SCRAM-SHA-512"}).items():
        monkeypatch.setenv(P + name, value)
    monkeypatch.delenv(f"{P}KAFKA__SASL_PASSWORD")
    monkeypatch.setenv(f"{P}KAFKA__SASL_PASSWORD_FILE", str(secret))
    kafka = load().kafka
    assert (kafka.tls, kafka.sasl, kafka.ssl_ca_file) == (True, True, "/etc/ca.pem"), "a path is not read as a secret's"
    assert kafka.sasl_password.get_secret_value() == "hush"
    assert "hush" not in repr(load())
    shown = CliRunner().invoke(cli, ["config", "show"])
    assert (shown.exit_code, "hush" in shown.output) == (0, False)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"SASL_USERNAME": "ann"}, "sasl_username is given, but security_protocol PLAINTEXT does not log in"),
        ({"SECURITY_PROTOCOL": "SSL", "SASL_PASSWORD": "hush"}, "sasl_password is given, .* SSL does not log in"),
        ({"SSL_CA_FILE": "/ca.pem"}, "ssl_ca_file is given, but security_protocol PLAINTEXT is not encrypted"),
        (
            {"SECURITY_PROTOCOL": "SASL_PLAINTEXT", "SSL_CERT_FILE": "/c.pem"},
            "ssl_cert_file is given, .* not encrypted",
        ),
        ({"SECURITY_PROTOCOL": "SASL_SSL", "SASL_PASSWORD": "hush"}, "sasl_username is missing"),
        ({"SECURITY_PROTOCOL": "SASL_SSL", "SASL_USERNAME": "ann"}, "sasl_password is missing"),
        ({"SECURITY_PROTOCOL": "SSL", "SSL_KEY_FILE": "/k.pem"}, "ssl_key_file is given, but no ssl_cert_file"),
        ({"SECURITY_PROTOCOL": "SSL", "SSL_KEY_PASSWORD": "hush"}, "ssl_key_password is given, but no ssl_cert_file"),
    ],
)
def test_settings_of_kafka_that_contradict_each_other_are_one_line(
    given: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(f"{P}KAFKA__{name}", value)
    with pytest.raises(SettingsError, match=f"^{P}KAFKA: {words}") as e:
        load()
    assert "\n" not in str(e.value)
    assert "hush" not in str(e.value)


@pytest.mark.parametrize("name", ["KAFKA__SASL_PASWORD", "KAFKA__SASL_PASSWORD__DEEPER", "PASWORD"])
def test_a_secret_under_a_misspelled_name_is_not_repeated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(P + name, "hush")
    with pytest.raises(SettingsError) as e:
        load()
    assert "hush" not in str(e.value)


def test_a_line_that_runs_on_tells_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(P + "KAFKA__PARTITIONS", f"8{P}POSTGRES__PASSWORD=hush")
    with pytest.raises(SettingsError, match="KAFKA__PARTITIONS") as e:
        load()
    assert "hush" not in str(e.value)
    monkeypatch.setenv(P + "KAFKA__PARTITIONS", "8" * 10_000 + "x")
    with pytest.raises(SettingsError, match="KAFKA__PARTITIONS") as e:
        load()
    assert len(str(e.value)) < 400


@pytest.mark.parametrize(
    ("section", "given", "words"),
    [
        ("POSTGRES", {"SSL_CA_FILE": "/ca.pem"}, "ssl_ca_file is given, but ssl_mode prefer checks no certificate"),
        ("POSTGRES", {"URL": "postgresql://u:hush@h/d", "SSL_MODE": "verify-full"}, "ssl_mode .* no effect beside url"),
        ("CLICKHOUSE", {"SSL_CA_FILE": "/ca.pem"}, "ssl_ca_file is given, but url is not of https"),
        (
            "MQTT",
            {"SSL_CERT_FILE": "/c.pem", "URL": "mqtt://u:hush@h"},
            "ssl_cert_file is given, but url is not of mqtts",
        ),
        ("MQTT", {"SSL_KEY_FILE": "/k.pem", "URL": "mqtts://u:hush@h"}, "ssl_key_file is given, but no ssl_cert_file"),
        ("MAIL", {"SSL_CA_FILE": "/ca.pem"}, "ssl_ca_file is given, but security is none"),
    ],
)
def test_tls_settings_without_effect_are_one_line(
    section: str, given: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(f"{P}{section}__{name}", value)
    with pytest.raises(SettingsError, match=f"^{P}{section}: {words}") as e:
        load()
    assert "\n" not in str(e.value)
    assert "hush" not in str(e.value)


def test_the_dsn_with_tls() -> None:
    postgres = Postgres(host="h", ssl_mode="verify-full", ssl_ca_file="/etc/my ca.pem")
    assert (
        postgres.dsn == "postgresql://preservarium@h:5432/timeseries?sslmode=verify-full&sslrootcert=/etc/my%20ca.pem"
    )


@pytest.mark.parametrize(
    ("given", "is_open"),
    [
        ({}, False),
        ({"WEB__HOST": "0.0.0.0"}, True),
        ({"WEB__HOST": "::"}, True),
        ({"WEB__HOST": "::1"}, False),
        ({"WEB__HOST": "0.0.0.0", "HTTP__TOKEN": "t0ken"}, False),
        ({"WEB__HOST": "0.0.0.0", "HTTP__ENABLED": "false"}, False),
    ],
)
def test_a_door_that_is_open_to_the_network_is_known(
    given: dict[str, str], is_open: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(P + name, value)
    assert load().ingest_open is is_open
