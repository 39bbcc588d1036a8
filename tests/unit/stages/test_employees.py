"""The look-up table of employees: newest change first, whatever the order."""

import itertools
from dataclasses import dataclass
from typing import Any

import orjson
import pytest

from preservarium import topics
from preservarium.stages.employees import fold_employees
from preservarium.streaming.stage import Batch

AT = 1_760_000_000_000_000


@dataclass(frozen=True)
class Rec:
    offset: int
    value: bytes | None
    key: bytes | None = b"E1"
    timestamp: int = AT // 1000
    headers: tuple[tuple[str, bytes], ...] = ()


def employee(name: str, at: int, **fields: Any) -> bytes:
    return orjson.dumps({"employee_code": "E1", "name": name, "updated_at": at} | fields)


def fold(records: list[Rec], table: dict[bytes, bytes]) -> Any:
    effects = fold_employees(Batch(topics.EMPLOYEES.name, 0, records), table.get, table="employees", now_us=AT)
    table.update(effects.puts.get("employees", {}))
    return effects


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_newest_change_stays_in_any_order(order):
    changes = [employee("Ada", AT), employee("Ada L.", AT + 2), employee("", AT + 1, deleted=True)]
    table: dict[bytes, bytes] = {}
    for offset, i in enumerate(order):
        fold([Rec(offset, changes[i])], table)
    assert orjson.loads(table[b"E1"])["name"] == "Ada L."


def test_a_deletion_stays_as_a_row():
    table: dict[bytes, bytes] = {}
    fold([Rec(0, employee("Ada", AT - 5)), Rec(1, None)], table)
    assert orjson.loads(table[b"E1"])["deleted"] == 1
    assert fold([Rec(2, employee("Ada", AT - 5))], table).puts == {}


def test_what_is_no_employee_is_told():
    effects = fold([Rec(0, b"{torn"), Rec(1, employee("", AT)), Rec(2, employee("Ada", AT))], {})
    assert effects.refused == {"envelope_not_json": 1, "envelope_invalid": 1}
    assert len(effects.sends) == 2
    assert set(effects.puts["employees"]) == {b"E1"}
