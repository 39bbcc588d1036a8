"""Decoding on one core: payloads and readings a second of CPU time, the best of interleaved rounds.

    python bench/decode.py [rounds]

Each line is one format. `decode` is the parser alone, `normalize` the whole of it: decode, map, convert, build the
message; `stage` also parses the raw record and writes the standardized one.
"""

import asyncio
import sys
import time
from pathlib import Path

from preservarium import topics
from preservarium.clock import SystemClock
from preservarium.domain.decoders import examples
from preservarium.domain.decoders.kinds import compile_parser
from preservarium.domain.readings.normalize import compile_device, normalize
from preservarium.registry.file import read
from preservarium.settings import LiveSettings, Settings
from preservarium.stages.normalize import Normalizer
from preservarium.streaming.records import raw_line
from preservarium.streaming.stage import Batch

ROOT = Path(__file__).parents[1]
PAYLOADS = 20_000
NOW = 1_717_243_200_000_000
CASES = (
    "decentlab-dl-sht35", "decentlab-dl-trs12", "decentlab-dl-blg", "decentlab-dl-lp8p", "decentlab-dl-atm41", "decentlab-dl-sdd",
    "senml", "json", "json-weather-station", "json-power-meter", "cayenne-lpp", "bthome", "influx",
)  # fmt: skip


class _Record:
    timestamp = NOW // 1000
    headers = ()
    key = None

    def __init__(self, value, offset):
        self.value, self.offset = value, offset


class _World:
    """The catalogue and the devices of a registry file, in memory."""

    rev = 1

    def __init__(self, documents):
        self.by = {
            kind: {d.get("device_id", d.get("name")): {"rev": 1, "version": 1, **d} for d in docs}
            for kind, docs in documents.items()
        }
        self.datatype, self.parser, self.type = self.by["datatype"].get, self.by["parser"].get, self.by["type"].get

    async def lookup_many(self, partition, ids):
        return {i: self.by["device"][i] for i in ids}

    async def ready(self):
        return


def per_second(function, count):
    start = time.process_time()
    function()
    return count / (time.process_time() - start)


def main(rounds=5):
    world = _World(read(ROOT / "examples/registry.yaml").documents)
    stage = Normalizer(world, world, SystemClock(), LiveSettings(Settings()))
    runs = {}
    for name in CASES:
        kind = next(t for t in world.by["type"].values() if t["parser"] == name)
        device = (
            next(d for d in world.by["device"].values() if d["type"] == kind["name"])
            if kind["name"] != "influx-generic"
            else None
        )
        parser = world.parser(name)
        raw = examples.example_input(next(e for e in parser["examples"] if "expect" in e))
        decoder = compile_parser(parser)
        device = device or {"device_id": "x", "rev": 1, "type": kind["name"], "enabled": True}
        world.by["device"][device["device_id"]] = device
        compiled = compile_device(device, kind, parser, world.datatype, decoder)
        fields = len(decoder.decode(raw))
        line = raw_line(
            device["device_id"], raw["payload"], received_at=NOW, connector="bench", mode="", port=raw["port"]
        )
        batch = Batch(topics.RAW.name, 0, [_Record(line, i) for i in range(5_000)])

        def decode(decoder=decoder, raw=raw):
            for _ in range(PAYLOADS):
                decoder.decode(raw)

        def whole(raw=raw, compiled=compiled):
            for _ in range(PAYLOADS):
                normalize(raw, compiled, NOW)

        def staged(batch=batch):
            effects = asyncio.run(stage(batch))
            assert not effects.refused, effects.refused

        runs[name] = (
            fields,
            {"decode": (decode, PAYLOADS), "normalize": (whole, PAYLOADS), "stage": (staged, 5_000)},
            {},
        )
    for _ in range(rounds):
        for _, functions, found in runs.values():
            for step, (function, count) in functions.items():
                found.setdefault(step, []).append(per_second(function, count))
    print(
        f"{'':22} {'fields':>6} {'decode/s':>10} {'fields/s':>10} {'normalize/s':>11} {'stage/s':>9} {'readings/s':>10}"
    )
    for name, (fields, _, found) in runs.items():
        best = {step: max(values) for step, values in found.items()}
        print(
            f"{name:22} {fields:6} {best['decode']:10,.0f} {best['decode'] * fields:10,.0f} {best['normalize']:11,.0f}"
            f" {best['stage']:9,.0f} {best['stage'] * fields:10,.0f}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
