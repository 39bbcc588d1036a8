"""URLs with passwords in them mean what was meant, to every driver, or are refused with what to do."""

import contextlib
import inspect
import re
from urllib.parse import quote, unquote

import pytest
from asyncpg import connect_utils
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preservarium import urls
from preservarium.settings import ClickHouse, Postgres, SettingsError, load, secrets

P = "PRESERVARIUM_"
#: What people and generators put into passwords; each alone, and all of them.
SIGNS = ["@", ":", "/", "#", "%", "$", "'", '"', " ", "&", "é", "?", "=", "+", "\\", "[", "]", "{", "}", "|", "`", "^", "<", ">", ";", ",", "!", "*", "~", "%41", "%zz",
         "${HOME}", "$$", "a@b:c/d", "//", "@@", "℀", "：", "密码", "🔑", "%", "100%", "-", "#x", "x#", "[::1]", "@evil.example"]  # fmt: skip
PASSWORDS = [f"a{sign}b" for sign in SIGNS] + SIGNS + ["".join(SIGNS), "plain"]

texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20)


def asyncpgs(dsn):
    """(host, port, user, password, database) as asyncpg reads it."""
    arguments = dict.fromkeys(inspect.signature(connect_utils._parse_connect_dsn_and_args).parameters)
    addresses, parameters = connect_utils._parse_connect_dsn_and_args(**{**arguments, "dsn": dsn})
    ((host, port),) = addresses
    return host, port, parameters.user, parameters.password, parameters.database


@pytest.mark.parametrize("password", PASSWORDS)
def test_any_password_works_where_it_stands_alone(monkeypatch, password):
    monkeypatch.setenv(f"{P}POSTGRES__PASSWORD", password)
    monkeypatch.setenv(f"{P}POSTGRES__USER", f"u{password}")
    monkeypatch.setenv(f"{P}CLICKHOUSE__PASSWORD", password)
    monkeypatch.setenv(f"{P}CLICKHOUSE__USER", "u")
    found = load()
    assert asyncpgs(found.postgres.dsn) == ("localhost", 5432, f"u{password}", password, "timeseries")
    assert found.clickhouse.parts == ("localhost", 8123, "u", password, False)


@pytest.mark.parametrize("password", PASSWORDS)
def test_any_password_works_in_a_file(monkeypatch, tmp_path, password):
    file = tmp_path / "password"
    file.write_text(password + "\n", encoding="utf-8")
    monkeypatch.setenv(f"{P}POSTGRES__PASSWORD_FILE", str(file))
    assert load().postgres.password.get_secret_value() == password


@pytest.mark.parametrize("password", PASSWORDS)
def test_any_password_works_in_a_url_as_urls_write_it(password):
    dsn = f"postgresql://u:{quote(password, safe='')}@h.example:5433/d"
    assert asyncpgs(Postgres(url=dsn).dsn) == ("h.example", 5433, "u", password, "d")
    assert ClickHouse(url=f"https://u:{quote(password, safe='')}@h.example").parts == (
        "h.example",
        8443,
        "u",
        password,
        True,
    )


@given(password=texts)
@example("12/3@x")
@example("1#@")
@example("1?password=y@h")
@settings(max_examples=400, deadline=None)
def test_a_password_that_stands_in_a_url_as_it_is_is_meant_or_refused(password):
    try:
        dsn = Postgres(url=f"postgresql://u:{password}@h.example:5433/d").dsn
        clickhouse = ClickHouse(url=f"http://u:{password}@h.example:5433").parts
    except ValueError as e:
        said = str(e)
    else:
        said = ""
    if said:
        assert re.search("%2F.*_PASSWORD", said, re.DOTALL), said
        return
    # What has the form of an escape is one.
    assert asyncpgs(dsn) == ("h.example", 5433, "u", unquote(password), "d")
    assert clickhouse == ("h.example", 5433, "u", unquote(password), False)


