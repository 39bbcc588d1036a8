"""The note that `up` leaves for other shells: who may read it, what it says, and when it counts."""

import json
import os
import stat
import subprocess
import sys

import pytest

from preservarium.embedded.guard import started_at
from preservarium.embedded.running import FILE, Running, addresses, find, named, shareable
from preservarium.settings import Settings, load


@pytest.fixture
def settings(monkeypatch, tmp_path):
    password = tmp_path / "password"
    password.write_text("s3cret\n")
    url = tmp_path / "url"
    url.write_text("http://default:t0psecret@127.0.0.1:20002\n")
    for name, value in {
        "KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:20001", "KAFKA__TOPIC_PREFIX": "site1.",
        "POSTGRES__HOST": "127.0.0.1", "POSTGRES__PORT": "20003", "POSTGRES__DATABASE": "preservarium",
        "POSTGRES__PASSWORD_FILE": str(password), "CLICKHOUSE__URL_FILE": str(url),
        "WEB__OPERATOR_TOKEN": "tok3n", "MAIL__PASSWORD": "mailsecret", "ANOMALY__ENABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"PRESERVARIUM_{name}", value)
    return load()


@pytest.fixture
def note(tmp_path, settings):
    embedded = {
        "postgres": {"PRESERVARIUM_POSTGRES__PASSWORD_FILE": str(tmp_path / "password")},
        "clickhouse": {"PRESERVARIUM_CLICKHOUSE__URL_FILE": str(tmp_path / "url")},
    }
    return Running.ours(tmp_path, "http://127.0.0.1:6066").serving(settings, embedded)


def test_only_its_owner_may_read_it_and_no_secret_is_in_it(note, tmp_path):
    note.write()
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600
    text = (tmp_path / FILE).read_text()
    for secret in ("s3cret", "t0psecret", "tok3n", "mailsecret"):
        assert secret not in text
    found = find(tmp_path)
    assert found == note
    assert found.addresses == {
        "kafka": "127.0.0.1:20001", "postgres": "127.0.0.1:20003/preservarium", "clickhouse": "127.0.0.1:20002",
    }  # fmt: skip
    assert found.variables["PRESERVARIUM_KAFKA__TOPIC_PREFIX"] == "site1."
    assert found.variables["PRESERVARIUM_ANOMALY__ENABLED"] == "true"
    assert found.variables["PRESERVARIUM_POSTGRES__PASSWORD_FILE"] == str(tmp_path / "password")
    assert "PRESERVARIUM_DATA_DIR" not in found.variables
    assert found.secretive == frozenset()
    assert [p.name for p in tmp_path.iterdir() if FILE in p.name] == [FILE]  # written as a whole


def test_what_is_given_with_a_secret_is_named(settings, tmp_path):
    given = Running.ours(tmp_path, "").serving(settings, {})
    assert given.secretive == {"postgres", "clickhouse"}


def test_it_goes_with_its_process(note, tmp_path):
    note.write()
    note.remove()
    assert find(tmp_path) is None
    assert not (tmp_path / FILE).exists()


def _left_behind(note, tmp_path, **other):
    note.write()
    document = json.loads((tmp_path / FILE).read_text()) | other
    (tmp_path / FILE).write_text(json.dumps(document))


def test_a_note_that_was_left_behind_counts_for_nothing(note, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    _left_behind(note, tmp_path, pid=ended.pid)
    assert find(tmp_path) is None
    # The pid is given to another process: a start time tells them apart.
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        _left_behind(note, tmp_path, pid=other.pid)
        assert find(tmp_path) is None
        _left_behind(note, tmp_path, pid=other.pid, started_at=started_at(other.pid))
        found = find(tmp_path)
        assert found is not None
        assert found.pid == other.pid
        note.remove()  # it is another one's
        assert (tmp_path / FILE).exists()
        other.communicate(b"\n")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pid": 1}', '{"pid": "x", "started_at": null}'])
def test_what_is_no_note_counts_for_nothing(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    assert find(tmp_path) is None


def test_the_note_of_a_start_says_how_far_it_is(tmp_path):
    Running.ours(tmp_path, "http://x").write()
    found = find(tmp_path)
    assert found is not None
    assert (found.state, found.pid, found.variables) == ("starting", os.getpid(), {})


def test_what_is_shared_is_what_is_not_the_default(monkeypatch):
    assert shareable(Settings()) == {}
    assert named(Settings()) == frozenset()
    monkeypatch.setenv("PRESERVARIUM_MQTT__URL", "mqtt://127.0.0.1:1884")
    assert shareable(load()) == {"PRESERVARIUM_MQTT__URL": "mqtt://127.0.0.1:1884"}
    monkeypatch.setenv("PRESERVARIUM_MQTT__URL", "mqtt://ann:pw@127.0.0.1:1884")
    assert shareable(load()) == {}


def test_addresses_are_told_without_credentials(monkeypatch):
    monkeypatch.setenv("PRESERVARIUM_POSTGRES__URL", "postgresql://ann:pw@db:5433/x?sslmode=require")
    monkeypatch.setenv("PRESERVARIUM_CLICKHOUSE__URL", "https://ann:pw@ch")
    monkeypatch.setenv("PRESERVARIUM_MQTT__ENABLED", "true")
    monkeypatch.setenv("PRESERVARIUM_MQTT__URL", "mqtts://ann:pw@broker")
    assert addresses(load()) == {
        "kafka": "localhost:9092", "postgres": "db:5433/x", "clickhouse": "ch:8443", "mqtt": "broker:8883",
    }  # fmt: skip
    monkeypatch.setenv("PRESERVARIUM_CLICKHOUSE__ENABLED", "false")
    assert "clickhouse" not in addresses(load())


def test_a_damaged_note_is_none(tmp_path):
    for text in ('{"pid": Infinity}', "[" * 5_000, '{"pid": 1e999}', "5"):
        (tmp_path / "running.json").write_text(text)
        assert find(tmp_path) is None
