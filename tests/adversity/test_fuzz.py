"""Whatever strangers send is taken or refused with a reason, in time: hundreds of damaged inputs for each reader here, a million in the slow suite.

`TEST_FUZZ_INPUTS` says about how many inputs, `TEST_FUZZ_SEED` which; the summary at the end says what became of them.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import pytest
from fuzzing.doors import doors
from fuzzing.mutate import Mutator
from fuzzing.run import Broken, Target, fuzz, worded
from fuzzing.targets import targets

from preservarium.domain.readings.units import canonical

#: Inputs, about: some seconds; in the slow suite some ten minutes. Targets give their shares of the latter.
SHORT, LONG = 4_000, 1_000_000
SEED = int(os.environ.get("TEST_FUZZ_SEED", "1"))
#: The fewest of a target.
INPUTS_MIN = 10


def held(readers: Sequence[Target], inputs: int, told: Callable[[str], None]) -> None:
    """Give each reader its share of the inputs, and tell what became of them."""
    canonical("unknown to all")  # the registry of units is made when it is first asked, which takes a second
    inputs = int(os.environ.get("TEST_FUZZ_INPUTS", inputs))
    tallies = []
    for reader in readers:
        tallies.append(fuzz(reader, max(INPUTS_MIN, inputs * reader.share // LONG), SEED))
        print(tallies[-1].line(), flush=True)
        if inputs > SHORT:
            told(tallies[-1].line())
    told(f"seed {SEED}: {sum(tally.inputs for tally in tallies):,} inputs, {sum(tally.taken for tally in tallies):,} taken, {sum(tally.refused for tally in tallies):,} refused")  # fmt: skip
    faults = [f"{tally.target}: {fault}" for tally in tallies for fault in tally.faults.values()]
    assert not faults, "\n".join(faults)
    assert all(tally.taken for tally in tallies if tally.inputs > 1_000), (
        "a reader that refuses everything reads nothing"
    )


def test_readers(tmp_path: Path, told: Callable[[str], None]) -> None:
    held(targets(tmp_path), SHORT, told)


def test_doors(told: Callable[[str], None]) -> None:
    with doors() as made:
        held(made.targets(), SHORT, told)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_readers_at_length(tmp_path: Path, told: Callable[[str], None]) -> None:
    held(targets(tmp_path), LONG, told)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_doors_at_length(dsn: str, told: Callable[[str], None]) -> None:
    with doors(dsn) as made:
        held(made.targets(), LONG, told)


# --- the fuzzer itself ---


def test_an_input_comes_again_with_its_seed() -> None:
    trees = [{"a": [1, {"b": "x"}]}, {"c": None}]
    one, same, other = ([Mutator(Random(seed + n)).json(trees) for n in range(200)] for seed in (7_000, 7_000, 8_000))
    assert one == same != other
    assert trees == [{"a": [1, {"b": "x"}]}, {"c": None}], "samples stay as they are"
    assert len(set(one)) > 100


def endless(_: object) -> str:
    while True:
        pass


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda _: 1 / 0, "ZeroDivisionError"), (lambda _: " ", "without a reason"), (lambda _: "not NoneType", "Python's words"), (endless, "no end within"),
        (lambda _: str(len(b"\1" * 300_000_000)), "bytes of memory"),
    ],
)  # fmt: skip
def test_the_fuzzer_finds(run: Callable[[object], str | None], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzzing.run.INPUT_S_MAX", 0.05 if run is endless else 60)
    tally = fuzz(Target("t", 1, lambda m: m.data([b"x"]), run), 1, 1)
    (fault,) = tally.faults.values()
    assert words in fault.what


def test_what_is_quoted_is_the_senders() -> None:
    worded("'NoneType' is no mode; there are \"dict object\"")
    with pytest.raises(Broken):
        worded("expected str, not NoneType")
