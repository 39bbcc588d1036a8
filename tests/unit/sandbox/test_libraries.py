"""The forms in which codecs are published, and the small libraries that they use: as Node gives them."""

import json

import orjson
import pytest

from preservarium.errors import ReasonCode
from preservarium.sandbox.javascript import JavaScript, ScriptError

pytest.importorskip("quickjs")

ARGUMENTS = '{"bytes": [1, 44], "fPort": 7, "recvTime": "2026-01-02T03:04:05Z", "variables": {}}'


def call(source, function="decodeUplink", arguments=ARGUMENTS):
    return orjson.loads(JavaScript(source, 1.0).call(function, arguments, 100_000))


def value(expression):
    return call("function decodeUplink(input) { return {data: " + expression + "}; }")["data"]


BODY = "return {data: {first: input.bytes[0], port: input.fPort}};"


@pytest.mark.parametrize(
    "source",
    [
        f"function decodeUplink(input) {{ {BODY} }}",
        f"var driver = {{decodeUplink: function (input) {{ {BODY} }}}};",
        f"var driver; (() => {{ driver = {{decodeUplink(input) {{ {BODY} }}}}; }})();",
        f"const driver = (function () {{ return {{decodeUplink(input) {{ {BODY} }}}}; }})();",
        f"exports.decodeUplink = function (input) {{ {BODY} }};",
        f"module.exports = {{decodeUplink(input) {{ {BODY} }}}};",
        f"exports.driver = {{decodeUplink(input) {{ {BODY} }}}};",
        f"module.exports.driver = {{decodeUplink(input) {{ {BODY} }}}};",
        f"export function decodeUplink(input) {{ {BODY} }}",
        f"function decodeUplink(input) {{ {BODY} }}\nexport {{ decodeUplink }};",
        f"export default {{decodeUplink(input) {{ {BODY} }}}};",
        "var driver = {Decoder: function (bytes, port) { return {first: bytes[0], port: port}; }};",
        "var driver = {Decode: function (port, bytes) { return {first: bytes[0], port: port}; }};",
    ],
)
def test_each_form_of_a_codec(source):
    assert call(source)["data"] == {"first": 1, "port": 7}


