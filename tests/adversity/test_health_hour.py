"""Is a healthy system ever called dead? An hour of the default fleet, `/health` and `/ready` asked each second."""

import http.client
import os
import signal
import time
from collections import Counter

import pytest
from up_support import Run, data_directory

#: How long it is watched; for a shorter look than the slow suite's hour.
WATCHED_S = float(os.environ.get("TEST_HEALTH_S", "3600"))
#: An answer that takes longer is none: who restarts on it waits no longer either.
ANSWER_S = 10.0

pytestmark = [pytest.mark.slow, pytest.mark.kafka, pytest.mark.postgres, pytest.mark.clickhouse,
              pytest.mark.timeout(WATCHED_S + 600)]  # fmt: skip


def ask(port: int, path: str) -> tuple[int, str]:
    """Status and body; status 0 where there was no answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    except (OSError, http.client.HTTPException) as e:
        return 0, repr(e)
    finally:
        connection.close()


def test_a_healthy_fleet_is_never_called_dead(tmp_path_factory):
    run = Run(data_directory(tmp_path_factory, "hour"))
    try:
        run.said("devices send")
        run.until(lambda: ask(run.port, "/ready")[0] == 200)
        counts: Counter[tuple[str, int]] = Counter()
        wrong: list[tuple[float, str, int, str]] = []
        slowest_s = 0.0
        begun = time.monotonic()
        while (at_s := time.monotonic() - begun) < WATCHED_S:
            for path in ("/health", "/ready"):
                asked_s = time.monotonic()
                status, body = ask(run.port, path)
                slowest_s = max(slowest_s, time.monotonic() - asked_s)
                counts[path, status] += 1
                if status != 200:
                    wrong.append((round(at_s, 1), path, status, body[:500]))
            assert run.process.poll() is None, run.errors.read_text()
            time.sleep(max(0.0, at_s + 1.0 - (time.monotonic() - begun)))
        print(f"{WATCHED_S:g} s: {dict(counts)}, slowest answer {slowest_s:.2f} s")
        assert wrong == []
        assert counts["/health", 200] > WATCHED_S * 0.5
    finally:
        run.process.send_signal(signal.SIGTERM)
        run.end()
