"""How a service is started: waited for as long as it gets on, given up at once when nobody wants it any more."""

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from preservarium.embedded.service import Interrupted, Service, ServiceError, run_tool


class Slow(Service):
    """Says a line now and then, and is healthy once its log has so many."""

    name = "slow"
    start_s = 0.6
    start_max_s = 30.0
    stop_s = 5.0

    def __init__(self, directory: Path, *, lines: int, every_s: float, wanted: int) -> None:
        super().__init__(directory)
        self._lines, self._every_s, self._wanted = lines, every_s, wanted

    def prepare(self) -> None:
        pass

    def command(self) -> Sequence[str]:
        code = (
            "import sys, time\n"
            f"for n in range({self._lines}):\n"
            f"    print('line', n, flush=True); time.sleep({self._every_s})\n"
            "time.sleep(600)\n"
        )
        return [sys.executable, "-I", "-S", "-c", code]

    def healthy(self) -> bool:
        return self.log_file.exists() and self.log_file.read_text().count("\n") >= self._wanted


def processes_of(directory: Path) -> list[int]:
    return [
        p.pid for p in psutil.process_iter(["cmdline"]) if any(str(directory) in a for a in p.info["cmdline"] or ())
    ]


def test_it_is_waited_for_as_long_as_its_log_moves(tmp_path):
    with Slow(tmp_path, lines=8, every_s=0.25, wanted=8) as service:
        assert service.started_s is not None
        assert service.started_s > 2 * Slow.start_s  # longer than silence may last, all in all


def test_one_that_says_nothing_more_has_failed_and_is_stopped(tmp_path):
    service = Slow(tmp_path, lines=2, every_s=0.05, wanted=3)
    with pytest.raises(ServiceError, match=r"slow did not answer .*showed no progress for 0.6 s") as caught:
        service.start()
    assert "| line 1" in str(caught.value)
    assert not service.alive
    assert processes_of(tmp_path) == []


def test_there_is_a_bound_however_much_it_says(tmp_path):
    service = Slow(tmp_path, lines=1_000, every_s=0.05, wanted=1_000)
    service.start_max_s = 1.5
    with pytest.raises(ServiceError, match=r"slow did not answer within 2 s\n"):
        service.start()
    assert processes_of(tmp_path) == []


def test_a_start_that_nobody_wants_any_more_ends_at_once(tmp_path):
    service = Slow(tmp_path, lines=1_000, every_s=0.05, wanted=1_000)
    threading.Timer(0.5, service.interrupt).start()
    begun = time.monotonic()
    with pytest.raises(Interrupted, match="the start of slow was given up"):
        service.start()
    assert time.monotonic() - begun < 10
    assert processes_of(tmp_path) == []
    with pytest.raises(Interrupted):
        service.start()  # it stays unwanted
    assert processes_of(tmp_path) == []


def test_waiting_for_another_owner_can_be_given_up(tmp_path):
    with Slow(tmp_path, lines=1, every_s=0.0, wanted=1):
        second = Slow(tmp_path, lines=1, every_s=0.0, wanted=1)
        threading.Timer(0.5, second.interrupt).start()
        begun = time.monotonic()
        with pytest.raises(Interrupted):
            second.start()
        assert time.monotonic() - begun < second.busy_wait_s / 2
        assert len(processes_of(tmp_path)) == 1, "the guard of the first"


def test_a_tool_is_run_and_what_it_printed_is_there():
    done = run_tool(
        "tool",
        [sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"],
        timeout_s=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_a_tool_that_takes_too_long_or_is_not_wanted_is_killed():
    sleeps = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(ServiceError, match=r"tool: no end within 0.3 s"):
        run_tool("tool", sleeps, timeout_s=0.3)
    given_up = threading.Event()
    threading.Timer(0.3, given_up.set).start()
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        run_tool("tool", sleeps, timeout_s=60, interrupted=given_up)
    assert time.monotonic() - begun < 10
