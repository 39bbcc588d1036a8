"""Notices where numbers and clocks are wrong: nothing is silenced, nothing is told twice, and what is missing is told."""

from datetime import UTC
from typing import Any

import pytest
from notice_support import US, GroupStage, event, transition
from quality_support import World, batch, catalogue, lines, live, record
from structlog.testing import capture_logs

from preservarium import metrics, topics
from preservarium.domain.notices import HANDED_OUT_MAX
from preservarium.notices.channel import Notice
from preservarium.notices.outbox import REMEMBERED_MAX, Notifier
from preservarium.notices.words import tell

HOUR = 3_600.0
#: Each alarm is told by itself, at once.
EACH: dict[str, Any] = {"group_wait_s": 0, "group_by": "alarm", "limit_notices": 1_000, "limit_window_s": 60}


class Channel:
    """Takes everything."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    async def send(self, notice: Notice) -> str:
        self.sent.append(notice.id)
        return "250 taken"


class Outbox:
    """A notify stage of one partition that is killed now and then."""

    def __init__(self) -> None:
        self.world = World(catalogue(("recipient", {"name": "ops", "channel": "webhook", "address": "http://x"})))
        self.channel = Channel()
        self.text = ""
        self.offset = 0
        self.start()

    def start(self) -> None:
        self.notifier = Notifier(
            "notify-endpoints", {"webhook": self.channel}, self.world.documents, live(), self.world.clock
        )
        self.notifier.recall(3, self.text)

    async def take(self, *deliveries: dict[str, Any]) -> list[dict[str, Any]]:
        receipts = []
        for delivery in deliveries:
            self.offset += 1
            effects = await self.notifier([batch(topics.NOTICES, record(self.offset, delivery))])
            receipts += lines(self.world.carry_out(effects, 3), topics.NOTICE_RECEIPTS)
            self.text = self.notifier.remember(3)
        return receipts


def delivery(name: str, number: int) -> dict[str, Any]:
    return {
        "delivery_id": name, "number": number, "sequence": 1, "recipient": "ops", "kind": "alarms", "group": {}, "held": None,
        "planned_at": US, "lines": [{**transition(), "status": "raised", "new": True, "raised_count": 1, "first_at": US, "transitions": [name], "transitions_count": 1}],
        "more": {},
    }  # fmt: skip


def breaks(what: str) -> float:
    return metrics.NOTICE_NUMBERS.labels("notify-endpoints", what)._value.get()


async def test_numbers_that_went_back_silence_nothing_and_are_told():
    outbox = Outbox()
    before = breaks("back")
    await outbox.take(delivery("a", 1_000_000), delivery("b", 1_000_001))
    with capture_logs() as logs:
        receipts = await outbox.take(*(delivery(f"later-{n}", 500 + n) for n in range(388)))
    assert [r["delivery_id"] for r in receipts] == [f"later-{n}" for n in range(388)]
    # Once: from there numbers go on.
    assert breaks("back") - before == 1
    assert [(line["event"], line["before"], line["number"]) for line in logs] == [
        ("notice_numbers_went_back", 1_000_001, 500)
    ]


async def test_a_gap_is_told_and_what_comes_after_it_is_sent():
    outbox = Outbox()
    before = breaks("gap")
    await outbox.take(delivery("a", 5), delivery("b", 9), delivery("c", 10))
    assert outbox.channel.sent == ["a", "b", "c"]
    assert breaks("gap") - before == 1


async def test_what_was_handed_out_twice_is_sent_once_whatever_its_number_and_also_after_a_restart():
    outbox = Outbox()
    first = [delivery(f"d-{n}", n) for n in range(1, HANDED_OUT_MAX + 1)]
    await outbox.take(*first)
    outbox.start()
    assert await outbox.take(*first, delivery("d-1", 7_777)) == []
    assert len(outbox.channel.sent) == HANDED_OUT_MAX
    # Brokers take 4 KiB beside an offset, of which the feed needs a part.
    assert [r["delivery_id"] for r in await outbox.take(*(delivery(f"e-{n}", 101 + n) for n in range(400)))]
    assert len(outbox.text) < 3_900
    assert outbox.text.startswith("500 ")
    assert REMEMBERED_MAX == 3 * HANDED_OUT_MAX


@pytest.mark.parametrize(("text", "number"), [("12", 12), ("", 0), ("x y", 0), ("12 !!!", 12), ("²", 0)])
async def test_what_an_earlier_release_kept_beside_the_offset_is_understood(text: str, number: int):
    outbox = Outbox()
    outbox.text = text
    outbox.start()
    assert outbox.notifier.remember(3) == f"{number} "
    assert await outbox.take(delivery("new", number))  # another notice, though it has a number that was seen


async def test_after_the_state_was_lost_every_alarm_is_told():
    """The number began at a clock that was ahead; the state was lost, and numbers went back."""
    stage, outbox = (
        GroupStage({"group_wait_s": 0, "group_by": ["alarm"], "limit": {"notices": 1_000, "window_s": 60}}),
        Outbox(),
    )
    stage.world.clock.jump(20 * 86_400)
    await stage.hear(event(transition(1), 1))
    await stage.run(3)
    stage.world.clock.jump(-20 * 86_400)
    stage.world.tables.clear()
    stage.start()
    await stage.hear(*(event(transition(n), n) for n in range(2, 50)))
    await stage.run(5)
    await outbox.take(*stage.sent)
    told = [
        t
        for d in stage.sent
        if d["delivery_id"] in outbox.channel.sent
        for line in d["lines"]
        for t in line["transitions"]
    ]
    assert sorted(told) == sorted(transition(n)["transition_id"] for n in range(1, 50))


async def test_repeats_of_a_recipient_whose_state_was_lost_have_ids_of_their_own():
    stage = GroupStage({"group_wait_s": 0, "group_interval_s": 1, "repeat_interval_s": 60})
    ids = []
    for _ in range(2):
        await stage.hear(event(transition(1), 1))
        ids += [d["delivery_id"] for d in await stage.run(200)]
        stage.world.tables.clear()
        stage.start()
    assert len(ids) > 5
    assert len(ids) == len(set(ids))


async def test_a_tick_hands_out_no_more_than_the_outbox_can_tell_apart():
    stage = GroupStage(settings=EACH)
    recipients = [{**event(transition(n), n), "recipient": f"r{n}@example.org"} for n in range(150)]
    await stage.hear(*recipients)
    for _ in range(3):
        # What is due is planned for fifty recipients a tick, and nothing goes out because the process dies.
        stage.advance(1)
        await stage.tick(crash="before")
    for _ in range(12):
        before = len(stage.sent)
        stage.advance(1)
        await stage.tick()
        assert len(stage.sent) - before <= HANDED_OUT_MAX
    assert len(stage.sent) == 150
    numbers = [d["number"] for d in stage.sent]
    assert numbers == list(range(numbers[0], numbers[0] + 150))


async def test_many_plans_of_few_recipients_go_out_in_order_and_in_parts():
    stage = GroupStage(settings=EACH)
    # Each recipient's document has room for a hundred lines that are planned.
    await stage.hear(*({**event(transition(n), n), "recipient": f"r{n % 3}@example.org"} for n in range(240)))
    for _ in range(8):
        before = len(stage.sent)
        stage.advance(1)
        await stage.tick()
        assert len(stage.sent) - before <= HANDED_OUT_MAX
    numbers = [d["number"] for d in stage.sent]
    assert numbers == list(range(numbers[0], numbers[0] + 240))


# --- a transition that iot_alerts holds twice


async def test_a_transition_that_comes_at_two_offsets_is_told_and_counted_once():
    stage = GroupStage()
    await stage.hear(event(transition(1), 1), event(transition(1), 2))
    (told,) = await stage.run(40)
    (line,) = told["lines"]
    assert (line["raised_count"], line["transitions_count"], len(line["transitions"])) == (1, 1, 1)
    # Told, over, forgotten: and here it is again.
    await stage.hear(event(transition(1, transition="cleared", state="normal", cleared_at=US), 3))
    assert len(await stage.run(400)) == 1
    before = metrics.DUPLICATES.labels("group")._value.get()
    await stage.hear(event(transition(1), 4), event(transition(1, transition="cleared", state="normal"), 5))
    assert await stage.run(2 * HOUR, 60) == []
    assert metrics.DUPLICATES.labels("group")._value.get() - before == 2


async def test_a_raise_that_comes_again_does_not_undo_what_came_after_it():
    stage = GroupStage({"repeat_interval_s": 600})
    await stage.hear(event(transition(1), 1))
    await stage.run(40)
    await stage.hear(event(transition(1, transition="acknowledged", state="acknowledged"), 2), event(transition(1), 3))
    assert await stage.run(2 * HOUR, 60) == []


# --- a clock that was wrong for a moment


@pytest.mark.parametrize("ahead_s", [HOUR, 20 * 86_400, 400 * 86_400])
@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"limit": {"notices": 2, "window_s": 3_600}},
        {"group_wait_s": 0, "group_interval_s": 60},
        {"digest": {"every": "hour"}},
    ],
)
@pytest.mark.parametrize("restarts", [False, True])
async def test_a_clock_that_was_ahead_for_twelve_seconds_silences_nobody(
    policy: dict[str, Any], ahead_s: float, restarts: bool
):
    stage = GroupStage(policy)
    await stage.hear(event(transition(1), 1))
    await stage.run(40)
    stage.world.clock.jump(ahead_s)
    await stage.hear(event(transition(2), 2))
    await stage.run(12)
    await stage.hear(event(transition(3), 3))
    stage.world.clock.jump(-ahead_s)
    if restarts:
        stage.start()
    await stage.hear(event(transition(4), 4))
    # Wait, interval and window are over within an hour, and a digest of the hour has come.
    await stage.run(2 * HOUR, 5)
    told = {t for d in stage.sent for line in d["lines"] for t in line["transitions"]}
    assert told == {transition(n)["transition_id"] for n in (1, 2, 3, 4)}


async def test_an_escalation_waits_no_longer_than_its_delay_whosoever_clock_is_ahead():
    stage = GroupStage({"group_wait_s": 0, "group_interval_s": 1})
    ahead_us = 20 * 86_400_000_000
    await stage.hear(event(transition(1, detected_at=stage.now_us + ahead_us), 1, after_s=120))
    stage.world.clock.jump(20 * 86_400)
    await stage.hear(event(transition(2, detected_at=stage.now_us), 2, after_s=120))
    stage.world.clock.jump(-20 * 86_400)
    assert await stage.run(119) == []
    told = await stage.run(10)
    assert [line["device_id"] for d in told for line in d["lines"] if line["new"]] == ["dev-1"]
    # Of what the worker itself noted by a wrong clock, the delay counts from when it looks again.
    told = await stage.run(120)
    assert [line["device_id"] for d in told for line in d["lines"] if line["new"]] == ["dev-2"]


# --- an alarm that nothing watches any more

WITHDRAWN: dict[str, Any] = {
    "transition": "withdrawn", "state": "normal", "cleared_at": US, "reason": "device_disabled", "recipients": [], "former": ["ops"],
}  # fmt: skip


async def test_whoever_was_told_hears_that_an_alarm_ended_with_its_device_and_why():
    stage = GroupStage()
    await stage.hear(event(transition(1), 1))
    await stage.run(40)
    await stage.hear(event(transition(1, **WITHDRAWN), 2, below=True))
    (told,) = await stage.run(400)
    (line,) = told["lines"]
    assert (line["status"], line["reason"]) == ("cleared", "device_disabled")
    words = tell(told, UTC, lambda _: None)
    assert "Ended:      the device is switched off" in words.text
    assert "the device is switched off" in words.html
    assert stage.document()["g"] == {}


async def test_whoever_was_not_told_of_it_hears_nothing():
    stage = GroupStage()
    await stage.hear(
        event(transition(1), 1), event(transition(1, **WITHDRAWN), 2), event(transition(2, **WITHDRAWN), 3)
    )
    assert await stage.run(2 * HOUR, 60) == []
