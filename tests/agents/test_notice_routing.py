"""The route stage: an event for each recipient, where it came from, and what its alarm can be grouped by."""

from typing import Any

from notice_support import transition
from quality_support import World, batch, catalogue, errors, lines, live, offer, record

from preservarium import topics
from preservarium.notices.routing import Router

OPS = ("recipient", {"name": "ops", "channel": "mail", "address": "ops@example.org"})
BOSS = ("recipient", {"name": "boss", "channel": "webhook", "address": "https://example.org/hook"})


def rule(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "rule", {
        "name": "hot",
        "kind": "high",
        "component_type": "temp",
        "severity": "major",
        "threshold": 30.0,
        **fields,
    }


class Route:
    def __init__(self, *documents: tuple[str, dict[str, Any]], **mail: Any) -> None:
        self.world = World(catalogue(OPS, BOSS, *documents))
        self.router = Router(self.world.known, self.world.documents, live(mail=mail), self.world.clock)

    async def run(self, *records: Any) -> tuple[list[dict[str, Any]], list[Any]]:
        """Events, and everything that was sent."""
        sends = self.world.carry_out(await self.router(batch(topics.ALERTS, *records)), 3)
        return lines(sends, topics.NOTICE_EVENTS), sends


async def test_an_event_says_where_it_came_from_and_is_keyed_by_its_recipient():
    events, sends = await Route().run(record(7, transition(1), transition(2, recipients=["boss", "ops"])))
    assert [(e["recipient"], e["source"], e["offset"], e["index"]) for e in events] == [
        ("ops", "3", 7, 0), ("boss", "3", 7, 1), ("ops", "3", 7, 1),
    ]  # fmt: skip
    assert [s.key for s in sends] == [b"ops", b"boss", b"ops"]
    assert {s.partition for s in sends} == {None}, "the key says where a recipient is"
    assert events[0]["transition"] == transition(1)


async def test_the_same_transition_gives_the_same_events():
    route = Route()
    one, two = [await route.run(record(7, transition(1))) for _ in range(2)]
    assert one == two


async def test_escalation_is_the_rules_or_the_devices():
    route = Route(rule(escalation=[{"after_s": 900, "recipients": ["boss"]}, {"after_s": 60, "recipients": ["ops"]}]))

    async def told() -> list[tuple[str, float]]:
        events, _ = await route.run(record(1, transition(1)))
        return [(e["recipient"], e["after_s"]) for e in events]

    # Whoever is told at once need not be told again.
    assert await told() == [("ops", 0), ("boss", 900)]
    route.world.devices["dev-1"] = {"type": "t", "rules": {"hot": {"escalation": []}}}
    assert await told() == [("ops", 0)]
    route.world.devices["dev-1"] = {"type": "t", "rules": {"hot": {"threshold": 5}, "off": None}}
    offer(route.world.documents, "rule", **rule(escalation=[{"after_s": 5, "recipients": ["boss"]}])[1])
    assert await told() == [("ops", 0), ("boss", 5)]


async def test_an_alarm_is_grouped_by_what_is_known_of_its_device():
    route = Route()
    route.world.devices["dev-1"] = {"type": "dl-10", "meta": {"area": "roof"}}
    events, _ = await route.run(record(1, transition(1, group="pump"), transition(2)))
    known, unknown = (e["labels"] for e in events)
    assert (known["area"], known["type"], known["group"], known["device"]) == ("roof", "dl-10", "pump", "dev-1")
    assert (unknown["area"], unknown["type"], unknown["group"], unknown["severity"]) == ("", "", "", "major")


async def test_a_recipient_that_is_not_registered_is_told_once_and_holds_up_nobody():
    events, sends = await Route().run(record(1, transition(1, recipients=["who", "ops"])))
    assert [e["recipient"] for e in events] == ["ops"]
    assert errors(sends) == [("notice_refused", "recipient 'who' is not in the registry")]


async def test_a_replay_tells_nobody():
    assert await Route(recipients="x@example.org").run(record(1, transition(1, generation=2, recipients=[]))) == (
        [],
        [],
    )
