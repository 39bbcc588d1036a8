"""A run of a script finds nothing that the one before has left, wherever it left it; and what scripts may do, they still may."""

import orjson
import pytest

from preservarium.sandbox.javascript import DOUBTS_MAX, JavaScript
from preservarium.sandbox.python_scripts import PythonScript

pytest.importorskip("quickjs")
pytest.importorskip("RestrictedPython")

ARGUMENTS = '{"bytes": [1, 44], "fPort": 7, "recvTime": "2026-01-02T03:04:05Z", "variables": {"k": "v"}, "context": {}}'
RESULT_MAX = 1_000_000


def outcome(script, function, arguments=ARGUMENTS):
    """What a call gives, or the text of its fault."""
    try:
        return orjson.loads(script.call(function, arguments, RESULT_MAX))
    except Exception as e:
        return f"{type(e).__name__}: {e}"


def javascript(source, runs=4):
    codec = JavaScript(source, 1.0)
    return [outcome(codec, "decodeUplink") for _ in range(runs)]


#: Where a run may leave a count. Each is a function body that returns how often it ran, as far as it can see.
PLACES = {
    "an undeclared variable": "if (typeof n === 'undefined') n = 0; return ++n;",
    "this": "var g = (function () { return this; })(); g.n = (g.n || 0) + 1; return g.n;",
    "globalThis": "globalThis.n = (globalThis.n || 0) + 1; return globalThis.n;",
    "global": "global['n'] = (global['n'] || 0) + 1; return global.n;",
    "a hidden global": "const seen = globalThis.n || 0; Object.defineProperty(globalThis, 'n', {value: seen + 1}); return seen + 1;",
    "a fast global": "var seen = globalThis.n || 0; Object.defineProperty(globalThis, 'n', {value: seen + 1, configurable: true}); return seen + 1;",
    "a symbol of the global": "var s = Symbol.for('n'); globalThis[s] = (globalThis[s] || 0) + 1; return globalThis[s];",
    "an accessor of the global": "var had = globalThis.n || 0; globalThis.__defineGetter__('n', () => had + 1); return had + 1;",
    "Array.prototype": "Array.prototype.n = (Array.prototype.n || 0) + 1; return [].n;",
    "Object.prototype": "Object.prototype.n = (Object.prototype.n || 0) + 1; return ({}).n;",
    "String.prototype": "String.prototype.n = (''.n || 0) + 1; return ''.n;",
    "Number.prototype": "Number.prototype.n = ((1).n || 0) + 1; return (1).n;",
    "Function.prototype": "Function.prototype.n = ((() => 1).n || 0) + 1; return (() => 1).n;",
    "RegExp.prototype": "RegExp.prototype.n = (/x/.n || 0) + 1; return /x/.n;",
    "Date.prototype": "Date.prototype.n = (i.recvTime.n || 0) + 1; return i.recvTime.n;",
    "Error.prototype": "Error.prototype.n = (new Error('x').n || 0) + 1; return new Error('x').n;",
    "Uint8Array.prototype": "Uint8Array.prototype.n = (new Uint8Array(1).n || 0) + 1; return new Uint8Array(1).n;",
    "the typed arrays' prototype": "var p = Object.getPrototypeOf(Uint8Array.prototype); p.n = (p.n || 0) + 1; return new Int8Array(1).n;",
    "a constructor": "Array.n = (Array.n || 0) + 1; return Array.n;",
    "a namespace": "Math.n = (Math.n || 0) + 1; return Math.n;",
    "a built-in function": "var f = Array.prototype.push; f.n = (f.n || 0) + 1; return [].push.n;",
    "the console": "console.log.n = (console.log.n || 0) + 1; return console.log.n;",
    "Buffer": "Buffer.prototype.n = (Buffer.from([1]).n || 0) + 1; return Buffer.from([1]).n;",
    "require": "require.n = (require.n || 0) + 1; return require.n;",
    "required buffer": "var b = require('buffer').Buffer; b.n = (b.n || 0) + 1; return b.n;",
    "module": "module.n = (module.n || 0) + 1; return module.n;",
    "exports": "exports.n = (exports.n || 0) + 1; return exports.n;",
    "generators": "var p = Object.getPrototypeOf(function* () {}); p.n = (p.n || 0) + 1; return (function* () {}).n;",
    "generator objects": "var p = Object.getPrototypeOf((function* () {}).prototype); p.n = (p.n || 0) + 1; return (function* () {})().n;",
    "async functions": "var p = Object.getPrototypeOf(async function () {}); p.n = (p.n || 0) + 1; return (async () => 1).n;",
    "async generators": "var p = Object.getPrototypeOf(async function* () {}); p.n = (p.n || 0) + 1; return p.n;",
    "iterators": "var p = Object.getPrototypeOf([].values()); p.n = (p.n || 0) + 1; return [].keys().n;",
    "iterators of iterators": "var p = Object.getPrototypeOf(Object.getPrototypeOf([].values())); p.n = (p.n || 0) + 1; return new Map().keys().n;",
    "matches": "var p = Object.getPrototypeOf('x'.matchAll(/x/g)); p.n = (p.n || 0) + 1; return p.n;",
    "strict arguments": "var f = Object.getOwnPropertyDescriptor((function () { 'use strict'; return arguments; })(), 'callee').get;"
    "try { f.n = (f.n || 0) + 1; } catch (e) { return 1; } return f.n || 1;",
    "the codec itself": "var f = outer; f.n = (f.n || 0) + 1; return f.n;",
    "a tagged template": "var t = (s => s)`x`; try { t.n = (t.n || 0) + 1; } catch (e) {} return t.n || 1;",
    "an evaluated declaration": "return (0, eval)('let n = (typeof m === \"undefined\" ? 0 : m) + 1; m = n; n');",
    "an evaluated function": "var n = typeof left === 'function' ? left() : 0; (0, eval)('function left() { return ' + (n + 1) + '; }'); return left();",
    "an evaluated variable": "(0, eval)('var n = (typeof n === \"undefined\" ? 0 : n) + 1'); return (0, eval)('n');",
    "a made function": "return Function('if (typeof n === \"undefined\") n = 0; return ++n')();",
    "a replaced function": "var was = JSON.parse.n || 0, f = function () {}; f.n = was + 1; JSON.parse = f; return JSON.parse.n;",
    "a replaced method": "var f = ''.trim.n || 0; String.prototype.trim = function () { return 1; }; String.prototype.trim.n = f + 1; return f + 1;",
    "a replaced toString": "var n = ('' + {}).length; Object.prototype.toString = function () { return 'x'.repeat(n + 1); }; return n;",
    "the global's prototype": "var n = globalThis.n || 0; Object.setPrototypeOf(globalThis, {n: n + 1}); return n + 1;",
    "the global's __proto__": "var n = this_.n || 0; this_.__proto__ = {n: n + 1, __proto__: this_.__proto__}; return n + 1;",
    "a closed global": "var n = Object.isExtensible(globalThis) ? 1 : 2; Object.preventExtensions(globalThis); return n;",
    "a frozen global": "var n = Object.isExtensible(globalThis) ? 1 : 2; Object.freeze(globalThis); return n;",
    "a prototype's prototype": "var n = [].n || 0; Object.setPrototypeOf(Array.prototype, {n: n + 1}); return n + 1;",
    "stack traces": "var n = Error.n || 0; Error.prepareStackTrace = function () { return ''; }; Error.n = n + 1; return Error.n;",
    "a species": "var n = Array.n || 0; Object.defineProperty(Array, 'n', {value: n + 1, configurable: true}); return Array.n;",
    "what a promise does later": "var n = globalThis.n || 0; Promise.resolve().then(() => { globalThis.n = n + 1; }); return n + 1;",
    "a static": "class A { static n = 0; } return ++A.n;",
    "a weak map of built-ins": "return (seen.set(Array, (seen.get(Array) || 0) + 1), seen.get(Array));",
}  # fmt: skip
_FRAME = "var outer = arguments.callee, this_ = this, seen = new WeakMap();\nfunction decodeUplink(i) {{ return {{data: (function () {{ {body} }})()}}; }}"


