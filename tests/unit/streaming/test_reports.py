"""What is wrong with a worker that a restart could mend."""

import pytest

from preservarium.streaming.reports import TAKING_STUCK_S, TakingOver, problems_of


def test_taking_over_counts_from_the_last_step_forward():
    taking = TakingOver()
    assert taking.look(None, 0.0) == 0.0
    assert taking.look((1, 0, 0), 1_000.0) == 0.0
    assert taking.look((1, 0, 0), 1_200.0) == 200.0
    # A record restored, then a generation of the group: each is a step.
    assert taking.look((1, 0, 7), 1_250.0) == 0.0
    assert taking.look((1, 0, 7), 1_251.0) == 1.0
    assert taking.look((2, 0, 7), 1_300.0) == 0.0
    assert taking.look((2, 0, 7), 1_700.0) == 400.0
    # Done: the next time begins anew.
    assert taking.look(None, 1_800.0) == 0.0
    assert taking.look((2, 0, 7), 2_000.0) == 0.0


@pytest.mark.parametrize(
    ("taking_s", "kafka_answers", "told"),
    [
        (TAKING_STUCK_S - 1, True, False),
        (TAKING_STUCK_S + 1, True, True),
        # A restart mends nothing while Kafka is away.
        (TAKING_STUCK_S + 1, False, False),
    ],
)
def test_a_worker_that_takes_partitions_over_for_ever_is_told(taking_s, kafka_answers, told):
    problems = problems_of({}, {}, None, assigned=False, kafka_answers=kafka_answers, taking_s=taking_s)
    assert bool(problems) is told
    if told:
        assert problems == [f"partitions are being taken over, without a step forward for {taking_s:.0f} s"]
