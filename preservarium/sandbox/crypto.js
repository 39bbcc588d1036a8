// require('crypto'): digests, and AES as codecs of meters use it; nothing that is random. Evaluated after node.js, for codecs that ask for it.
'use strict';
(function (libraries) {
  var Buffer = libraries.buffer.Buffer;
  function rotl(n, by) { return (n << by) | (n >>> (32 - by)); }
  function blocks(bytes, little) {
    var out = Array.from(bytes), bits = out.length * 8;
    out.push(0x80);
    while (out.length % 64 !== 56) out.push(0);
    var high = Math.floor(bits / 4294967296), low = bits >>> 0;
    for (var i = 0; i < 8; i++) {
      var k = little ? i : 7 - i;
      out.push(((k < 4 ? low : high) >>> (8 * (k % 4))) & 0xff);
    }
    return out;
  }
  function wordsOut(words, little) {
    var out = [];
    words.forEach(function (w) {
      for (var i = 0; i < 4; i++) out.push((w >>> (8 * (little ? i : 3 - i))) & 0xff);
    });
    return out;
  }
  function md5(bytes) {
    var shifts = [7, 12, 17, 22, 5, 9, 14, 20, 4, 11, 16, 23, 6, 10, 15, 21], state = [0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476];
    var data = blocks(bytes, true);
    for (var at = 0; at < data.length; at += 64) {
      var a = state[0], b = state[1], c = state[2], d = state[3];
      for (var i = 0; i < 64; i++) {
        var round = i >> 4, f, g;
        if (round === 0) { f = (b & c) | (~b & d); g = i; }
        else if (round === 1) { f = (d & b) | (~d & c); g = (5 * i + 1) % 16; }
        else if (round === 2) { f = b ^ c ^ d; g = (3 * i + 5) % 16; }
        else { f = c ^ (b | ~d); g = (7 * i) % 16; }
        var p = at + 4 * g, word = data[p] | (data[p + 1] << 8) | (data[p + 2] << 16) | (data[p + 3] << 24);
        var sum = (a + f + (Math.floor(Math.abs(Math.sin(i + 1)) * 4294967296) | 0) + word) | 0;
        a = d; d = c; c = b;
        b = (b + rotl(sum, shifts[round * 4 + (i % 4)])) | 0;
      }
      state = [(state[0] + a) | 0, (state[1] + b) | 0, (state[2] + c) | 0, (state[3] + d) | 0];
    }
    return wordsOut(state, true);
  }
  function sha1(bytes) {
    var state = [0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0], data = blocks(bytes, false), w = [];
    for (var at = 0; at < data.length; at += 64) {
      for (var i = 0; i < 80; i++)
        w[i] = i < 16
          ? (data[at + 4 * i] << 24) | (data[at + 4 * i + 1] << 16) | (data[at + 4 * i + 2] << 8) | data[at + 4 * i + 3]
          : rotl(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);
      var a = state[0], b = state[1], c = state[2], d = state[3], e = state[4];
      for (i = 0; i < 80; i++) {
        var f = i < 20 ? (b & c) | (~b & d) : i < 40 ? b ^ c ^ d : i < 60 ? (b & c) | (b & d) | (c & d) : b ^ c ^ d;
        var t = (rotl(a, 5) + f + e + [0x5a827999, 0x6ed9eba1, 0x8f1bbcdc, 0xca62c1d6][Math.floor(i / 20)] + w[i]) | 0;
        e = d; d = c; c = rotl(b, 30); b = a; a = t;
      }
      state = [state[0] + a, state[1] + b, state[2] + c, state[3] + d, state[4] + e].map(function (n) { return n | 0; });
    }
    return wordsOut(state, false);
  }
  // The constants of SHA-256 are the fractions of roots of primes.
  var primes = [];
  for (var candidate = 2; primes.length < 64; candidate++)
    if (primes.every(function (p) { return candidate % p; })) primes.push(candidate);
  function fraction(x) { return ((x - Math.floor(x)) * 4294967296) | 0; }
  var SHA256 = primes.map(function (p) { return fraction(Math.cbrt(p)); });
  function sha256(bytes) {
    var state = primes.slice(0, 8).map(function (p) { return fraction(Math.sqrt(p)); }), data = blocks(bytes, false), w = [];
    for (var at = 0; at < data.length; at += 64) {
      for (var i = 0; i < 64; i++) {
        if (i < 16) w[i] = (data[at + 4 * i] << 24) | (data[at + 4 * i + 1] << 16) | (data[at + 4 * i + 2] << 8) | data[at + 4 * i + 3];
        else {
          var x = w[i - 15], y = w[i - 2];
          w[i] = (w[i - 16] + (rotl(x, 25) ^ rotl(x, 14) ^ (x >>> 3)) + w[i - 7] + (rotl(y, 15) ^ rotl(y, 13) ^ (y >>> 10))) | 0;
        }
      }
      var s = state.slice();
      for (i = 0; i < 64; i++) {
        var t1 = (s[7] + (rotl(s[4], 26) ^ rotl(s[4], 21) ^ rotl(s[4], 7)) + ((s[4] & s[5]) ^ (~s[4] & s[6])) + SHA256[i] + w[i]) | 0;
        var t2 = ((rotl(s[0], 30) ^ rotl(s[0], 19) ^ rotl(s[0], 10)) + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]))) | 0;
        s = [(t1 + t2) | 0, s[0], s[1], s[2], (s[3] + t1) | 0, s[4], s[5], s[6]];
      }
      state = state.map(function (n, k) { return (n + s[k]) | 0; });
    }
    return wordsOut(state, false);
  }
  var DIGESTS = { md5: md5, sha1: sha1, sha256: sha256 };
  function digestOf(name) {
    var found = DIGESTS[String(name).toLowerCase().replace('-', '')];
    if (!found) throw new Error('crypto: no digest ' + name + '; there are md5, sha1, sha256');
    return found;
  }
  function given(data, encoding) { return typeof data === 'string' ? Buffer.from(data, encoding) : Buffer.from(data); }
  function answered(bytes, encoding) { return encoding ? new Buffer(bytes).toString(encoding) : new Buffer(bytes); }
  function Hash(finish) { this._bytes = []; this._finish = finish; }
  Hash.prototype.update = function (data, encoding) {
    var bytes = given(data, encoding);
    for (var i = 0; i < bytes.length; i++) this._bytes.push(bytes[i]);
    return this;
  };
  Hash.prototype.digest = function (encoding) { return answered(this._finish(this._bytes), encoding); };

  // AES (FIPS 197), its tables made when first used.
  var SBOX, INVERSE;
  function times2(n) { return ((n << 1) ^ (n & 0x80 ? 0x11b : 0)) & 0xff; }
  function tables() {
    if (SBOX) return;
    SBOX = []; INVERSE = [];
    for (var p = 1, q = 1, done = false; !done; ) {
      p = p ^ times2(p);
      q ^= q << 1; q ^= q << 2; q ^= q << 4; q &= 0xff;
      if (q & 0x80) q ^= 0x09;
      var x = q ^ (q << 1 | q >> 7) ^ (q << 2 | q >> 6) ^ (q << 3 | q >> 5) ^ (q << 4 | q >> 4);
      SBOX[p] = (x ^ 0x63) & 0xff;
      done = p === 1;
    }
    SBOX[0] = 0x63;
    SBOX.forEach(function (value, i) { INVERSE[value] = i; });
  }
  function schedule(key) {
    tables();
    var size = key.length / 4, rounds = size + 6, out = Array.from(key), constant = 1;
    for (var i = size; i < 4 * (rounds + 1); i++) {
      var word = out.slice(4 * i - 4, 4 * i);
      if (i % size === 0) {
        word = [SBOX[word[1]] ^ constant, SBOX[word[2]], SBOX[word[3]], SBOX[word[0]]];
        constant = times2(constant);
      } else if (size > 6 && i % size === 4) word = word.map(function (b) { return SBOX[b]; });
      for (var k = 0; k < 4; k++) out.push(out[4 * (i - size) + k] ^ word[k]);
    }
    return out;
  }
  function mixed(column, factors) {
    return [0, 1, 2, 3].map(function (row) {
      for (var sum = 0, k = 0; k < 4; k++)
        for (var b = column[k], f = factors[(k - row + 4) % 4]; f; f >>= 1, b = times2(b)) if (f & 1) sum ^= b;
      return sum;
    });
  }
  function block(keys, input, backwards) {
    var rounds = keys.length / 16 - 1, state = Array.from(input);
    function add(round) { for (var i = 0; i < 16; i++) state[i] ^= keys[16 * round + i]; }
    function substitute(box) { state = state.map(function (b) { return box[b]; }); }
    function shift(by) { state = state.map(function (_, i) { return state[(i + 4 * by * (i % 4) + 64) % 16]; }); }
    function mix(factors) {
      for (var c = 0; c < 16; c += 4) { var m = mixed(state.slice(c, c + 4), factors); for (var k = 0; k < 4; k++) state[c + k] = m[k]; }
    }
    var round;
    if (!backwards) {
      add(0);
      for (round = 1; round <= rounds; round++) { substitute(SBOX); shift(1); if (round < rounds) mix([2, 3, 1, 1]); add(round); }
    } else {
      for (round = rounds; round >= 1; round--) { add(round); if (round < rounds) mix([14, 11, 13, 9]); shift(-1); substitute(INVERSE); }
      add(0);
    }
    return state;
  }
  function Cipher(name, key, iv, backwards) {
    var parts = /^aes-?(128|192|256)-?(cbc|ecb|ctr)$/.exec(String(name).toLowerCase());
    if (!parts) throw new Error('crypto: no cipher ' + name + '; there are aes-128, aes-192 and aes-256 in cbc, ecb and ctr');
    key = given(key);
    if (key.length !== Number(parts[1]) / 8) throw new RangeError('Invalid key length');
    this._keys = schedule(key);
    this._mode = parts[2];
    this._iv = iv === null || iv === undefined ? [] : Array.from(given(iv));
    if (this._mode !== 'ecb' && this._iv.length !== 16) throw new TypeError('Invalid initialization vector');
    this._backwards = backwards;
    this._padded = this._mode !== 'ctr';
    this._waiting = [];
  }
  Cipher.prototype.setAutoPadding = function (on) { this._padded = this._mode !== 'ctr' && on !== false; return this; };
  Cipher.prototype._step = function (input) {
    var self = this, out;
    if (this._mode === 'ctr') {
      out = block(this._keys, this._iv, false);
      for (var i = 15; i >= 0 && (this._iv[i] = (this._iv[i] + 1) & 0xff) === 0; i--);
      return input.map(function (b, k) { return b ^ out[k]; });
    }
    if (this._mode === 'ecb') return block(this._keys, input, this._backwards);
    if (this._backwards) {
      out = block(this._keys, input, true).map(function (b, k) { return b ^ self._iv[k]; });
      this._iv = input;
      return out;
    }
    return (this._iv = block(this._keys, input.map(function (b, k) { return b ^ self._iv[k]; }), false));
  };
  Cipher.prototype.update = function (data, encoding, answer) {
    var bytes = given(data, encoding), out = [];
    for (var i = 0; i < bytes.length; i++) this._waiting.push(bytes[i]);
    // Of what is padded the last block waits for the end.
    var least = this._padded && this._backwards ? 17 : 16;
    while (this._waiting.length >= least) out = out.concat(this._step(this._waiting.splice(0, 16)));
    return answered(out, answer);
  };
  Cipher.prototype.final = function (answer) {
    var left = this._waiting, out = [];
    if (this._mode === 'ctr') out = left.length ? this._step(left) : [];
    else if (!this._padded) { if (left.length) throw new Error('wrong final block length'); }
    else if (!this._backwards) {
      var pad = 16 - left.length;
      while (left.length < 16) left.push(pad);
      out = this._step(left);
    } else {
      if (left.length !== 16) throw new Error('wrong final block length');
      out = this._step(left);
      var last = out[15];
      if (last < 1 || last > 16 || out.slice(16 - last).some(function (b) { return b !== last; })) throw new Error('bad decrypt');
      out = out.slice(0, 16 - last);
    }
    this._waiting = [];
    return answered(out, answer);
  };
  libraries.crypto = {
    createHash: function (name) { return new Hash(digestOf(name)); },
    createHmac: function (name, key) {
      var digest = digestOf(name), secret = Array.from(given(key));
      if (secret.length > 64) secret = digest(secret);
      while (secret.length < 64) secret.push(0);
      function under(mask) { return secret.map(function (b) { return b ^ mask; }); }
      return new Hash(function (bytes) { return digest(under(0x5c).concat(digest(under(0x36).concat(bytes)))); });
    },
    createCipheriv: function (name, key, iv) { return new Cipher(name, key, iv, false); },
    createDecipheriv: function (name, key, iv) { return new Cipher(name, key, iv, true); },
    timingSafeEqual: function (one, other) { return Buffer.compare(given(one), given(other)) === 0; },
  };
})
