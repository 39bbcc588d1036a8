"""A simulated relay: takes what is sent to `devices/<address>/down`, and tells its state on `devices/<address>/up`.

    python examples/commands/device.py relay-1 [--url mqtt://localhost:1883] [--deaf]

Without --url it speaks to the broker of the settings, or of the `preservarium up --mqtt` that runs here. With --deaf it says nothing, as a device that is out of reach.
"""

import argparse
import asyncio
import contextlib
from urllib.parse import urlsplit

import aiomqtt

from preservarium.cli.system import load


async def play(address: str, url: str, deaf: bool) -> None:
    """Answer until interrupted."""
    broker = urlsplit(url)
    async with aiomqtt.Client(broker.hostname or "localhost", broker.port or 1883, identifier=address) as client:
        await client.subscribe(f"devices/{address}/down", qos=1)
        print(f"{address} listens", flush=True)
        async for message in client.messages:
            state = bytes(message.payload)
            print(f"{address} is told {state.hex()}", flush=True)
            if not deaf:
                await client.publish(f"devices/{address}/up", state, qos=1)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="A simulated relay.")
    options.add_argument("address")
    options.add_argument("--url", default="")
    options.add_argument("--deaf", action="store_true")
    given = options.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(play(given.address, given.url or load().mqtt.url.get_secret_value(), given.deaf))
