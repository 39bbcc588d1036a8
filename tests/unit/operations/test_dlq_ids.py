"""Which error lines are meant, before Kafka is asked."""

import pytest

from preservarium.cli.dlq import _bars
from preservarium.operations import dlq
from preservarium.settings import Settings


@pytest.mark.parametrize(
    "identity",
    ["", ":", "1", "1:", ":1", "-1:0", "a:b", "1:2:3", "\u00b2:0", "0:\u0663", "\uff11:0", " 0:1", "0:" + "9" * 5_000],
)
async def test_what_is_no_id_is_refused_in_a_sentence(identity: str) -> None:
    with pytest.raises(dlq.DlqError, match="is no id of an error: PARTITION:OFFSET"):
        await dlq.letter(Settings(), identity)


def test_error_lines_are_chosen_by_any_spelling_of_the_address() -> None:
    lines = [{"device_id": device} for device in ("70B3D57ED0AA0001", "70b3d57ed0aa0001", "70b3d57ed0aa0002", None)]
    assert [dlq.Select(device="70:b3:d5:7e:d0:aa:00:01").takes(line) for line in lines] == [True, True, False, False]


def test_error_lines_are_chosen_by_stage_parser_and_time() -> None:
    line = {"stage": "validate", "code": "value_range", "parser": "acme@2", "first_seen": 10}
    takes = [
        ({}, True), ({"stages": ["validate"]}, True), ({"stages": ["normalize"]}, False), ({"parsers": ["acme"]}, True),
        ({"parsers": ["acme@2"]}, True), ({"parsers": ["acme@1"]}, False), ({"parsers": ["ac"]}, False), ({"since_us": 10}, True),
        ({"since_us": 11}, False), ({"until_us": 10}, True), ({"until_us": 9}, False), ({"codes": ["value_range"], "until_us": 9}, False),
    ]  # fmt: skip
    for fields, wanted in takes:
        assert dlq.Select(**fields).takes(line) is wanted, fields
    assert not dlq.Select(parsers=["acme"]).takes({"code": "unknown_device"})
    assert not dlq.Select(limit=5).narrows
    assert dlq.Select(until_us=0).narrows is False
    assert dlq.Select(stages=["sink"]).narrows


def test_an_event_that_a_store_refused_goes_to_its_topic_and_a_raw_message_to_the_raw_one() -> None:
    event = {"topic": "iot_aggregates", "partition": 4, "offset": 9, "index": 1, "device_id": "d1", "raw": '{"window_id":"w"}', "attempt": 2,
             "message": "", "raw_partition": 1, "raw_offset": 2}  # fmt: skip
    letter = dlq.Letter("0:1", event)
    assert letter.coordinates == "iot_aggregates/4/9/1"
    assert letter.input == b'{"window_id":"w"}'
    send = dlq._again(letter, letter.input)
    assert (send.topic.name, send.key, send.partition, send.headers) == (
        "iot_aggregates",
        b"d1",
        4,
        (("attempt", b"3"),),
    )
    # People are told from iot_alerts: what was refused there is no event to be sent again.
    assert dlq.Letter("0:2", {**event, "topic": "iot_alerts"}).event_topic is None
    assert dlq.Letter("0:2", {**event, "topic": "iot_raw_data", "raw_index": 0}).coordinates == "1/2/0"
    assert dlq.Letter("0:3", {**event, "message": "x [first 5 of 9 bytes kept]"}).input is None


@pytest.mark.parametrize(
    ("numbers", "bars"), [([], ""), ([0, 0], ""), ([1], "█"), ([0, 1, 1000], " ▁█"), ([8, 4, 0, 0], "█▄")]
)
def test_what_is_not_nothing_has_a_bar(numbers: list[int], bars: str) -> None:
    assert _bars(numbers) == bars
