"""The work-flow of files: who works on which file, at which stage; from whatever tells of it to one form.

An event says that a task (a file at a stage) was assigned, changed or deleted. Three kinds of record carry it:

- plain JSON: the fields of `TaskEvent`, an object a line;
- Debezium's change events (Debezium 2.x documentation, connectors for PostgreSQL, MySQL and MongoDB): the envelope with
  `before`, `after`, `op`, with its schema or without, or the row alone (its event flattening);
- a tombstone (a record without a value): the file that the key names is gone.

**Order.** Of a file, the current row is the one with the greatest (assigned_at, event_id), however late and however often
events come. An event id is the change's place in its source: a number, two numbers ("1700000000000000-17"), an
ObjectId or UUID; another text is ordered by its first 16 bytes. `version` turns both into one number, and sets events that
have even these in common in an order that depends on what they say and on nothing else. An event that deletes is an
event like the others: the file is gone while it is the newest.

Instants are µs since the epoch, UTC.
"""

import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Final, NoReturn, NotRequired, TypedDict

import orjson

from preservarium.domain.readings.instant import instant_us
from preservarium.domain.readings.number import whole_number
from preservarium.domain.readings.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US
from preservarium.errors import ReasonCode, Reject

#: A task of such a status is completed, also where its source has no `completed_at`: then when it was changed.
DONE_STATUSES: Final = frozenset({"completed", "complete", "done", "finished", "closed"})

#: Names and codes are for people to read; a longer one is a mistake or an attack.
NAME_CHARS_MAX: Final = 255


class TaskEvent(TypedDict):
    """A line of `task_events`, keyed by file: a task as it is after a change."""

    event_id: NotRequired[
        str
    ]  #: the change's place in its source; absent: made of updated_at and task_id, or the offset
    file_id: str
    stage: NotRequired[str]  #: absent only where it deletes
    status: NotRequired[str]  #: likewise
    employee_code: NotRequired[str | None]  #: None, "": nobody
    employee_name: NotRequired[str | None]  #: as the source knows it; the table of employees wins
    assigned_at: int  #: when the task was given out
    started_at: NotRequired[int | None]
    completed_at: NotRequired[int | None]
    updated_at: NotRequired[int | None]  #: when the source changed it
    task_id: NotRequired[str]  #: the source's own key of the task
    experiment_id: NotRequired[str | None]
    deleted: NotRequired[bool]  #: the task is no more


class Employee(TypedDict):
    """A line of `employees` (compacted), keyed by employee code."""

    employee_code: str
    name: str
    email: NotRequired[str | None]
    department: NotRequired[str | None]
    active: NotRequired[bool]  #: absent: true
    updated_at: NotRequired[int]  #: absent: when Kafka took the record
    event_id: NotRequired[str]  #: as in TaskEvent, among changes of one instant
    deleted: NotRequired[bool]


class TaskRow(TypedDict):
    """A checked event: a row of the table `task_events`."""

    file_id: str
    event_id: str
    assigned_at: int
    version: int  #: greater is newer; below 2**256
    stage: str
    status: str
    employee_code: str
    employee_name: str
    started_at: int | None
    completed_at: int | None
    changed_at: int  #: when the source changed it; where it does not say, when it was assigned
    task_id: str
    experiment_id: str
    deleted: int  #: 1: the file has no current row while this is its newest event


class EmployeeRow(TypedDict):
    """A checked employee: a row of the table `employees`."""

    employee_code: str
    version: int
    name: str
    email: str
    department: str
    active: int
    updated_at: int
    deleted: int


# --- order ------------------------------------------------------------------------------------------------------------

_PAIR: Final = re.compile(r"([0-9]{1,20})[-./:]([0-9]{1,20})")
_NUMBER: Final = re.compile(r"[0-9]{1,20}")
_HEX: Final = re.compile(r"[0-9a-f]{24}|[0-9a-f]{32}|[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", re.IGNORECASE)
_WORD: Final = 2**64


