import math
from functools import partial

import jax
import numpy as np
import pytest
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

from gpt2_jax.data.loader import Batch, InOrder
from gpt2_jax.runtime.sharding import make_mesh, replicated
from gpt2_jax.training.batches import in_order
from gpt2_jax.training.evaluate import Evaluation, evaluate, make_eval_step
from shapes import TINY


def examples(tokens, block_size):
    """As the loader gives them: each target once, the end under a mask."""
    targets = len(tokens) - 1

    def read(numbers):
        x = np.zeros((len(numbers), block_size + 1), np.int32)
        mask = np.zeros((len(numbers), block_size), bool)
        for row, i in enumerate(numbers):
            part = tokens[i * block_size :][: block_size + 1]
            if len(part) > 1:
                x[row, : len(part)] = part
                mask[row, : len(part) - 1] = True
        return Batch(x, mask)

    return InOrder(-(-targets // block_size), read)


def test_perplexity_of_any_loss():
    losses = (0.0, 1000.0, math.inf, math.nan)
    found = [Evaluation(loss, 1).perplexity for loss in losses]
    np.testing.assert_array_equal(found, [1, math.inf, math.inf, math.nan])


def test_loss_is_the_mean_over_all_targets_whatever_the_batch(tiny):
    model, params = tiny
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, 100)
    nll = []
    apply = jax.jit(partial(model.apply, {"params": params}))
    for start in range(0, 99, 16):
        part = tokens[start : start + 17][None]
        logits, _ = apply(part[:, :-1])
        nll += np.asarray(cross_entropy(logits, part[:, 1:]), float).ravel().tolist()
    assert len(nll) == 99
    step = make_eval_step(model)
    for devices, batch_size in [(1, 3), (1, 1), (8, 8)]:
        mesh = make_mesh(devices=jax.devices()[:devices])
        placed = jax.device_put(params, replicated(mesh))
        batches = in_order(examples(tokens, 16), batch_size, 16, mesh)
        result = evaluate(placed, batches, step=step)
        assert result.tokens == 99
        assert result.loss == pytest.approx(np.mean(nll), rel=1e-6)
        assert result.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)


def test_each_row_is_read_once_for_the_devices_that_hold_it():
    asked = []

    def read(numbers):
        asked.append(numbers.tolist())
        return Batch(np.tile(numbers[:, None], 5).astype(np.int32))

    mesh = make_mesh(4, 1, 2)
    batches = list(in_order(InOrder(10, read), 8, 4, mesh))
    assert sorted(asked) == [[i, i + 1] for i in range(0, 16, 2)]
    tokens = np.concatenate([tokens for tokens, *_ in batches])
    assert tokens[:, 0].tolist() == list(range(16))
    assert batches[0][1:] == (None, None)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"microbatch of 12 examples .* the 8 devices"):
        in_order(examples(range(100), 16), 12, 16, make_mesh())


def test_nothing_to_evaluate_is_refused(tiny):
    model, params = tiny
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(params, [], step=make_eval_step(model))
