"""How long questions of the lineage graph take at ten million edges; what the edges of a batch add to its transaction.

    python bench/lineage_graph.py [--edges 10000000] [--questions 300]

Starts a PostgreSQL of its own, fills `data_lineage` with twelve partitions of batches as the sink writes them (two edges a batch, an alarm
for each tenth, an experiment for each hundredth), and asks what is above and below nodes drawn by chance. Prints JSON.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import asyncpg

from preservarium.domain.lineage_graph import OFFSET_BITS
from preservarium.embedded.postgres import Postgres
from preservarium.settings import load
from preservarium.stores import lineage_graph
from preservarium.stores.migrate import migrate_postgres

PARTITIONS = 12
RECORDS = 40  # of a batch of one partition
AT_ONCE = 250_000

_FILL = f"""
WITH batch AS (
  SELECT n, n % {PARTITIONS} AS p, n / {PARTITIONS} * {RECORDS} AS first, md5(n::text) AS id FROM generate_series($1::bigint, $2::bigint - 1) AS g(n))
INSERT INTO data_lineage (source_id, target_id, relationship_type, transformation_id, created_at, span)
SELECT s, t, r, x, now() - INTERVAL '20 days' + n * INTERVAL '0.3 s', span FROM batch CROSS JOIN LATERAL (VALUES
  ('raw:' || p || ':' || first || '-' || first + {RECORDS - 1}, 'validated:' || p || ':' || first || '-' || first + {RECORDS - 1}, 'validated',
   'normalize+validate', int8range(p * {1 << OFFSET_BITS} + first, p * {1 << OFFSET_BITS} + first + {RECORDS})),
  ('validated:' || p || ':' || first || '-' || first + {RECORDS - 1}, 'batch:' || id, 'stored', 'sink',
   int8range(p * {1 << OFFSET_BITS} + first, p * {1 << OFFSET_BITS} + first + {RECORDS})),
  (CASE WHEN n % 10 = 0 THEN 'raw:' || p || ':' || first || '-' || first END, 'alarm:' || id, 'raised', 'rule:hot',
   int8range(p * {1 << OFFSET_BITS} + first, p * {1 << OFFSET_BITS} + first + 1)),
  (CASE WHEN n % 100 = 0 THEN 'batch:' || id END, 'experiment:' || n % 3, 'belongs_to', 'sink', NULL)) AS v(s, t, r, x, span)
WHERE s IS NOT NULL
ON CONFLICT DO NOTHING"""


async def measure(dsn: str, edges: int, questions: int) -> dict[str, Any]:
    """Fill and ask."""
    connection = await asyncpg.connect(dsn, command_timeout=3_600)
    batches = int(edges / 2.11)
    started = time.perf_counter()
    for start in range(0, batches, AT_ONCE):
        await connection.execute(_FILL, start, min(batches, start + AT_ONCE))
    filled_s = time.perf_counter() - started
    await connection.execute("ANALYZE data_lineage")
    count = await connection.fetchval("SELECT count(*) FROM data_lineage")
    size = await connection.fetchval("SELECT pg_total_relation_size('data_lineage')")
    found: dict[str, Any] = {"edges": count, "bytes_per_edge": round(size / count), "fill_s": round(filled_s, 1)}
    numbers = [random.randrange(batches) for _ in range(questions)]
    ids = dict(
        zip(
            numbers,
            [r[0] for r in await connection.fetch("SELECT md5(n::text) FROM unnest($1::bigint[]) AS u(n)", numbers)],
            strict=True,
        )
    )
    asked = {
        "down raw:P:OFFSET": [(f"raw:{n % PARTITIONS}:{n // PARTITIONS * RECORDS + 7}", True) for n in numbers],
        "up batch:ID": [(f"batch:{ids[n]}", False) for n in numbers],
        "up alarm:ID": [(f"alarm:{ids[n]}", False) for n in numbers if n % 10 == 0],
        "up validated:P:OFFSET": [
            (f"validated:{n % PARTITIONS}:{n // PARTITIONS * RECORDS + 7}", False) for n in numbers
        ],
        "up experiment:ID, a third of all, cut": [(f"experiment:{n % 3}", False) for n in numbers[:20]],
    }
    for name, nodes in asked.items():
        times = []
        total = 0
        for node, down in nodes:
            begun = time.perf_counter()
            graph = await lineage_graph.walk(connection, node, down=down)
            times.append(1_000 * (time.perf_counter() - begun))
            total += len(graph.edges)
        times.sort()
        assert total >= len(nodes), name
        found[name] = {
            "n": len(times),
            "p50_ms": round(times[len(times) // 2], 2),
            "p99_ms": round(times[int(len(times) * 0.99)], 2),
            "max_ms": round(times[-1], 2),
        }
    await connection.close()
    return found


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edges", type=int, default=10_000_000)
    parser.add_argument("--questions", type=int, default=300)
    arguments = parser.parse_args()
    random.seed(1)
    directory = Path(tempfile.mkdtemp(prefix="preservarium-bench-"))
    server = Postgres(
        directory / "postgres", settings={"shared_buffers": "256MB", "max_wal_size": "4GB", "fsync": "off"}
    )
    server.start()
    try:
        dsn = server.dsn()
        asyncio.run(migrate_postgres(load(postgres={"url": dsn})))
        result = asyncio.run(measure(dsn, arguments.edges, arguments.questions))
        print(json.dumps({"cpus": os.cpu_count(), "load": os.getloadavg()[0], **result}, indent=2))
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
