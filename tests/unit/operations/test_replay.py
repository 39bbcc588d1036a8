"""Which stage is set back how, and what a plan says of it."""

import re
from pathlib import Path

import pytest

from preservarium.cli.replay import _target
from preservarium.cli.trace import _coordinates
from preservarium.operations.replay import (
    DERIVING,
    REFUSED,
    SINKS,
    STAGES,
    SYNCS,
    Place,
    Plan,
    ReplayError,
    Way,
    _says,
    way_of,
)
from preservarium.settings import Settings

REFERENCE = Path(__file__).parents[3] / "docs" / "reference" / "stages.md"


def declared() -> dict[str, str]:
    """Stage -> the column of its state, as the agents declare it."""
    rows = re.findall(r"^\| ([\w-]+) \| `[a-z]+/[a-z_]+[.]py` \|.*\| (.*?) \|$", REFERENCE.read_text(), re.MULTILINE)
    return dict(rows)


def test_every_stage_is_known() -> None:
    assert set(STAGES) == set(declared())
    assert len(STAGES) == len(set(STAGES))


def test_a_stage_is_set_back_where_it_keeps_its_position() -> None:
    for stage, state in declared().items():
        if stage in REFUSED:
            with pytest.raises(ReplayError, match=f"stage {stage} is not set back"):
                way_of(stage)
        elif state.startswith("offsets in the database"):
            assert way_of(stage) is Way.DATABASE, stage
        elif state.startswith("bounds of the batch"):
            assert way_of(stage) is Way.GROUP, stage
        else:
            assert way_of(stage) is Way.GENERATION, stage
    assert (*SINKS, *SYNCS, *DERIVING, *REFUSED) == STAGES


def test_a_stage_that_there_is_not() -> None:
    with pytest.raises(ReplayError, match="there is no stage normalise; there are: sink,"):
        way_of("normalise")


@pytest.mark.parametrize(
    ("place", "again", "skipped"),
    [
        (Place(0, 100, 80, 20), 60, 0),
        (Place(0, 100, 80, 80), 0, 0),
        (Place(0, 100, 80, 90), 0, 10),
        (Place(30, 100, 10, 30), 0, 0),  # what retention has deleted is not skipped by us
        (Place(30, 100, None, 30), 0, 0),
        (Place(30, 100, None, 50), 0, 20),
    ],
)
def test_what_is_read_again_and_what_never(place: Place, again: int, skipped: int) -> None:
    assert (place.again, place.skipped) == (again, skipped)


def test_a_plan_says_where_the_position_is_and_what_follows() -> None:
    sink = Plan(
        "sink", Way.DATABASE, "iot_validated_data", "earliest", {0: Place(0, 9, 5, 0)}, group="g-sink", members=2
    )
    said = " ".join(_says(sink, Settings()))
    assert "sink_offsets" in said
    assert "5 records are read again" in said
    assert "Workers run (2 in the group)" in said
    forward = Plan("sink", Way.DATABASE, "iot_validated_data", "x", {0: Place(0, 9, 5, 7)})
    assert "NEVER be stored" in " ".join(_says(forward, Settings()))
    sync = Plan("sync", Way.GROUP, "iot_validated_data", "x", {0: Place(0, 9, 5, 0)}, group="g-sync", members=1)
    said = " ".join(_says(sync, Settings()))
    assert "rows that ClickHouse holds are left out" in said
    assert "Stop them first" in said
    generation = Plan("validate", Way.GENERATION, "iot_raw_data", "x", {0: Place(0, 9, None, 2)}, generation=4)
    said = " ".join(_says(generation, Settings()))
    assert "Setting back the offset of validate would derive nothing" in said
    assert "generation 4 is opened: 7 raw records" in said
    assert (generation.records, generation.skipped) == (7, 0)


def test_targets() -> None:
    assert _target("earliest").earliest
    assert _target("41").offset == 41
    assert _target("2026-11-30T10:00:00Z").at_us == 1_796_032_800_000_000
    assert _target("1796032800000000").at_us == 1_796_032_800_000_000
    assert _target("2h").at_us is not None
    with pytest.raises(Exception, match="neither an instant"):
        _target("yesterday")


@pytest.mark.parametrize(("text", "found"), [("3:41", (3, 41, None)), ("3:41:2", (3, 41, 2)), ("3/41/2", (3, 41, 2))])
def test_raw_coordinates(text: str, found: tuple[int, int, int | None]) -> None:
    assert _coordinates(text) == found


@pytest.mark.parametrize("text", ["", "3", "3:", "a:1", "1:2:3:4", "-1:2", "1:²", f"1:{'9' * 19}", f"{2**31}:0"])
def test_what_are_no_raw_coordinates(text: str) -> None:
    with pytest.raises(Exception, match="--raw"):
        _coordinates(text)
