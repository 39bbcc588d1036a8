"""The stream's side of the sandbox: processes, deadlines, and the breaker of each script version.

A batch's payloads travel in one round trip for each lane. Two lanes keep good scripts fast while a bad one is found out: a
version starts in the suspect lane, moves to the trusted lane after some good calls, and goes back at its first hard fault.
"""

import asyncio
import contextlib
import mmap
import os
import struct
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import orjson
import structlog

from preservarium import metrics
from preservarium.errors import Fatal, ReasonCode
from preservarium.settings import Settings
from preservarium.waiting import alive, in_line

T = TypeVar("T")

log = structlog.get_logger(__name__)

#: Good calls after which a version may run beside the others.
TRUST_CALLS: Final = 20
#: Contexts a process keeps: at up to 32 MiB each and typically 1 MiB.
SCRIPTS_MAX: Final = 200
#: Starting Python and QuickJS takes 0.2 s; on a loaded machine many times that.
START_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Script:
    """A script version. Two with one `id` are the same source."""

    id: str  #: SHA-256 of kind and source, hexadecimal
    name: str  #: name@version, for people
    kind: str  #: javascript or python
    source: str


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a script's function; `arguments` is JSON text."""

    script: Script
    function: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a call gave no result."""

    code: ReasonCode
    message: str
    line: int | None = None  #: in the script, where known


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a call: its result as JSON text, or a fault."""

    text: str | None
    fault: Fault | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What a script may use."""

    cpu_s: float = 0.1  #: CPU of one call; public codecs take under 0.001
    wall_s: float = 0.5  #: after this time without progress the process is killed
    result_bytes_max: int = 1_000_000  #: characters of one result
    hard_faults_max: int = 3  #: time-outs, kills and memory faults in a row that set a version aside
    soft_faults_max: int = 100  #: exceptions in a row that do
    suspend_s: float = 300.0  #: a version set aside is tried with one call after this time

    @classmethod
    def of(cls, settings: Settings) -> "Limits":
        """As the settings say."""
        return cls(**settings.sandbox.model_dump())


@dataclass(slots=True)
class _Version:
    good: int = 0  #: calls since the last hard fault
    hard: int = 0  #: hard faults in a row
    soft: int = 0  #: exceptions in a row
    suspended_at: float | None = None
    last: str = ""  #: the fault that set it aside


class SandboxPool:
    """Runs scripts in processes that can be killed.

    Args:
        limits: what a script may use.
        monotonic: the clock of the breaker's waits, in seconds.
    """

    def __init__(self, limits: Limits | None = None, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits or Limits()
        self._monotonic = monotonic
        self._trusted = _Process("trusted", self._limits)
        self._suspect = _Process("suspect", self._limits)
        self._versions: dict[str, _Version] = {}

    async def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """Run every call, each once; the outcomes in the order of the calls. Never raises for what a script does.

        Raises:
            Fatal: the sandbox cannot be started at all (its extra is not installed).
        """
        outcomes: list[Outcome | None] = [None] * len(calls)
        lanes: tuple[list[int], list[int]] = ([], [])
        probing: set[str] = set()
        for i, call in enumerate(calls):
            version = self._versions.setdefault(call.script.id, _Version())
            if version.suspended_at is not None:
                due = self._monotonic() - version.suspended_at >= self._limits.suspend_s
                if not due or call.script.id in probing:
                    outcomes[i] = Outcome(
                        None, Fault(ReasonCode.SCRIPT_SUSPENDED, self._suspended_message(call, version))
                    )
                    continue
                probing.add(call.script.id)
            lanes[version.good < TRUST_CALLS].append(i)
        await asyncio.gather(
            *(
                self._run_lane(process, indices, calls, outcomes)
                for process, indices in zip((self._trusted, self._suspect), lanes, strict=True)
                if indices
            )
        )
        return [o for o in outcomes if o is not None]

    async def close(self) -> None:
        """End both processes."""
        await asyncio.gather(self._trusted.close(), self._suspect.close())

    def suspended(self) -> dict[str, str]:
        """Versions set aside, by script id, with the fault that did it."""
        return {i: v.last for i, v in self._versions.items() if v.suspended_at is not None}

    def resume(self, script_id: str) -> None:
        """Let a version that was set aside run again."""
        self._versions.pop(script_id, None)

    def _suspended_message(self, call: Call, version: _Version) -> str:
        return f"{call.script.name} is set aside after faults in a row: {version.last}"

    async def _run_lane(
        self, process: "_Process", indices: list[int], calls: Sequence[Call], outcomes: list[Outcome | None]
    ) -> None:
        async with in_line(process.lock):
            pending = indices
            again = False
            while pending:
                # After a kill: the culprit's version may have been set aside, its other calls must not wait for more kills.
                ready = []
                for i in pending:
                    version = self._versions[calls[i].script.id]
                    if again and version.suspended_at is not None:
                        message = self._suspended_message(calls[i], version)
                        outcomes[i] = Outcome(None, Fault(ReasonCode.SCRIPT_SUSPENDED, message))
                    else:
                        ready.append(i)
                pending = ready
                if not pending:
                    return
                finished, killed = await process.run([calls[i] for i in pending])
                for i, outcome in zip(pending, finished, strict=False):
                    outcomes[i] = outcome
                    self._note(calls[i], outcome)
                if killed is not None:
                    number, fault = killed
                    culprit = pending[number]
                    outcomes[culprit] = Outcome(None, fault)
                    self._note(calls[culprit], outcomes[culprit] or Outcome(None, fault))
                    # What ran before the culprit but was not yet answered runs again: scripts are pure.
                    pending = [i for i in pending[len(finished) :] if i != culprit]
                    again = True
                else:
                    pending = pending[len(finished) :]

    def _note(self, call: Call, outcome: Outcome) -> None:
        version = self._versions[call.script.id]
        fault = outcome.fault
        if fault is None:
            version.good += 1
            version.hard = version.soft = 0
            version.suspended_at = None
            return
        metrics.SCRIPT_FAULTS.labels(fault.code.value).inc()
        if fault.code is ReasonCode.SCRIPT_SUSPENDED:
            return  # the worker's own answer to the rest of a batch: not a further fault
        if fault.code is ReasonCode.SCRIPT_TIMEOUT:
            version.good = 0
            version.hard += 1
        else:
            version.soft += 1
        over = version.hard >= self._limits.hard_faults_max or version.soft >= self._limits.soft_faults_max
        if over:
            if version.suspended_at is None:
                log.error(
                    "script_set_aside",
                    script=call.script.name,
                    code=fault.code.value,
                    fault=fault.message,
                    line=fault.line,
                )
            version.suspended_at = self._monotonic()
            version.last = fault.message
            # After the wait one call is let through; a further fault sets it aside again at once.
            version.hard = max(version.hard, self._limits.hard_faults_max)


@dataclass(slots=True)
class _Running:
    process: asyncio.subprocess.Process
    page: mmap.mmap
    known: OrderedDict[str, None] = field(default_factory=OrderedDict)  #: script ids whose source it has, oldest first


class _Process:
    """One sandbox process, started when first needed and again after a kill."""

    def __init__(self, lane: str, limits: Limits) -> None:
        self._lane = lane
        self._limits = limits
        self._running: _Running | None = None
        self.lock = asyncio.Lock()

    async def run(self, calls: Sequence[Call]) -> tuple[list[Outcome], tuple[int, Fault] | None]:
        """Outcomes of the first calls in order, and, where the process had to be killed, the culprit's number and fault."""
        running = self._running or await self._start()
        request = self._request(running, calls)
        finished: list[Outcome] = []
        running.page[:8] = struct.pack("<q", 0)
        try:
            writer, reader = _pipe(running.process.stdin), _pipe(running.process.stdout)
            writer.write(struct.pack("<I", len(request)) + request)
            sending = asyncio.ensure_future(writer.drain())
            try:
                while len(finished) < len(calls):
                    frame = await self._frame(reader, running.page)
                    finished.extend(_outcome(r) for r in orjson.loads(frame)["results"])
                    alive()
                await sending
            finally:
                sending.cancel()
                with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                    await sending
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError) as e:
            (number,) = struct.unpack("<q", running.page[:8])
            number = min(max(number, len(finished)), len(calls) - 1)
            await self.close()
            how = "over its wall-clock limit" if isinstance(e, TimeoutError) else "the sandbox process died"
            log.warning("sandbox_killed", lane=self._lane, script=calls[number].script.name, reason=how)
            metrics.SANDBOX_KILLS.labels(self._lane).inc()
            return finished, (number, Fault(ReasonCode.SCRIPT_TIMEOUT, how))
        except BaseException:
            # Cancelled in mid-answer: what is still in the pipe would be taken for the next batch's.
            await self.close()
            raise
        return finished, None

    async def _frame(self, reader: asyncio.StreamReader, page: mmap.mmap) -> bytes:
        """The next frame; TimeoutError when the call under way has not changed for the wall-clock limit."""
        read = asyncio.ensure_future(self._read(reader))
        try:
            seen = page[:8]
            while True:
                done, _ = await asyncio.wait({read}, timeout=self._limits.wall_s)
                if done:
                    return read.result()
                if page[:8] == seen:
                    raise TimeoutError
                seen = page[:8]
                alive()
        finally:
            if not read.done():
                read.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await read

    @staticmethod
    async def _read(reader: asyncio.StreamReader) -> bytes:
        (length,) = struct.unpack("<I", await reader.readexactly(4))
        return await reader.readexactly(length)

    def _request(self, running: _Running, calls: Sequence[Call]) -> bytes:
        fresh: dict[str, dict[str, str]] = {}
        for call in calls:
            script = call.script
            if script.id not in running.known:
                fresh[script.id] = {"kind": script.kind, "source": script.source}
            running.known[script.id] = None
            running.known.move_to_end(script.id)
        used = {c.script.id for c in calls}
        evicted: list[str] = []
        for identity in list(running.known):
            if len(running.known) <= SCRIPTS_MAX:
                break
            if identity not in used:
                del running.known[identity]
                evicted.append(identity)
        body: dict[str, Any] = {
            "limits": {
                "cpu_s": self._limits.cpu_s,
                "result_bytes_max": self._limits.result_bytes_max,
                "hard_faults_max": self._limits.hard_faults_max,
            },
            "scripts": fresh,
            "forget": evicted,
            "calls": [(c.script.id, c.function, c.arguments) for c in calls],
        }
        return orjson.dumps(body)

    async def _start(self) -> _Running:
        shared = os.memfd_create("preservarium-sandbox") if hasattr(os, "memfd_create") else _unlinked_file()
        try:
            os.ftruncate(shared, 8)
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-m", "preservarium.sandbox.worker", str(shared),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
                pass_fds=(shared,), env={}, cwd="/", limit=1 << 20,
            )  # fmt: skip
            running = _Running(process, mmap.mmap(shared, 8))
        finally:
            os.close(shared)
        try:
            async with asyncio.timeout(START_S):
                hello = orjson.loads(await self._read(_pipe(process.stdout)))
        except (TimeoutError, asyncio.IncompleteReadError):
            self._running = running
            error = b""
            if process.returncode is not None and process.stderr is not None:
                error = await process.stderr.read(4_000)
            await self.close()
            last = error.decode(errors="replace").strip().splitlines()[-1:] or ["it did not answer"]
            message = f"the script sandbox does not start (pip install 'preservarium[scripts]'?): {last[0]}"
            raise Fatal(message) from None
        log.info("sandbox_started", lane=self._lane, pid=process.pid, filtered=hello["filtered"])
        self._running = running
        return running

    async def close(self) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        with contextlib.suppress(ProcessLookupError):
            running.process.kill()
        await running.process.wait()
        if running.process.stdin is not None:
            running.process.stdin.close()
        running.page.close()


def _outcome(result: list[Any]) -> Outcome:
    if result[0]:
        return Outcome(result[1])
    fault = result[1]
    return Outcome(None, Fault(ReasonCode(fault["code"]), fault["message"], fault["line"]))


def _pipe(stream: T | None) -> T:
    """The pipe, which is there because the process was started with one."""
    assert stream is not None
    return stream


def _unlinked_file() -> int:
    import tempfile

    fd, path = tempfile.mkstemp()
    os.unlink(path)
    return fd
