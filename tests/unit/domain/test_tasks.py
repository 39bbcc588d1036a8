"""Task events and employees out of every form that they come in, and their order."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.domain.tasks import employee_row, event_order, task_rows, version
from preservarium.errors import ReasonCode, Reject

AT = 1_760_000_000_000_000
SEEN = AT + 5_000_000

TASK = {
    "file_id": "F1", "stage": "scan", "status": "assigned", "employee_code": "E2", "employee_name": "Bo",
    "assigned_at": AT, "event_id": "7",
}  # fmt: skip


def rows(value: Any, key: bytes | None = b"F1", *, offset: int = 41, index: int = 0) -> list[dict[str, Any]]:
    return [dict(r) for r in task_rows(key, value, offset=offset, index=index, recorded_at=SEEN)]


def refused(value: Any, key: bytes | None = b"F1") -> tuple[ReasonCode, str]:
    with pytest.raises(Reject) as caught:
        rows(value, key)
    return caught.value.code, str(caught.value)


def test_plain_json():
    (row,) = rows(TASK | {"completed_at": "2025-10-09T08:53:20Z", "id": 12, "updated_at": AT + 1})
    assert row | {"version": 0} == {
        "file_id": "F1", "event_id": "7", "assigned_at": AT, "version": 0, "stage": "scan", "status": "assigned",
        "employee_code": "E2", "employee_name": "Bo", "started_at": None, "completed_at": AT, "changed_at": AT + 1,
        "task_id": "12", "experiment_id": "", "deleted": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "event_id"),
    [
        ({"event_id": 8}, "8"),
        ({"event_id": None}, "41-0"),
        ({"event_id": None, "updated_at": AT + 9, "id": 12}, f"{AT + 9}-12"),
        ({"event_id": None, "updated_at": "2025-10-09T08:53:20Z"}, f"{AT}-0"),
    ],
)
def test_an_event_without_an_id_is_as_new_as_its_change_or_its_offset(fields, event_id):
    assert rows(TASK | fields)[0]["event_id"] == event_id


def test_a_status_that_says_done_is_a_completion():
    assert rows(TASK | {"status": "Done"})[0]["completed_at"] == AT
    assert rows(TASK | {"status": "done", "updated_at": AT + 4})[0]["completed_at"] == AT + 4
    assert rows(TASK | {"status": "open"})[0]["completed_at"] is None


def envelope(op: str, before: Any, after: Any, source: dict[str, Any]) -> dict[str, Any]:
    return {"before": before, "after": after, "op": op, "ts_ms": AT // 1000, "source": source}


POSTGRES = {"connector": "postgresql", "lsn": 24023128, "ts_ms": AT // 1000 + 7, "table": "tasks"}
ROW = {
    "id": 5, "file_id": "F1", "stage": "scan", "status": "done", "employee_code": "E1", "assigned_at": AT, "meta": "{}",
    "completed_at": "2025-10-09T09:00:00.5Z",
}  # fmt: skip


@pytest.mark.parametrize("schema", [True, False])
@pytest.mark.parametrize("op", ["c", "r", "u"])
def test_debezium_postgresql(op, schema):
    value = envelope(op, None, ROW, POSTGRES)
    (row,) = rows({"schema": {"type": "struct"}, "payload": value} if schema else value, b'{"id":5}')
    assert (row["event_id"], row["status"], row["changed_at"], row["completed_at"], row["task_id"]) == (
        "24023128-5", "done", AT + 7_000, AT + 400_500_000, "5",
    )  # fmt: skip


def test_debezium_deletions():
    gone = envelope("d", ROW, None, POSTGRES)
    (row,) = rows(gone, b'{"id":5}')
    assert (row["file_id"], row["assigned_at"], row["deleted"]) == ("F1", AT, 1)
    assert rows(None, b'{"schema":{},"payload":{"id":5}}') == []
    (row,) = rows(envelope("d", {"id": 5}, None, POSTGRES), b'{"file_id":"F9"}')
    assert (row["file_id"], row["assigned_at"]) == ("F9", AT + 7_000)
    assert refused(envelope("d", {"id": 5}, None, POSTGRES), b'{"id":5}') == (
        ReasonCode.ENVELOPE_INVALID,
        "a deletion that does not name its file: the source must send the whole row as `before`",
    )


def test_a_task_that_goes_to_another_file_leaves_the_one_it_had():
    after, before = rows(envelope("u", ROW, ROW | {"file_id": "F2"}, POSTGRES))
    assert [(r["file_id"], r["deleted"]) for r in (after, before)] == [("F2", 0), ("F1", 1)]


def test_debezium_mysql():
    source = {"connector": "mysql", "file": "mysql-bin.000003", "pos": 154, "row": 2, "ts_ms": AT // 1000}
    early = rows(envelope("c", None, ROW, source))[0]
    late = rows(envelope("u", ROW, ROW, source | {"file": "mysql-bin.000004", "pos": 4, "row": 0}))[0]
    assert early["event_id"] == f"000003-{154 << 16 | 2}"
    assert early["version"] < late["version"]


def test_debezium_mongodb():
    document = {
        "_id": {"$oid": "507f1f77bcf86cd799439011"}, "file_id": "F1", "stage": "ocr", "status": "open", "employee_code": 17,
        "assigned_at": {"$date": AT // 1000}, "started_at": {"$date": {"$numberLong": str(AT // 1000 + 1)}},
    }  # fmt: skip
    source = {"connector": "mongodb", "ts_ms": AT // 1000, "ord": 3}
    (row,) = rows(envelope("u", None, json.dumps(document), source), b'{"id":"{\\"$oid\\":\\"507f\\"}"}')
    assert (row["task_id"], row["event_id"], row["assigned_at"], row["started_at"], row["employee_code"]) == (
        "507f1f77bcf86cd799439011", f"{AT // 1000}-3", AT, AT + 1000, "17",
    )  # fmt: skip
    assert refused(envelope("u", None, None, source))[1].startswith("a change without `after`")
    assert refused(envelope("u", None, "{torn", source))[0] == ReasonCode.ENVELOPE_NOT_JSON


def test_flattened_rows():
    (row,) = rows(ROW | {"__deleted": "true", "__lsn": 9, "__source_ts_ms": AT // 1000})
    assert (row["event_id"], row["deleted"], row["changed_at"]) == ("9-5", 1, AT)
    assert rows(ROW | {"__deleted": "false", "__op": "u"})[0]["deleted"] == 0


def test_tombstones():
    (row,) = rows(None, b"F1")
    assert (row["file_id"], row["assigned_at"], row["event_id"], row["deleted"]) == ("F1", SEEN, "41-0", 1)
    assert rows(None, b'"F1"')[0]["file_id"] == "F1"
    assert refused(None, None)[0] == ReasonCode.ENVELOPE_INVALID


@pytest.mark.parametrize(
    ("value", "code", "text"),
    [
        ([], ReasonCode.ENVELOPE_INVALID, "a line is a JSON object"),
        (TASK | {"file_id": ""}, ReasonCode.ENVELOPE_INVALID, "file_id is missing"),
        (TASK | {"file_id": 1.5}, ReasonCode.ENVELOPE_INVALID, "file_id is not text"),
        (TASK | {"stage": None}, ReasonCode.ENVELOPE_INVALID, "stage is missing"),
        (TASK | {"status": None}, ReasonCode.ENVELOPE_INVALID, "status is missing"),
        (TASK | {"assigned_at": None}, ReasonCode.TIMESTAMP_INVALID, "assigned_at is missing"),
        (TASK | {"assigned_at": "soon"}, ReasonCode.TIMESTAMP_INVALID, "assigned_at 'soon' is no instant"),
        (TASK | {"assigned_at": 0}, ReasonCode.TIMESTAMP_INVALID, "assigned_at is not between 2000 and 2100: 0"),
        (TASK | {"stage": "x" * 256}, ReasonCode.ENVELOPE_INVALID, "stage has 256 characters; it may have 255"),
        (TASK | {"event_id": True}, ReasonCode.ENVELOPE_INVALID, "event_id is neither text nor a whole number"),
        (TASK | {"deleted": "perhaps"}, ReasonCode.ENVELOPE_INVALID, "deleted is neither true nor false"),
        (envelope("t", None, None, POSTGRES), ReasonCode.ENVELOPE_INVALID, "op 't' cannot be followed"),
        ({"schema": {}, "payload": 3}, ReasonCode.ENVELOPE_INVALID, "the envelope's payload is not an object"),
    ],
)
def test_what_cannot_be_used_says_why(value, code, text):
    assert refused(value) == (code, text)


def test_employees():
    def employee(value: Any, key: bytes | None = b"E1") -> Any:
        return employee_row(key, value, offset=3, index=0, recorded_at=SEEN)

    row = employee({"employee_code": "E1", "name": "Ada", "updated_at": AT, "department": "scan", "active": False})
    assert row | {"version": 0} == {
        "employee_code": "E1", "version": 0, "name": "Ada", "email": "", "department": "scan", "active": 0, "updated_at": AT,
        "deleted": 0,
    }  # fmt: skip
    assert employee({"employee_name": "Ada"})["name"] == "Ada"
    assert employee(None)["deleted"] == 1
    assert employee(None, b'{"id":1}') is None
    gone = employee(envelope("d", {"employee_code": "E1"}, None, POSTGRES))
    assert (gone["deleted"], gone["employee_code"]) == (1, "E1")
    assert gone["version"] > row["version"]
    with pytest.raises(Reject, match="name is missing"):
        employee({"employee_code": "E1"})


# --- order


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_numbers_and_pairs_keep_their_order(a, b):
    assert (event_order(str(a)) < event_order(str(b))) == (a < b)
    assert (event_order(f"{a}-1") < event_order(f"{b}-0")) == (a < b)
    assert (event_order(f"1-{a}") < event_order(f"1-{b}")) == (a < b)


@given(st.integers(0, 2**96 - 1), st.integers(0, 2**96 - 1))
def test_object_ids_keep_their_order(a, b):
    assert (event_order(f"{a:024x}") < event_order(f"{b:024x}")) == (a < b)


@given(st.text(max_size=40), st.text(max_size=40), st.integers(0, 2**51), st.integers(0, 2**51))
def test_a_version_is_a_number_of_256_bits_and_time_comes_first(a, b, at, later):
    one, two = version(at, a, "x"), version(later, b, "y")
    assert 0 <= event_order(a) < 2**128
    assert 0 <= one < 2**256
    if at != later:
        assert (one < two) == (at < later)


def test_equal_times_and_ids_have_an_order_that_only_the_content_makes():
    one, two = version(AT, "7", "a"), version(AT, "7", "b")
    assert one != two
    assert version(AT, "7", "a") == one
