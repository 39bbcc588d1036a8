"""A parser script that never ends, in a real worker on a real Kafka."""

import asyncio
import time
from collections import Counter
from pathlib import Path

import orjson
import pytest
from worker_support import Workers, make_topics, read_all, until

from preservarium import topics
from preservarium.settings import Kafka, LiveSettings, Settings
from preservarium.streaming.publish import Publisher
from preservarium.streaming.records import raw_line
from preservarium.streaming.stage import Send

PARTITIONS = 2
ROUNDS = 20
DEVICES = [f"{kind}-{n}" for kind in ("script", "python", "table") for n in range(3)]

pytest.importorskip("quickjs")
pytest.importorskip("RestrictedPython")


@pytest.mark.kafka
@pytest.mark.timeout(180)
async def test_a_bombs_version_is_set_aside_and_the_others_go_on(kafka: str, topic_prefix: str, tmp_path: Path) -> None:
    await make_topics(kafka, topic_prefix, PARTITIONS, [topics.RAW, topics.STANDARDIZED, topics.ERRORS])
    environment = {
        "PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS": kafka,
        "PRESERVARIUM_KAFKA__TOPIC_PREFIX": topic_prefix,
        "PRESERVARIUM_KAFKA__GROUP": f"{topic_prefix}worker",
        "PRESERVARIUM_KAFKA__PARTITIONS": str(PARTITIONS),
        "PRESERVARIUM_DATA_DIR": str(tmp_path / "data"),
        "PRESERVARIUM_ENV_FILE": "/dev/null",
        "PRESERVARIUM_LOG_FORMAT": "json",
        # A machine that is busy must not make a good script look like a bomb.
        "PRESERVARIUM_SANDBOX__WALL_S": "2",
        "PRESERVARIUM_SANDBOX__CPU_S": "1",
    }
    workers = Workers(Path(__file__).parent / "script_app.py", environment, tmp_path)
    live = LiveSettings(
        Settings(kafka=Kafka(bootstrap_servers=kafka, topic_prefix=topic_prefix, partitions=PARTITIONS))
    )
    publisher = Publisher(live)
    made: list[dict] = []
    errors: list[dict] = []

    async def all_there() -> bool:
        records = await read_all(kafka, topics.STANDARDIZED.full(topic_prefix), PARTITIONS)
        made[:] = [orjson.loads(line) for r in records for line in r.value.split(b"\n")]
        errors[:] = [orjson.loads(r.value) for r in await read_all(kafka, topics.ERRORS.full(topic_prefix), PARTITIONS)]
        return len(made) >= ROUNDS * len(DEVICES) and len(errors) >= ROUNDS * 2

    try:
        number = workers.start()
        await workers.ready(number)
        for n in range(ROUNDS):
            sent = [
                Send(topics.RAW, d.encode(), raw_line(d, bytes([n]), received_at=time.time_ns() // 1000, connector="test", mode="LoRaWAN"))
                for d in (*DEVICES, "bomb-1", "bomb-2")
            ]  # fmt: skip
            await publisher.publish(sent)
            await asyncio.sleep(0.1)  # several batches, not one
        await until(all_there, 60, lambda: f"{len(made)} made, {len(errors)} errors\n{workers.log(number)[-3_000:]}")
        assert workers.processes[number].poll() is None
    finally:
        await publisher.on_stop()
        workers.stop()
    assert sorted((m["device_id"], m["readings"][0]["value"]) for m in made) == sorted(
        (d, n) for d in DEVICES for n in range(ROUNDS)
    )
    codes = Counter(e["code"] for e in errors)
    assert codes == {"script_timeout": 3, "script_suspended": 2 * ROUNDS - 3}
    assert {e["device_id"] for e in errors} == {"bomb-1", "bomb-2"}
    assert all(e["message"].startswith("bomb@1") and e["parser"] == "bomb@1" and "raw" in e for e in errors)
