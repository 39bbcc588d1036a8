"""What alarms did, counted from their transitions, and how two histories differ."""

from hypothesis import given
from hypothesis import strategies as st

from preservarium.domain.alarms.history import AlarmKey, History, compare

S = 1_000_000
KEY = AlarmKey("d", "hot", "-1")


def raised(at: int) -> dict[str, object]:
    return {
        "transition": "raised", "rule": "hot", "pin_position": "-1", "occurred_at": at, "cleared_at": None,
        "severity": "major", "recipients": ["ops"],
    }  # fmt: skip


def cleared(at: int) -> dict[str, object]:
    return {**raised(0), "transition": "cleared", "cleared_at": at}


def test_durations_are_counted_and_what_stands_lasts_to_the_end():
    history = History("d")
    history.take([raised(10 * S), cleared(40 * S), raised(100 * S)])
    history.close(160 * S)
    tally = history.tallies[KEY]
    assert (tally.raised, tally.cleared, tally.standing, tally.transitions) == (2, 1, 1, 3)
    assert (tally.active_us, tally.longest_us) == (90 * S, 60 * S)
    assert list(history.spans[KEY]) == [10 * S, 40 * S, 100 * S, 160 * S]
    assert history.told == {"ops": 3}


def test_chatter_is_the_third_within_a_minute():
    history = History("d")
    for at in (0, 30, 60, 61, 200, 230):
        history.take([raised(at * S), cleared(at * S + 1)])
    # 60 is the third since 0, 61 the third since 30; 200 and 230 are two.
    assert history.tallies[KEY].chatter == 2


def test_other_transitions_and_other_rules_do_not_count():
    history = History("d", frozenset({"cold"}))
    history.take([raised(S), {**raised(S), "transition": "superseded", "rule": "cold"}])
    assert history.tallies == {}


def test_ten_short_alarms_in_one_long_one_are_one_pair_and_nine_alone():
    long = [0, 100 * S]
    short = [t * S for n in range(10) for t in (n * 10, n * 10 + 1)]
    found = compare(long, short)
    assert (found.both, found.only_new, found.only_old) == (1, 0, 9)
    assert (found.active_new_us, found.active_old_us, found.longer_us) == (100 * S, 10 * S, 99 * S)


spans = st.lists(st.integers(1, 50), max_size=40).map(
    lambda steps: [sum(steps[: i + 1]) for i in range(len(steps) // 2 * 2)]
)


@given(spans, spans)
def test_every_alarm_is_paired_or_alone_and_the_sides_may_be_swapped(new, old):
    found, swapped = compare(new, old), compare(old, new)
    assert found.both + found.only_new == len(new) // 2
    assert found.both + found.only_old == len(old) // 2
    assert (found.both, found.only_new, found.only_old) == (swapped.both, swapped.only_old, swapped.only_new)
    assert found.longer_us == -swapped.longer_us
    assert compare(new, new).both == len(new) // 2
