"""Who counts at a rung, told alike by a run that is there and by one that has come further."""

import pytest

from adapters_jax.training.run import Progress
from adapters_jax.tuning import rungs


@pytest.mark.parametrize(
    ('finished', 'steps', 'expected'),
    [
        ('', 0, True),
        ('pruned after 25 % of the steps: not among the best 1/2', 10, True),
        ('all steps taken', 20, True),
        ('no improvement in 2 evaluations', 10, False),
        # The steps are those before the one that failed.
        ('diverged: the loss of step 11 is nan', 10, True),
        ('diverged: the loss of step 10 is nan', 9, False),
        ('diverged: after step 10 the outputs for a split are not finite', 9, False),
    ],
)
def test_who_still_trained_after_the_evaluation_of_step_10(finished, steps, expected):
    assert rungs._reached(Progress(finished=finished, steps=steps), 10) is expected
