"""What feeds read of an aiokafka consumer besides its public API, for consumers that are lists."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any


def subscription(positions: Mapping[int, int], ends: Mapping[int, int]) -> Any:
    """aiokafka's notes of each partition: where the consumer stands, and where the partition ends."""

    def state_value(tp: Any) -> Any:
        if tp.partition not in positions:
            return None
        end = ends[tp.partition]
        return SimpleNamespace(
            position=positions[tp.partition], has_valid_position=True, highwater=end, lso=end, timestamp=0
        )

    return SimpleNamespace(subscription=SimpleNamespace(assignment=SimpleNamespace(state_value=state_value)))
