"""Coordinates, ids and the watermark."""

from hypothesis import given
from hypothesis import strategies as st

from preservarium.domain.readings.lineage import (
    GENERATIONS_MAX,
    Coordinates,
    Marks,
    alarm_id,
    applied,
    coordinates_of,
    derivation_of,
    generation_state,
    identity,
    is_applied,
    message_id,
    take,
    transition_id,
)

MESSAGE = {
    "device_id": "d", "connector_mode": "MQTT", "topic": "", "timestamp": 5, "received_at": 6, "raw_partition": 1,
    "raw_offset": 20, "raw_index": 3, "parser": "p@1", "config_rev": 7, "generation": 0, "readings": [],
}  # fmt: skip


def test_ids_are_the_same_for_ever():
    # Stored rows carry these: a change of the algorithm would double every alarm.
    assert alarm_id("dev-1", "hot", "-1", 1_700_000_000_000_000, 0) == identity(
        "alarm", "dev-1", "hot", "-1", 1_700_000_000_000_000, 0
    )
    assert identity("a", "bc") == "7c1b431edccd581aadb0f33676f776e6"
    assert identity("a", "bc") != identity("ab", "c")
    assert transition_id("x", "raised", 1) != transition_id("x", "raised", 2)


def test_a_derivation_names_what_made_the_value():
    reading = {"component_type": "t", "pin_position": "0", "value": 1.0, "unit": ""}
    derivation = derivation_of(MESSAGE, reading)
    assert derivation.timestamp == 5
    assert derivation.raw == Coordinates(1, 20, 3) == coordinates_of(MESSAGE)
    assert str(derivation.raw) == "1:20:3"
    assert derivation_of(MESSAGE, {**reading, "timestamp": 4}).timestamp == 4
    assert derivation_of({**MESSAGE, "generation": 1}, reading).id != derivation.id
    assert derivation_of({**MESSAGE, "generation": 1}, reading).series == derivation.series
    assert message_id(MESSAGE) != message_id({**MESSAGE, "raw_index": 4})


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 3)), max_size=60))
def test_the_watermark_passes_each_position_once_and_only_forward(positions: list[tuple[int, int, int]]):
    marks: Marks = {}
    passed: dict[int, list[tuple[int, int]]] = {}
    for partition, offset, line in positions:
        if not is_applied(marks, str(partition), offset, line):
            applied(marks, str(partition), offset, line)
            passed.setdefault(partition, []).append((offset, line))
    for list_ in passed.values():
        assert list_ == sorted(set(list_))
    assert marks == {str(p): list(x[-1]) for p, x in passed.items()}


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.integers(0, 9), st.integers(0, 3)), max_size=60))
def test_a_message_is_taken_where_its_position_was_not_applied_and_by_where_it_was_released(
    messages: list[tuple[bool, int, int, int]],
):
    marks: Marks = {}
    step_by_step: Marks = {}
    for released, partition, offset, index in messages:
        raw = {"raw_partition": partition, "raw_offset": offset, "raw_index": index}
        message = {**raw, "raw_offset": 0, "released": [offset, index]} if released else raw
        position = ("released" if released else str(partition)), offset, index
        assert take(marks, message) is not is_applied(step_by_step, *position)
        applied(step_by_step, *position)
        assert marks == step_by_step


def test_a_mark_never_goes_back():
    marks: Marks = {"0": [5, 5]}
    applied(marks, "0", 4, 9)
    applied(marks, "0", 5, 4)
    assert marks == {"0": [5, 5]}


def test_the_live_generation_is_never_displaced():
    kept: dict[str, list[int]] = {}
    for generation in range(10):
        generation_state(kept, generation, list).append(generation)
    assert list(kept) == ["0", "7", "8", "9"]
    assert len(kept) == GENERATIONS_MAX
    assert generation_state(kept, 0, list) == [0]
