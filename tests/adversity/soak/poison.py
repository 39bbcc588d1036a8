"""Records that nothing can be made of, or not all: bytes, and how many lines of `iot_errors` each is to become."""

import json
import random
import time
from dataclasses import dataclass
from typing import Any

from soak import fleet


@dataclass(frozen=True, slots=True)
class Poison:
    """One record."""

    value: bytes | None
    key: bytes | None
    errors: int  #: lines of `iot_errors` that name it; -1: one at least


def envelope(device: str, payload: Any, **fields: Any) -> bytes:
    """As a connector would write it, had it no checks."""
    line = {
        "device": device, "received_at": time.time_ns() // 1000, "connector": "poison", "mode": "HTTP", "topic": "",
        "payload": payload, **fields,
    }  # fmt: skip
    return json.dumps(line).encode()


def make(detail: str, draw: random.Random, devices: int) -> Poison:
    """A poison of a kind. It names a device that exists, so that it meets the partition and the state of good messages."""
    device = fleet.steady(draw.randrange(devices))
    key = device.encode()
    good = {"t": 20.0, "n": 1}
    match detail:
        case "empty":
            return Poison(b"", key, -1)
        case "null":
            return Poison(None, key, -1)
        case "no json":
            return Poison(draw.randbytes(40).replace(b"\n", b" "), key, -1)
        case "torn":
            whole = envelope(device, good)
            return Poison(whole[: draw.randrange(2, len(whole) - 2)], key, -1)
        case "not utf-8":
            return Poison(envelope(device, "x").replace(b'"x"', b'"\xff\xfe\x80"'), key, -1)
        case "deep":
            return Poison(b'{"device":' + b"[" * 5_000 + b"]" * 5_000 + b"}", key, -1)
        case "huge":
            return Poison(envelope(device, "x" * 700_000), key, -1)
        case "nul":
            return Poison(envelope(device, good).replace(b"HTTP", b"HT\\u0000TP"), key, -1)
        case "a number":
            return Poison(b"17", key, -1)
        case "no key":
            return Poison(envelope("", good), None, -1)
        case "bad key":
            return Poison(envelope("", good), b"\xff\x00\xfe", -1)
        case "nan":
            return Poison(envelope(device, {"t": float("nan"), "n": float("nan")}), key, -1)
        case "infinite":
            return Poison(envelope(device, {"t": 1e308, "n": -5}).replace(b"1e+308", b"1e999"), key, -1)
        case "text":
            return Poison(envelope(device, {"t": "warm", "n": "many"}), key, -1)
        case "big integer":
            return Poison(envelope(device, {"t": 10**400, "n": 10**400}), key, -1)
        case "unknown device":
            unknown = f"nobody-{draw.randrange(10**6)}"
            return Poison(envelope(unknown, good), unknown.encode(), -1)
        case "future":
            return Poison(envelope(device, {"t": 999.0, "n": -5}), key, -1)
        case "batch with a bad line":
            return Poison(b"{]\n" + envelope(device, {"t": 999.0, "n": -5}) + b"\n[", key, -1)
        case "bad received_at":
            return Poison(envelope(device, {"t": 999.0, "n": -5}, received_at="yesterday"), key, -1)
        case "payload missing":
            return Poison(
                b'{"device":"%b","connector":"poison","received_at":%d}' % (key, time.time_ns() // 1000), key, -1
            )
    raise AssertionError(detail)