@pytest.mark.parametrize("sign", ["/", "#", "?", " ", "[", "℀", "\t", "12/3", "1?x"])
@pytest.mark.parametrize("name", ["POSTGRES__URL", "CLICKHOUSE__URL", "MQTT__URL", "EXTRACT__URL"])
def test_what_would_be_misread_is_refused_by_name_and_never_shown(monkeypatch, name, sign):
    scheme = {"POSTGRES__URL": "postgresql", "CLICKHOUSE__URL": "http", "MQTT__URL": "mqtt", "EXTRACT__URL": "mongodb"}[
        name
    ]
    monkeypatch.setenv(P + name, f"{scheme}://u:hush{sign}hush@h.example/d")
    with pytest.raises(SettingsError, match=rf"^{P}{name}: .*%40") as told:
        load()
    assert "hush" not in str(told.value)
    if name in ("POSTGRES__URL", "CLICKHOUSE__URL"):
        assert f"{P}{name.replace('URL', 'PASSWORD')}" in str(told.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("POSTGRES__URL", "mysql://h/d"), ("POSTGRES__URL", "h.example/d"), ("POSTGRES__URL", "postgresql://h:0/d"), ("POSTGRES__URL", "postgresql://h:70000/d"),
        ("POSTGRES__URL", "postgresql://h:x/d"), ("POSTGRES__URL", "postgresql://h1:1,h2:x/d"), ("POSTGRES__URL", "postgresql://[::1/d"),
        ("POSTGRES__HOST", "h/x"), ("POSTGRES__HOST", "u@h"), ("POSTGRES__HOST", "a b"), ("POSTGRES__HOST", ""), ("POSTGRES__PORT", "0"),
        ("CLICKHOUSE__URL", "tcp://h:9000"), ("CLICKHOUSE__URL", "h:8123"), ("CLICKHOUSE__URL", "http://"), ("CLICKHOUSE__URL", ""), ("CLICKHOUSE__URL", "http://h:8123x"),
        ("CLICKHOUSE__URL", "http://:8123"), ("MQTT__URL", "h:1883"), ("MQTT__URL", "mqtt://h:1883:1883"), ("MQTT__URL", "ssl://h"), ("EXTRACT__URL", "oracle://h"),
        ("KAFKA__BOOTSTRAP_SERVERS", ""), ("KAFKA__BOOTSTRAP_SERVERS", "kafka://h:9092"), ("KAFKA__BOOTSTRAP_SERVERS", "h:x"), ("KAFKA__BOOTSTRAP_SERVERS", "h:1, h:99999"),
        ("KAFKA__BOOTSTRAP_SERVERS", "::1:9092"), ("WEB__PUBLIC_URL", "https://[x"), ("WEB__PUBLIC_URL", "https://h:x"), ("WEB__PUBLIC_URL", "plant.example"),
        ("WEB__PUBLIC_URL", "https://"), ("POSTGRES__HOST", "h:5432"), ("POSTGRES__HOST", "h1,h2"), ("POSTGRES__HOST", "[::1]"), ("CLICKHOUSE__URL", "http://h1:1,h2:2"),
    ],
)  # fmt: skip
def test_what_is_no_address_is_one_line_that_names_the_setting(monkeypatch, name, value):
    monkeypatch.setenv(P + name, value)
    with pytest.raises(SettingsError) as told:
        load()
    assert str(told.value).startswith((f"{P}{name}: ", f"{P}{name.partition('__')[0]}: "))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("POSTGRES__URL", "postgres://h/d"), ("POSTGRES__URL", "postgresql:///d?host=/run/postgresql"), ("POSTGRES__URL", "postgresql://u:p@h1:1,h2:2/d?target_session_attrs=any"),
        ("POSTGRES__URL", "postgresql://u@[::1]:5432/d"), ("POSTGRES__URL", "POSTGRESQL://h"), ("POSTGRES__HOST", "::1"), ("POSTGRES__HOST", "/run/postgresql"),
        ("CLICKHOUSE__URL", "http://[2001:db8::1]:8123/"), ("CLICKHOUSE__URL", "HTTPS://h"), ("MQTT__URL", "mqtts://u:p@h:8883"), ("MQTT__URL", ""),
        ("EXTRACT__URL", "mongodb://u:p@h1:1,h2:2/d?replicaSet=r"), ("EXTRACT__URL", "mongodb+srv://u:p@h/d"), ("EXTRACT__URL", ""),
        ("KAFKA__BOOTSTRAP_SERVERS", "a:1, b:2,"), ("KAFKA__BOOTSTRAP_SERVERS", "broker_1"), ("KAFKA__BOOTSTRAP_SERVERS", "[::1]:9092"),
        ("WEB__PUBLIC_URL", "https://plant.example:8443/base"), ("WEB__PUBLIC_URL", ""),
    ],
)  # fmt: skip
def test_what_is_an_address_is_taken(monkeypatch, name, value):
    monkeypatch.setenv(P + name, value)
    assert load()


def test_an_ipv6_host_stands_in_brackets_in_a_url():
    assert asyncpgs(Postgres(host="::1", user="u", password="p@").dsn) == ("::1", 5432, "u", "p@", "timeseries")


def test_user_and_password_of_the_url_win_over_the_fields_together():
    fields = {"user": "f", "password": "fp"}
    assert ClickHouse(url="http://u:up@h", **fields).parts[2:4] == ("u", "up")
    assert ClickHouse(url="http://u@h", **fields).parts[2:4] == ("u", "")
    assert ClickHouse(url="http://h", **fields).parts[2:4] == ("f", "fp")
    assert ClickHouse(url="http://h", password="p").parts[2:4] == ("default", "p")


def test_what_is_secret_is_known_in_both_its_forms(monkeypatch):
    monkeypatch.setenv(f"{P}CLICKHOUSE__URL", "http://u:p%2Fssword@h")
    monkeypatch.setenv(f"{P}HTTP__TOKEN", "t0ken-of-senders")
    monkeypatch.setenv(f"{P}MAIL__PASSWORD", "abc")
    known = secrets(load())
    assert {"p/ssword", "p%2Fssword", "t0ken-of-senders"} <= set(known)
    assert "abc" not in known
    assert known == sorted(known, key=len, reverse=True)


@given(text=st.text(max_size=40))
@settings(max_examples=500, deadline=None)
def test_any_text_is_an_address_or_a_value_error(text):
    for read in (
        lambda: urls.read(text, "http", "https"),
        lambda: urls.read(f"http://{text}", "http"),
        lambda: urls.places(text),
    ):
        with contextlib.suppress(ValueError):
            read()