def test_a_drivers_functions_find_each_other():
    assert call(
        "var driver = {k: 3, decodeUplink(i) { return {data: this.k}; }, encodeDownlink(i) { return {bytes: [this.k]}; }};"
    ) == {"data": 3}
    assert call(
        "var driver = {encodeDownlink(i) { return {bytes: [i.data.n]}; }};", "encodeDownlink", '{"data": {"n": 5}}'
    ) == {"bytes": [5]}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("require('crypto').createHash('md5').update('hello').digest('hex')", "5d41402abc4b2a76b9719d911017c592"),
        ("require('node:crypto').createHash('sha1').update('hel').update('lo').digest('hex')", "aaf4c61ddcc5e8a2dabede0f3b482cd9aea9434d"),
        ("require('crypto').createHash('SHA-256').update(Buffer.from('hello')).digest().toString('base64')", "LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ="),
        ("require('crypto').createHmac('sha256', 'key').update('hello').digest('hex')", "9307b3b915efb5171ff14d8cb55fbcc798c6c0ef1456d66ded1a6aa723a58b7b"),
        ("(() => { var x = require('crypto').createCipheriv('aes-128-cbc', Buffer.from('000102030405060708090a0b0c0d0e0f', 'hex'), Buffer.alloc(16)); return x.update('hello world, this is it', 'utf8', 'hex') + x.final('hex'); })()", "c232ff2b3de1233dedc8face1665e2c4609fa4a4448f5d38ad77c9f6c54c341e"),
        ("(() => { var x = require('crypto').createCipheriv('aes-256-ctr', Buffer.alloc(32, 7), Buffer.alloc(16, 255)); return x.update('hello world, this is it', 'utf8', 'hex') + x.final('hex'); })()", "92d0546cbf73c58d7cf82d152517a758796d87f4c70594"),
        ("(() => { var x = require('crypto').createDecipheriv('aes-128-ecb', Buffer.alloc(16), null); x.setAutoPadding(false); return x.update('00112233445566778899aabbccddeeff', 'hex', 'hex') + x.final('hex'); })()", "01b01ebc304cbe5467c4d78376f9641d"),
        ("(() => { var c = require('crypto'), k = Buffer.alloc(24, 3), iv = Buffer.alloc(16, 9), e = c.createCipheriv('aes-192-cbc', k, iv), d = c.createDecipheriv('aes-192-cbc', k, iv); var s = Buffer.concat([e.update('abcdefghijklmnopqrstuvwxyz'), e.final()]); return d.update(s, null, 'utf8') + d.final('utf8'); })()", "abcdefghijklmnopqrstuvwxyz"),
        ("(() => { var b = Buffer.alloc(10); b.writeUInt16LE(0x54, 0); b.writeFloatLE(60, 2); b.writeFloatBE(1.5, 6); return b.toString('hex'); })()", "54000000" + "7042" + "3fc00000"),
        ("(() => { var b = Buffer.alloc(8); b.writeDoubleBE(-2.5); return b.toString('hex'); })()", "c004000000000000"),
        ("(() => { var b = Buffer.alloc(8); b.writeBigInt64LE(-2n); return b.toString('hex'); })()", "feffffffffffffff"),
        ("(() => { var b = Buffer.alloc(6); b.writeUIntBE(0x123456, 0, 3); b.writeIntLE(-2, 3, 3); return b.toString('hex'); })()", "123456feffff"),
        ("(() => { var b = Buffer.alloc(4); var n = b.write('ff01', 1, 'hex'); return n + b.toString('hex'); })()", "200ff0100"),
        ("(() => { var b = Buffer.from('abcd'), t = Buffer.alloc(3); return b.copy(t, 1) + t.toString('hex'); })()", "2006162"),
        ("Buffer.from('0a0b0c0d', 'hex').swap16().toString('hex')", "0b0a0d0c"),
        ("Buffer.from('abcabc').indexOf('ca')", 2),
        ("require('buffer').Buffer.compare(Buffer.from([1]), Buffer.from([1, 0]))", -1),
        ("new Date(Date.UTC(2024, 10, 21, 1, 2, 44)).toLocaleString()", "11/21/2024, 1:02:44 AM"),
        ("new Date(Date.UTC(2024, 0, 5, 12, 0, 0)).toLocaleString('en-US')", "1/5/2024, 12:00:00 PM"),
        ("new Date(Date.UTC(2024, 0, 5)).toLocaleTimeString()", "12:00:00 AM"),
        ("new Date(NaN).toLocaleString()", "Invalid Date"),
        ("(1234567.89123).toLocaleString()", "1,234,567.891"),
        ("(-0.5).toLocaleString()", "-0.5"),
        ("(3).toLocaleString('en-US', {minimumFractionDigits: 2})", "3.00"),
        ("(1234.5).toLocaleString('en-US', {maximumFractionDigits: 0, useGrouping: false})", "1235"),
        ("typeof performance", "undefined"),
    ],
)  # fmt: skip
def test_values_as_node_gives_them(expression, expected):
    assert value(expression) == expected


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("require('fs')", "can import nothing"),
        ("require('crypto').randomBytes(4)", "not a function"),
        ("require('crypto').createHash('sha3')", "no digest"),
        ("require('crypto').createCipheriv('aes-128-cbc', Buffer.alloc(15), Buffer.alloc(16))", "key length"),
        (
            "require('crypto').createDecipheriv('aes-128-cbc', Buffer.alloc(16), Buffer.alloc(15))",
            "initialization vector",
        ),
        ("Buffer.alloc(3).writeFloatLE(1, 0)", "outside buffer bounds"),
    ],
)
def test_what_there_is_not_says_so(expression, why):
    with pytest.raises(ScriptError, match=why) as e:
        value(json.loads(json.dumps(expression)))
    assert e.value.code is ReasonCode.SCRIPT_FAULT
