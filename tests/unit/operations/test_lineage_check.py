"""What a verification counts, and what of a record is read."""

import pytest

from preservarium.domain.quality.rederivation import Difference, Status, StoredReading, Unverifiable
from preservarium.domain.readings.lineage import Coordinates
from preservarium.operations.lineage_check import EXAMPLES_MAX, Report
from preservarium.operations.raw_records import GAP_MAX, _runs
from preservarium.operations.rederive import Verdict, _better, _legacy
from preservarium.operations.trace import rederivation_text

ROW = StoredReading(
    "d", "MQTT", "t", "-1", 5, 1.5, None, "", "", 2, (), 7, Coordinates(0, 1, 0), "decoded_iot_data@1", 0, "", 0, False, None
)  # fmt: skip
SAME = Verdict(Status.IDENTICAL)
GONE = Verdict(Status.UNVERIFIABLE, Unverifiable.RAW_GONE)
NONE = Verdict(Status.UNVERIFIABLE, Unverifiable.NO_CONFIGURATION, text="device d is not registered")
SHARED = Verdict(Status.UNVERIFIABLE, Unverifiable.OTHER_MESSAGES)
OTHER = Verdict(Status.DIFFERENT, differences=(Difference("value", 1.0, 2.0),))


def test_shares() -> None:
    report = Report(0, 10)
    assert (report.same, report.share(report.identical)) == (True, 0.0)
    for verdict, times in ((SAME, 6), (GONE, 3), (NONE, 1)):
        for _ in range(times):
            report.add(ROW, verdict)
    assert (report.checked, report.share(report.identical), report.same) == (10, 0.6, True)
    assert report.unverifiable == {"raw_gone": 3, "no_configuration": 1}
    for _ in range(EXAMPLES_MAX + 5):
        report.add(ROW, OTHER)
    assert (report.different, len(report.examples), report.same) == (EXAMPLES_MAX + 5, EXAMPLES_MAX, False)


@pytest.mark.parametrize(
    ("before", "now", "counts"),
    [
        (None, OTHER, OTHER),
        (OTHER, SAME, SAME),
        (NONE, OTHER, OTHER),
        (OTHER, NONE, OTHER),
        (NONE, NONE, NONE),
        (NONE, SAME, SAME),
    ],
)
def test_of_several_states_of_the_registry_the_one_that_gives_the_reading_counts(
    before: Verdict | None, now: Verdict, counts: Verdict
) -> None:
    assert _better(before, now) is counts


def test_a_verdict_for_people() -> None:
    assert rederivation_text(SAME).endswith("bit by bit the same")
    assert rederivation_text(NONE).endswith("(device d is not registered)")
    assert rederivation_text(OTHER).endswith("DIFFERENT in value (1.0 is stored, 2.0 comes out)")


def test_offsets_that_are_near_are_read_through() -> None:
    assert _runs([]) == []
    assert _runs([3, 4, 4 + GAP_MAX, 5 + 2 * GAP_MAX]) == [[3, 4, 4 + GAP_MAX], [5 + 2 * GAP_MAX]]


class Record:
    """Of the replaced service's topic."""

    timestamp = 0
    value = b'{"mac_address": "d", "mode": "MQTT", "data_point_label": "t", "value": 1.5, "timestamp": "1970-01-01T00:00:00.000005Z"}'


def test_a_message_of_the_replaced_service_is_its_own_derivation() -> None:
    row = StoredReading(
        "d", "MQTT", "t", "-1", 5, 1.5, None, "", "", 2, (), 0, Coordinates(0, 1, 0), "decoded_iot_data@1", 0, "", 0, False, None
    )  # fmt: skip
    assert _legacy(row, Record()).status is Status.IDENTICAL
    assert _legacy(ROW, Record()).differences == (Difference("received_at", 7, 0),)
    # A line that there is not.
    beyond = StoredReading(
        "d", "MQTT", "t", "-1", 5, 1.5, None, "", "", 2, (), 0, Coordinates(0, 1, 9), "decoded_iot_data@1", 0, "", 0, False, None
    )  # fmt: skip
    assert _legacy(beyond, Record()).status is Status.DIFFERENT
