"""How many workers a load asks for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.domain.capacity import GROWTH_MAX, TARGET_UTILISATION, wanted_share, workers_wanted


@given(st.floats(0, 1), st.floats(0, 1e9))
def test_a_share_grows_with_load_and_lag_and_has_a_limit(utilisation: float, lag_s: float) -> None:
    share = wanted_share(utilisation, lag_s)
    assert 0 <= share <= round(GROWTH_MAX / TARGET_UTILISATION, 3) + 0.001
    assert share >= wanted_share(utilisation, 0) - 1e-9


@pytest.mark.parametrize(
    ("utilisation", "lag_s", "share"),
    [
        (0.0, 0, 0.0),
        (0.35, 0, 0.5),
        (0.7, 0, 1.0),
        (1.0, 5, 1.429),  # batches come and go
        (1.0, 300, 2.857),
        (1.0, 86_400, 2.857),  # no more than doubled at once
        (0.2, 86_400, 0.286),  # not for want of workers
    ],
)
def test_shares(utilisation: float, lag_s: float, share: float) -> None:
    assert wanted_share(utilisation, lag_s) == share


def test_the_number_of_workers_is_the_sum_within_its_limits() -> None:
    assert workers_wanted(3 * 1.0, least=2, most=10) == 3
    assert workers_wanted(2 * 1.429, least=2, most=10) == 3
    assert workers_wanted(0.1, least=2, most=10) == 2
    assert workers_wanted(40.0, least=2, most=10) == 10
    assert workers_wanted(3 * 0.3333, least=1, most=10) == 1
