"""Differential: the streaming tests say what ioos-qc, the reference implementation over arrays, says."""

import random
from typing import Any

import pytest

from preservarium.domain.quality import Limits, compile_checks, new_state, validate

qartod = pytest.importorskip("ioos_qc.qartod", reason="missing: ioos-qc (a development dependency)")
numpy = pytest.importorskip("numpy")

S = 1_000_000
T = 1_700_000_000
SERIES = 1_000
LIMITS = Limits(future_skew_us=S, store_failed=True, series_max=10)


def flags(datatype: dict[str, Any], values: list[float], times: list[int], test: str) -> list[int]:
    """The final flag of each reading by one test, revisions applied."""
    checks = compile_checks(None, lambda _: {"name": "x", "rev": 1, "kind": "number", "unit": "m", **datatype})  # type: ignore[arg-type, return-value, typeddict-item]
    state = new_state()
    found: dict[int, int] = {}
    for i, (value, at) in enumerate(zip(values, times, strict=True)):
        message = {
            "device_id": "d", "connector_mode": "M", "timestamp": at * S, "received_at": at * S, "raw_partition": 0,
            "raw_offset": i, "raw_index": 0, "generation": 0,
            "readings": [{"component_type": "x", "pin_position": "-1", "value": value, "unit": "m"}],
        }  # fmt: skip
        validate(message, checks, state, LIMITS)
        for reading in message["readings"]:  # type: ignore[attr-defined]
            found[reading.get("timestamp", at * S)] = reading["quality"] if test in reading.get("flags", ()) else 1
    return [found[at * S] for at in times]


def walks(seed: int, *, regular: bool) -> tuple[random.Random, list[float], list[int]]:
    rng = random.Random(seed)
    n = rng.randint(3, 60)
    step = rng.randint(1, 600)
    value, values, times, at = rng.uniform(-50, 50), [], [], T
    for _ in range(n):
        # Quarters are exact in binary: both sides compute the same numbers.
        value += rng.choice([0, 0, 0, 0.25, -0.25, 1, -1, 10, -10]) * rng.choice([1, 1, 1, 4])
        values.append(round(value * 4) / 4)
        times.append(at)
        at += step if regular else rng.randint(1, 900)
    return rng, values, times


def instants(times: list[int]) -> Any:
    return numpy.array(times, dtype="datetime64[s]")


def test_gross_range():
    for seed in range(SERIES):
        rng, values, times = walks(seed, regular=False)
        fail = sorted(rng.uniform(-80, 80) for _ in range(2))
        suspect = sorted(rng.uniform(*fail) for _ in range(2))
        datatype = {
            "fail_span": {"min": fail[0], "max": fail[1]},
            "suspect_span": {"min": suspect[0], "max": suspect[1]},
        }
        expected = qartod.gross_range_test(values, tuple(fail), tuple(suspect)).tolist()
        assert flags(datatype, values, times, "gross_range") == expected, seed


def test_rate_of_change():
    for seed in range(SERIES):
        rng, values, times = walks(seed, regular=False)
        threshold = rng.choice([0.001, 0.01, 0.1, 0.5])
        expected = qartod.rate_of_change_test(values, instants(times), threshold).tolist()
        assert (
            flags({"tests": {"rate_of_change": {"threshold": threshold}}}, values, times, "rate_of_change") == expected
        )


@pytest.mark.parametrize("method", ["average", "differential"])
def test_spike(method: str):
    for seed in range(SERIES):
        rng, values, times = walks(seed, regular=False)
        suspect = rng.choice([0.5, 1, 3])
        parameters = {"suspect_threshold": suspect, "fail_threshold": suspect * 3, "method": method}
        expected = qartod.spike_test(values, suspect, suspect * 3, method).tolist()
        # The first and the last have no two neighbours: not evaluated there, not objected to here.
        expected[0] = expected[-1] = 1
        assert flags({"tests": {"spike": parameters}}, values, times, "spike") == expected, seed


def test_flat_line():
    for seed in range(SERIES):
        rng, values, times = walks(seed, regular=True)
        step = times[1] - times[0]
        suspect = step * rng.randint(1, 6)
        fail = suspect + step * rng.randint(1, 6)
        tolerance = rng.choice([0.2, 0.3, 1.1, 5])
        parameters = {"suspect_threshold": suspect, "fail_threshold": fail, "tolerance": tolerance}
        expected = qartod.flat_line_test(values, instants(times), suspect, fail, tolerance).tolist()
        assert flags({"tests": {"flat_line": parameters}}, values, times, "flat_line") == expected, seed
