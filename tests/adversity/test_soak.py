"""The short form of `make soak`: a cut, a kill and some thirty faults more within ten seconds, and nothing is lost.

The world is the whole one: Kafka, PostgreSQL, ClickHouse, a mail server and two workers with every agent on.
"""

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from soak.faults import BY_NAME, KINDS, Fault, plan, singles
from soak.run import Options, run

from preservarium.embedded.service import ServiceUnavailable

POISONS = BY_NAME["poison"].details

FAULTS = [
    Fault(1.0, "cut", "worker-1", 12.0),
    Fault(0.5, "kill", "worker-0"),
    Fault(2.0, "reply swallowed", "worker-1", detail="postgres"),
    Fault(3.0, "reply swallowed", "worker-1", detail="clickhouse"),
    Fault(3.0, "backends terminated", "postgres"),
    Fault(4.0, "reset", "worker-0", detail="postgres"),
    Fault(13.5, "backends terminated", "postgres"),
    Fault(13.5, "reply swallowed", "worker-1", detail="kafka"),
    *(Fault(0.4 + 0.4 * n, "poison", "records", detail=detail, seed=n) for n, detail in enumerate(POISONS)),
]


@pytest.mark.kafka
@pytest.mark.postgres
@pytest.mark.clickhouse
@pytest.mark.timeout(400)
async def test_faults_at_once_lose_and_double_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    began = time.monotonic()

    def say(text: str) -> None:
        said.append(f"{time.monotonic() - began:6.1f} s  {text}")

    tmp_path.chmod(0o755)
    try:
        report = await run(Options(seconds=120, workers=2, devices=12, bursting=100, rate=30), tmp_path, say, FAULTS)
    except ServiceUnavailable as e:
        pytest.skip(f"missing: {e}")
    with capsys.disabled():
        print("\n" + "\n".join(said[-20:]))
    assert [fault["kind"] for fault in report["faults"] if fault["skipped"]] == []
    assert report["result"]["good"], "\n".join(said)
    assert len(report["faults"]) == len(FAULTS)
    assert not any(report["deaths"].values()), "no fault here is a reason for a worker to end by itself"
    json.dumps(report)


def test_a_seed_is_a_plan_and_has_every_kind() -> None:
    first = plan(7, 1_800, 3)
    assert first == plan(7, 1_800, 3)
    assert first != plan(8, 1_800, 3)
    assert {fault.kind for fault in first} == {kind.name for kind in KINDS}
    assert all(0 < fault.at_s < 1_800 for fault in first)
    assert {fault.target for fault in first} >= {"worker-0", "worker-1", "worker-2", "kafka", "postgres", "clickhouse"}


def test_faults_of_a_lane_do_not_overlap() -> None:
    lanes: dict[Any, list[Fault]] = {}
    for fault in plan(7, 1_800, 3):
        lanes.setdefault((BY_NAME[fault.kind].lane, fault.target), []).append(fault)
    for faults in lanes.values():
        for one, following in pairwise(faults):
            assert one.at_s + one.for_s < following.at_s


def test_a_plan_of_some_kinds_has_no_other_and_an_unknown_one_is_refused() -> None:
    assert {fault.kind for fault in plan(7, 600, 2, ["kill", "cut"])} == {"kill", "cut"}
    with pytest.raises(ValueError, match="no kind of fault: kil"):
        plan(7, 600, 2, ["kil"])


def test_alone_is_each_kind_once() -> None:
    faults = singles(7, 3)
    assert sorted(fault.kind for fault in faults) == sorted(kind.name for kind in KINDS)
    assert faults == singles(7, 3) != singles(8, 3)
    assert [fault.kind for fault in singles(7, 3, ["cut"])] == ["cut"]
