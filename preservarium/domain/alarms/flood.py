"""Alarm floods: when alarms come faster than people can work (ISA-18.2, 16.3; EEMUA 191).

A flood is a state of an operator, not of a device: it begins above 10 annunciations within 10 minutes and ends below 5.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

WINDOW_US: Final = 600_000_000
BEGINS: Final = 10
ENDS: Final = 5
#: Annunciations remembered; a flood of more is a flood.
REMEMBERED_MAX: Final = 10_000

#: Everybody together.
EVERYBODY: Final = ""


@dataclass(frozen=True, slots=True)
class Flood:
    """How one operator's ten minutes were."""

    on: bool
    raised: int  #: annunciations within the window


class Floods:
    """Watches the annunciations of all devices; they need not come in the order of time."""

    def __init__(self) -> None:
        #: (when it was annunciated, to whom besides everybody)
        self._raised: deque[tuple[int, tuple[str, ...]]] = deque(maxlen=REMEMBERED_MAX)
        self._on: set[str] = set()
        self._known: set[str] = {EVERYBODY}

    def take(self, at: int, operators: Iterable[str] = ()) -> None:
        """Take one annunciation.

        Args:
            at: when it was told, µs since the epoch, UTC.
            operators: who was told.
        """
        told = tuple(dict.fromkeys(operators))
        self._known.update(told)
        self._raised.append((at, told))

    def now(self, now_us: int) -> dict[str, Flood]:
        """How everybody (`EVERYBODY`) and each operator that ever was told stand; to be asked at least once a minute."""
        while self._raised and self._raised[0][0] <= now_us - WINDOW_US:
            self._raised.popleft()
        counts = dict.fromkeys(self._known, 0)
        for at, operators in self._raised:
            if at > now_us - WINDOW_US:
                counts[EVERYBODY] += 1
                for operator in operators:
                    counts[operator] += 1
        self._on = {one for one, n in counts.items() if n > BEGINS or (one in self._on and n >= ENDS)}
        return {one: Flood(one in self._on, n) for one, n in counts.items()}
