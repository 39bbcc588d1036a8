"""commands: device_commands, iot_validated_data → command_events, device_downlinks; iot_alerts → device_commands.

Waits for no database and no broker. The first two stages share one state: the app gives a partition to one of them at a
time. Where the worker does not know a device that a request names, the database is asked, as normalize does.
"""

from agents.registry import catalogue, device_lookup
from preservarium import topics
from preservarium.stages.commands import TICK_S, Commanding
from preservarium.streaming.app import app
from preservarium.streaming.stage import Batch, Effects
from tables.command_states import command_states

_commanding = Commanding(
    command_states,
    device_lookup.known,
    device_lookup.lookup_many,
    catalogue,
    app.live,
    app.clock,
    past_backlog=lambda partition: app.stages.past_backlog("commands", partition),
)
device_lookup.on_change(_commanding.profiles.forget)


@app.stage(
    topics.COMMANDS,
    name="commands",
    writes=(topics.COMMAND_EVENTS, topics.DOWNLINKS),
    state=command_states,
    on_tick=_commanding.tick,
    tick_s=lambda: TICK_S,
)
async def commands(batch: Batch) -> Effects:
    """Queue commands, hand them over one at a time, take the reports of what became of them."""
    return await _commanding.lines(batch)


@app.stage(
    topics.VALIDATED,
    name="command-uplinks",
    writes=(topics.COMMAND_EVENTS, topics.DOWNLINKS),
    state=command_states,
)
async def command_uplinks(batch: Batch) -> Effects:
    """Confirm commands by what devices say, and send to those that were asleep."""
    return await _commanding.uplinks(batch)


@app.stage(topics.ALERTS, name="command-alarms", writes=(topics.COMMANDS,))
async def command_alarms(batch: Batch) -> Effects:
    """Ask for the commands that rules of alarms name."""
    return await _commanding.alarms(batch)