@pytest.mark.parametrize("place", PLACES)
def test_nothing_of_a_codecs_run_is_seen_by_the_next(place):
    first, *later = javascript(_FRAME.format(body=PLACES[place]))
    assert isinstance(first, dict), first
    assert later == [first] * 3


@pytest.mark.parametrize("place", PLACES)
def test_nor_what_it_left_while_it_was_loaded(place):
    body = PLACES[place].replace("i.recvTime", "new Date(0)")
    source = f"var outer = arguments.callee, this_ = this, seen = new WeakMap(), n_ = (function () {{ {body} }})(); function decodeUplink(i) {{ return {{data: n_}}; }}"
    first, *later = javascript(source)
    assert isinstance(first, dict), first
    assert later == [first] * 3


@pytest.mark.parametrize("place", PLACES)
def test_nor_where_the_codec_seemed_to_be_harmless(place):
    """The first call writes nothing, so a context is kept; nothing stays in it all the same."""
    frame = _FRAME.replace("return {{data:", "if (i.fPort !== 9) return {{data: 0}}; return {{data:")
    codec = JavaScript(frame.format(body=PLACES[place]), 1.0)
    assert outcome(codec, "decodeUplink") == {"data": 0}
    nine = ARGUMENTS.replace('"fPort": 7', '"fPort": 9')
    first, *later = [outcome(codec, "decodeUplink", nine) for _ in range(4)]
    # A write that was refused without a word gives no count at all.
    assert first["data"] in (1, 15) if "data" in first else first == {}
    assert later == [first] * 3