def event_order(event_id: str) -> int:
    """An event id as a number below 2**128 that keeps the order of ids of one kind.

    Numbers by value, pairs by the first and then the second, ObjectIds and UUIDs by value, other text by its first 16
    bytes as UTF-8. A number over 64 bits counts as text.
    """
    if _NUMBER.fullmatch(event_id):
        number = int(event_id)
        if number < _WORD:
            # As the first of a pair, so that "7" stands before "7-1".
            return number * _WORD
    elif pair := _PAIR.fullmatch(event_id):
        first, second = int(pair[1]), int(pair[2])
        if first < _WORD and second < _WORD:
            return first * _WORD + second
    elif _HEX.fullmatch(event_id):
        return int(event_id.replace("-", ""), 16)
    return int.from_bytes(event_id.encode()[:16].ljust(16, b"\0"))


def version(at: int, event_id: str, *content: Any) -> int:
    """One number for the order of (at, event_id): 64 bits of time, 128 of the id, 64 of a digest of id and content.

    Args:
        at: µs since the epoch, not negative.
        event_id: the change's place in its source.
        content: what the event says, as JSON can hold it; decides between events that differ in nothing else.
    """
    digest = blake2b(orjson.dumps((event_id, *content)), digest_size=8).digest()
    return (at << 192) | (event_order(event_id) << 64) | int.from_bytes(digest)


# --- records ----------------------------------------------------------------------------------------------------------


def task_rows(key: bytes | None, value: Any, *, offset: int, index: int, recorded_at: int) -> list[TaskRow]:
    """What a line says of tasks: usually one row, two where a task went from one file to another, none where nothing.

    Args:
        key: the record's key.
        value: the parsed line; None for a record without a value.
        offset: of the record: the event id of a line that names neither its own nor when it changed.
        index: of the line in its record.
        recorded_at: when Kafka took the record; a tombstone is as new as this.

    Raises:
        Reject: `envelope_invalid`, `envelope_not_json`, `timestamp_invalid`; the text says which field.
    """
    if value is None:
        file_id, is_row = _key_field(key, "file_id")
        if file_id:
            return [_task({"file_id": file_id}, f"{offset}-{index}", None, recorded_at, deleted=True)]
        if is_row:
            # Debezium's second record for a deletion; the first has said which file.
            return []
        _reject("a tombstone whose key names no file")
    change = _change(value)
    if change is None:
        return []
    before, after = change.before, change.after
    here = f"{offset}-{index}"
    if after is not None:
        place = change.place or _place(after) or here
        rows = [_task(after, place, change.at, recorded_at, deleted=change.deleted)]
        if before is not None and before.get("file_id") not in (None, "", after.get("file_id")):
            rows.append(_task(before, place, change.at, recorded_at, deleted=True))
        return rows
    gone = dict(before or {})
    if not gone.get("file_id"):
        gone["file_id"] = _key_field(key, "file_id")[0]
        if not gone["file_id"]:
            _reject("a deletion that does not name its file: the source must send the whole row as `before`")
    return [_task(gone, change.place or here, change.at, recorded_at, deleted=True)]


def employee_row(key: bytes | None, value: Any, *, offset: int, index: int, recorded_at: int) -> EmployeeRow | None:
    """What a line says of an employee; None where it says nothing. Arguments and errors as in `task_rows`."""
    place = f"{offset}-{index}"
    if value is None:
        code, is_row = _key_field(key, "employee_code")
        if code:
            return _employee({"employee_code": code}, place, recorded_at, deleted=True)
        if is_row:
            return None
        _reject("a tombstone whose key names no employee")
    change = _change(value)
    if change is None:
        return None
    row = change.after if change.after is not None else dict(change.before or {})
    if not row.get("employee_code"):
        row = {**row, "employee_code": _key_field(key, "employee_code")[0]}
    at = change.at or recorded_at
    return _employee(row, change.place or place, at, deleted=change.deleted or change.after is None)


class _Change:
    """A change of a row, out of its envelope."""

    __slots__ = ("after", "at", "before", "deleted", "place")

    def __init__(
        self,
        before: dict[str, Any] | None,
        after: dict[str, Any] | None,
        *,
        place: str = "",
        at: int | None = None,
        deleted: bool = False,
    ) -> None:
        self.before = before  #: the row before, where it is told
        self.after = after  #: the row after; None: deleted
        self.place = place  #: in the source's log, "" where it is not told
        self.at = at  #: when the source changed it
        self.deleted = deleted


#: Debezium: create, read (of a snapshot), update.
_WRITES: Final = frozenset({"c", "r", "u"})


