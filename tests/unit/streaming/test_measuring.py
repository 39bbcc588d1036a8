"""How old messages are when a stage has done with them, how far it is behind, and what a process may use."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from prometheus_client.openmetrics.exposition import generate_latest
from record_fakes import Rec

from preservarium import metrics, topics
from preservarium.domain.readings.json_text import to_bytes
from preservarium.streaming.measuring import ENDS, Arrivals, Behind, Usage, memory_limit_bytes, retention_s
from preservarium.streaming.stage import Batch

NOW_US = 1_700_000_100_000_000


def line(received_us: int, **more: Any) -> bytes:
    return to_bytes(
        {"device_id": "dev", "topic": "", "timestamp": received_us - 2_000_000, "received_at": received_us,
         "raw_partition": 3, "raw_offset": 17, "raw_index": 2, "readings": []} | more
    )  # fmt: skip


def record(value: bytes, *, offset: int = 1, at_ms: int = 1_700_000_099_000, headers: Any = ()) -> Rec:
    made = Rec(offset, value=value)
    made.timestamp, made.headers = at_ms, headers
    return made


def seen(to: str, since: str = "receipt") -> tuple[float, float]:
    """(observations, their sum)"""
    labels = {"to": to, "since": since}
    name = "preservarium_end_to_end_seconds"
    return (
        REGISTRY.get_sample_value(f"{name}_count", labels) or 0.0,
        REGISTRY.get_sample_value(f"{name}_sum", labels) or 0.0,
    )


@pytest.mark.parametrize("stage", [s for s in ENDS if s != "normalize"])
def test_one_observation_a_call_and_it_is_the_oldest_message(stage: str) -> None:
    to = ENDS[stage]
    before, device = seen(to), seen(to, "device")
    Arrivals(stage).done(
        [
            Batch("iot_validated_data", 1, [record(line(NOW_US - 3_000_000)), record(line(NOW_US), offset=2)]),
            Batch("iot_validated_data", 2, [record(line(NOW_US - 9_000_000), at_ms=1_700_000_091_000)]),
        ],
        NOW_US,
    )
    assert (seen(to)[0] - before[0], seen(to)[1] - before[1]) == (1, pytest.approx(9))
    assert seen(to, "device")[1] - device[1] == pytest.approx(11)


def test_the_first_stage_takes_the_records_own_time_and_nothing_of_a_payload() -> None:
    before = seen("standardized")
    lie = record(b'{"device":"d","payload":{"received_at":1,"timestamp":1}}', at_ms=NOW_US // 1_000 - 1_500)
    Arrivals("normalize").done([Batch(topics.RAW.name, 0, [lie])], NOW_US)
    assert seen("standardized")[1] - before[1] == pytest.approx(1.5)


@pytest.mark.parametrize(
    "value",
    [b"", b"{}", b"\xff\x00", b'{"received_at":"soon"}', b'{"received_at":-5}', b'{"received_at":' + b"9" * 40 + b"}",
     b'{"device_id":"\\"received_at\\":1700000000000000"}'],
)  # fmt: skip
def test_what_does_not_say_when_it_was_received_is_not_observed(value: bytes) -> None:
    before = seen("postgres")
    Arrivals("sink").done([Batch("iot_validated_data", 0, [record(value)])], NOW_US)
    assert seen("postgres") == before


def test_no_value_at_all_is_not_observed() -> None:
    before = seen("postgres")
    Arrivals("sink").done([Batch("iot_validated_data", 0, [Rec(1, value=None)])], NOW_US)
    assert seen("postgres") == before


def test_replays_and_what_was_redriven_are_left_out() -> None:
    before = seen("clickhouse")
    arrivals = Arrivals("sync")
    day = line(NOW_US - 86_400_000_000)
    arrivals.done([Batch("iot_validated_data", 0, [record(day, headers=(("generation", b"2"),))])], NOW_US)
    arrivals.done([Batch("iot_validated_data", 0, [record(line(NOW_US - 86_400_000_000, attempt=2))])], NOW_US)
    assert seen("clickhouse") == before


def test_a_clock_that_is_ahead_makes_no_negative_age() -> None:
    before = seen("postgres")
    Arrivals("sink").done([Batch("iot_validated_data", 0, [record(line(NOW_US + 60_000_000))])], NOW_US)
    assert seen("postgres") == (before[0] + 1, before[1])


def test_data_processing_latency_is_that_of_postgres() -> None:
    name = "data_processing_latency_seconds_count"
    before = REGISTRY.get_sample_value(name) or 0
    for stage in ENDS:
        Arrivals(stage).done([Batch("iot_validated_data", 0, [record(line(NOW_US - 1))])], NOW_US)
    assert REGISTRY.get_sample_value(name) == before + 1


def test_a_slow_one_says_whose_it_is() -> None:
    Arrivals("sink").done([Batch("iot_validated_data", 0, [record(line(NOW_US - 40_000_000))])], NOW_US)
    text = generate_latest(REGISTRY).decode()
    buckets = [
        x
        for x in text.splitlines()
        if x.startswith('preservarium_end_to_end_seconds_bucket{le="60.0",since="receipt",to="postgres"')
    ]
    assert buckets
    assert '# {raw="3:17:2"} 40.0' in buckets[0]


def test_stages_of_events_keep_their_own_watermark_and_observe_nothing() -> None:
    arrivals = Arrivals("sink-alarms")
    arrivals.done([Batch("iot_alerts", 4, [record(b"{}", at_ms=NOW_US // 1_000 - 10)])], NOW_US)
    assert arrivals.done_ms == {4: NOW_US // 1_000 - 10}
    assert arrivals.newest_us == NOW_US - 10_000


@given(st.lists(st.tuples(st.integers(0, 60_000), st.booleans()), min_size=1, max_size=30))
def test_lag_is_never_less_than_the_age_of_the_oldest_record(steps: list[tuple[int, bool]]) -> None:
    """Records are written, looks are made, and all are acknowledged now and then: the lag is no younger than what waits."""
    behind, now, waiting, done = Behind(), 1_700_000_000_000, [], 1_700_000_000_000
    behind.lag_s("s", {"lag_by_partition": {0: 0}, "commit_age_s": 0.0}, {}, now)
    for wait_ms, worked_off in steps:
        now += wait_ms + 1
        if worked_off and waiting:
            done, waiting = waiting[-1], []
        else:
            waiting.append(now)
        lag_s = behind.lag_s("s", {"lag_by_partition": {0: len(waiting)}, "commit_age_s": 0.0}, {0: done}, now)
        assert lag_s == 0 if not waiting else lag_s >= (now - waiting[0]) / 1_000


def test_a_record_after_an_hour_of_silence_is_no_lag_of_an_hour() -> None:
    behind, start = Behind(), 1_700_000_000_000
    for second in range(3_600):
        behind.lag_s("s", {"lag_by_partition": {0: 0}, "commit_age_s": 0.0}, {0: start}, start + second * 1_000)
    now = start + 3_600_500
    assert behind.lag_s("s", {"lag_by_partition": {0: 1}, "commit_age_s": 0.0}, {0: start}, now) == pytest.approx(1.5)


def test_a_stage_that_has_just_begun_is_as_far_behind_as_its_first_record_waits() -> None:
    report = {"lag_by_partition": {0: 5, 1: 0}, "commit_age_s": 7.0}
    assert Behind().lag_s("s", report, {}, 1_700_000_000_000) == 7.0


def test_a_partition_that_went_to_another_worker_is_forgotten() -> None:
    behind = Behind()
    behind.lag_s("s", {"lag_by_partition": {0: 0, 1: 0}, "commit_age_s": 0.0}, {}, 1_000_000)
    behind.lag_s("s", {"lag_by_partition": {1: 0}, "commit_age_s": 0.0}, {}, 2_000_000)
    # It comes back an hour later with a backlog: what was seen of it then says nothing any more.
    report = {"lag_by_partition": {0: 9, 1: 0}, "commit_age_s": 0.25}
    assert behind.lag_s("s", report, {}, 3_600_000_000) == 0.25


def test_what_a_stage_reads_is_kept_for_so_long() -> None:
    assert retention_s("iot_raw_data") == 86_400
    assert retention_s("iot_device_registry") is None
    assert retention_s("somebody_elses") is None


def test_a_process_says_what_it_uses_and_may_use(tmp_path: Any) -> None:
    Usage(str(tmp_path / "not" / "made" / "yet")).sample()

    def value(name: str) -> float:
        return REGISTRY.get_sample_value(f"preservarium_{name}") or 0.0

    assert 0 < value("cpu_cores") <= 4_096
    assert 0 < value("memory_bytes") < value("memory_limit_bytes")
    assert 0 < value("disk_free_bytes") < value("disk_size_bytes")


def test_a_containers_limit_wins_and_none_is_none(tmp_path: Any) -> None:
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text("104857600\n")
    whole = memory_limit_bytes([str(tmp_path / "absent")])
    assert memory_limit_bytes([str(tmp_path / "limit")]) == 104_857_600
    assert memory_limit_bytes([str(tmp_path / "max")]) == whole
    assert memory_limit_bytes([str(tmp_path / "max"), str(tmp_path / "limit")]) == 104_857_600


def test_no_label_of_a_metric_is_what_a_stranger_says() -> None:
    """Every label has values from a list of ours; a device, a series, a path or a client would have any number."""
    allowed = {
        "stage", "topic", "partition", "code", "kind", "group", "action", "dependency", "cache", "outcome", "table", "connector",
        "reason", "store", "dashboard", "origin", "cause", "transition", "severity", "recipient", "channel", "what", "event",
        "state", "format", "lane", "to", "since", "version", "direction", "route", "method", "pool", "canary",
    }  # fmt: skip
    used = set(itertools.chain.from_iterable(metric.labels for metric in metrics.CATALOGUE.values()))
    assert used <= allowed, f"say in docs/OPERATING.md how many values these have: {used - allowed}"


def test_json_lines_of_ours_have_the_times_in_their_heads() -> None:
    """What is searched for must stand within the bytes that are searched."""
    names = "x" * 255
    value = line(NOW_US, device_id=names, topic=names, connector_mode=names)
    assert value.index(b'"received_at"') < 4_096 - 40
    assert json.loads(value)["received_at"] == NOW_US
