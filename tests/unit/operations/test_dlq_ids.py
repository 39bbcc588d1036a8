"""Which error lines are meant, before Kafka is asked."""

import pytest

from preservarium.operations import dlq
from preservarium.settings import Settings


@pytest.mark.parametrize(
    "identity",
    ["", ":", "1", "1:", ":1", "-1:0", "a:b", "1:2:3", "\u00b2:0", "0:\u0663", "\uff11:0", " 0:1", "0:" + "9" * 5_000],
)
async def test_what_is_no_id_is_refused_in_a_sentence(identity: str) -> None:
    with pytest.raises(dlq.DlqError, match="is no id of an error: PARTITION:OFFSET"):
        await dlq.letter(Settings(), identity)


def test_error_lines_are_chosen_by_any_spelling_of_the_address() -> None:
    lines = [{"device_id": device} for device in ("70B3D57ED0AA0001", "70b3d57ed0aa0001", "70b3d57ed0aa0002", None)]
    assert [dlq.Select(device="70:b3:d5:7e:d0:aa:00:01").takes(line) for line in lines] == [True, True, False, False]
