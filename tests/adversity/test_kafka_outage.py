"""The broker is killed and comes back under a working worker: it waits, heals and loses nothing."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from test_torture import Field, Load
from worker_support import until

from preservarium.embedded.kafka import Kafka
from preservarium.errors import Retry


class StubbornLoad(Load):
    """Goes on when Kafka is back; what was not acknowledged is sent again, so ids may come twice."""

    async def _run(self) -> None:
        publish = self._publisher.publish

        async def again(sends: Any) -> Any:
            while True:
                try:
                    return await publish(sends)
                except Retry:
                    await asyncio.sleep(0.2)

        self._publisher.publish = again  # type: ignore[method-assign]
        await super()._run()


@pytest.mark.kafka
@pytest.mark.timeout(240)
async def test_a_broker_that_dies_and_comes_back_costs_time_only(
    own_kafka: Kafka, topic_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    field = Field(own_kafka.bootstrap_servers, topic_prefix, tmp_path, monkeypatch, failures=0)
    await field.make_topics()
    load = StubbornLoad(field.live, 500)
    try:
        async with load.running():
            number = field.workers.start()
            await field.workers.ready(number)
            await until(lambda: len(field.stored()) > 200, 30)
            await asyncio.to_thread(own_kafka.kill)
            await asyncio.sleep(8)  # longer than the session timeout of 6 s
            before = len(field.stored())
            await asyncio.to_thread(own_kafka.start)
            await until(lambda: len(field.stored()) > before + 200, 90, lambda: field.workers.log(number)[-5_000:])
        await until(
            lambda: set(field.stored()) >= set(range(load.produced)), 60, lambda: field.workers.log(number)[-5_000:]
        )
        assert field.workers.processes[number].poll() is None, "the worker lived through it"
        with capsys.disabled():
            print(f"\n  produced {load.produced:,}, stored {len(field.stored()):,}, before {before:,}")
    finally:
        field.workers.stop()
