"""Pages of a topic, over a log in memory: nothing is left out or told twice, both ways, whatever is looked for."""

from types import SimpleNamespace

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preservarium.operations import browse
from preservarium.operations.browse import TopicUnknown, Wanted
from preservarium.settings import Settings

SETTINGS = Settings()


class Log:
    """Partitions of records; of some offsets there are none, as where a log is compacted."""

    def __init__(self, partitions):
        self.held = partitions

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        return None

    async def partitions(self, topic):
        return frozenset(range(len(self.held))) if topic == "iot_validated_data" else frozenset()

    async def bounds(self, tps):
        begins = {tp: self.held[tp.partition][0] for tp in tps}
        return begins, {tp: self.held[tp.partition][1] for tp in tps}

    async def between(self, topic, partition, begin, end):
        assert self.held[partition][0] <= begin < end <= self.held[partition][1]
        records = [r for r in self.held[partition][2] if begin <= r.offset < end]
        for i in range(0, len(records), 3):
            yield records[i : i + 3]

    async def since(self, topic, partitions, at_us):
        return {
            p: next((r.offset for r in self.held[p][2] if r.timestamp * 1_000 >= at_us), self.held[p][1])
            for p in partitions
        }


def record(partition, offset, at_ms, key):
    return SimpleNamespace(partition=partition, offset=offset, timestamp=at_ms, key=key, value=orjson.dumps({"at": at_ms}), headers=())  # fmt: skip


@st.composite
def logs(draw):
    partitions = []
    for p in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, 5))
        offsets = [begin + n for n in range(draw(st.integers(0, 25))) if draw(st.booleans()) or n % 4]
        end = (offsets[-1] + 1 if offsets else begin) + draw(st.integers(0, 2))
        # By the broker's time: within a partition it does not go back.
        at = sorted(draw(st.lists(st.integers(0, 50), min_size=len(offsets), max_size=len(offsets))))
        keys = draw(st.lists(st.sampled_from([b"70B3D57ED0AA0001", b"b", None]), min_size=len(offsets), max_size=len(offsets)))  # fmt: skip
        partitions.append((begin, end, [record(p, o, t, k) for o, t, k in zip(offsets, at, keys, strict=True)]))
    return Log(partitions)


async def everything(log, wanted, monkeypatch, scan=None):
    monkeypatch.setattr(browse, "Records", lambda _settings: log)
    if scan is not None:
        monkeypatch.setattr(browse, "SCAN_MAX", scan)
    found, at = [], None
    for _ in range(500):
        page = await browse.page(SETTINGS, "iot_validated_data", wanted, at)
        assert len(page.records) <= wanted.limit
        found += [(r["partition"], r["offset"]) for r in page.records]
        if (at := page.next) is None:
            return found
    raise AssertionError("pages without end")


@pytest.mark.parametrize("onward", [False, True])
@pytest.mark.parametrize("key", ["", "70-b3-d5-7e-d0-aa-00-01", "b"])
def test_pages_have_each_record_once_in_order(onward, key):
    @settings(max_examples=60, deadline=None)
    @given(logs(), st.integers(1, 7), st.integers(3, 9))
    def check(log, limit, scan):
        import asyncio

        wanted = Wanted(limit=limit, key=key, offset=0 if onward else None)
        with pytest.MonkeyPatch.context() as monkeypatch:
            found = asyncio.run(everything(log, wanted, monkeypatch, scan))
        held = [r for _, _, records in log.held for r in records if wanted.takes(r)]
        assert sorted(found) == sorted((r.partition, r.offset) for r in held)
        for partition in range(len(log.held)):
            offsets = [o for p, o in found if p == partition]
            assert offsets == sorted(offsets, reverse=not onward)

    check()


async def test_from_a_time_on_only_what_is_as_late(monkeypatch):
    log = Log([(0, 5, [record(0, n, n * 10, b"b") for n in range(5)])])
    assert await everything(log, Wanted(from_us=25_000), monkeypatch) == [(0, 3), (0, 4)]


async def test_the_newest_of_all_partitions_come_first(monkeypatch):
    log = Log([(0, 3, [record(0, n, n * 10, b"b") for n in range(3)]), (7, 9, [record(1, 7, 5, b"b"), record(1, 8, 99, b"b")])])  # fmt: skip
    monkeypatch.setattr(browse, "Records", lambda _settings: log)
    page = await browse.page(SETTINGS, "iot_validated_data", Wanted(limit=3))
    assert [(r["partition"], r["offset"]) for r in page.records] == [(1, 8), (0, 2), (0, 1)]


async def test_what_is_no_topic_of_ours_is_not_looked_into(monkeypatch):
    monkeypatch.setattr(browse, "Records", lambda _settings: Log([(0, 0, [])]))
    for name, partition in (("__consumer_offsets", None), ("iot_validated_data", 4), ("iot_raw_data", None)):
        with pytest.raises(TopicUnknown):
            await browse.page(SETTINGS, name, Wanted(partition=partition))
    assert "preservarium-device_configs-changelog" in browse.names(SETTINGS)


@pytest.mark.parametrize(
    ("value", "kind", "cut"),
    [
        (None, "tombstone", False), (b'{"a": 1}', "lines", False), (b'{"a": 1}\n{"a": 2}\n', "lines", False), (b"\xff\x00", "base64", False), (b"no json", "text", False),
        (b"[" * 5_000, "text", False), (b"x" * 20_000, "text", True), (b"\n".join([b"1"] * 50), "lines", True), (b"", "text", False),
        (b"a" * 16_383 + "é".encode(), "text", True),
    ],
)  # fmt: skip
def test_a_value_is_shown_as_what_it_is(value, kind, cut):
    shown = browse.line_of(SimpleNamespace(partition=0, offset=1, timestamp=2, key=b"\xff", value=value, headers=(("a", b"\xff"), ("b", None))))  # fmt: skip
    assert (shown["kind"], shown["cut"]) == (kind, cut)
    assert shown["headers"] == {"a": "\\xff", "b": ""}
    orjson.dumps(shown)
