"""Runs a target, and holds each input to what must hold of all: an answer or a documented refusal, in time, in little memory, in words."""

import contextlib
import gc
import linecache
import re
import resource
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

from fuzzing.mutate import Mutator

#: CPU seconds of one input; the clock is the process's, so that a busy machine counts twice at most. The slowest by far, some thousand open
#: brackets in YAML, take the library one second to refuse, however many they are: it looks ahead for a colon behind each.
INPUT_S_MAX: Final = 5.0
#: Memory that one input may add to the most that the process ever had: an input has 64 KiB.
INPUT_BYTES_MAX: Final = 200_000_000
#: Different faults told of a target; each with how often it came.
FAULTS_MAX: Final = 20

#: Words that only whoever writes Python understands.
PYTHONS: Final = re.compile(
    r"<class '|<[\w.]+ object at 0x|Traceback \(|\bNoneType\b|\b(?:dict|str|bytes|bytearray|tuple) object\b|\b(?:a|not|an?) (?:dict|str|int|float|bool|tuple|NoneType)\b"
    r"|\b[A-Z]\w+(?:Error|Exception)\b|invalid literal for|codec can't|not supported between|unhashable|index out of range|has no attribute|positional arguments?:|unexpected keyword argument"
    r"|\bsubscriptable\b|object is not|unexpected keyword|could not convert string|Expecting (?:value|property|')|argument must be|must be str|must be a? ?string, not|unpack|_ssl\.c|\.py\b"
)  # fmt: skip
#: What is quoted is the sender's.
_QUOTED: Final = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|`[^`]*`", re.DOTALL)


class Broken(AssertionError):
    """What must hold of every input does not hold of this one."""


class Hang(BaseException):
    """An input takes for ever; not an Exception, so that nothing on the way takes it for its own."""


def worded(text: str, *, quoting: bool = True) -> str:
    """A reason, which must be one for people.

    Args:
        text: the reason.
        quoting: what stands in quotes may be anything.
    """
    if not text or not text.strip():
        message = "a refusal without a reason"
        raise Broken(message)
    if found := PYTHONS.search(_QUOTED.sub("''", text) if quoting else text):
        message = f"a reason in Python's words ({found[0]!r}): {text[:300]}"
        raise Broken(message)
    return text


@dataclass(frozen=True)
class Target:
    """Something that reads what strangers write."""

    name: str
    share: int  #: of the run at length, how many inputs are this target's
    make: Callable[[Mutator], Any]  #: an input
    run: Callable[[Any], str | None]  #: None: it was taken; a text: why it was refused. Everything else is a fault


@dataclass
class Fault:
    """What went wrong, and with what."""

    number: int  #: of the input
    what: str
    given: Any
    times: int = 1

    def __str__(self) -> str:
        return f"input {self.number} ({self.times} times): {self.what}\n    given: {shown(self.given)}"


@dataclass
class Tally:
    """What became of a target's inputs."""

    target: str
    inputs: int = 0
    taken: int = 0
    refused: int = 0
    slowest_s: float = 0.0  #: CPU time of the slowest input
    grown_bytes: int = 0  #: the most that one input added to the process's memory
    seconds: float = 0.0
    faults: dict[str, Fault] = field(default_factory=dict)

    def line(self) -> str:
        """For people."""
        share = 100 * self.taken / self.inputs if self.inputs else 0.0
        return (
            f"{self.target:<28} {self.inputs:>9,} inputs  {share:5.1f}% taken  {self.refused:>9,} refused  "
            f"slowest {1e3 * self.slowest_s:6.1f} ms  {self.seconds:6.1f} s"
        )


def shown(given: Any) -> str:
    """An input, to be tried again."""
    text = repr(given)
    return text if len(text) <= 3_000 else f"{text[:2_000]} … {text[-500:]}  ({len(text)} characters)"


def fuzz(target: Target, inputs: int, seed: int) -> Tally:
    """Give a target so many inputs. The same seed gives the same ones."""
    tally = Tally(target.name)
    before = signal.signal(signal.SIGPROF, _hang)
    gc.collect()
    _forget_peak()
    started = time.perf_counter()
    try:
        for number in range(inputs):
            given = target.make(Mutator(Random((seed << 32) + number)))
            _one(target, tally, number, given)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    tally.seconds = time.perf_counter() - started
    return tally


def _forget_peak() -> None:
    """Measure the most that the process had from here on: what came before would hide an input that takes as much."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _one(target: Target, tally: Tally, number: int, given: Any) -> None:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_PROF, INPUT_S_MAX * 5)
    began = time.process_time()
    what = ""
    try:
        why = target.run(given)
        if why is None:
            tally.taken += 1
        else:
            worded(why)
            tally.refused += 1
    except Broken as e:
        key, what = re.sub(r"[0-9]+", "0", str(e))[:80], str(e)
    except Hang:
        key, what = "hang", f"no end within {INPUT_S_MAX * 5:g} s of CPU time"
    except Exception as e:
        key = what = _where(e)
    signal.setitimer(signal.ITIMER_PROF, 0)
    took_s = time.process_time() - began
    grown = 1_024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)
    tally.inputs += 1
    tally.slowest_s = max(tally.slowest_s, took_s)
    tally.grown_bytes = max(tally.grown_bytes, grown)
    if not what and took_s > INPUT_S_MAX:
        key, what = "slow", f"{took_s:.1f} s of CPU time"
    if not what and grown > INPUT_BYTES_MAX:
        key, what = "memory", f"{grown:,} bytes of memory"
    if what:
        if key in tally.faults:
            tally.faults[key].times += 1
        elif len(tally.faults) < FAULTS_MAX:
            tally.faults[key] = Fault(number, what, given)


def _hang(*_: Any) -> None:
    raise Hang


def _where(e: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(e.__traceback__) if "/tests/" not in f.filename]
    lines = [
        f"{f.filename.rpartition('/preservarium/')[2]}:{f.lineno} {linecache.getline(f.filename, f.lineno or 0).strip()}"
        for f in frames[-3:]
    ]
    return f"{type(e).__name__}: {str(e)[:200]} at {' < '.join(reversed(lines))}"