@pytest.mark.parametrize(
    "source",
    [
        "}); var n = 0; (function () { return [{decodeUplink: function (i) { return {data: ++n}; }}]; ",
        "}).call(this), module, exports]; }, (function () { var n = 0; return function () { return [{decodeUplink: i => ({data: ++n})}]; }; })()); (function () { (function () {",
        "} && (function () { var n = 0; return function () { return [{decodeUplink: i => ({data: ++n})}, {}, {}]; }; })(), function () { [(function () {",
        "return {}; }).call(this)]; }; let leak = 0; (function () { (function () {",
    ],
)
def test_a_brace_too_many_does_not_lead_out_of_the_run(source):
    with pytest.raises(Exception, match=r"brace|SyntaxError|unexpected|expecting"):
        JavaScript(source, 1.0).call("decodeUplink", ARGUMENTS, RESULT_MAX)


#: What the field writes, and what a hardened context must not break: as in a context of its own, in every run.
CUSTOMS = {
    "loops with undeclared variables": ("n = 0; for (k = 0; k < i.bytes.length; k++) { n += i.bytes[k]; } return n;", 45),
    "a method of one's own objects": ("function A() {} A.prototype.toString = function () { return 'mine'; }; return '' + new A();", "mine"),
    "a constructor's name": ("function A() {} A.prototype = Object.create(Error.prototype); A.prototype.constructor = A; A.prototype.name = 'A';"
                             " return [new A().constructor === A, new A().name, String(new A()), new A() instanceof Error];", [True, "A", "A", True]),
    "fields with names of built-ins": ("var o = {}; o.constructor = 1; o.valueOf = 2; o.hasOwnProperty = 3; o.toString = 4; return o;",
                                       {"constructor": 1, "valueOf": 2, "hasOwnProperty": 3, "toString": 4}),
    "an own toString of an array": ("var a = [1]; a.toString = function () { return 'a'; }; return a + '';", "a"),
    "an error with a message": ("var e = new TypeError('x'); e.message = 'y'; e.name = 'z'; return String(e);", "z: y"),
    "a class over a built-in": ("class A extends Array { sum() { return this.reduce((a, b) => a + b, 0); } } return A.from(i.bytes).sum();", 45),
    "the console replaced": ("console = {log: function () { return 1; }}; return console.log();", 1),
    "a polyfill that is there already": ("if (!Object.assign) { Object.defineProperty(Object, 'assign', {value: 1}); } return Object.assign({a: 1}, {b: 2});", {"a": 1, "b": 2}),
    "a polyfill": ("String.prototype.twice = function () { return this + this; }; return 'ab'.twice();", "abab"),
    "a polyfill by definition": ("Object.defineProperty(Array.prototype, 'last', {value: function () { return this[this.length - 1]; }}); return i.bytes.last();", 44),
    "a polyfill in strict mode": ("'use strict'; Number.prototype.hex = function () { return this.toString(16); }; return (255).hex();", "ff"),
    "a function put in place of a built-in": ("Math.round = function () { return 'mine'; }; return Math.round(1.5);", "mine"),
    "eval": ("return eval('1 + 2');", 3),
    "a call with apply": ("return Math.max.apply(null, i.bytes) + String.fromCharCode.apply(String, [65]);", "44A"),
    "own properties": ("var o = {a: 1}; return [o.hasOwnProperty('a'), Object.prototype.hasOwnProperty.call(o, 'b'), typeof undeclared];", [True, False, "undefined"]),
    "names that codecs declare": ("var module = 1, exports = 2, Buffer = 3, require = 4; return [module, exports, Buffer, require];", [1, 2, 3, 4]),
    "what is not declared is a fault": ("try { return undeclared; } catch (e) { return e.name; }", "ReferenceError"),
}  # fmt: skip


