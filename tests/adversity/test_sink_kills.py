"""A worker killed at every statement of its transactions: each reading is stored once, none is missing, each refusal told."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest
from sink_kill_app import messages, second_value
from sink_support import NOW_US, fetch, migrated_database

ROOT = Path(__file__).resolve().parents[2]


def expected(total: int) -> dict[tuple[str, str, int], tuple[float, int]]:
    """(device, pin, µs since the first) -> value, quality of the log's records in their order."""
    rows: dict[tuple[str, str, int], tuple[float, int]] = {}
    for offset in range(total):
        for line in messages(offset):
            for reading in line["readings"]:
                key = line["device_id"], reading["pin_position"], reading.get("timestamp", line["timestamp"]) - NOW_US
                if key not in rows or reading.get("revised"):
                    rows[key] = reading["value"], reading["quality"]
    return rows


@pytest.mark.parametrize("kills", [30, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
async def test_killed_at_every_statement(postgres, kills):
    with migrated_database(postgres) as dsn:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__).with_name("sink_kill_app.py")),
            dsn,
            str(kills),
            "7",
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
        assert process.returncode == 0
        said = json.loads(out)
        assert sum(said["kills"].values()) == kills
        rows = await fetch(dsn, "SELECT device_id, pin_position, timestamp, value, quality FROM iot_measurements")
        found = {(r[0], r[1], round(r[2].timestamp() * 1e6) - said["now_us"]): (r[3], r[4]) for r in rows}
        assert len(found) == len(rows)
        assert found == expected(said["total"])
        second = [told for offset in range(said["total"]) if (told := second_value(offset)) is not None]
        assert [tuple(line) for line in said["told"]] == second != []
        offsets = await fetch(dsn, "SELECT next_offset FROM sink_offsets")
        assert [r[0] for r in offsets] == [said["total"]]
        stale = await fetch(
            dsn,
            "SELECT count(*) FROM latest l JOIN (SELECT series_id, max(timestamp) AS t FROM measurements GROUP BY 1) m"
            " USING (series_id) WHERE l.timestamp <> m.t",
        )
        assert stale[0][0] == 0
    assert len(said["kills"]) >= 10, said["kills"]
    if kills >= 200:
        words = " | ".join(said["kills"])
        for statement in (
            "BEGIN",
            "INSERT INTO sink_offsets",
            "WITH moved",
            "COPY measurements",
            "COPY sink_staging",
            "COMMIT",
        ):
            assert statement in words, said["kills"]
