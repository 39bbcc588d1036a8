"""The state of commands alone: how many a second, and how large it is.

    python bench/commands.py [COMMANDS]

One core: requests, reports and confirming uplinks of 1,000 devices, the state document read and written for each step,
as the stages do it. Kafka and the broker are not in it.
"""

import sys
import time
from typing import Any

import orjson

from preservarium.domain.commands.device import OPEN_MAX, DeviceCommands, Turn
from preservarium.domain.commands.lines import parse_line
from preservarium.domain.commands.profile import Profile

DEVICES = 1_000
T = 1_700_000_000_000_000
PROFILE = Profile(topic="devices/x/down", parser="p")
CONFIRM = {"component_type": "relay", "equals": 1}


def main() -> None:
    """Print what was measured."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    states: dict[str, bytes] = {}
    offset = steps = 0

    def step(device: str, line: dict[str, Any] | None, at: int) -> Any:
        nonlocal offset, steps
        offset, steps = offset + 1, steps + 1
        commands = DeviceCommands(device, orjson.loads(states[device]) if device in states else None)
        if line is None:
            message = {
                "raw_partition": 0, "raw_offset": offset, "raw_index": 0, "generation": 0, "received_at": at,
                "readings": [{"component_type": "relay", "pin_position": "-1", "value": 1.0, "quality": 1}],
            }  # fmt: skip
            outcome = commands.uplink(message, PROFILE, Turn(at), awake_us=30_000_000)
        else:
            parsed = parse_line(line, device_id=device, at=at, key=str(offset))
            outcome = getattr(commands, parsed.kind)(parsed, PROFILE, Turn(at), "c0", offset, 0)
        states[device] = orjson.dumps(commands.document())
        return outcome

    started = time.perf_counter()
    for n in range(count):
        device, at = f"d{n % DEVICES}", T + n * 1_000
        made = step(device, {"command": "set", "fields": {"on": 1}, "confirm": CONFIRM}, at)
        step(device, {"kind": "report", "report": "sent", "downlink_id": made.downlinks[0]["downlink_id"]}, at + 1)
        assert step(device, None, at + 2).events[-1]["state"] == "successful"
    seconds = time.perf_counter() - started
    ended = len(states["d0"])
    for _ in range(OPEN_MAX):
        step("full", {"command": "set", "fields": {"on": 1}, "confirm": CONFIRM}, T)
    print(f"{count:,} commands, {steps:,} steps in {seconds:.2f} s: {count / seconds:,.0f} commands a second, one core")
    print(
        f"state of a device: {ended / (count / DEVICES):.0f} bytes for each ended command, {len(states['full']):,} bytes with a full queue"
    )


if __name__ == "__main__":
    main()