@pytest.mark.parametrize("custom", CUSTOMS)
def test_what_the_field_writes_works_in_every_run(custom):
    body, expected = CUSTOMS[custom]
    assert javascript(f"function decodeUplink(i) {{ {body} }}".replace("return ", "return ", 1)) == [expected] * 4


def test_a_codec_may_declare_the_names_that_it_is_given():
    source = "let module = {}; const exports = 1; let require, Buffer = 2; function decodeUplink() { return {data: [typeof module, exports, Buffer]}; }"
    assert javascript(source) == [{"data": ["object", 1, 2]}] * 4


def test_a_codec_that_writes_to_a_built_in_now_and_then_is_found_out():
    codec = JavaScript(
        "function decodeUplink(i) { if (i.fPort === 9) { Array.prototype.sum = function () { return this.reduce((a, b) => a + b, 0); };"
        " return {data: i.bytes.sum()}; } return {data: typeof i.bytes.sum}; }",
        1.0,
    )
    nine = ARGUMENTS.replace('"fPort": 7', '"fPort": 9')
    said = [
        orjson.loads(codec.call("decodeUplink", given, RESULT_MAX))["data"] for given in (ARGUMENTS, ARGUMENTS, nine, ARGUMENTS, nine)
    ]  # fmt: skip
    assert said == ["undefined", "undefined", 45, "undefined", 45]


def test_a_codec_that_replaces_what_objects_inherit_now_and_then_is_found_out():
    codec = JavaScript(
        "function decodeUplink(i) { if (i.fPort === 9) Object.prototype.toString = function () { return 'mine'; }; return {data: '' + {}}; }",
        1.0,
    )
    nine = ARGUMENTS.replace('"fPort": 7', '"fPort": 9')
    said = [
        orjson.loads(codec.call("decodeUplink", given, RESULT_MAX))["data"] for given in (ARGUMENTS, nine, ARGUMENTS, nine)
    ]  # fmt: skip
    assert said == ["[object Object]", "mine", "[object Object]", "mine"]


def test_faults_are_faults_in_the_first_run_and_in_every_other():
    source = "function decodeUplink(i) {\n  left = (typeof left === 'undefined' ? 0 : left) + 1;\n  throw new Error('run ' + left);\n}"
    codec = JavaScript(source, 1.0)
    said = [outcome(codec, "decodeUplink") for _ in range(DOUBTS_MAX + 4)]
    assert said == ["ScriptError: Error: run 1"] * len(said)


def test_what_is_not_json_leaves_nothing_either():
    source = "function decodeUplink(i) { if (typeof n !== 'undefined') return {data: 'seen'}; n = 1; Object.defineProperty(globalThis, 'm', {value: 1}); return decodeUplink; }"
    assert javascript(source) == ["ScriptError: the result is not JSON"] * 4


def test_a_kept_context_lets_a_codec_reach_nothing_that_it_can_write_to():
    """Whatever values a codec can make: what they inherit from, and what is found there, is closed."""
    source = """
function decodeUplink(i) {
  var made = [[], {}, '', 1, true, Symbol(), 1n, /x/, new Date(), new Error(), () => 1, function* () {}, async () => 1, async function* () {},
    Object.getPrototypeOf((function* () {})()), Object.getPrototypeOf((async function* () {})()), new Map(), new Map().keys(), new Set(), new Set().values(), new WeakMap(), new WeakSet(),
    [].values(), ''[Symbol.iterator](), 'x'.matchAll(/x/g), new Proxy({}, {}), new Uint8Array(1), new Float64Array(1), new BigInt64Array(1),
    new DataView(new ArrayBuffer(1)), new SharedArrayBuffer(1), Promise.resolve(), new TypeError(), new AggregateError([]), Buffer.from([1]),
    (function () { return arguments; })(), i];
  var seen = new Set(), open = [], left = made.map(one => [typeof one, Object.getPrototypeOf(Object(one))]);
  left.push(['globals', Object.getPrototypeOf(globalThis)]);
  while (left.length) {
    var [name, one] = left.pop();
    if (one === null || one === globalThis || (typeof one !== 'object' && typeof one !== 'function') || seen.has(one)) continue;
    seen.add(one);
    if (!Object.isFrozen(one)) open.push(name);
    left.push([name + '.__proto__', Object.getPrototypeOf(one)]);
    for (const key of Reflect.ownKeys(one)) {
      var p = Object.getOwnPropertyDescriptor(one, key), path = name + '.' + String(key);
      left.push([path, p.value], [path + '.get', p.get], [path + '.set', p.set]);
      // What a getter hides: of the object itself, else of an instance, which it may refuse.
      if (p.get) try { left.push([path, one[key]]); } catch (e) { }
    }
  }
  return {data: {open: open, count: seen.size}};
}"""
    first, second, *_ = javascript(source)
    assert len(first["data"]["open"]) > 100, "the first run is in a context of its own, which is open"
    assert second["data"]["open"] == []
    assert second["data"]["count"] > 500


