"""What a load needs: the plan, and the command that measures costs at a running worker."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from preservarium.__main__ import cli
from preservarium.domain.capacity import TARGET_UTILISATION, Costs, Load, plan


@given(st.floats(1, 1e7), st.floats(0.1, 100), st.floats(1, 10))
def test_what_is_planned_carries_the_peak(rate: float, readings: float, peak: float) -> None:
    made = plan(Load(rate, readings, peak=peak), Costs())
    used = {part.name: part.used for part in made.parts}
    assert used["workers"] <= 1 + 1e-9
    assert used["partitions"] <= 1 / 3 + 1e-9  # each worker has several
    assert made.partitions >= made.workers
    assert (
        made.readings_per_s / (made.workers * made.worker_readings_per_s / TARGET_UTILISATION)
        <= TARGET_UTILISATION + 1e-9
    )
    assert made.bottleneck.used == max(used.values())
    assert made.headroom == pytest.approx(1 / made.bottleneck.used)
    assert made.brokers is not None
    assert made.brokers >= 3


def test_the_costs_are_those_that_were_measured() -> None:
    """docs/PERFORMANCE.md: 23.4 µs a reading with four in a message; with one, 2.76 times as much."""
    costs = Costs()
    assert (costs.message_us + 4 * costs.reading_us) / 4 == pytest.approx(23.4, abs=0.1)
    assert costs.message_us + costs.reading_us == pytest.approx(23.4 * 2.76, abs=0.3)


@given(st.floats(1, 1e6))
def test_more_load_never_needs_less(rate: float) -> None:
    small, large = plan(Load(rate), Costs()), plan(Load(rate * 2), Costs())
    assert large.workers >= small.workers
    assert large.partitions >= small.partitions
    assert large.headroom <= small.headroom
    assert plan(Load(rate, rules=10), Costs()).workers >= small.workers


def test_workers_beyond_the_partitions_carry_nothing() -> None:
    few = plan(Load(50_000), Costs(), workers=40, partitions=4)
    assert few.parts == plan(Load(50_000), Costs(), workers=4, partitions=4).parts
    assert few.bottleneck.used > 1


@pytest.mark.parametrize(
    "wrong", [{"messages_per_s": 0}, {"messages_per_s": -1}, {"readings": 0}, {"peak": 0.5}, {"replication": 0}]
)
def test_what_is_no_load_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        plan(Load(**{"messages_per_s": 10.0, **wrong}), Costs())


# --- the command


class FakeWorker:
    """Serves metrics that grow with each scrape as a worker's would."""

    def __init__(self, messages: int) -> None:
        scrapes = iter(range(1_000))

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                n = next(scrapes)
                self.send_response(200 if self.path == "/metrics" else 404)
                self.end_headers()
                self.wfile.write(
                    f'preservarium_records_received_total{{stage="normalize"}} {n * messages}.0\n'
                    f'preservarium_records_received_total{{stage="sink"}} {n * 7}.0\n'
                    f'preservarium_readings_total{{stage="normalize"}} {n * messages * 2}.0\n'
                    f"process_cpu_seconds_total {n * messages * 200e-6}\npreservarium_loop_cpu_seconds_total {n * 0.5}\n".encode()
                )

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def workers() -> Iterator[list[FakeWorker]]:
    made: list[FakeWorker] = []
    yield made
    for worker in made:
        worker.stop()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["capacity", *arguments])


def test_a_plan_by_measured_costs_of_ours() -> None:
    done = run("--rate", "1000", "--price", "worker=30", "--price", "gb=0.1", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.output)
    assert (document["workers"], document["readings_per_s"], document["costs"]) == (2, 4_000, "docs/PERFORMANCE.md")
    assert document["month"]["worker"] == 60
    assert document["month"]["sum"] == pytest.approx(sum(v for k, v in document["month"].items() if k != "sum"))
    assert "full first: workers" in run("--rate", "1000").output


def test_costs_are_measured_at_workers(workers: list[FakeWorker]) -> None:
    workers += [FakeWorker(2_000), FakeWorker(2_000)]
    done = run("--for", "2", "--json", *(part for w in workers for part in ("--worker", w.url)))
    assert done.exit_code == 0, done.output
    document = json.loads(done.output)
    measured = document["measured"]
    assert measured["readings"] == 2
    assert measured["message_us"] == pytest.approx(200)
    assert 1_000 < measured["messages_per_s"] <= 2_000
    assert document["there"] == {"workers": 2, "partitions": 12}
    # 200 µs a message of two readings: one worker carries 10,000 readings a second when it is full.
    assert document["worker_readings_per_s"] == pytest.approx(7_000, rel=0.01)


def test_what_runs_and_does_not_carry_the_load_is_exit_code_1(workers: list[FakeWorker]) -> None:
    workers.append(FakeWorker(2_000))
    done = run("--for", "2", "--rate", "20000", "--worker", workers[0].url)
    assert done.exit_code == 1
    assert "does not carry it" in done.output
    assert "start more workers" in done.output


@pytest.mark.parametrize(
    "arguments", [(), ("--rate", "0"), ("--rate", "5", "--price", "worker"), ("--rate", "5", "--price", "moon=1")]
)
def test_what_cannot_be_answered_is_a_usage_error(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_workers_at_which_nothing_comes_say_nothing(workers: list[FakeWorker]) -> None:
    workers.append(FakeWorker(1))
    done = run("--for", "2", "--worker", workers[0].url)
    assert done.exit_code == 1
    assert "say nothing of what one costs" in done.output
