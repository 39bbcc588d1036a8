"""Whoever types what README and docs print, beside a running `preservarium up`, gets what they say: no error."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from documented import ANSWERS, NOT_RUN, PAGES, ROOT, Documented, documented
from up_support import Run, data_directory, left_behind, plain_environment

from preservarium.embedded.mosquitto import PLACES

COMMANDS = documented()
#: They list what there is or write a file, and need no server.
ASKS_NOBODY = ("preservarium sync query", "preservarium registry init")

pytestmark = [pytest.mark.kafka, pytest.mark.postgres, pytest.mark.clickhouse, pytest.mark.timeout(900)]


def mosquitto() -> bool:
    return shutil.which("mosquitto", path=os.pathsep.join((os.environ.get("PATH", ""), *PLACES))) is not None


@pytest.fixture(scope="module")
def up(tmp_path_factory) -> Iterator[Run]:
    run = Run(data_directory(tmp_path_factory, "docs"), *(["--mqtt"] if mosquitto() else []))
    run.until(lambda: run.get("/ready"))
    run.said("devices send")
    # The alarm that the documents answer comes after some seconds.
    run.until(lambda: (page := run.get("/api/alarms?q=co2-high")) and page["total"])
    yield run
    run.process.send_signal(signal.SIGINT)
    code, _ = run.end()
    assert code == 0
    assert left_behind(run.data_dir) == []


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """A directory with `preservarium` and `python` of this very checkout, whatever is installed beside it."""
    directory = tmp_path_factory.mktemp("bin")
    for name, module in (("preservarium", "-m preservarium"), ("python", "")):
        script = directory / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        script.chmod(0o755)
    return directory


def type_in(command: Documented, up: Run, programs: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        ["bash", "-c", command.text.removesuffix("&").rstrip()], text=True, start_new_session=True,
        cwd=programs if command.page.startswith("docs/guides/") else ROOT,  # guides write files of the reader's own
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=plain_environment(
            PATH=f"{programs}{os.pathsep}{os.environ['PATH']}", PRESERVARIUM_DATA_DIR=str(up.data_dir),
            PRESERVARIUM_ENV_FILE=os.devnull, PYTHONPATH=str(ROOT),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("page", dict.fromkeys(c.page for c in COMMANDS if not c.reason))
def test_commands_of_a_page_work_in_their_order(up, programs, page):
    beside: list[subprocess.Popen[str]] = []
    try:
        for command in COMMANDS:
            if command.page != page or command.reason:
                continue
            if page == "docs/COMMANDS.md" and not mosquitto():
                pytest.skip("missing: Mosquitto, for the device that docs/COMMANDS.md commands")
            typed = type_in(command, up, programs)
            if command.background:
                beside.append(typed)
                assert typed.stdout is not None
                assert "listens" in typed.stdout.readline(), typed.stderr and typed.stderr.read()
                continue
            out, err = typed.communicate(ANSWERS, timeout=600)
            where = f"{page}:{command.line}: {command.text}\n{out}\n{err}"
            assert typed.returncode == 0, where
            assert "Traceback" not in err, where
            if command.text.startswith("preservarium") and not command.text.startswith(ASKS_NOBODY):
                assert f"using the system that runs in {up.data_dir}" in err, where
            assert out.strip(), where
    finally:
        for typed in beside:
            for process in (*psutil.Process(typed.pid).children(recursive=True), psutil.Process(typed.pid)):
                process.terminate()
            typed.communicate(timeout=30)


def test_everything_that_is_printed_was_found_and_what_is_not_run_is_still_printed():
    assert len(COMMANDS) >= 25
    assert {"README.md", "docs/OPERATING.md", "docs/COMMANDS.md", "docs/TASKS.md"} <= {c.page for c in COMMANDS}
    printed = sum(page.read_text(encoding="utf-8").count("\n$ preservarium ") for page in PAGES)
    assert sum(c.text.startswith("preservarium ") for c in COMMANDS) >= printed
    for page, begin in NOT_RUN:
        assert any(c.page == page and c.text.startswith(begin) for c in COMMANDS), (page, begin)
    assert all(NOT_RUN.values())


#: What the sample fleet brings about, as SQL that counts it.
AT_WORK = {
    "alarms": "SELECT count(*) FROM alarm_events WHERE transition = 'raised'",
    "alarms that ended": "SELECT count(*) FROM alarm_events WHERE transition = 'cleared'",
    "notices": "SELECT count(*) FROM notice_deliveries WHERE outcome = 'sent' AND channel = 'mail'",
    "commands of an alarm": "SELECT count(*) FROM device_commands WHERE state = 'successful' AND device_id = 'fan-hall-1'"
    " AND requested_by LIKE 'alarm%'",
    "anomalies": "SELECT count(*) FROM anomalies WHERE state = 'begins' AND device_id = 'meter-hall-1'",
    "windows": "SELECT count(*) FROM aggregates WHERE size_s = 30",
    "consumption of a meter": "SELECT count(*) FROM iot_measurements WHERE component_type = 'energy_consumption' AND value >= 0",
}  # fmt: skip


def test_the_sample_fleet_shows_every_stage_at_work(up, programs):
    def counted(sql: str) -> int:
        typed = type_in(Documented("", 0, f'preservarium db postgres --json -c "{sql}"'), up, programs)
        out, err = typed.communicate(timeout=120)
        assert typed.returncode == 0, err
        return int(out.split('"count":')[1].split("}")[0])

    for what, sql in AT_WORK.items():
        assert up.until(lambda sql=sql: counted(sql), timeout_s=180), what
    mails = [*(up.data_dir / "mail").glob("*.eml")]
    assert any(b"CO2 1400: CO2 at" in mail.read_bytes().replace(b"=\r\n", b"") for mail in mails)
    # A meter that only counts up is never reset, also from one start to the next.
    assert (
        counted("SELECT count(*) FROM iot_measurements WHERE component_type = 'energy_consumption' AND value > 1") == 0
    )
    stages = {stage["name"]: stage for stage in up.get("/api/status")["stages"]}
    for name in ("anomaly", "aggregate", "alarm", "commands", "group", "notify", "sink-aggregates", "sync-anomalies"):
        assert stages[name]["received_total"] > 0, name