# --- Python ----------------------------------------------------------------------------------------------------------

#: As PLACES: the expression `n()` counts up what a run has left.
PYTHON_PLACES = {
    "a list": "seen = []\ndef n():\n    seen.append(1)\n    return len(seen)\n",
    "a dictionary": "seen = {'n': 0}\ndef n():\n    seen['n'] = seen['n'] + 1\n    return seen['n']\n",
    "a set": "seen = set()\ndef n():\n    seen.add(len(seen))\n    return len(seen)\n",
    "a bytearray": "seen = bytearray()\ndef n():\n    seen.append(1)\n    return len(seen)\n",
    "a global": "seen = 0\ndef n():\n    global seen\n    seen = seen + 1\n    return seen\n",
    "a default argument": "def n(seen=[]):\n    seen.append(1)\n    return len(seen)\n",
    "a closure": "def counter():\n    seen = []\n    def count():\n        seen.append(1)\n        return len(seen)\n    return count\nn = counter()\n",
    "a class attribute": "class A:\n    seen = []\ndef n():\n    A.seen.append(1)\n    return len(A.seen)\n",
    "a generator": "def numbers():\n    k = 0\n    while True:\n        k = k + 1\n        yield k\nnumber = numbers()\ndef n():\n    return next(number)\n",
    "an iterator": "number = iter(range(1, 100))\ndef n():\n    return next(number)\n",
    "a name that was given": "def n():\n    global math\n    try:\n        math = math + 1\n    except TypeError:\n        math = 1\n    return math\n",
    "a built-in that was replaced": "def n():\n    global len\n    k = len([1]) \n    len = lambda x: 7\n    return k\n",
    "an exception": "error = ValueError([])\ndef n():\n    error.args[0].append(1)\n    return len(error.args[0])\n",
    "a partial call": "def n(*given, **named):\n    named['x'] = named.get('x', 0) + 1\n    return named['x']\n",
}  # fmt: skip


@pytest.mark.parametrize("place", PYTHON_PLACES)
def test_nothing_of_a_python_scripts_run_is_seen_by_the_next(place):
    source = PYTHON_PLACES[place] + "def decode(payload, context):\n    return {'first': n(), 'second': n()}\n"
    script = PythonScript(source, 1.0)
    first, *later = [outcome(script, "decode") for _ in range(4)]
    assert first["first"] == 1
    assert later == [first] * 3


@pytest.mark.parametrize(
    "body",
    [
        "math.seen = 1", "struct.unpack = None", "json.loads = None", "datetime.datetime.seen = 1", "setattr(math, 'seen', 1)", "delattr(math, 'pi')",
        "ValueError.seen = 1", "list.seen = 1", "struct.error.seen = 1", "decode.seen = 1", "del math.pi", "context.update.seen = 1",
    ],
)  # fmt: skip
def test_what_a_python_script_is_given_it_cannot_write_to(body):
    script = PythonScript(f"def decode(payload, context):\n    {body}\n    return 1\n", 1.0)
    for _ in range(2):
        assert outcome(script, "decode").startswith("ScriptError: ")
    untouched = PythonScript(
        "def decode(payload, context):\n    return [math.pi > 3, struct.unpack('>h', payload)[0]]\n", 1.0
    )
    assert outcome(untouched, "decode") == [True, 300]


def test_what_a_python_script_does_while_it_is_loaded_counts_for_its_time():
    script = PythonScript("def decode(payload, context):\n    return 1\n", 1.0)
    assert outcome(script, "decode") == 1
    with pytest.raises(Exception, match="CPU"):
        PythonScript("while True:\n    pass\ndef decode(payload, context):\n    return 1\n", 0.01)
