// Nothing of a run is left for the next one: a context that is kept has built-in objects that nobody can write to, and a global
// object from which a codec's variables are taken after each call. Evaluated after harness.js and node.js, before the codec.
'use strict';
(function (global) {
  var freeze = Object.freeze, ownKeys = Reflect.ownKeys, prototypeOf = Reflect.getPrototypeOf, extensible = Reflect.isExtensible;
  var describe = Reflect.getOwnPropertyDescriptor, define = Reflect.defineProperty, remove = Reflect.deleteProperty, same = Object.is;

  // What is there stands on an object behind the global one. What is found on the global object itself is then a codec's,
  // a variable that it did not declare, and is seen by counting three keys instead of seventy.
  var builtin = Object.create(Object.prototype);
  Object.setPrototypeOf(global, builtin);
  ownKeys(global).forEach(function (key) {
    var found = describe(global, key);
    if (!found.configurable) return;
    found.enumerable = false;
    define(builtin, key, found);
    remove(global, key);
  });
  var kept = ownKeys(global).length;
  function whole() { return prototypeOf(global) === builtin && extensible(global); }

  // Every object that a codec can reach without making it: by properties from the global object, and what only syntax leads to.
  function reachable() {
    var left = [
      builtin, [].values(), ''[Symbol.iterator](), new Map().entries(), new Set().values(), ''.matchAll(/x/g),
      function () {}, function* () {}, function* () {}(), async function () {}, async function* () {}, async function* () {}(),
      (function () { return arguments; })(),
    ];
    var found = new Set([global]), list = [];
    function meet(one) {
      if (one === null || (typeof one !== 'object' && typeof one !== 'function') || found.has(one)) return;
      found.add(one);
      left.push(one);
    }
    left.forEach(function (one) { found.add(one); });
    while (left.length) {
      var one = left.pop(), keys = ownKeys(one);
      list.push(one);
      meet(prototypeOf(one));
      for (var i = 0; i < keys.length; i++) {
        var property = describe(one, keys[i]);
        meet(property.value);
        meet(property.get);
        meet(property.set);
      }
    }
    return list;
  }

  // ---- whether a run wrote to what is there, in a context that lets it ----
  function picture(one) {
    var keys = ownKeys(one), seen = [prototypeOf(one), extensible(one), keys.length];
    for (var i = 0; i < keys.length; i++) {
      var p = describe(one, keys[i]);
      seen.push(keys[i], p.value, p.get, p.set, p.writable, p.enumerable, p.configurable);
    }
    return seen;
  }
  function differs(one, seen) {
    var now = picture(one);
    if (now.length !== seen.length) return true;
    for (var i = 0; i < now.length; i++) if (!same(now[i], seen[i])) return true;
    return false;
  }
  var watched = [], pictures = [];
  function touched() {
    if (!whole()) return true;
    for (var i = 0; i < watched.length; i++) if (differs(watched[i], pictures[i])) return true;
    return false;
  }

  // ---- a context that is kept ----
  // In a frozen prototype, `own.toString = …` of a codec's own object would come to nothing: what is inherited and cannot be
  // written hides what is to be made. So where codecs' objects inherit from, reading is by a getter, and writing makes the
  // property of the object that is written to.
  var refused = false;
  function yielding(home, key, made) {
    var property = describe(home, key);
    if (!property.configurable || !('value' in property)) return;
    var value = property.value;
    var accessor = {
      get() { return value; },
      set(given) {
        if (this === home) refused = true;
        else if (this !== null && (typeof this === 'object' || typeof this === 'function'))
          define(this, key, { value: given, writable: true, enumerable: true, configurable: true });
      },
      enumerable: property.enumerable, configurable: false,
    };
    define(home, key, accessor);
    made.push(accessor.get, accessor.set);
  }
  // Read so often that a getter would be felt; who gives one of these names to a variable of his own declares it.
  var QUICK = ['Object', 'Array', 'Number', 'String', 'Boolean', 'Math', 'JSON', 'Date', 'parseInt', 'parseFloat', 'isNaN', 'Uint8Array'];
  var ERRORS = ['Error', 'EvalError', 'RangeError', 'ReferenceError', 'SyntaxError', 'TypeError', 'URIError'];
  function harden() {
    // Found before there are getters, which no walk looks behind.
    var open = reachable();
    [Object.prototype, Function.prototype].concat(ERRORS.map(function (name) { return global[name].prototype; })).forEach(function (home) {
      ownKeys(home).forEach(function (key) { yielding(home, key, open); });
    });
    ['constructor', 'toString', 'toLocaleString'].forEach(function (key) { yielding(Array.prototype, key, open); });
    ownKeys(builtin).forEach(function (key) { if (QUICK.indexOf(key) < 0) yielding(builtin, key, open); });
    for (var i = 0; i < open.length; i++) freeze(open[i]);
  }
  // '!': a built-in object was not written to, so the result may be wrong; '~': something stays that cannot be taken away.
  function leave() {
    if (refused) return '!';
    if (!whole()) return '~';
    var keys = ownKeys(global);
    if (keys.length === kept) return '';
    for (var i = 0; i < keys.length; i++) remove(global, keys[i]);
    return ownKeys(global).length === kept ? '' : '~';
  }
  return function (what) {
    if (what === 'watch') { watched = reachable(); pictures = watched.map(picture); return undefined; }
    if (what === 'touched') return touched();
    harden();
    return leave;
  };
})(globalThis);
