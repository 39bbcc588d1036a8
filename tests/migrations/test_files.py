"""Every migration file, by the rules of migrations/README.md. Needs no server."""

from pathlib import Path

import pytest

from preservarium.settings import Settings, load
from preservarium.stores.migrate import (
    MIGRATIONS,
    MigrationError,
    Store,
    lint,
    load_files,
    parse_file,
    split,
    substitute,
)

FILES: list[tuple[Store, Path]] = [
    (store, path)
    for store in ("postgres", "clickhouse")
    for path in sorted((MIGRATIONS / store).glob("*"))
    if path.name != "README.md"
]


@pytest.mark.parametrize(("store", "path"), FILES, ids=[f"{s}/{p.name}" for s, p in FILES])
def test_every_file_keeps_the_rules(store: Store, path: Path) -> None:
    migration = parse_file(store, path)
    assert lint(migration, load()) == []


@pytest.mark.parametrize(("store", "path"), FILES, ids=[f"{s}/{p.name}" for s, p in FILES])
def test_every_file_can_be_substituted_for_a_cluster(store: Store, path: Path) -> None:
    statements = parse_file(store, path).statements(load(clickhouse={"cluster": "main"}))
    assert all("{{" not in s.sql for s in statements)


@pytest.mark.parametrize("store", ["postgres", "clickhouse"])
def test_versions_are_unique_and_sorted(store: Store) -> None:
    versions = [m.version for m in load_files(store)]
    assert versions == sorted(set(versions))
    assert versions


def _file(tmp_path: Path, name: str, text: str, store: Store = "postgres") -> Path:
    folder = tmp_path / store
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "name",
    ["1_x.sql", "0001x.sql", "0001_X.sql", "0001_x.SQL", "0001ab_x.sql", "0001_.sql", "0001_x y.sql", "notes.txt"],
)
def test_a_misnamed_file_is_refused(tmp_path: Path, name: str) -> None:
    _file(tmp_path, name, "SELECT 1;")
    with pytest.raises(MigrationError, match="is named"):
        load_files("postgres", tmp_path)


def test_the_same_version_twice_is_refused(tmp_path: Path) -> None:
    _file(tmp_path, "0001_x.sql", "SELECT 1;")
    _file(tmp_path, "0001_y.sql", "SELECT 1;")
    with pytest.raises(MigrationError, match="0001 is taken"):
        load_files("postgres", tmp_path)


def test_header_lines_are_read(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        "0002a_post_x.sql",
        "-- Why.\n-- requires: plain\n-- no-transaction\n-- blocking\n\nSELECT 1;\n-- requires: timescaledb\n",
    )
    m = parse_file("postgres", path)
    assert (m.version, m.phase, m.requires, m.transactional, m.blocking) == ("0002a", "post", "plain", False, True)


def test_an_unknown_requirement_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MigrationError, match="neither timescaledb nor plain"):
        parse_file("postgres", _file(tmp_path, "0001_x.sql", "-- requires: oracle\nSELECT 1;"))


def test_line_ends_do_not_change_the_checksum(tmp_path: Path) -> None:
    unix = parse_file("postgres", _file(tmp_path, "0001_x.sql", "SELECT\n1;\n"))
    (tmp_path / "postgres" / "0001_x.sql").write_bytes(b"SELECT\r\n1;\r\n")
    assert parse_file("postgres", tmp_path / "postgres" / "0001_x.sql").checksum == unix.checksum


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SELECT 1; SELECT 2", ["SELECT 1", "SELECT 2"]),
        ("-- a; b\nSELECT 1 -- c;\n;", ["SELECT 1 -- c;"]),
        ("/* ; /* nested; */ ; */ SELECT 1;;", ["SELECT 1"]),
        ("SELECT ';', 'it''s;' ;", ["SELECT ';', 'it''s;'"]),
        ('SELECT "a;b";', ['SELECT "a;b"']),
        (r"SELECT '\';SELECT 2", [r"SELECT '\'", "SELECT 2"]),
        (r"SELECT E'\';', 2; SELECT 3", [r"SELECT E'\';', 2", "SELECT 3"]),
        ("DO $$ BEGIN; END $$; SELECT $1;", ["DO $$ BEGIN; END $$", "SELECT $1"]),
        ("DO $body$ a; $$ b; $$ $body$;", ["DO $body$ a; $$ b; $$ $body$"]),
        ("SELECT a$b$c; SELECT 2;", ["SELECT a$b$c", "SELECT 2"]),
        ("", []),
        ("-- only words", []),
    ],
)
def test_statements_are_cut_outside_quotes_and_comments(text: str, expected: list[str]) -> None:
    assert [s.sql for s in split(text)] == expected


