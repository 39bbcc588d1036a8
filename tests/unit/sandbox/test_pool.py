"""The sandbox against scripts that mean harm, in the real processes."""

import asyncio
import hashlib
import math

import orjson
import pytest

from preservarium.domain.commands.downlinks import DownlinkError, encoded
from preservarium.domain.decoders.examples import raw_message
from preservarium.domain.decoders.scripts import compile_script
from preservarium.domain.readings import json_text
from preservarium.errors import ReasonCode
from preservarium.sandbox.pool import TRUST_CALLS, Call, Limits, SandboxPool, Script

pytest.importorskip("quickjs")
pytest.importorskip("RestrictedPython")


def script(source: str, kind: str = "javascript") -> Script:
    digest = hashlib.sha256(f"{kind}:{source}".encode()).hexdigest()
    return Script(digest, f"{digest[:6]}@1", kind, source)


def call(source: str, payload: bytes = b"\x01\x2c", kind: str = "javascript", function: str | None = None) -> Call:
    arguments = orjson.dumps(
        {"bytes": list(payload), "fPort": 7, "recvTime": "2026-01-02T03:04:05Z", "variables": {"k": "v"}}
    )
    return Call(
        script(source, kind), function or ("decode" if kind == "python" else "decodeUplink"), arguments.decode()
    )


GOOD = "function decodeUplink(input) { return {data: {n: input.bytes[0] * 256 + input.bytes[1], port: input.fPort}}; }"
REGEX_BOMB = "function decodeUplink(i) { return {data: /^(a+)+$/.test('a'.repeat(40) + 'b')}; }"


@pytest.fixture
async def pool():
    made = SandboxPool(Limits(cpu_s=0.1, wall_s=0.4))
    yield made
    await made.close()


async def result(pool: SandboxPool, c: Call):
    (outcome,) = await pool.run([c])
    assert outcome.fault is None, outcome.fault
    return orjson.loads(outcome.text)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (GOOD, {"data": {"n": 300, "port": 7}}),
        ("const decodeUplink = ({bytes, fPort}) => ({data: {n: bytes.length, fPort}, warnings: ['w']})",
         {"data": {"n": 2, "fPort": 7}, "warnings": ["w"]}),
        ("function Decoder(bytes, port) { return {n: bytes[1], port: port}; }", {"data": {"n": 44, "port": 7}}),
        ("function Decode(fPort, bytes, variables) { return {p: fPort, v: variables.k}; }", {"data": {"p": 7, "v": "v"}}),
        ("exports.decodeUplink = function (input) { return {data: input.bytes}; }", {"data": [1, 44]}),
        ("module.exports = { decodeUplink: function (input) { return {data: 1}; } };", {"data": 1}),
        ("export function decodeUplink(input) { return {data: 2}; }", {"data": 2}),
        ("function decodeUplink(input) { return {data: 3}; }\nexport {\n  decodeUplink,\n};", {"data": 3}),
        ("export default { decodeUplink(input) { return {data: 4}; } };", {"data": 4}),
        ("export default function decodeUplink(input) { return {data: 5}; }", {"data": 5}),
        ("function decodeUplink(i) { let n = 0; for (const k in i.bytes) n++; return {data: [n, i.bytes.at(-1), 'ab'.at(-1),"
         " new Uint8Array([7, 8]).at(-2), Object.hasOwn({a: 1}, 'a'), [1, 2, 3].findLast(x => x < 3), [2, 1].toSorted(),"
         " structuredClone({a: [1]}).a[0]]}; }", {"data": [2, 44, "b", 7, True, 2, [1, 2], 1]}),
        ("function decodeUplink(i) { return {data: i.recvTime.getUTCFullYear()}; }", {"data": 2026}),
        ("function decodeUplink(i) { const b = Buffer.from(i.bytes); return {data: [b.readUInt16BE(0), b.readInt16LE(0), b.toString('hex'),"
         " Buffer.from('AQI=', 'base64').length, b.slice(1).readUInt8(0), Buffer.from('0000803f', 'hex').readFloatLE(0)]}; }",
         {"data": [300, 11265, "012c", 2, 44, 1.0]}),
        ("function decodeUplink(i) { return {data: {absent: undefined, none: null}}; }", {"data": {"none": None}}),
        ("function decodeUplink(i) { return {errors: ['unknown port']}; }", {"errors": ["unknown port"]}),
    ],
)  # fmt: skip
async def test_every_signature_of_the_field_is_understood(pool, source, expected):
    assert await result(pool, call(source)) == expected


