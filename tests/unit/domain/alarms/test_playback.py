"""How a device's stored readings are cut into messages makes no difference to what its rules say."""

from hypothesis import given, settings
from hypothesis import strategies as st

from preservarium.domain.alarms.history import Playback
from preservarium.domain.alarms.rules import compile_rules

S = 1_000_000
T = 1_700_000_000 * S
_COMMON = {"rev": 1, "component_type": "temperature", "severity": "major"}
_HIGH = {**_COMMON, "kind": "high", "threshold": 25.0}
RULES = {
    rule["name"]: rule
    for rule in (
        {**_HIGH, "name": "hot", "on_delay_s": 20, "deadband": 1},
        {**_HIGH, "name": "levels", "levels": [{"threshold": 28.0, "severity": "critical"}]},
        {**_COMMON, "name": "silent", "kind": "no_data", "no_data_s": 25},
        {**_HIGH, "name": "grouped", "group": "pump"},
        {**_COMMON, "name": "off", "kind": "low", "component_type": "flow", "threshold": 5.0, "group": "pump", "group_master": True},
        {**_HIGH, "name": "sum", "kind": "expression", "expression": "value + other", "threshold": 32.0,
         "inputs": {"other": {"component_type": "flow", "pin_position": "0"}}, "inputs_max_age_s": 60},
        {**_HIGH, "name": "waits", "lateness_s": 30, "group": "pump"},
    )
}  # fmt: skip


def rules(names):
    device = {"device_id": "d", "rev": 1, "type": "t", "enabled": True, "rules": {name: {} for name in names}}
    found = compile_rules(device, None, RULES.get, lambda _: None)
    assert not found.problems
    return found


def said(instants, names, cuts):
    """What the rules say of readings at instants, so many instants to a message."""
    told = []
    playback = Playback("d", rules(names), heard=told.extend)
    start = offset = 0
    while start < len(instants):
        part = instants[start : start + cuts[offset % len(cuts)]]
        start += len(part)
        offset += 1
        readings = [
            {"component_type": kind, "pin_position": pin, "value": value, "quality": 1, "timestamp": at}
            for at, values in part
            for (kind, pin), value in sorted(values.items())
        ]
        playback.take(
            {
                "generation": 0, "raw_partition": 0, "raw_offset": offset, "raw_index": 0, "timestamp": part[0][0],
                "received_at": part[-1][0], "readings": readings,
            }
        )  # fmt: skip
    history = playback.close(instants[-1][0] + 100 * S)
    lasting = (
        "alarm_id",
        "transition_id",
        "transition",
        "transition_at",
        "occurred_at",
        "cleared_at",
        "severity",
        "first_out",
    )
    key = lambda one: (one["transition_at"], one["rule"], one["pin_position"], one["sequence"])  # noqa: E731
    return history.tallies, history.spans, [[one[name] for name in lasting] for one in sorted(told, key=key)]


_SERIES = st.sampled_from([("temperature", "0"), ("temperature", "1"), ("flow", "0")])
_INSTANTS = st.lists(
    st.tuples(st.sampled_from([1, 10, 20, 30, 70]), st.dictionaries(_SERIES, st.floats(0, 30), min_size=1)),
    min_size=1,
    max_size=40,
).map(lambda gaps: [(T + sum(gap for gap, _ in gaps[: n + 1]) * S, values) for n, (_, values) in enumerate(gaps)])


@settings(deadline=None)
@given(
    _INSTANTS, st.sets(st.sampled_from(sorted(RULES)), min_size=1), st.lists(st.integers(1, 20), min_size=1, max_size=5)
)
def test_the_size_of_messages_makes_no_difference(instants, names, cuts):
    assert said(instants, sorted(names), cuts) == said(instants, sorted(names), [1])
