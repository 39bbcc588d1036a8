"""The notices that would have gone out in a back-test: by the routing and the grouping that run live.

Time is the transitions' own. Nobody acknowledges and nothing is sent.
"""

import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from tempfile import TemporaryFile
from typing import Any, Final, cast

import orjson

from preservarium.domain.notices import Event, Inbox, Policy
from preservarium.domain.registry.device import DeviceDoc, RecipientDoc
from preservarium.notices.routing import labels_of, route

#: Times that one inbox is looked at between two transitions; a digest of a year of hours needs as many.
LOOKS_MAX: Final = 10_000
#: Unpacked at a time; some hundreds of transitions.
_UNPACKED_BYTES: Final = 1 << 18


class Heard:
    """What is kept of transitions for `played`, compressed: some 100 bytes each, however many devices they are of."""

    def __init__(self) -> None:
        self.count = 0
        self._packer = zlib.compressobj(1)
        self._packed = bytearray()

    def add(self, line: bytes) -> None:
        """Add one of `kept`."""
        self.count += 1
        self._packed += self._packer.compress(line + b"\n")

    def packed(self) -> bytes:
        """All of them; nothing can be added after it."""
        return bytes(self._packed + self._packer.flush())


def _by_time(blocks: Iterable[bytes]) -> Iterator[list[Any]]:
    """The transitions of all blocks by time, else as they came; only where they lie in a file without name is in memory."""
    with TemporaryFile() as file:
        times, ends = array("q"), array("q", [0])
        for block in blocks:
            for line in _lines(block):
                times.append(orjson.loads(line)[0])
                file.write(line)
                ends.append(ends[-1] + len(line))
        for number in sorted(range(len(times)), key=times.__getitem__):
            file.seek(ends[number])
            yield orjson.loads(file.read(ends[number + 1] - ends[number]))


def _lines(block: bytes) -> Iterator[bytes]:
    unpacker = zlib.decompressobj()
    rest = b""
    while block:
        *lines, rest = (rest + unpacker.decompress(block, _UNPACKED_BYTES)).split(b"\n")
        yield from lines
        block = unpacker.unconsumed_tail


def kept(transition: Mapping[str, Any], device: DeviceDoc, escalation: Sequence[Any]) -> bytes:
    """What `played` needs of a transition, packed, as there may be very many."""
    at = transition["transition_at"]
    return orjson.dumps([at, {**transition, "detected_at": at}, labels_of(transition, device), escalation])


def played(
    blocks: Iterable[bytes],
    recipient: Callable[[str], RecipientDoc | None],
    policy_of: Callable[[str], Policy],
    defaults: Sequence[str],
    to_us: int,
) -> dict[str, dict[str, int]]:
    """Notices by recipient and kind (`alarms`, `repeat`, `digest`), until `to_us`.

    Args:
        blocks: of `Heard.packed`; what happened at the same time is heard in their order.
        recipient: the registry's look-up.
        policy_of: how a recipient wants to be told.
        defaults: mail addresses for transitions that name nobody.
        to_us: end of the time, µs.
    """
    inboxes: dict[str, tuple[Inbox, Policy]] = {}
    counts: dict[str, Counter[str]] = {}

    def pass_time(name: str, now_us: int) -> None:
        """Plan what falls due until then, each at its time."""
        inbox, policy = inboxes[name]
        at = 0
        for _ in range(LOOKS_MAX):
            due = inbox.due_us(policy, at)
            if due is None or due > now_us:
                return
            at = max(at + 1, due)
            inbox.plan(policy, at, 1)
            counts[name].update(cast(Any, plan)["kind"] for plan in inbox.take())

    for number, (at, transition, labels, escalation) in enumerate(_by_time(blocks)):
        for told in route(transition, recipient, defaults, escalation).told:
            if told.recipient not in inboxes:
                inboxes[told.recipient] = Inbox(told.recipient), policy_of(told.recipient)
                counts[told.recipient] = Counter()
            pass_time(told.recipient, at)
            event: Event = {
                "recipient": told.recipient, "source": "0", "offset": number, "index": 0, "after_s": told.after_s,
                "below": told.below, "labels": labels, "transition": transition,
            }  # fmt: skip
            inbox, policy = inboxes[told.recipient]
            inbox.hear(event, policy, at)
    for name in inboxes:
        pass_time(name, to_us)
    return {name: dict(sorted(found.items())) for name, found in sorted(counts.items())}
