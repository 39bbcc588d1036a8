"""Parser scripts: payloads a second in one sandbox process, and what a bomb costs the other devices of its worker.

    python bench/sandbox.py [seconds]

`alone` is QuickJS in this process, CPU time; `process` is the round trip to one sandbox process, wall clock; `stage` the
whole stage: raw record in, standardized record out. The second part normalizes a batch every 50 ms, 190 devices with a
field table and 10 with a script; then the same with five devices more whose script is a regular expression that
never ends. It prints the percentiles of a batch's latency; the bomb's version is set aside after three kills.
"""

import asyncio
import statistics
import sys
import time

from preservarium import topics
from preservarium.clock import SystemClock
from preservarium.domain.decoders import examples
from preservarium.domain.decoders.kinds import compile_any
from preservarium.sandbox.javascript import JavaScript
from preservarium.sandbox.pool import TRUST_CALLS, Limits, SandboxPool
from preservarium.settings import LiveSettings, Settings
from preservarium.stages.normalize import Normalizer, script_call
from preservarium.streaming.records import raw_line
from preservarium.streaming.stage import Batch

NOW = 1_717_243_200_000_000
PAYLOAD = bytes.fromhex("03670110046850057401410067ff10")
SOURCES = {
    "small": "function decodeUplink(i) { return {data: {temperature: (i.bytes[0] << 8 | i.bytes[1]) / 10}}; }",
    "loop": """
var types = {0: ['input', 1, 1], 103: ['temperature', 2, 10], 104: ['humidity', 1, 2], 116: ['voltage', 2, 100]};
function read(bytes, at, n) { var v = 0; for (var k = 0; k < n; k++) v = v * 256 + bytes[at + k]; return v; }
function decodeUplink(input) {
  var data = {}, warnings = [], at = 0;
  while (at + 1 < input.bytes.length) {
    var channel = input.bytes[at++], type = types[input.bytes[at++]];
    if (!type) { warnings.push('unknown type'); break; }
    data[type[0] + '_' + channel] = read(input.bytes, at, type[1]) / type[2];
    at += type[1];
  }
  return {data: data, warnings: warnings};
}""",
}
BOMB = "function decodeUplink(i) { return {data: {n: /^(a+)+$/.test('a'.repeat(40) + 'b')}}; }"


class Record:
    timestamp, headers, key = NOW // 1000, (), None

    def __init__(self, value, offset):
        self.value, self.offset = value, offset


class World:
    rev = 1

    def __init__(self):
        table = {"fields": [{"name": "temperature", "type": "i16", "div": 10, "unit": "°C"}]}
        self.parsers = {n: ("javascript", s) for n, s in {**SOURCES, "bomb": BOMB}.items()} | {
            "table": ("table", table)
        }

    def datatype(self, name):
        return None

    def parser(self, name):
        kind, source = self.parsers[name]
        return {"name": name, "version": 1, "rev": 1, "kind": kind, "status": "active", "source": source, "hash": name}

    def type(self, name):
        return {"name": name, "rev": 1, "manufacturer": "m", "parser": name}

    async def lookup_many(self, partition, ids):
        return {i: {"device_id": i, "rev": 1, "type": i.split("-")[0], "enabled": True} for i in ids}

    async def ready(self):
        return


def line(device):
    return raw_line(device, PAYLOAD, received_at=NOW, connector="bench", mode="", port=1)


async def speed(rounds=5, count=2_000):
    world = World()
    for name, source in SOURCES.items():
        parser = compile_any(world.parser(name))
        calls = [script_call(parser, examples.raw_message(PAYLOAD, port=1))] * count
        codec = JavaScript(source, 10)
        pool = SandboxPool(Limits(cpu_s=5, wall_s=10))
        stage = Normalizer(world, world, SystemClock(), LiveSettings(Settings()), pool)
        batch = Batch(topics.RAW.name, 0, [Record(line(name), i) for i in range(count)])
        await pool.run(calls[:TRUST_CALLS])
        alone, process, whole = [], [], []
        for _ in range(rounds):
            begun = time.process_time()
            for call in calls:
                codec.call(call.function, call.arguments, 1_000_000)
            alone.append(count / (time.process_time() - begun))
            begun = time.perf_counter()
            outcomes = await pool.run(calls)
            process.append(count / (time.perf_counter() - begun))
            assert all(o.text for o in outcomes)
            begun = time.perf_counter()
            effects = await stage(batch)
            whole.append(count / (time.perf_counter() - begun))
            assert not effects.refused, effects.refused
        await pool.close()
        print(
            f"{name:8} alone {statistics.median(alone):9,.0f}/s  process {statistics.median(process):9,.0f}/s"
            f"  stage {statistics.median(whole):9,.0f}/s"
        )


async def isolation(seconds):
    for bombs in (0, 5, 0, 5):
        pool = SandboxPool()
        world = World()
        stage = Normalizer(world, world, SystemClock(), LiveSettings(Settings()), pool)
        devices = [f"table-{n}" for n in range(190)] + [f"small-{n}" for n in range(10)]
        good = [Record(line(d), i) for i, d in enumerate(devices)]
        bad = [Record(line(f"bomb-{n}"), 1_000 + n) for n in range(bombs)]
        for _ in range(5):
            await stage(Batch(topics.RAW.name, 0, good))
        taken = []
        end = time.perf_counter() + seconds
        while (begun := time.perf_counter()) < end:
            await stage(Batch(topics.RAW.name, 0, good + bad))
            taken.append(time.perf_counter() - begun)
            await asyncio.sleep(max(0.0, 0.05 - taken[-1]))
        await pool.close()
        taken.sort()
        at = {p: taken[min(len(taken) - 1, int(len(taken) * p))] * 1000 for p in (0.5, 0.99, 0.999)}
        print(
            f"{bombs} bombs  {len(taken):5} batches  p50 {at[0.5]:7.1f} ms  p99 {at[0.99]:7.1f} ms"
            f"  p99.9 {at[0.999]:7.1f} ms  max {taken[-1] * 1000:7.1f} ms"
        )


if __name__ == "__main__":
    asyncio.run(speed())
    asyncio.run(isolation(float(sys.argv[1]) if len(sys.argv) > 1 else 20.0))
