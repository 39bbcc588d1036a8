"""Floods begin above ten annunciations in ten minutes and end below five, for each operator."""

from preservarium.domain.alarms.flood import EVERYBODY, Flood, Floods

S = 1_000_000


def test_a_flood_is_an_operators_and_everybodys():
    floods = Floods()
    for n in range(11):
        floods.take(n * 30 * S, ["day"] if n % 2 else ["day", "night", "day"])
    assert floods.now(300 * S) == {EVERYBODY: Flood(True, 11), "day": Flood(True, 11), "night": Flood(False, 6)}
    # 600 s after it, an annunciation does not count any more.
    assert floods.now(600 * S + 30 * 5 * S)[EVERYBODY] == Flood(True, 5)
    assert floods.now(600 * S + 30 * 6 * S)[EVERYBODY] == Flood(False, 4)
    # Between five and ten there is none that had not begun.
    for n in range(5):
        floods.take(800 * S + n, ["day"])
    assert floods.now(801 * S)["day"] == Flood(False, 9)


def test_annunciations_need_not_come_in_the_order_of_time():
    floods = Floods()
    for at in (900, 100, 950, 200):
        floods.take(at * S)
    assert floods.now(1_000 * S)[EVERYBODY] == Flood(False, 2)