def _change(value: Any) -> _Change | None:
    """The change that a line tells of; None where it is none (a message in the source's log)."""
    if not isinstance(value, dict):
        _reject("a line is a JSON object")
    if "payload" in value and value.keys() <= {"schema", "payload"}:
        value = value["payload"]
        if not isinstance(value, dict):
            _reject("the envelope's payload is not an object")
    op = value.get("op")
    if not isinstance(op, str) or "source" not in value:
        return _plain_change(value)
    if op == "m":
        return None
    source = value["source"] if isinstance(value["source"], dict) else {}
    before, after = _image(value.get("before"), "before"), _image(value.get("after"), "after")
    if op in _WRITES and after is None:
        _reject("a change without `after`: the source must send the whole document")
    if op not in _WRITES and op != "d":
        _reject(f"op {op!r:.20} cannot be followed")
    at = instant_us(source.get("ts_us"), "us") or instant_us(source.get("ts_ms") or value.get("ts_ms"), "ms")
    row = after if op != "d" else before
    return _Change(before, None if op == "d" else after, place=_source_place(source, row or {}), at=at)


def _plain_change(value: dict[str, Any]) -> _Change:
    row = {name: _bare(field) for name, field in value.items()}
    deleted = row.get("deleted", row.get("__deleted"))
    if deleted not in (None, True, False, 0, 1, "true", "false"):
        _reject("deleted is neither true nor false")
    gone = deleted in (True, 1, "true") or row.get("__op") == "d"
    at = instant_us(row.get("__source_ts_ms"), "ms") or _instant(row, "updated_at")
    place = row.get("event_id")
    if place is None or place == "":
        lsn = row.get("__lsn")
        place = f"{lsn}-{_low(row)}" if type(lsn) is int else ""
    elif isinstance(place, bool) or not isinstance(place, str | int):
        _reject("event_id is neither text nor a whole number")
    return _Change(None, row, place=_named("event_id", place), at=at, deleted=gone)


def _image(image: Any, name: str) -> dict[str, Any] | None:
    """A row of an envelope; MongoDB's are text in extended JSON."""
    if isinstance(image, str):
        try:
            image = orjson.loads(image)
        except orjson.JSONDecodeError as e:
            raise Reject(ReasonCode.ENVELOPE_NOT_JSON, f"{name}: {e}") from None
    if image is None:
        return None
    if not isinstance(image, dict):
        _reject(f"{name} is not an object")
    return {field: _bare(value) for field, value in image.items()}


def _bare(value: Any) -> Any:
    """A value out of MongoDB's extended JSON (v2, canonical and relaxed)."""
    while isinstance(value, dict) and len(value) == 1:
        (kind, inner), *_ = value.items()
        if kind == "$date":
            milliseconds = _bare(inner)
            return instant_us(milliseconds, "ms")
        if kind in ("$numberLong", "$numberInt"):
            return whole_number(inner) if isinstance(inner, str) else None
        if kind != "$oid":
            break
        value = inner
    return value


