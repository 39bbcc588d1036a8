"""route and group: iot_alerts → notice_events → notices. They wait for no database and no mail server.

route says who is to hear of a transition, group when: it keeps each recipient's state where its events are.
"""

from agents.registry import catalogue, device_lookup
from preservarium import topics
from preservarium.notices.grouping import TICK_S, Grouping
from preservarium.notices.routing import Router
from preservarium.streaming.app import app
from preservarium.streaming.stage import Batch, Effects
from tables.notice_states import notice_states

_router = Router(device_lookup.known, catalogue, app.live, app.clock)
_grouping = Grouping(notice_states, catalogue, app.live, app.clock)


@app.stage(topics.ALERTS, name="route", writes=(topics.NOTICE_EVENTS,))
async def route(batch: Batch) -> Effects:
    """Send each recipient what it is to hear of."""
    return await _router(batch)


@app.stage(
    topics.NOTICE_EVENTS,
    name="group",
    writes=(topics.NOTICES,),
    state=notice_states,
    on_tick=_grouping.tick,
    tick_s=lambda: TICK_S,
)
async def group(batch: Batch) -> Effects:
    """Group, hold back and repeat: make notices when they are due."""
    return await _grouping(batch)
