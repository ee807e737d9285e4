import math

import pytest

from gpt2_jax.checkpoints.retention import Saved, best_step, finite, kept_steps

PLAIN, INTERIM = Saved(), Saved(interim=True)


@pytest.mark.parametrize(
    ("saved", "keep_last", "kept"),
    [
        ({}, 2, set()),
        # the last ones, and the best
        ({s: PLAIN for s in (1, 2, 3, 4)}, 2, {3, 4}),
        ({1: Saved(3.0), 2: Saved(1.0), 3: Saved(2.0), 4: PLAIN}, 2, {2, 3, 4}),
        # the newest may be spoilt: nothing was computed from its parameters yet
        ({1: PLAIN, 2: PLAIN, 3: PLAIN}, 1, {2, 3}),
        ({1: PLAIN, 2: PLAIN, 3: Saved(9.0)}, 1, {3}),
        # what is there to resume from pushes out nothing, and goes with the next
        ({1: PLAIN, 2: PLAIN, 3: INTERIM, 4: INTERIM}, 2, {1, 2, 4}),
        ({1: PLAIN, 2: PLAIN, 3: INTERIM, 4: PLAIN}, 2, {2, 4}),
        (
            {1: Saved(2.0), 2: PLAIN, 3: Saved(1.0, interim=True), 4: PLAIN},
            1,
            {1, 2, 4},
        ),
        ({7: INTERIM}, 1, {7}),
    ],
)
def test_kept_steps(saved, keep_last, kept):
    assert kept_steps(saved, keep_last) == kept


def test_the_best_is_the_first_of_least_loss():
    assert best_step({9: Saved(1.0), 3: Saved(1.0), 5: Saved(2.0), 1: PLAIN}) == 3
    assert best_step({1: PLAIN}) is None


def test_metrics_that_are_no_numbers_are_none():
    assert finite({"a": 1.0, "b": math.nan, "c": -math.inf}) == {"a": 1.0}