#: A decoder of each language that is given 1e999, -1e999, NaN, null and 0.
NOT_FINITE = [
    ("javascript", """function decodeUplink(i) {
        const p = i.payload, found = [p.a === Infinity, p.b === -Infinity, Number.isNaN(p.c), p.d === null, p.e[0] === -Infinity];
        return {data: {found: found.join(), over: 1 / 0, under: -1 / 0, nan: p.c * 2, none: p.d, deep: {list: [p.e[0], 7]}, zero: p.f, text: 'NaN'}};
    }"""),
    ("python", """def decode(payload, context):
    p = payload
    found = [p["a"] > 1e308, p["b"] < -1e308, math.isnan(p["c"]), p["d"] is None, p["e"][0] < -1e308]
    over = 1e308 * 10
    return {"found": ",".join([str(f).lower() for f in found]), "over": over, "under": -over, "nan": p["c"] * 2, "none": p["d"],
            "deep": {"list": (p["e"][0], 7)}, "zero": p["f"], "text": "NaN"}
"""),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "source"), NOT_FINITE, ids=["javascript", "python"])
async def test_what_is_not_finite_is_so_to_a_script_and_behind_it(pool, kind, source):
    parser = compile_script({"kind": kind, "name": "p", "version": 1, "source": source})
    payload = json_text.loads(b'{"a": 1e999, "b": -Infinity, "c": NaN, "d": null, "e": [-1e999], "f": 0}')
    arguments = parser.arguments(raw_message(payload))
    for _again in range(3):  # a codec's later runs are in a context that is kept
        (outcome,) = await pool.run([Call(Script(parser.script_id, "p@1", kind, source), parser.function, arguments)])
        assert outcome.fault is None, outcome.fault
        fields = {f.name: f.value for f in parser.fields(outcome.text)}
        assert fields.pop("found") == "true,true,true,true,true"
        assert math.isnan(fields.pop("nan"))
        assert fields == {
            "over": math.inf, "under": -math.inf, "deep.list.0": -math.inf, "deep.list.1": 7, "zero": 0, "text": "NaN",
        }  # fmt: skip


async def test_a_python_scripts_list_may_hold_what_is_not_finite(pool):
    source = "def decode(payload, context):\n    return [{'name': 'a', 'value': float('nan')}, {'name': 'b', 'value': 1.5, 'pin': None}]"
    c = Call(Script("s", "p@1", "python", source), "decode", '{"bytes": []}')
    (outcome,) = await pool.run([c])
    nan, fine = json_text.loads(outcome.text.encode())
    assert math.isnan(nan["value"])
    assert fine == {"name": "b", "value": 1.5, "pin": None}


async def test_downlink_encoders(pool):
    source = "function encodeDownlink(input) { return {fPort: 2, bytes: [input.data.on ? 1 : 0]}; }" + GOOD
    c = Call(script(source), "encodeDownlink", '{"data": {"on": true}}')
    assert await result(pool, c) == {"fPort": 2, "bytes": [1]}


async def test_an_encoders_byte_that_is_not_finite_is_no_byte(pool):
    c = Call(
        script("function encodeDownlink(input) { return {bytes: [1, 0 / 0]}; }" + GOOD),
        "encodeDownlink",
        '{"data": {}}',
    )
    (outcome,) = await pool.run([c])
    with pytest.raises(DownlinkError, match="no byte"):
        encoded(outcome.text, {})


async def test_a_python_script_decodes(pool):
    source = "def decode(payload, context):\n    (t,) = struct.unpack('>h', payload)\n    return [{'name': 't', 'value': t / 10}]\n"
    assert await result(pool, call(source, kind="python")) == [{"name": "t", "value": 30.0}]


