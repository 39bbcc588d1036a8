"""A worker as `faust worker` starts it: recovery, exit codes, reload, a database that is down, nothing to fetch."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from worker_support import PARTITIONS, ROOT, Worker, make_topics, read_all, until

from preservarium import topics
from preservarium.streaming.stage import Send
from preservarium.topics import Topic


@pytest.fixture
def worker(kafka: str, topic_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Worker(kafka, topic_prefix, tmp_path, monkeypatch)
    yield made
    made.workers.stop()


def ready_after_s(log: str) -> float:
    return float(re.findall(r'"took_s": ([0-9.]+), "event": "worker_ready"', log)[-1])


async def test_state_survives_stops_kills_and_the_loss_of_the_disk(worker: Worker) -> None:
    await worker.make_topics()
    keys = 30_000
    await worker.publish([Send(topics.RAW, b"k%d" % i, b"v%d" % i) for i in range(keys)])

    def holds_everything() -> bool:
        return sum(worker.report().get("tables", {}).get("states", {}).values()) == keys

    first = await worker.ready("state")
    await until(holds_everything, 30, lambda: str(worker.report()))
    await until(lambda: worker.stage("remember")["lag"] == 0, 10)
    assert worker.report()["ok"]
    assert worker.report()["loop"].startswith("uvloop")
    await worker.stop(first)
    assert worker.report_file.with_suffix(".closed").exists(), "resources are closed"

    again = await worker.ready("state")
    await until(holds_everything, 5)
    assert (worker.directory / "data" / "worker-0").is_dir()
    worker.workers.signal(again, signal.SIGKILL)

    fresh = await worker.ready("state", PRESERVARIUM_DATA_DIR=str(worker.directory / "fresh"))
    await until(holds_everything, 5, lambda: str(worker.report()["tables"]))
    # Faust's way would take 3 s for these and more for more.
    assert ready_after_s(worker.workers.log(fresh)) < 6 + 8  # the killed member's session, and some seconds to join
    await worker.stop(fresh)


def heard(topic: Topic, device: str, at_us: int, offset: int) -> Send:
    """A message of a device, received when it was measured."""
    message = {
        "device_id": device, "connector_mode": "MQTT", "topic": "", "timestamp": at_us, "received_at": at_us,
        "raw_partition": 0, "raw_offset": offset, "raw_index": 0, "parser": "p@1", "config_rev": 1, "generation": 0,
        "readings": [{"component_type": "temp", "pin_position": "-1", "value": 20.0, "unit": "°C", "quality": 1}],
    }  # fmt: skip
    return Send(topic, device.encode(), json.dumps(message).encode())


async def alerts(worker: Worker) -> list[Any]:
    return [json.loads(r.value) for r in await read_all(worker.kafka, topics.ALERTS.full(worker.prefix), PARTITIONS)]


async def test_a_message_that_a_stage_holds_up_past_its_deadline_is_no_silence(worker: Worker) -> None:
    used = [topics.RAW, topics.VALIDATED, topics.ALERTS, topics.ALARM_STANDING]
    await make_topics(worker.kafka, worker.prefix, PARTITIONS, used)
    down = worker.directory / "down"
    number = await worker.ready("held", WORKER_DOWN=str(down), PRESERVARIUM_ALARM__SETTLE_S="1")
    devices = [f"dev-{i}" for i in range(12)]
    first_us = time.time_ns() // 1_000
    await worker.publish([heard(topics.RAW, device, first_us, 1) for device in devices])
    await until(lambda: sum(worker.report().get("tables", {}).get("alarm_states", {}).values()) == len(devices), 20)

    down.touch()
    second_us = time.time_ns() // 1_000
    assert second_us < first_us + 8_000_000, "too slow to say anything"
    await worker.publish([heard(topics.RAW, device, second_us, 2) for device in devices])
    while time.time_ns() // 1_000 < first_us + 11_000_000:  # three seconds, fifteen ticks, beyond the deadline
        assert await alerts(worker) == []
        await asyncio.sleep(0.3)
    down.unlink()

    async with asyncio.timeout(60):
        while len(await alerts(worker)) < len(devices):
            await asyncio.sleep(0.3)
    raised = {(t["device_id"], t["transition"], t["occurred_at"]) for t in await alerts(worker)}
    assert raised == {(device, "raised", second_us + 8_000_000) for device in devices}
    await worker.stop(number)


async def test_silence_is_told_once_by_whichever_worker_there_is_at_its_deadline(worker: Worker) -> None:
    await make_topics(worker.kafka, worker.prefix, PARTITIONS, [topics.VALIDATED, topics.ALERTS, topics.ALARM_STANDING])
    devices = [f"dev-{i}" for i in range(30)]

    async def publish(at_us: int, offset: int) -> None:
        await worker.publish([heard(topics.VALIDATED, device, at_us, offset) for device in devices])

    async def told() -> list[Any]:
        return await alerts(worker)

    settle = {"PRESERVARIUM_ALARM__SETTLE_S": "1"}
    first = await worker.ready("silence", **settle)
    heard_us = time.time_ns() // 1_000
    await publish(heard_us, 1)
    await until(lambda: sum(worker.report().get("tables", {}).get("alarm_states", {}).values()) == len(devices), 20)
    worker.workers.signal(first, signal.SIGKILL)

    second = await worker.ready("silence", **settle)
    async with asyncio.timeout(60):
        while len(await told()) < len(devices):
            await asyncio.sleep(0.3)
    raised = await told()
    assert {(t["device_id"], t["transition"], t["occurred_at"]) for t in raised} == {
        (device, "raised", heard_us + 8_000_000) for device in devices
    }
    again_us = time.time_ns() // 1_000
    await publish(again_us, 2)
    async with asyncio.timeout(30):
        while len(await told()) < 2 * len(devices):
            await asyncio.sleep(0.3)
    cleared = [t for t in await told() if t["transition"] == "cleared"]
    assert {t["alarm_id"] for t in cleared} == {t["alarm_id"] for t in raised}
    assert {t["cleared_at"] for t in cleared} == {again_us}
    await worker.stop(second)


async def test_a_fatal_error_ends_the_worker_with_a_failure(worker: Worker) -> None:
    await worker.make_topics()
    await worker.publish([Send(topics.RAW, b"k", b"v")])
    number = worker.workers.start(WORKER_MODE="fatal")
    assert await worker.workers.ended(number, within_s=60) not in (0, None)
    assert "the test says so" in worker.workers.log(number)


async def test_a_worker_with_group_stages_only_starts_and_works(worker: Worker) -> None:
    await worker.make_topics()
    number = await worker.ready("group")
    await worker.publish([Send(topics.STANDARDIZED, b"k%d" % i, b"%d" % i) for i in range(100)])

    async def passed() -> bool:
        return len(await read_all(worker.kafka, topics.VALIDATED.full(worker.prefix), PARTITIONS)) == 100

    await until(passed, 20, lambda: worker.workers.log(number)[-2_000:])
    await worker.stop(number)


async def test_a_database_that_is_down_stops_its_own_stage_and_no_other(worker: Worker) -> None:
    await worker.make_topics()
    down = worker.directory / "down"
    down.touch()
    number = await worker.ready("down", WORKER_DOWN=str(down))
    sends = [Send(topics.RAW, b"k%d" % i, b"%d" % i) for i in range(3_000)]
    await worker.publish(sends[:1_000])
    await until(lambda: worker.stage("keep").get("paused"), 20)
    # Longer than the session timeout: waiting must not cost the membership.
    began = time.monotonic()
    await worker.publish(sends[1_000:])
    await until(lambda: worker.stage("forward")["lag"] == 0, 20)
    await asyncio.sleep(max(0, 7 - (time.monotonic() - began)))
    report = worker.report()
    assert report["ok"], report["problems"]
    assert set(report["stages"]["keep"]["paused"].values()) == {"the database is down"}
    assert report["stages"]["keep"]["lag"] == 3_000
    assert len(await read_all(worker.kafka, topics.STANDARDIZED.full(worker.prefix), PARTITIONS)) == 3_000
    assert await read_all(worker.kafka, topics.VALIDATED.full(worker.prefix), PARTITIONS) == []
    down.unlink()
    await until(lambda: worker.stage("keep")["lag"] == 0, 20)
    records = await read_all(worker.kafka, topics.VALIDATED.full(worker.prefix), PARTITIONS)
    assert sorted(int(r.value) for r in records) == list(range(3_000))
    await worker.stop(number)


async def test_a_stop_with_handlers_that_hang_is_bounded_and_loses_nothing(worker: Worker) -> None:
    await worker.make_topics()
    number = await worker.ready("stuck")
    await worker.publish([Send(topic, b"k", b"v", 0) for topic in (topics.RAW, topics.STANDARDIZED)])
    for stage in ("hang", "hang-too"):
        await until(lambda stage=stage: worker.stage(stage).get("busy_s"), 20)
    worker.workers.signal(number, signal.SIGTERM)
    assert await worker.workers.ended(number, within_s=29) == 0, "less than the grace that Kubernetes gives"
    assert "batch_abandoned" in worker.workers.log(number)
    assert "flight_abandoned" in worker.workers.log(number)
    again = await worker.ready("stuck")
    for stage in ("hang", "hang-too"):
        await until(lambda stage=stage: worker.stage(stage).get("busy_s"), 20, lambda: "what was abandoned comes again")
    worker.workers.signal(again, signal.SIGKILL)


async def test_a_reload_says_what_changed(worker: Worker) -> None:
    await worker.make_topics()
    worker.env_file.write_text("PRESERVARIUM_SINK__ROWS_MAX=100\n")
    number = await worker.ready("state")
    worker.env_file.write_text("PRESERVARIUM_SINK__ROWS_MAX=200\nPRESERVARIUM_KAFKA__LINGER_MS=7\n")
    worker.workers.signal(number, signal.SIGHUP)
    await until(lambda: "settings_reloaded" in worker.workers.log(number), 10)
    lines = [json.loads(x) for x in worker.workers.log(number).splitlines() if x.startswith("{")]
    (changed,) = [x for x in lines if x["event"] == "setting_changed"]
    assert (changed["variable"], changed["old"], changed["new"]) == ("PRESERVARIUM_SINK__ROWS_MAX", "100", "200")
    (refused,) = [x for x in lines if x["event"] == "setting_needs_restart"]
    assert refused["variable"] == "PRESERVARIUM_KAFKA__LINGER_MS"
    worker.env_file.write_text("PRESERVARIUM_SINK__ROWS_MAX=no\n")
    worker.workers.signal(number, signal.SIGHUP)
    await until(lambda: "settings_not_reloaded" in worker.workers.log(number), 10)
    await worker.stop(number)


@pytest.mark.parametrize("command", ["agents", "tables"])
def test_fausts_command_line_works_from_the_checkout(command: str) -> None:
    faust = [sys.executable, "-m", "faust", "-A", "preservarium", command]
    result = subprocess.run(
        faust, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    listed = {
        "agents": ["@normalize", "@validate", "@alarm", "@notify", "@sink", "@sync", "@registry"],
        "tables": ["device_configs", "series_states", "alarm_states"],
    }
    assert all(name in result.stdout for name in listed[command])


def test_a_wrong_setting_is_one_line_and_exit_code_2() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "faust", "-A", "preservarium", "agents"],
        cwd=ROOT,
        env={**os.environ, "PRESERVARIUM_KAFKA__PARTITIONS": "many"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.strip().count("\n") == 0
    assert "PRESERVARIUM_KAFKA__PARTITIONS" in result.stderr


async def test_a_worker_that_is_known_again_waits_for_no_session_of_its_own(worker: Worker) -> None:
    await worker.make_topics()
    keys = 3_000
    await worker.publish([Send(topics.RAW, b"k%d" % i, b"v%d" % i) for i in range(keys)])

    def holds(count: int) -> bool:
        return sum(worker.report().get("tables", {}).get("states", {}).values()) == count

    # Without a name it would wait out the session of the one that was killed.
    session_s = 60
    named = {"PRESERVARIUM_KAFKA__STATIC_MEMBERSHIP": "true", "PRESERVARIUM_KAFKA__SESSION_TIMEOUT_S": str(session_s)}
    killed = await worker.ready("state", **named)
    await until(lambda: holds(keys), 30, lambda: str(worker.report()))
    name = (worker.directory / "data" / "worker-0" / "instance").read_text()
    worker.workers.signal(killed, signal.SIGKILL)
    await worker.workers.ended(killed)

    again = await worker.ready("state", **named)
    assert ready_after_s(worker.workers.log(again)) < session_s / 2
    assert (worker.directory / "data" / "worker-0" / "instance").read_text() == name
    await worker.publish([Send(topics.RAW, b"n%d" % i, b"v") for i in range(300)])
    await until(lambda: holds(keys + 300), 30, lambda: str(worker.report()))
    await worker.stop(again)

    # Stopped, it stays a member: started again it goes on at once.
    last = await worker.ready("state", **named)
    assert ready_after_s(worker.workers.log(last)) < session_s / 2
    await worker.stop(last)


async def test_so_does_a_stage_with_a_group_of_its_own(worker: Worker) -> None:
    await worker.make_topics()
    named = {"PRESERVARIUM_KAFKA__STATIC_MEMBERSHIP": "true", "PRESERVARIUM_KAFKA__SESSION_TIMEOUT_S": "60"}
    killed = await worker.ready("group", **named)
    await worker.publish([Send(topics.STANDARDIZED, b"k", b"1")])
    await until(lambda: worker.stage("keep").get("lag") == 0, 20, lambda: str(worker.report()))
    worker.workers.signal(killed, signal.SIGKILL)
    await worker.workers.ended(killed)

    again = await worker.ready("group", **named)
    await worker.publish([Send(topics.STANDARDIZED, b"k%d" % i, b"2") for i in range(30)])
    await until(
        lambda: worker.stage("keep").get("partitions") == [0, 1, 2] and worker.stage("keep")["lag"] == 0,
        30,
        lambda: str(worker.report()),
    )
    await worker.stop(again)
