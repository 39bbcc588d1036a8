"""Differential: the streaming tests say what ioos-qc, the reference implementation over arrays, says."""

import random
from typing import Any

import pytest

from preservarium.domain.quality.checks import compile_checks
from preservarium.domain.quality.validation import Limits, new_state, validate

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


PERIODS = {
    "month": (1, 12),
    "hour": (0, 23),
    "dayofweek": (0, 6),
    "dayofyear": (1, 366),
    "quarter": (1, 4),
    "week": (1, 53),
}


@pytest.mark.filterwarnings("ignore")  # ioos-qc asks pandas for periods by names that pandas is about to rename
def test_climatology():
    for seed in range(SERIES):
        rng, values, times = walks(seed, regular=False)
        # Spread over a year, so that seasons differ.
        times = [T + (at - T) * rng.choice([1, 60, 1_000, 6_000]) for at in times]
        times = sorted(set(times))
        values = values[: len(times)]
        members = []
        for _ in range(rng.randint(1, 4)):
            period = rng.choice([None, *PERIODS])
            if period is None:
                first = rng.choice(times)
                tspan: Any = [first, first + rng.randint(0, 10_000_000)]
            else:
                tspan = sorted(rng.randint(*PERIODS[period]) for _ in range(2))
            vspan = sorted(round(rng.uniform(-60, 60)) for _ in range(2))
            member = {"tspan": tspan, "vspan": vspan, "period": period}
            if rng.random() < 0.5:
                member["fspan"] = [vspan[0] - 10, vspan[1] + 10]
            members.append(member)
        expected = qartod.climatology_test(
            [
                {
                    **m,
                    "tspan": [str(numpy.datetime64(t, "s")) for t in m["tspan"]] if m["period"] is None else m["tspan"],
                }
                for m in members
            ],
            values,
            instants(times),
            [numpy.nan] * len(values),
        )
        checks = compile_checks(
            None,
            lambda _, members=members: {  # type: ignore[misc, return-value]
                "name": "x", "rev": 1, "kind": "number", "unit": "m", "tests": {"climatology": {"members": members}},
            },
        )  # fmt: skip
        found = []
        for i, (value, at) in enumerate(zip(values, times, strict=True)):
            message = {
                "device_id": "d", "connector_mode": "M", "timestamp": at * S, "received_at": at * S, "raw_partition": 0,
                "raw_offset": i, "raw_index": 0, "generation": 0,
                "readings": [{"component_type": "x", "pin_position": "-1", "value": value, "unit": "m"}],
            }  # fmt: skip
            validate(message, checks, new_state(), LIMITS)
            found.append(message["readings"][0]["quality"])  # type: ignore[index]
        assert found == expected.tolist(), seed


@pytest.mark.parametrize("check_type", ["std", "range"])
def test_attenuated_signal(check_type: str):
    compared = 0
    for seed in range(SERIES):
        rng, values, _ = walks(seed, regular=True)
        step = rng.choice([1, 5, 10])
        period = step * 8 * rng.randint(1, 4)
        start = T // period * period
        times = [start + i * step for i in range(len(values))]
        suspect = rng.choice([0.3, 1.1, 5.3])
        fail = suspect / 3
        expected = qartod.attenuated_signal_test(
            values, instants(times), suspect, fail, test_period=period, check_type=check_type
        ).tolist()
        parameters = {
            "suspect_threshold": suspect, "fail_threshold": fail, "test_period": period, "check_type": check_type,
        }  # fmt: skip
        found = flags({"tests": {"attenuated_signal": parameters}}, values, times, "attenuated_signal")
        for i, at in enumerate(times):
            # Where an eighth ends, both look at the same readings; before a period is over, only ioos-qc judges.
            if at - start >= period and (at + step) % (period // 8) == 0:
                assert found[i] == expected[i], (seed, i)
                compared += 1
    assert compared > SERIES