@pytest.mark.parametrize(
    ("source", "code", "kind"),
    [
        ("function decodeUplink(i) { while (true) {} }", ReasonCode.SCRIPT_TIMEOUT, "javascript"),
        (REGEX_BOMB, ReasonCode.SCRIPT_TIMEOUT, "javascript"),
        ("function decodeUplink(i) { var a = []; while (true) a.push('x'.repeat(1e6) + a.length); }",
         ReasonCode.SCRIPT_TIMEOUT, "javascript"),
        ("function decodeUplink(i) { return decodeUplink(i) + 1; }", ReasonCode.SCRIPT_FAULT, "javascript"),
        ("function decodeUplink(i) { return {data: 'x'.repeat(2e6)}; }", ReasonCode.DECODE_LIMIT, "javascript"),
        ("function decodeUplink(i) { var o = {}; o.o = o; return o; }", ReasonCode.SCRIPT_FAULT, "javascript"),
        ("function decodeUplink(i) { return require('fs').readFileSync('/etc/passwd'); }", ReasonCode.SCRIPT_FAULT, "javascript"),
        ("function decodeUplink(i) { return std.open('/etc/passwd', 'r'); }", ReasonCode.SCRIPT_FAULT, "javascript"),
        ("this is not JavaScript", ReasonCode.SCRIPT_FAULT, "javascript"),
        ("var x = 1;", ReasonCode.SCRIPT_FAULT, "javascript"),
        ("async function decodeUplink(i) { return 1; }", ReasonCode.SCRIPT_FAULT, "javascript"),
        ("def decode(payload, context):\n    while True:\n        pass\n", ReasonCode.SCRIPT_TIMEOUT, "python"),
        ("def decode(payload, context):\n    return 10 ** 10 ** 10\n", ReasonCode.SCRIPT_TIMEOUT, "python"),
        ("def decode(payload, context):\n    return ['x' * 1000000 for i in range(100000)]\n", ReasonCode.SCRIPT_TIMEOUT, "python"),
        ("def decode(payload, context):\n    return open('/etc/passwd').read()\n", ReasonCode.SCRIPT_FAULT, "python"),
        ("import os\ndef decode(payload, context):\n    return os.getcwd()\n", ReasonCode.SCRIPT_FAULT, "python"),
        ("def decode(payload, context):\n    return ().__class__.__bases__[0].__subclasses__()\n", ReasonCode.SCRIPT_FAULT, "python"),
        ("def decode(payload, context):\n    return '{0.__class__}'.format(payload)\n", ReasonCode.SCRIPT_FAULT, "python"),
        ("def decode(payload, context):\n    return getattr(payload, '__cl' + 'ass__')\n", ReasonCode.SCRIPT_FAULT, "python"),
        ("def decode(payload, context):\n    return decode(payload, context)\n", ReasonCode.SCRIPT_FAULT, "python"),
        ("def other(payload):\n    return 1\n", ReasonCode.SCRIPT_FAULT, "python"),
    ],
)  # fmt: skip
async def test_harm_ends_in_a_reason_and_the_next_script_runs(pool, source, code, kind):
    (outcome,) = await pool.run([call(source, kind=kind)])
    assert outcome.fault is not None
    assert outcome.fault.code is code, outcome.fault
    assert await result(pool, call(GOOD)) == {"data": {"n": 300, "port": 7}}


async def test_one_script_cannot_reach_into_anothers_context(pool):
    poison = (
        "Object.prototype.n = 'poisoned'; Array.prototype.map = null; JSON.stringify = function () { return '\"poisoned\"'; };"
        "this.constructor.constructor('globalThis.decodeUplink = 1'); function decodeUplink(i) { return {data: 0}; }"
    )
    await pool.run([call(poison)])
    clean = (
        "function decodeUplink(i) { return {data: {n: {}.n === undefined, s: JSON.stringify([1].map(x => x + 1))}}; }"
    )
    assert await result(pool, call(clean)) == {"data": {"n": True, "s": "[2]"}}


async def test_a_fault_names_the_line_of_the_script(pool):
    (outcome,) = await pool.run([call("function decodeUplink(i) {\n  var x = 1;\n  return x.y.z;\n}")])
    assert outcome.fault.line == 3
    (outcome,) = await pool.run([call("def decode(payload, context):\n    a = 1\n    return a / 0\n", kind="python")])
    assert outcome.fault.line == 3


async def test_the_others_of_a_batch_are_answered_though_one_had_to_be_killed(pool):
    batch = [call(GOOD), call(REGEX_BOMB), call(GOOD), call(GOOD)]
    outcomes = await pool.run(batch)
    assert [o.fault and o.fault.code for o in outcomes] == [None, ReasonCode.SCRIPT_TIMEOUT, None, None]


