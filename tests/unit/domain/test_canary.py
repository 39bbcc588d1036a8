"""Who is in a share, what differs between two outcomes, and what limits decide."""

from types import SimpleNamespace
from typing import Any

import pytest

from preservarium.domain.canary import (
    EXAMPLES_MAX,
    LIMITS,
    STEPS,
    CanaryDoc,
    Counts,
    Seen,
    checked,
    decide,
    difference,
    readings_of,
    seen_by,
    sees,
    share_of,
)


def canary(percent: int = 10, name: str = "parser/acme", **limits: Any) -> CanaryDoc:
    kind, _, of = name.partition("/")
    return {
        "name": name, "kind": kind, "of": of, "candidate": {"name": of, "version": 2}, "percent": percent, "started_at": 0, "step_at": 0,
        "limits": {**LIMITS, **limits}, "rev": 7,  # type: ignore[typeddict-item]
    }  # fmt: skip


DEVICES = [f"{n:016x}" for n in range(4_000)]


def test_a_share_is_as_large_as_it_says_holds_the_smaller_ones_and_does_not_depend_on_spelling() -> None:
    chosen = {percent: {d for d in DEVICES if sees(canary(percent), d)} for percent in (*STEPS, 0)}
    assert not chosen[0]
    assert len(chosen[100]) == len(DEVICES)
    for smaller, larger in ((1, 10), (10, 50), (50, 100)):
        assert chosen[smaller] < chosen[larger]
        assert len(chosen[smaller]) / len(DEVICES) == pytest.approx(smaller / 100, abs=0.03)
    assert share_of("parser/acme", "70B3D57ED0AA0001") == share_of("parser/acme", "70:b3:d5:7e:d0:aa:00:01")
    assert {d for d in DEVICES if sees(canary(10, "parser/other"), d)} != chosen[10]
    share_of("parser/acme", "\ud800")  # whatever a device calls itself


def test_those_of_the_share_see_the_candidate_and_all_others_what_is_in_force() -> None:
    types = SimpleNamespace(
        parser=lambda name: {"name": name, "version": 1}, datatype=lambda name: {"name": name}, type=lambda name: {"name": name},
        canaries={"parser/acme": canary(50), "datatype/t": canary(50, "datatype/t")},
    )  # fmt: skip
    variants = set()
    for device in DEVICES[:200]:
        variant, seen = seen_by(types, device)
        variants.add(variant)
        assert (seen.parser("acme")["version"] == 2) is sees(types.canaries["parser/acme"], device)
        assert (seen.datatype("t").get("version") == 2) is sees(types.canaries["datatype/t"], device)
        assert seen.parser("other")["version"] == 1
        assert seen.type("T")["name"] == "T"
    assert len(variants) == 4
    types.canaries = {}
    assert seen_by(types, DEVICES[0]) == ((), types)
    assert seen_by(object(), DEVICES[0])[0] == ()
    assert isinstance(Seen(types, []), Seen)


def one(value: Any = 1.0, **more: Any) -> dict[Any, Any]:
    message = {"timestamp": 5}
    return readings_of(
        message, [{"component_type": "t", "pin_position": "-1", "value": value, "unit": "°C", "quality": 1, **more}]
    )


@pytest.mark.parametrize(
    ("current", "candidate", "said"),
    [
        (one(), one(), ""), (None, None, ""), (one(float("nan")), one(float("nan")), ""), (one(1), one(1.0), "t[-1]: 1 °C q1 → 1.0 °C q1"),
        (one(), one(2.0), "t[-1]: 1.0 °C q1 → 2.0 °C q1"), (one(), None, "refused now, and not before"), (None, one(), "refused before, and not now"),
        (one(), one(timestamp=6), "t[-1]: 1.0 °C q1 → none; t[-1]: none → 1.0 °C q1"), (one(quality=4, flags=["b", "a"]), one(quality=4, flags=["a", "b"]), ""),
        (one(), one(quality=4, flags=["range"]), "t[-1]: 1.0 °C q1 → 1.0 °C q4 range"),
    ],
)  # fmt: skip
def test_what_differs(current: Any, candidate: Any, said: str) -> None:
    assert difference(current, candidate) == said


def test_counts_and_examples() -> None:
    counts = Counts()
    for current, candidate in ((one(), one()), (one(), None), (None, one()), (one(), one(2.0)), (None, None)):
        counts.add(current, candidate, {"device_id": "d"})
    assert (counts.compared, counts.different, counts.broken, counts.mended) == (5, 3, 1, 1)
    for _ in range(20):
        counts.add(one(), None, {"device_id": "d"})
    assert len(counts.examples) == EXAMPLES_MAX


def test_limits_roll_back_and_go_on_by_themselves_only_where_they_are_asked_to() -> None:
    hold_us = int(LIMITS["hold_s"] * 1e6)
    assert decide(canary(), Counts(compared=99, different=99, broken=99), hold_us) is None
    gone = decide(canary(), Counts(compared=100, different=2, broken=2), 0)
    assert gone is not None
    assert gone.action == "rollback"
    assert gone.reason == "2 of 100 messages at 10 % are refused by the candidate alone: 2.00%, and 1.00% is the limit"
    assert decide(canary(), Counts(compared=100, different=100, broken=1), 10 * hold_us) is None
    other = decide(canary(differences=0.5), Counts(compared=100, different=51), 0)
    assert other is not None
    assert (other.action, "come out otherwise" in other.reason) == ("rollback", True)
    assert decide(canary(auto=True), Counts(compared=100), hold_us - 1) is None
    found = []
    for percent in (1, 10, 30, 50, 100):
        decision = decide(canary(percent, auto=True), Counts(compared=100), hold_us)
        assert decision is not None
        found.append((decision.action, decision.percent))
    assert found == [("step", 10), ("step", 50), ("step", 50), ("step", 100), ("promote", 0)]


def test_what_is_no_limit_is_said() -> None:
    assert checked(LIMITS, 1) == []
    assert len(checked({**LIMITS, "errors": 2, "differences": -1, "messages_min": 0, "hold_s": -1}, 0)) == 5