def test_clickhouse_strings_escape_with_backslashes() -> None:
    assert [s.sql for s in split(r"SELECT '\';'; SELECT `a;b`", backslash_escapes=True)] == [
        r"SELECT '\';'",
        "SELECT `a;b`",
    ]


def test_statements_know_their_line() -> None:
    assert [(s.number, s.line) for s in split("-- head\n\nSELECT 1;\n\n  SELECT\n2;")] == [(1, 3), (2, 5)]


@pytest.mark.parametrize("text", ["SELECT 'a", "/* a", "$$ a", 'SELECT "a'])
def test_what_is_not_closed_is_an_error(text: str) -> None:
    with pytest.raises(MigrationError, match=r"line 1: .* is not closed"):
        split(text)


@pytest.fixture
def settings() -> Settings:
    return load(sink={"chunk_days": 7}, postgres={"user": "o'brien", "password": "x"}, clickhouse={"cluster": "c1"})


def test_settings_are_put_in(settings: Settings) -> None:
    assert substitute("a {{sink.chunk_days}} {{clickhouse.enabled}}", settings, "x") == "a 7 true"
    assert (
        substitute("{{clickhouse.on_cluster}} {{clickhouse.replicated}}M", settings, "x")
        == "ON CLUSTER 'c1' ReplicatedM"
    )
    assert substitute("{{clickhouse.on_cluster}}{{clickhouse.replicated}}M", load(), "x") == "M"
    assert substitute("{{clickhouse.dedup_window}}", settings, "x").startswith("replicated_deduplication_window = ")
    assert substitute("{{clickhouse.dedup_window}}", load(), "x").startswith("non_replicated_deduplication_window = ")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sink.no_such", "there is no setting"),
        ("nowhere.x", "there is no setting"),
        ("sink", "may not stand in SQL"),
        ("postgres.password", "may not stand in SQL"),
        ("postgres.user", "characters that may not stand in SQL"),
        ("Sink.X", "is not the name of a setting"),
        ("sink.__class__.x", "is not the name of a setting"),
        ("", "is not the name of a setting"),
    ],
)
def test_other_placeholders_are_refused(settings: Settings, name: str, reason: str) -> None:
    with pytest.raises(MigrationError, match=reason):
        substitute("{{" + name + "}}", settings, "x")


@pytest.mark.parametrize(
    ("store", "text", "fault"),
    [
        ("postgres", "BEGIN; SELECT 1;", "opens and closes the transaction"),
        ("postgres", "CREATE INDEX CONCURRENTLY i ON t (a);", "needs `-- no-transaction`"),
        ("postgres", "-- no-transaction\nCREATE INDEX CONCURRENTLY i ON t (a);", "may run twice"),
        ("postgres", "-- nothing", "has no statement"),
        ("clickhouse", "CREATE TABLE t (a Int8) ENGINE = Memory", "may run twice"),
        ("clickhouse", "INSERT INTO t VALUES (1)", "may run twice"),
        (
            "clickhouse",
            "ALTER TABLE t MODIFY SETTING non_replicated_deduplication_window = 9, x = 1;",
            "a cluster has other names",
        ),
        ("clickhouse", "-- requires: plain\nCREATE TABLE IF NOT EXISTS t (a Int8) ENGINE = Memory", "for PostgreSQL"),
    ],
)
def test_lint_finds(tmp_path: Path, store: Store, text: str, fault: str) -> None:
    found = lint(parse_file(store, _file(tmp_path, "0001_x.sql", text, store)), load())
    assert len(found) == 1
    assert fault in found[0]
