"""The handler of the employees stage: of each employee the newest change stays, whatever the order."""

from collections.abc import Callable
from typing import Any

import orjson

from preservarium.domain.readings.json_text import to_bytes
from preservarium.domain.tasks import employee_row
from preservarium.errors import Reject
from preservarium.streaming.records import error_line, lines_of, loads, refuse
from preservarium.streaming.stage import Batch, Effects

#: Digits of a version (domain/tasks.py) in hexadecimal, so that text compares as numbers do; JSON has no numbers so long.
_VERSION_DIGITS = 64


def fold_employees(batch: Batch, get: Callable[[bytes], bytes | None], *, table: str, now_us: int) -> Effects:
    """Rows of the table `employees` after a batch, and error lines for what is none.

    A deletion stays as a row, so that a change from before it does not bring the employee back.

    Args:
        batch: records of the topic `employees`.
        get: the row as it is stored, by employee code.
        table: the table's name.
        now_us: named in error lines.
    """
    effects = Effects()
    rows: dict[bytes, dict[str, Any]] = {}
    for record in batch.records:
        for index, raw in enumerate(lines_of(record.value)):
            try:
                row = employee_row(
                    record.key,
                    None if raw is None else loads(raw),
                    offset=record.offset,
                    index=index,
                    recorded_at=record.timestamp * 1_000,
                )
            except Reject as e:
                line = error_line(
                    "employees", e.code, str(e), topic=batch.topic, partition=batch.partition, record=record, index=index,
                    raw=raw, now_us=now_us,
                )  # fmt: skip
                refuse(effects, line)
                continue
            if row is None:
                continue
            key = row["employee_code"].encode()
            new = {**row, "version": f"{row['version']:0{_VERSION_DIGITS}x}"}
            known = rows.get(key)
            if known is None and (stored := get(key)) is not None:
                known = orjson.loads(stored)
            if known is None or known["version"] < new["version"]:
                rows[key] = new
    for key, new in rows.items():
        effects.put(table, key, to_bytes(new))
    return effects
