"""Registry documents as events, and the device records that a worker keeps."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.domain.registry.changes import difference, fold, fold_devices, rev_of

_documents = st.dictionaries(
    st.sampled_from("abcd"),
    st.none() | st.booleans() | st.integers(0, 2) | st.floats(0, 2) | st.lists(st.integers(0, 1)),
    max_size=4,
)


@given(st.lists(st.none() | _documents, max_size=6))
def test_the_fold_of_the_differences_is_the_last_state(states: list[dict[str, Any] | None]) -> None:
    events = []
    for before, after in zip([None, *states], states, strict=False):
        event = difference(before, after)
        if event is not None:
            events.append(event)
    folded = fold(None, events)
    last = states[-1] if states else None
    assert (folded is None) == (last is None)
    if last is not None:
        assert orjson.dumps(folded, option=orjson.OPT_SORT_KEYS) == orjson.dumps(last, option=orjson.OPT_SORT_KEYS)


def test_equal_documents_make_no_event() -> None:
    assert difference({"a": 1, "b": 2}, {"b": 2, "a": 1}) is None
    assert difference(None, None) is None


def test_true_is_not_one() -> None:
    assert difference({"a": 1}, {"a": True}) == ("changed", {"set": {"a": True}})


@pytest.mark.parametrize(
    ("state", "event"), [({"a": 1}, "created"), (None, "changed"), (None, "removed"), ({"a": 1}, "renamed")]
)
def test_an_event_that_does_not_fit_is_refused(state: dict[str, Any] | None, event: str) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        fold(state, [(event, {"doc": {}, "set": {}})])


def _doc(device_id: str, rev: int, **more: Any) -> bytes:
    return orjson.dumps({"device_id": device_id, "rev": rev, **more})


def test_only_newer_records_count() -> None:
    table = {b"a": _doc("a", 5)}
    puts, faults = fold_devices(
        [(b"a", _doc("a", 4), None), (b"a", _doc("a", 5), None), (b"b", _doc("b", 1), None)], table.get
    )
    assert puts == {b"b": _doc("b", 1)}
    assert faults == {}


def test_the_newest_of_a_batch_wins_whatever_its_order() -> None:
    puts, _ = fold_devices([(b"a", _doc("a", 7), None), (b"a", _doc("a", 6), None)], {}.get)
    assert puts == {b"a": _doc("a", 7)}


def test_a_removed_device_is_not_brought_back_by_an_older_record() -> None:
    puts, _ = fold_devices([(b"a", _doc("a", 3), None), (b"a", None, 4), (b"a", _doc("a", 3), None)], {}.get)
    mark = puts[b"a"]
    assert mark is not None
    assert orjson.loads(mark) == {"device_id": "a", "rev": 4, "deleted": True}
    again, _ = fold_devices([(b"a", _doc("a", 3), 3)], lambda _: mark)
    assert again == {}
    back, _ = fold_devices([(b"a", _doc("a", 5), 5)], lambda _: mark)
    assert back == {b"a": _doc("a", 5)}


def test_a_tombstone_without_revision_is_obeyed() -> None:
    assert fold_devices([(b"a", None, None)], {b"a": _doc("a", 9)}.get)[0] == {b"a": None}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (None, _doc("a", 1)),
        (b"", _doc("a", 1)),
        (b"a", b"{"),
        (b"a", b"[]"),
        (b"a", b'{"device_id":"a"}'),
        (b"a", b'{"device_id":"a","rev":"1"}'),
        (b"a", _doc("b", 1)),
        (b"\xff", _doc("a", 1)),
    ],
)
def test_foreign_records_are_faults_and_stop_nothing(key: bytes | None, value: bytes) -> None:
    puts, faults = fold_devices([(key, value, None), (b"z", _doc("z", 1), None)], {}.get)
    assert puts == {b"z": _doc("z", 1)}
    assert list(faults) == [0]


def test_a_device_has_a_record_by_the_canonical_form_of_its_address_too() -> None:
    doc = _doc("70-B3-D5-7E-D0-AA-00-01", 3)
    records = [(b"70-B3-D5-7E-D0-AA-00-01", doc, 3), (b"70b3d57ed0aa0001", doc, 3), (b"70B3D57ED0AA0001", doc, 3)]
    puts, faults = fold_devices(records, {}.get)
    assert puts == {b"70-B3-D5-7E-D0-AA-00-01": doc, b"70b3d57ed0aa0001": doc}
    assert list(faults) == [2]


def test_a_stored_value_that_cannot_be_read_is_replaced() -> None:
    assert fold_devices([(b"a", _doc("a", 1), None)], lambda _: b"garbage")[0] == {b"a": _doc("a", 1)}


def test_a_revision_is_a_whole_number() -> None:
    assert rev_of(None) is None
    assert rev_of(_doc("a", 3)) == 3
    with pytest.raises(ValueError, match="revision"):
        rev_of(b'{"rev": true}')
