// The one entry point of the sandbox, and what newer codecs use and QuickJS has not. Evaluated in each context before the
// codec; node.js and hardening.js come after it where they are needed. Plain ES2020: QuickJS offers no file, network or timer.
'use strict';
(function (global) {
  var quiet = function () {};
  global.console = { log: quiet, info: quiet, warn: quiet, error: quiet, debug: quiet, trace: quiet };
  global.global = global;

  // What newer codecs use and QuickJS has not. Hidden from `for … in`, which many codecs walk arrays with.
  function offer(target, name, value) {
    if (!(name in target)) Object.defineProperty(target, name, { value: value, writable: true, configurable: true });
  }
  function at(n) {
    n = Math.trunc(n) || 0;
    return this[n < 0 ? this.length + n : n];
  }
  [Array.prototype, String.prototype, Object.getPrototypeOf(Uint8Array.prototype)].forEach(function (p) { offer(p, 'at', at); });
  offer(Object, 'hasOwn', function (object, key) { return Object.prototype.hasOwnProperty.call(object, key); });
  offer(Array.prototype, 'findLastIndex', function (test, self) {
    for (var i = this.length - 1; i >= 0; i--) if (test.call(self, this[i], i, this)) return i;
    return -1;
  });
  offer(Array.prototype, 'findLast', function (test, self) { return this[this.findLastIndex(test, self)]; });
  offer(Array.prototype, 'toSorted', function (compare) { return this.slice().sort(compare); });
  offer(Array.prototype, 'toReversed', function () { return this.slice().reverse(); });
  offer(global, 'structuredClone', function (value) {
    if (value === null || typeof value !== 'object') return value;
    if (value instanceof Date) return new Date(value.getTime());
    if (ArrayBuffer.isView(value)) return value.slice();
    if (Array.isArray(value)) return value.map(global.structuredClone);
    var copy = {};
    Object.keys(value).forEach(function (key) { copy[key] = global.structuredClone(value[key]); });
    return copy;
  });

  // Captured before any codec runs: what one does to built-in objects does not reach the code below.
  var parse = JSON.parse, stringify = JSON.stringify, freeze = Object.freeze, keysOf = Object.keys;
  var sourceOf = Function.prototype.call.bind(Function.prototype.toString);

  // JSON has no NaN and no Infinity: what is not finite goes in and out as a marked text (json_text.py), so that it is refused and
  // not taken for nothing.
  var indexOf = Function.prototype.call.bind(String.prototype.indexOf), MARK = '\uE000';
  function unmark(key, value) {
    return value === MARK + 'NaN' ? NaN : value === MARK + 'Infinity' ? Infinity : value === MARK + '-Infinity' ? -Infinity : value;
  }
  function mark(key, value) { return typeof value === 'number' && value - value !== 0 ? MARK + value : value; }
  function read(text) { return indexOf(text, MARK) < 0 ? parse(text) : parse(text, unmark); }
  function written(value) {
    var text = stringify(value);
    return typeof text === 'string' && indexOf(text, 'null') >= 0 ? stringify(value, mark) : text;
  }

  // The codec may define plain functions, or hang them on exports / module.exports.
  function finder(defined, module, exports) {
    var exported = module && module.exports;
    return function (name) {
      if (typeof defined[name] === 'function') return defined[name];
      if (exported && typeof exported[name] === 'function') return exported[name].bind(exported);
      if (exported && exported.default && typeof exported.default[name] === 'function') return exported.default[name];
      if (exports && typeof exports[name] === 'function') return exports[name];
      return undefined;
    };
  }
  // LoRa Alliance TS013 first, then the older signatures of The Things Network v2 and ChirpStack v3.
  var signatures = {
    decodeUplink: function (find) {
      var found = find('decodeUplink');
      if (found) return found;
      if ((found = find('Decoder'))) return function (input) { return { data: found(input.bytes, input.fPort, input.variables) }; };
      if ((found = find('Decode'))) return function (input) { return { data: found(input.fPort, input.bytes, input.variables) }; };
      return undefined;
    },
    decodeDownlink: function (find) { return find('decodeDownlink'); },
    encodeDownlink: function (find) {
      var found = find('encodeDownlink');
      if (found) return found;
      if ((found = find('Encoder'))) return function (input) { return { bytes: found(input.data, input.fPort), fPort: input.fPort }; };
      if ((found = find('Encode'))) return function (input) { return { bytes: found(input.fPort, input.data, input.variables), fPort: input.fPort }; };
      return undefined;
    },
    __proto__: null,
  };
  // Network servers run a codec from its first line for each payload, and some codecs count on it (a read position in a
  // global variable): so the codec is the body of a function, compiled once and run for each call.
  var codec;
  function run() {
    var module = { exports: {} };
    return codec.call(global, module, module.exports);
  }
  var leave = function () { return ''; }, left = '';
  var door = {
    // The codec as a function; false where the text is more than one: a brace too many would end a function early, and
    // what stood behind it would be evaluated once and for all runs.
    load: function (body, text) {
      if (sourceOf(body) !== text) return false;
      // It can get hold of it (arguments.callee), and must find nothing there.
      freeze(body.prototype);
      codec = freeze(body);
      return true;
    },
    functions: function () {
      var parts = run(), find = finder(parts[0], parts[1], parts[2]);
      return stringify(keysOf(signatures).filter(function (name) { return signatures[name](find); }));
    },
    // What is done after each call; its word comes before the result, nothing where all is well. See hardening.js.
    leaving: function (given) { leave = given; },
    left: function () { return left; },
    call: function (name, text) {
      var input = read(text), result;
      try {
        if (typeof input.recvTime === 'string') input.recvTime = new Date(input.recvTime);
        var parts = run(), called = signatures[name] && signatures[name](finder(parts[0], parts[1], parts[2]));
        if (!called) throw new Error('the codec has no ' + name);
        result = called(input);
        if (result && typeof result.then === 'function') throw new Error('the codec returned a promise');
        result = written(result === undefined ? null : result);
      } finally {
        left = leave();
      }
      return left && typeof result === 'string' ? left + result : result;
    },
    __proto__: null,
  };
  return function (what, first, second) { return door[what](first, second); };
})(globalThis);