async def test_a_version_that_keeps_faulting_is_set_aside_and_tried_again_later():
    now = 0.0
    pool = SandboxPool(Limits(cpu_s=0.02, wall_s=0.3, hard_faults_max=2, suspend_s=60.0), monotonic=lambda: now)
    try:
        loop = call("function decodeUplink(i) { if (i.bytes[0] === 1) while (true) {} return {data: 1}; }")
        outcomes = await pool.run([loop, loop])
        assert [o.fault.code for o in outcomes] == [ReasonCode.SCRIPT_TIMEOUT] * 2
        (outcome,) = await pool.run([loop])
        assert outcome.fault.code is ReasonCode.SCRIPT_SUSPENDED
        assert loop.script.id in pool.suspended()
        now = 61.0
        outcomes = await pool.run([loop, loop])
        assert [o.fault.code for o in outcomes] == [ReasonCode.SCRIPT_TIMEOUT, ReasonCode.SCRIPT_SUSPENDED]
        now = 200.0
        good = Call(loop.script, loop.function, loop.arguments.replace("[1,", "[2,"))
        assert (await pool.run([good]))[0].fault is None
        assert pool.suspended() == {}
    finally:
        await pool.close()


async def test_a_batch_of_endless_loops_costs_a_few_limits_not_thousands(pool):
    loop = call("function decodeUplink(i) { while (true) {} }")
    outcomes = await pool.run([loop] * 1_000 + [call(GOOD)])
    codes = [o.fault and o.fault.code for o in outcomes]
    assert codes == [ReasonCode.SCRIPT_TIMEOUT] * 3 + [ReasonCode.SCRIPT_SUSPENDED] * 997 + [None]


async def test_exceptions_in_a_row_set_a_version_aside():
    pool = SandboxPool(Limits(soft_faults_max=5))
    try:
        throws = call("function decodeUplink(i) { throw new Error('always'); }")
        outcomes = await pool.run([throws] * 5)
        assert {o.fault.code for o in outcomes} == {ReasonCode.SCRIPT_FAULT}
        assert (await pool.run([throws]))[0].fault.code is ReasonCode.SCRIPT_SUSPENDED
    finally:
        await pool.close()


async def test_a_trusted_script_does_not_wait_for_a_suspect_one(pool):
    await pool.run([call(GOOD)] * (TRUST_CALLS + 1))
    await pool.run([call(GOOD)])  # starts the process of the trusted ones
    loop = asyncio.get_running_loop()
    bomb = asyncio.ensure_future(pool.run([call(REGEX_BOMB)]))
    await asyncio.sleep(0.05)
    started = loop.time()
    await pool.run([call(GOOD)])
    assert not bomb.done(), f"the good call waited {loop.time() - started:.3f} s for the bomb"
    await bomb


async def test_a_batch_cancelled_in_mid_answer_leaves_nothing_for_the_next(pool):
    slow = call(
        "function decodeUplink(i) { var n = 0; for (var k = 0; k < 300000; k++) n += k; return {data: 'slow'}; }"
    )
    task = asyncio.ensure_future(pool.run([slow] * 50))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await result(pool, call(GOOD)) == {"data": {"n": 300, "port": 7}}


async def test_the_process_can_open_no_file_and_no_socket():
    # Straight at the confinement, as if a script had escaped from its language.
    import subprocess
    import sys

    code = (
        "import mmap, os, socket, sys\n"
        "from preservarium.sandbox import confine\n"
        "confine.limit_resources(); confine.drop_user()\n"
        "if not confine.filter_system_calls(): print('no filter'); sys.exit()\n"
        "for what in (lambda: open('/etc/passwd'), lambda: socket.socket(), lambda: os.fork(), lambda: os.execv('/bin/true', ['true'])):\n"
        "    try: what(); print('allowed')\n"
        "    except PermissionError: print('refused')\n"
        "os._exit(0 if sys.stdout.flush() is None else 1)\n"
    )
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, timeout=30
    )
    if "no filter" in done.stdout:
        pytest.skip("this platform has no seccomp filter: the sandbox relies on the languages and the resource limits")
    assert done.stdout.split() == ["refused"] * 4, done.stderr


async def test_a_codec_starts_from_its_first_line_for_each_payload(pool):
    source = (
        "var position = 0; let seen = []; const table = {a: 1};\n"
        "function take(bytes) { return bytes[position++]; }\n"
        "function decodeUplink(input) { seen.push(1); table.a += 1; return {data: [take(input.bytes), seen.length, table.a]}; }"
        " // the end"
    )
    for _ in range(3):
        assert await result(pool, call(source, b"\x07\x08")) == {"data": [7, 1, 2]}
