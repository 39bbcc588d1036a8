// What Node and browsers offer and codecs use: Buffer, require('buffer'), atob, btoa, TextDecoder, TextEncoder.
'use strict';
(function (global) {
  var ALPHABET = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/';
  function fromBase64(text) {
    var out = [], bits = 0, value = 0;
    text = text.replace(/-/g, '+').replace(/_/g, '/');
    for (var i = 0; i < text.length; i++) {
      var digit = ALPHABET.indexOf(text[i]);
      if (digit < 0) continue;
      value = ((value << 6) | digit) & 0xffffff;
      bits += 6;
      if (bits >= 8) { bits -= 8; out.push((value >> bits) & 0xff); }
    }
    return out;
  }
  function toBase64(bytes) {
    var out = '';
    for (var i = 0; i < bytes.length; i += 3) {
      var n = (bytes[i] << 16) | ((bytes[i + 1] || 0) << 8) | (bytes[i + 2] || 0);
      out += ALPHABET[(n >> 18) & 63] + ALPHABET[(n >> 12) & 63];
      out += i + 1 < bytes.length ? ALPHABET[(n >> 6) & 63] : '=';
      out += i + 2 < bytes.length ? ALPHABET[n & 63] : '=';
    }
    return out;
  }
  function utf8Encode(text) {
    var out = [];
    for (var ch of String(text)) {
      var c = ch.codePointAt(0);
      if (c < 0x80) out.push(c);
      else if (c < 0x800) out.push(0xc0 | (c >> 6), 0x80 | (c & 63));
      else if (c < 0x10000) out.push(0xe0 | (c >> 12), 0x80 | ((c >> 6) & 63), 0x80 | (c & 63));
      else out.push(0xf0 | (c >> 18), 0x80 | ((c >> 12) & 63), 0x80 | ((c >> 6) & 63), 0x80 | (c & 63));
    }
    return out;
  }
  function utf8Decode(bytes) {
    var out = '';
    for (var i = 0; i < bytes.length; ) {
      var b = bytes[i], extra = b < 0x80 ? 0 : b >> 5 === 6 ? 1 : b >> 4 === 14 ? 2 : b >> 3 === 30 ? 3 : -1;
      var c = extra === 0 ? b : extra < 0 ? 0xfffd : b & (0x3f >> extra);
      var ok = extra >= 0 && i + extra < bytes.length + 0;
      for (var k = 1; ok && k <= extra; k++) {
        if ((bytes[i + k] & 0xc0) !== 0x80) ok = false;
        else c = (c << 6) | (bytes[i + k] & 63);
      }
      if (!ok) { out += '\ufffd'; i += 1; continue; }
      out += c > 0x10ffff ? '\ufffd' : String.fromCodePoint(c);
      i += 1 + extra;
    }
    return out;
  }
  function hexDecode(text) {
    var out = [];
    for (var i = 0; i + 1 < text.length; i += 2) {
      var n = parseInt(text.substr(i, 2), 16);
      if (!/^[0-9a-fA-F]{2}$/.test(text.substr(i, 2))) break; // as Node does: decoding stops at the first bad digit
      out.push(n);
    }
    return out;
  }
  global.atob = function (text) { return fromBase64(String(text)).map(function (b) { return String.fromCharCode(b); }).join(''); };
  global.btoa = function (text) {
    return toBase64(String(text).split('').map(function (c) { return c.charCodeAt(0) & 0xff; }));
  };
  global.TextDecoder = function () {};
  global.TextDecoder.prototype.decode = function (bytes) { return utf8Decode(bytes || []); };
  global.TextEncoder = function () {};
  global.TextEncoder.prototype.encode = function (text) { return new Uint8Array(utf8Encode(text)); };

  // Node's Buffer, as far as codecs use it: a Uint8Array with readers.
  class Buffer extends Uint8Array {
    static from(value, encoding) {
      if (typeof value === 'string') {
        switch (String(encoding || 'utf8').toLowerCase()) {
          case 'hex': return new Buffer(hexDecode(value));
          case 'base64': case 'base64url': return new Buffer(fromBase64(value));
          case 'ascii': case 'latin1': case 'binary':
            return new Buffer(value.split('').map(function (c) { return c.charCodeAt(0) & 0xff; }));
          default: return new Buffer(utf8Encode(value));
        }
      }
      if (value instanceof ArrayBuffer) return new Buffer(value);
      if (value && value.type === 'Buffer' && Array.isArray(value.data)) value = value.data;
      return new Buffer(Array.from(value || [], function (b) { return b & 0xff; }));
    }
    static alloc(size, fill) { var b = new Buffer(size); if (fill) b.fill(fill); return b; }
    static allocUnsafe(size) { return new Buffer(size); }
    static isBuffer(value) { return value instanceof Buffer; }
    static byteLength(text, encoding) { return Buffer.from(text, encoding).length; }
    static concat(list) {
      var out = [];
      list.forEach(function (b) { for (var i = 0; i < b.length; i++) out.push(b[i]); });
      return new Buffer(out);
    }
    slice(start, end) { return this.subarray(start, end); }
    equals(other) {
      return this.length === other.length && this.every(function (b, i) { return b === other[i]; });
    }
    toString(encoding, start, end) {
      var part = this.subarray(start || 0, end === undefined ? this.length : end);
      switch (String(encoding || 'utf8').toLowerCase()) {
        case 'hex': return Array.from(part, function (b) { return (b < 16 ? '0' : '') + b.toString(16); }).join('');
        case 'base64': return toBase64(part);
        case 'ascii': return Array.from(part, function (b) { return String.fromCharCode(b & 0x7f); }).join('');
        case 'latin1': case 'binary': return Array.from(part, function (b) { return String.fromCharCode(b); }).join('');
        default: return utf8Decode(part);
      }
    }
    toJSON() { return { type: 'Buffer', data: Array.from(this) }; }
    _check(offset, size) {
      if (!(offset >= 0) || offset + size > this.length) throw new RangeError('Attempt to access memory outside buffer bounds');
    }
    readUIntBE(offset, size) {
      this._check(offset, size);
      for (var n = 0, i = 0; i < size; i++) n = n * 256 + this[offset + i];
      return n;
    }
    readUIntLE(offset, size) {
      this._check(offset, size);
      for (var n = 0, i = size - 1; i >= 0; i--) n = n * 256 + this[offset + i];
      return n;
    }
    readIntBE(offset, size) { var n = this.readUIntBE(offset, size), m = Math.pow(2, 8 * size); return n >= m / 2 ? n - m : n; }
    readIntLE(offset, size) { var n = this.readUIntLE(offset, size), m = Math.pow(2, 8 * size); return n >= m / 2 ? n - m : n; }
  }
  [['8', 1, ''], ['16BE', 2, 'BE'], ['16LE', 2, 'LE'], ['32BE', 4, 'BE'], ['32LE', 4, 'LE']].forEach(function (row) {
    ['UInt', 'Int', 'Uint'].forEach(function (sign) {
      var inner = 'read' + (sign === 'Int' ? 'Int' : 'UInt') + (row[2] || 'BE');
      Buffer.prototype['read' + sign + row[0]] = function (offset) { return this[inner](offset || 0, row[1]); };
    });
    ['UInt', 'Int', 'Uint'].forEach(function (sign) {
      Buffer.prototype['write' + sign + row[0]] = function (value, offset) {
        offset = offset || 0;
        this._check(offset, row[1]);
        var n = value < 0 ? value + Math.pow(2, 8 * row[1]) : value;
        for (var i = 0; i < row[1]; i++) {
          this[row[2] === 'LE' ? offset + i : offset + row[1] - 1 - i] = n & 0xff;
          n = Math.floor(n / 256);
        }
        return offset + row[1];
      };
    });
  });
  [['Float', 4], ['Double', 8]].forEach(function (row) {
    ['BE', 'LE'].forEach(function (order) {
      Buffer.prototype['read' + row[0] + order] = function (offset) {
        offset = offset || 0;
        this._check(offset, row[1]);
        var view = new DataView(this.buffer, this.byteOffset, this.byteLength);
        return row[1] === 4 ? view.getFloat32(offset, order === 'LE') : view.getFloat64(offset, order === 'LE');
      };
    });
  });
  ['readBigUInt64BE', 'readBigUInt64LE', 'readBigInt64BE', 'readBigInt64LE'].forEach(function (name) {
    Buffer.prototype[name] = function (offset) {
      this._check(offset || 0, 8);
      var view = new DataView(this.buffer, this.byteOffset, this.byteLength);
      return view[name.indexOf('U') > 0 ? 'getBigUint64' : 'getBigInt64'](offset || 0, name.endsWith('LE'));
    };
  });
  global.Buffer = Buffer;
  global.require = function (name) {
    if (name === 'buffer') return { Buffer: Buffer };
    throw new Error('require(' + JSON.stringify(name) + '): a parser script can import nothing');
  };
})(globalThis);
