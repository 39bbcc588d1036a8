"""What `up` shows: the line that changes, and the addresses."""

from dataclasses import replace
from pathlib import Path

from preservarium.cli.up_screen import address_lines, progress_line
from preservarium.embedded.running import Running
from preservarium.embedded.supervise import Standing
from preservarium.operations.accounting_live import Count

COUNT = Count(505, 1_796, 1_793, {"clickhouse": 1_720, "postgres": 1_777}, 3)


def test_the_line_has_the_numbers_of_the_accounting():
    assert progress_line(11.2, COUNT, Standing(lag=23, rss_bytes=169 << 20, alive=1)) == (
        "   11 s  messages 505  standardized 1,796  validated 1,793  PostgreSQL 1,777  ClickHouse 1,720  errors 3  lag 23"
        "  worker 169 MiB"
    )


def test_the_lag_is_not_known_while_no_worker_answers():
    assert "errors 3  lag –  worker 0 MiB" in progress_line(11.2, COUNT, Standing())


def test_every_door_is_named():
    addresses = {"kafka": "127.0.0.1:20001", "postgres": "127.0.0.1:20003/preservarium"}
    note = Running(Path("/x"), 1, "1", "running", "http://127.0.0.1:6066", addresses)
    lines = address_lines(note, ".preservarium", "", "preservarium")
    assert lines[:4] == [
        "Console:    http://127.0.0.1:6066",
        "Readings:   POST http://127.0.0.1:6066/ingest",
        "Kafka:      127.0.0.1:20001",
        "PostgreSQL: 127.0.0.1:20003/preservarium   (preservarium db postgres)",
    ]
    assert not any(line.startswith(("ClickHouse", "MQTT", "Mail")) for line in lines)
    assert lines[-1].endswith(".preservarium: preservarium doctor")
    full = {**addresses, "clickhouse": "127.0.0.1:20002", "mqtt": "127.0.0.1:1883"}
    lines = address_lines(
        replace(note, addresses=full), ".preservarium", ".preservarium/mail", ".venv/bin/preservarium"
    )
    assert "ClickHouse: 127.0.0.1:20002   (.venv/bin/preservarium db clickhouse)" in lines
    assert "MQTT:       mqtt://127.0.0.1:1883   (devices/<address>/up)" in lines
    assert "Mail:       .preservarium/mail   (notices, a file each)" in lines
