"""How many workers a load needs: what one worker asks for by what it measures, and what a planned load will take.

Pure: costs and loads come in as numbers, and what comes out says what it was made of.
"""

from math import ceil
from typing import Final

#: A worker is to be this busy. The rest is for bursts, for a worker that fails, and because latency grows steeply beyond.
TARGET_UTILISATION: Final = 0.7
#: A backlog is to be worked off within this time beside what arrives.
CATCH_UP_S: Final = 300.0
#: A backlog asks for at most so many times the workers: the group is assigned anew at each change, and a doubling is
#: looked at again after some minutes.
GROWTH_MAX: Final = 2.0
#: Less lag than this is how batches come and go.
LAG_NORMAL_S: Final = 10.0


def wanted_share(utilisation: float, lag_s: float) -> float:
    """The workers that one worker's share of the load needs: 1 where it is as busy as it should be, 0.5 half as busy.

    The sum over all workers is the number wanted. A worker that is busy all the time shows no more than 1 / TARGET_UTILISATION of what it
    lacks, so its lag says the rest. Lag of a worker that is hardly busy is not for want of workers (it waits for a database, say),
    and asks for none.

    Args:
        utilisation: share of a core that its event loop uses, 0 to 1.
        lag_s: of its slowest stage, s.
    """
    share = max(0.0, min(1.0, utilisation)) / TARGET_UTILISATION
    if utilisation < TARGET_UTILISATION or lag_s <= LAG_NORMAL_S:
        return round(share, 3)
    return round(share * min(GROWTH_MAX, 1 + lag_s / CATCH_UP_S), 3)


def workers_wanted(shares: float, *, least: int, most: int) -> int:
    """The number of workers, of what all shares add up to."""
    return max(least, min(most, ceil(round(shares, 3))))
