"""Logging set-up."""

import json
import logging

import pytest
import structlog

from preservarium import logs


@pytest.fixture(autouse=True)
def restored() -> object:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    config = structlog.get_config()
    yield
    root.handlers[:], root.level = handlers, level
    structlog.configure(**config)


def test_json_lines_for_us_and_for_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("INFO", "json")
    structlog.get_logger("preservarium.x").info("batch_waits", stage="sink")
    logging.getLogger("somebody").warning("%d things", 3)
    try:
        raise ValueError("why")
    except ValueError:
        structlog.get_logger("preservarium.x").exception("failed")
    ours, theirs, failed = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (ours["event"], ours["stage"], ours["level"], ours["logger"]) == (
        "batch_waits",
        "sink",
        "info",
        "preservarium.x",
    )
    assert ours["timestamp"].endswith("Z")
    assert theirs["event"] == "3 things"
    assert "ValueError: why" in failed["exception"]


def test_libraries_are_quiet_and_the_level_can_change(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("INFO", "console")
    logging.getLogger("faust.app").info("Starting")
    logging.getLogger("mode.services").info("Starting")
    structlog.get_logger("preservarium.y").debug("detail")
    assert capsys.readouterr().err == ""
    logs.set_level("ERROR")
    structlog.get_logger("preservarium.y").warning("hidden")
    logging.getLogger("faust.app").warning("hidden")
    assert capsys.readouterr().err == ""


def test_a_librarys_repeats_are_written_once() -> None:
    repeats = logs.Repeats()

    def passes(name: str, message: str, *args: object) -> bool:
        return repeats.filter(logging.LogRecord(name, logging.ERROR, "", 0, message, args, None))

    assert passes("aiokafka", "no node %d", 1)
    assert not passes("aiokafka", "no node %d", 1)
    assert passes("aiokafka", "no node %d", 2)
    assert passes("aiokafka.conn", "no node %d", 1)
    assert passes("preservarium", "x")
    assert passes("preservarium", "x")
    for i in range(2 * logs.REPEATS_MAX):
        assert passes("aiokafka", "m %d", i)
    assert len(repeats._written_s) <= logs.REPEATS_MAX
