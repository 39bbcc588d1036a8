"""Refusals that are set aside: each once, with a reason, and never what a redrive has sent."""

import orjson
import pytest

from preservarium.operations import discarding, dlq
from preservarium.operations.dlq import Letter, Select
from preservarium.operations.refusals import Refusals
from preservarium.settings import Settings

NOW = 1_760_000_000_000_000


def line(n, **more):
    return {"code": "value_range", "device_id": "d", "raw_partition": 0, "raw_offset": n, "raw_index": 0, **more}


class Publisher:
    def __init__(self, _live):
        pass

    async def ensure_topic(self, name):
        pass

    async def publish(self, sends):
        SENT.extend(sends)

    async def on_stop(self):
        pass


SENT: list = []


@pytest.fixture(autouse=True)
def kafka(monkeypatch):
    SENT.clear()

    async def letters(_settings, select):
        for n in (0, 1, 1, 2, 3):
            yield Letter(f"0:{n}", line(n))

    async def settled(_settings):
        return {"0/2/0"} | {send.key.decode() for send in SENT}

    monkeypatch.setattr(dlq, "letters", letters)
    monkeypatch.setattr(dlq, "settled", settled)
    monkeypatch.setattr(discarding, "Publisher", Publisher)


async def discard(**more):
    done = await discarding.discard(Settings(), more.pop("select", Select(("value_range",))), reason=more.pop("reason", " broken "), actor="ann", now_us=NOW, **more)  # fmt: skip
    return done.matched, done.discarded, done.already


@pytest.mark.parametrize("reason", ["", "   ", "x" * 1_001])
async def test_without_a_reason_nothing_is_set_aside(reason):
    with pytest.raises(discarding.ReasonMissing):
        await discard(reason=reason)
    assert SENT == []


async def test_each_is_marked_once_and_what_was_redriven_is_left_alone(monkeypatch):
    monkeypatch.setattr(discarding, "BATCH", 2)
    assert await discard(dry_run=True) == (5, 3, 2)
    assert SENT == []
    assert await discard() == (5, 3, 2)
    assert [send.key for send in SENT] == [b"0/0/0", b"0/1/0", b"0/3/0"]
    assert orjson.loads(SENT[0].value) == {"error": "0:0", "code": "value_range", "device_id": "d", "at": NOW, "discarded": "broken", "actor": "ann"}  # fmt: skip
    assert await discard() == (5, 0, 5)


async def test_a_limit_counts_what_is_set_aside():
    assert (await discard(select=Select(("value_range",), limit=2)))[1] == 2
    assert len(SENT) == 2


def test_whoever_looks_sees_what_became_of_each():
    refusals = Refusals()

    class Record:
        def __init__(self, key, value):
            self.key, self.value = key, value

    refusals.settle(
        [
            Record(b"0/1/0", orjson.dumps({"at": NOW, "discarded": "broken", "actor": "ann"})),
            Record(b"0/2/0/1", orjson.dumps({"at": NOW})),
            *(Record(b"0/3/0", value) for value in (None, b"{", b"[]", b"{}", b'{"at": "x"}')),
            Record(b"\xff", orjson.dumps({"at": NOW})),
        ]
    )
    assert refusals.settled(line(1)) == {"how": "discarded", "at": NOW, "reason": "broken", "actor": "ann"}
    assert refusals.settled(line(2, part=1))["how"] == "redriven"
    assert refusals.settled(line(2)) is None
    assert refusals.settled(line(3)) is None
