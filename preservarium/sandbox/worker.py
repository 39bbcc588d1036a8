"""The sandbox process: `python -m preservarium.sandbox.worker`, spoken to over its standard input and output.

Frames are a 4-byte little-endian length and a JSON text. A request carries the calls of a whole batch; results go back in
order, a frame each few milliseconds, so that what is finished is not lost when the process must be killed. The number of
the call under way stands in a page of memory shared with the parent: after a kill it knows the culprit.

Request  {"scripts": {id: {"kind": "javascript"|"python", "source": text}}, "forget": [id], "limits": {...},
          "calls": [[id, function, arguments as JSON text], …]}
Answer   {"results": [[true, JSON text] | [false, {"code", "message", "line"}], …]} until every call has one
"""

import mmap
import os
import struct
import sys
import time
from typing import Any, Final

import orjson

from preservarium.errors import ReasonCode
from preservarium.sandbox import confine
from preservarium.sandbox.javascript import JavaScript, ScriptError
from preservarium.sandbox.python_scripts import PythonScript

#: Results wait this long for company: a round trip costs about 0.1 ms.
FLUSH_S: Final = 0.004
#: A frame from the parent: a batch of payloads and, rarely, the sources of scripts.
FRAME_BYTES_MAX: Final = 256 << 20


def _read_exactly(fd: int, count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        part = os.read(fd, min(count, 1 << 20))
        if not part:
            raise SystemExit(0)  # the parent is gone, or wants us to end
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _write(fd: int, body: bytes) -> None:
    view = memoryview(struct.pack("<I", len(body)) + body)
    while view:
        view = view[os.write(fd, view) :]


def main() -> None:
    """Serve requests until standard input ends."""
    shared_fd = int(sys.argv[1])
    page = mmap.mmap(shared_fd, 8)
    os.close(shared_fd)
    confine.limit_resources()
    confine.drop_user()
    confined = confine.filter_system_calls()
    _write(1, orjson.dumps({"ready": True, "filtered": confined}))
    scripts: dict[str, JavaScript | PythonScript | ScriptError] = {}
    sources: dict[str, dict[str, str]] = {}
    while True:
        (length,) = struct.unpack("<I", _read_exactly(0, 4))
        if length > FRAME_BYTES_MAX:
            raise SystemExit(2)
        _serve(orjson.loads(_read_exactly(0, length)), scripts, sources, page)


def _serve(
    request: dict[str, Any],
    scripts: dict[str, JavaScript | PythonScript | ScriptError],
    sources: dict[str, dict[str, str]],
    page: mmap.mmap,
) -> None:
    cpu_s: float = request["limits"]["cpu_s"]
    result_bytes_max: int = request["limits"]["result_bytes_max"]
    for identity in request.get("forget", ()):
        scripts.pop(identity, None)
        sources.pop(identity, None)
    sources.update(request.get("scripts", {}))
    hard_faults_max: int = request["limits"]["hard_faults_max"]
    hard_faults: dict[
        str, int
    ] = {}  # in a row, in this batch: a thousand payloads must not each use their whole CPU limit
    results: list[Any] = []
    flushed = time.monotonic()
    for number, (identity, function, arguments) in enumerate(request["calls"]):
        page[:8] = struct.pack("<q", number)
        try:
            script = scripts.get(identity) or _compile(sources[identity], cpu_s)
            scripts[identity] = script
            if isinstance(script, ScriptError):
                raise script
            if hard_faults.get(identity, 0) >= hard_faults_max:
                raise ScriptError(
                    ReasonCode.SCRIPT_SUSPENDED, "set aside for the rest of this batch after faults in a row"
                )
            results.append((True, script.call(function, arguments, result_bytes_max)))
            hard_faults.pop(identity, None)
        except ScriptError as e:
            results.append((False, {"code": e.code.value, "message": str(e), "line": e.line}))
            if e.code is ReasonCode.SCRIPT_TIMEOUT:
                hard_faults[identity] = hard_faults.get(identity, 0) + 1
            if e.discard:
                scripts.pop(identity, None)
        if time.monotonic() - flushed > FLUSH_S:
            _write(1, orjson.dumps({"results": results}))
            results = []
            flushed = time.monotonic()
    if results:
        _write(1, orjson.dumps({"results": results}))


def _compile(given: dict[str, str], cpu_s: float) -> JavaScript | PythonScript | ScriptError:
    """The script, or why it cannot be used: kept too, so that a broken source is compiled once."""
    try:
        return (
            JavaScript(given["source"], cpu_s)
            if given["kind"] == "javascript"
            else PythonScript(given["source"], cpu_s)
        )
    except ScriptError as e:
        return e


if __name__ == "__main__":
    main()