def _source_place(source: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Where in the source's log a change stands: PostgreSQL's LSN, MySQL's binary log, MongoDB's operation log."""
    lsn = source.get("lsn")
    if type(lsn) is int:
        # All rows of a snapshot have one LSN.
        return f"{lsn}-{_low(row)}"
    file, position = source.get("file"), source.get("pos")
    if isinstance(file, str) and type(position) is int:
        number = file.rpartition(".")[2]
        at_row = source.get("row")
        if number.isdecimal():
            # Positions have 32 bits, in some versions more; rows of one event are few.
            return f"{number}-{position << 16 | (at_row if type(at_row) is int else 0)}"
    milliseconds, order = source.get("ts_ms"), source.get("ord")
    if type(milliseconds) is int and type(order) is int:
        return f"{milliseconds}-{order}"
    return ""


def _place(row: Mapping[str, Any]) -> str:
    """The event id of a row that names none: when it changed, "" where it does not say."""
    updated_at = _instant(row, "updated_at")
    return "" if updated_at is None else f"{updated_at}-{_low(row)}"


def _low(row: Mapping[str, Any]) -> int:
    """The row's own number, where it has one: tells rows of one instant apart."""
    for name in ("task_id", "id", "_id"):
        number = row.get(name)
        if isinstance(number, str) and _NUMBER.fullmatch(number):
            number = int(number)
        if type(number) is int and 0 <= number < _WORD:
            return number
    return 0


def _task(row: Mapping[str, Any], event_id: str, at: int | None, recorded_at: int, *, deleted: bool) -> TaskRow:
    file_id = _named("file_id", row.get("file_id"))
    if not file_id:
        _reject("file_id is missing")
    stage, status = _named("stage", row.get("stage")), _named("status", row.get("status"))
    assigned_at = _instant(row, "assigned_at")
    if not deleted:
        if not stage:
            _reject("stage is missing")
        if not status:
            _reject("status is missing")
        if assigned_at is None:
            raise Reject(ReasonCode.TIMESTAMP_INVALID, "assigned_at is missing")
    elif assigned_at is None:
        assigned_at = _within("the time of the deletion", at or recorded_at)
    changed_at = assigned_at if at is None else _within("updated_at", at)
    completed_at = _instant(row, "completed_at")
    if completed_at is None and status.casefold() in DONE_STATUSES:
        completed_at = changed_at
    result = TaskRow(
        file_id=file_id,
        event_id=event_id,
        assigned_at=assigned_at,
        version=0,
        stage=stage,
        status=status,
        employee_code=_named("employee_code", row.get("employee_code")),
        employee_name=_named("employee_name", row.get("employee_name")),
        started_at=_instant(row, "started_at"),
        completed_at=completed_at,
        changed_at=changed_at,
        task_id=_named("task_id", next((row[n] for n in ("task_id", "id", "_id") if row.get(n) is not None), "")),
        experiment_id=_named("experiment_id", row.get("experiment_id")),
        deleted=int(deleted),
    )
    result["version"] = version(assigned_at, event_id, list(result.values()))
    return result


def _employee(row: Mapping[str, Any], place: str, changed_at: int, *, deleted: bool) -> EmployeeRow:
    code = _named("employee_code", row.get("employee_code"))
    if not code:
        _reject("employee_code is missing")
    name = _named("name", row.get("name", row.get("employee_name")))
    if not name and not deleted:
        _reject("name is missing")
    active = row.get("active", True)
    if active not in (None, True, False):
        _reject("active is neither true nor false")
    updated_at = _instant(row, "updated_at")
    result = EmployeeRow(
        employee_code=code,
        version=0,
        name=name,
        email=_named("email", row.get("email")),
        department=_named("department", row.get("department")),
        active=int(active is None or bool(active)),
        updated_at=_within("updated_at", changed_at) if updated_at is None else updated_at,
        deleted=int(deleted),
    )
    result["version"] = version(result["updated_at"], place, list(result.values()))
    return result


# --- fields -----------------------------------------------------------------------------------------------------------


def _key_field(key: bytes | None, name: str) -> tuple[str, bool]:
    """(the field of that name, whether the key is an object): a key is the name itself, or Debezium's object."""
    if not key:
        return "", False
    try:
        text = key.decode()
    except UnicodeDecodeError:
        return "", False
    if not text.startswith(("{", '"')):
        return _named(name, text), False
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return _named(name, text), False
    if isinstance(value, str):
        return _named(name, value), False
    if "payload" in value and value.keys() <= {"schema", "payload"}:
        value = value["payload"]
    if not isinstance(value, dict):
        return "", True
    return _named(name, value.get(name)), True


def _named(name: str, value: Any) -> str:
    """A name or code as text; numbers are as good."""
    if value is None:
        return ""
    if type(value) is int:
        return str(value)
    if not isinstance(value, str):
        _reject(f"{name} is not text")
    if len(value) > NAME_CHARS_MAX:
        _reject(f"{name} has {len(value)} characters; it may have {NAME_CHARS_MAX}")
    return value


def _instant(row: Mapping[str, Any], name: str) -> int | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    at = instant_us(value)
    if at is None:
        raise Reject(ReasonCode.TIMESTAMP_INVALID, f"{name} {value!r:.80} is no instant")
    return _within(name, at)


def _within(name: str, at: int) -> int:
    if not TIMESTAMP_MIN_US <= at < TIMESTAMP_MAX_US:
        raise Reject(ReasonCode.TIMESTAMP_INVALID, f"{name} is not between 2000 and 2100: {at}")
    return at


def _reject(message: str) -> NoReturn:
    raise Reject(ReasonCode.ENVELOPE_INVALID, message)
