"""The doctor before real servers."""

import asyncio

import pytest

from preservarium.cli.doctor import State, examine
from preservarium.settings import load


async def test_servers_that_answer_are_green_and_what_is_missing_is_said(
    kafka: str, pg_dsn: str, clickhouse: str, monkeypatch: pytest.MonkeyPatch, topic_prefix: str
) -> None:
    monkeypatch.setenv("PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS", kafka)
    monkeypatch.setenv("PRESERVARIUM_KAFKA__TOPIC_PREFIX", topic_prefix)
    monkeypatch.setenv("PRESERVARIUM_POSTGRES__URL", pg_dsn)
    monkeypatch.setenv("PRESERVARIUM_CLICKHOUSE__URL", clickhouse)
    found = {f.name: f for f in await asyncio.wait_for(examine(load(), up=False), 30)}
    states = {name: found[name].state for name in ("kafka", "postgres", "clickhouse", "clock skew")}
    assert set(states.values()) == {State.GREEN}, states
    assert found["topics"].state == State.YELLOW
    assert "migrate" in found["topics"].advice
    assert "PostgreSQL" in found["postgres"].found
    assert found["timescaledb"].state in (State.GREEN, State.YELLOW)


async def test_more_replicas_than_brokers_is_red(kafka: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from preservarium.cli.doctor import check_kafka

    monkeypatch.setenv("PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS", kafka)
    monkeypatch.setenv("PRESERVARIUM_KAFKA__REPLICATION", "3")
    first = (await check_kafka(load()))[0]
    assert (first.state, "REPLICATION" in first.advice) == (State.RED, True)
