"""What the migrations say to ClickHouse, read by ClickHouse's own parser: for one server and for a cluster.

No cluster is to be had here, so its text is parsed and not run. What a single server gets is run by every other test.
"""

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import clickhouse_connect
import pytest
from clickhouse_connect.driver.exceptions import DatabaseError

from preservarium.settings import load
from preservarium.stores.migrate import MIGRATIONS, parse_file, substitute
from preservarium.stores.migrate.clickhouse import _BOOKKEEPING_CLICKHOUSE

FILES = sorted((MIGRATIONS / "clickhouse").glob("*.sql"))
LAYOUTS = {"server": "", "cluster": "main"}


@pytest.fixture(scope="module")
def client(clickhouse: str) -> Any:
    u = urlsplit(clickhouse)
    client = clickhouse_connect.get_client(
        host=u.hostname, port=u.port, username=u.username or "default", password=u.password or "", dedicated_pool=True
    )
    yield client
    client.close()


def parsed(client: Any, sql: str) -> str:
    """The statement as the engine's parser writes it."""
    text: str = client.query("SELECT formatQuerySingleLine({sql:String})", parameters={"sql": sql}).result_rows[0][0]
    return text


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", FILES, ids=[p.name for p in FILES])
def test_every_statement_is_parsed_by_the_engine(client: Any, path: Path, layout: str) -> None:
    settings = load(clickhouse={"cluster": LAYOUTS[layout]})
    for statement in parse_file("clickhouse", path).statements(settings):
        text = parsed(client, statement.sql)
        creates = re.match(r"(CREATE|DROP|ALTER|EXCHANGE)", text) is not None
        clustered = "ON CLUSTER main" in text
        assert not creates or clustered == (layout == "cluster"), f"statement {statement.number}: {text}"
        tree = re.search(r"ENGINE = (\w*MergeTree)", text)
        if tree is not None:
            assert tree[1].startswith("Replicated") == (layout == "cluster"), f"statement {statement.number}: {text}"
            # A setting of the other layout is taken and does nothing: tokens would be ignored in silence.
            assert ("non_replicated_deduplication_window" in text) <= (layout == "server"), text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bookkeeping_is_parsed_by_the_engine(client: Any, layout: str) -> None:
    text = parsed(
        client, substitute(_BOOKKEEPING_CLICKHOUSE, load(clickhouse={"cluster": LAYOUTS[layout]}), "bookkeeping")
    )
    assert ("ON CLUSTER main" in text) == ("ReplicatedReplacingMergeTree(at)" in text) == (layout == "cluster")


def test_what_is_no_sql_is_refused(client: Any) -> None:
    """The check checks: the engine parses, and does not only pass the text on."""
    with pytest.raises(DatabaseError, match="Syntax error"):
        parsed(client, "CREATE TABLE IF NOT EXISTS t (a Int8) ENGIN = MergeTree ORDER BY a")
