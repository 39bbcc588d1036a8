"""Kafka records as far as the code looks at them."""

from collections.abc import Sequence
from dataclasses import dataclass, field


class Rec:
    """A record as aiokafka gives it, as far as handlers look."""

    def __init__(self, offset: int, key: bytes | None = b"dev", value: bytes | None = b"{}") -> None:
        self.offset = offset
        self.timestamp = 1_700_000_000_000
        self.key = key
        self.value = value
        self.headers: Sequence[tuple[str, bytes]] = ()

    def __repr__(self) -> str:
        return f"Rec({self.offset})"


@dataclass(frozen=True)
class RawRec:
    """A record of a raw message, by its value first."""

    value: bytes | None
    key: bytes | None = None
    offset: int = 7
    timestamp: int = 1_700_000_000_000
    headers: tuple[tuple[str, bytes], ...] = field(default=())
