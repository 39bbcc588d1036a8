"""Who is told of an alarm that stands while its recipients change: from the rule over route and group to the notice."""

from typing import Any

import orjson
import pytest
from notice_support import US, S
from quality_support import World, batch, catalogue, errors, lines, live, offer, record

from preservarium import topics
from preservarium.domain.alarms.action import parse_action
from preservarium.domain.alarms.device import DeviceAlarms
from preservarium.domain.alarms.rules import compile_rules
from preservarium.domain.notices import Inbox, Policy
from preservarium.notices.routing import Router

DEVICE: Any = {"device_id": "dev-1", "rev": 1, "type": "t", "enabled": True, "meta": {"area": "roof"}}
RULE: Any = {"name": "hot", "rev": 1, "component_type": "temp", "kind": "high", "severity": "major", "threshold": 30}
LEVELS: Any = [{"threshold": 40, "severity": "critical"}]


class Site:
    """A device, its rule, and the inboxes of all who are told."""

    def __init__(self, **rule: Any) -> None:
        named = ("ops", "night", "boss", "alias")
        self.world = World(catalogue(*(("recipient", self.recipient(name)) for name in named)))
        self.world.documents.offer("recipient", {**self.recipient("alias"), "address": "ops@example.org", "rev": 50})
        self.router = Router(lambda *_: DEVICE, self.world.documents, live(), self.world.clock)
        self.state: bytes | None = None
        self.inboxes: dict[str, Inbox] = {}
        self.at = self.number = 0
        self.rule(**rule)

    @staticmethod
    def recipient(name: str) -> Any:
        return {"name": name, "rev": 1, "channel": "mail", "address": f"{name}@example.org"}

    def rule(self, **fields: Any) -> None:
        rule: Any = {**RULE, **fields}
        offer(self.world.documents, "rule", **rule)
        datatype: Any = {"name": "temp", "rev": 1, "kind": "number", "unit": "°C"}
        device: Any = {**DEVICE, "rules": {"hot": {}} if fields else {}}
        self.rules = compile_rules(device, None, {"hot": rule}.get, lambda _: datatype)

    async def reads(self, value: float) -> dict[str, list[tuple[str, bool]]]:
        """Who is told what within a minute: status, and whether it is new."""
        self.at += 60
        reading = {"component_type": "temp", "pin_position": "-1", "value": value, "unit": "°C", "quality": 1}
        message = {
            "generation": 0, "timestamp": US + self.at * S, "received_at": US + self.at * S, "readings": [reading],
            "raw_partition": 1, "raw_offset": self.at, "raw_index": 0,
        }  # fmt: skip
        return await self.happens(lambda alarms: alarms.observe(message, self.rules))

    async def happens(self, what: Any) -> dict[str, list[tuple[str, bool]]]:
        alarms = DeviceAlarms("dev-1", orjson.loads(self.state) if self.state else None)
        told = what(alarms).transitions
        self.state = orjson.dumps(alarms.document())
        if not told:
            return {}
        self.at += 1
        self.sends = (await self.router(batch(topics.ALERTS, record(self.at, *told)))).sends
        policy = Policy(group_by=("area",), group_wait_us=0, group_interval_us=S)
        now_us = US + self.at * S
        for event in lines(self.sends, topics.NOTICE_EVENTS):
            self.inboxes.setdefault(event["recipient"], Inbox(event["recipient"])).hear(event, policy, now_us)
        found = {}
        for name, inbox in self.inboxes.items():
            self.number = inbox.plan(policy, now_us + 2 * S, self.number)
            for notice in inbox.take():
                found[name] = [(line["status"], line["new"]) for line in notice["lines"]]
        return found

    def waiting(self) -> list[str]:
        """Recipients who would be told again."""
        return [name for name, inbox in self.inboxes.items() if inbox.document()["g"]]


async def test_who_was_told_hears_the_end_and_who_is_named_now_hears_from_the_next_notice_on():
    site = Site(recipients=["ops"], levels=LEVELS)
    assert await site.reads(31) == {"ops": [("raised", True)]}
    site.rule(recipients=["night"], levels=LEVELS)
    assert await site.reads(32) == {}
    # What is new of it is for the new one only.
    assert await site.reads(45) == {"night": [("raised", True)]}
    site.rule(recipients=["boss"], levels=LEVELS)
    assert await site.reads(20) == {name: [("cleared", True)] for name in ("ops", "night", "boss")}
    assert site.waiting() == []
    # The next alarm is none of theirs.
    assert await site.reads(31) == {"boss": [("raised", True)]}


async def test_an_answer_is_heard_by_who_was_told_so_that_it_is_not_repeated():
    site = Site(recipients=["ops"])
    await site.reads(31)
    site.rule(recipients=["night"])
    word = {"device_id": "dev-1", "rule": "hot", "action": "acknowledge", "actor": "ann", "at": US + 100 * S}
    assert await site.happens(lambda a: a.act(parse_action(word), site.rules, "a3", 1, 0)) == {}
    assert sorted(e["recipient"] for e in lines(site.sends, topics.NOTICE_EVENTS)) == ["night", "ops"]
    assert await site.reads(20) == {"ops": [("cleared", True)], "night": [("cleared", True)]}


async def test_who_was_told_by_escalation_hears_the_end_too():
    site = Site(recipients=["ops"], escalation=[{"after_s": 0.001, "recipients": ["boss"]}])
    assert await site.reads(31) == {"ops": [("raised", True)], "boss": [("raised", True)]}
    site.rule(recipients=["ops"])
    assert await site.reads(20) == {"ops": [("cleared", True)], "boss": [("cleared", True)]}


async def test_nobody_who_was_not_told_hears_of_an_end():
    site = Site(recipients=["ops"], escalation=[{"after_s": 86_400, "recipients": ["boss"]}])
    assert await site.reads(31) == {"ops": [("raised", True)]}
    site.rule(recipients=["ops"])
    assert await site.reads(20) == {"ops": [("cleared", True)]}
    assert site.waiting() == []


async def test_a_recipient_that_is_deleted_is_told_of_in_an_event_and_forgotten():
    site = Site(recipients=["ops", "night"])
    await site.reads(31)
    site.rule(recipients=["night"])
    del site.world.documents._documents["recipient"]["ops"]
    assert await site.reads(20) == {"night": [("cleared", True)]}
    text = "recipient 'ops' is not in the registry: what it was told of the alarm has no end"
    assert errors(site.sends) == [("notice_refused", text)]
    assert site.waiting() == []


async def test_one_address_under_another_name_is_told_once():
    site = Site(recipients=["ops"])
    await site.reads(31)
    site.rule(recipients=["alias"])
    assert await site.reads(20) == {"alias": [("cleared", True)]}
    assert site.waiting() == []


@pytest.mark.parametrize("changes", [1, 3])
async def test_who_was_told_of_an_alarm_hears_that_its_rule_is_gone_and_nothing_is_repeated(changes: int):
    site = Site(recipients=["ops"], levels=LEVELS)
    await site.reads(31)
    told = {"ops"}
    for name in ["night", "boss", "ops"][: changes - 1]:
        site.rule(recipients=[name], levels=LEVELS)
        await site.reads(45)
        await site.reads(35)
        told.add(name)
    site.rule()
    assert await site.reads(31) == {name: [("cleared", True)] for name in told}
    assert await site.reads(31) == {}
    assert site.waiting() == []
