from functools import partial

import jax
import numpy as np
import pytest
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

from gpt2_jax.evaluate import check_batch, evaluate, make_eval_step
from gpt2_jax.sharding import make_mesh, replicated
from shapes import TINY


def batches(n_tokens, batch_size, block_size, tokens):
    """As the loader gives them: each target once, the end under a mask."""
    targets = n_tokens - 1
    rows = -(-targets // block_size)
    for first in range(0, rows, batch_size):
        x = np.zeros((batch_size, block_size + 1), np.int32)
        mask = np.zeros((batch_size, block_size), bool)
        for i in range(batch_size):
            part = tokens[(first + i) * block_size :][: block_size + 1]
            if len(part) > 1:
                x[i, : len(part)] = part
                mask[i, : len(part) - 1] = True
        yield x, mask


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
        result = evaluate(
            placed, batches(100, batch_size, 16, tokens), step=step, mesh=mesh
        )
        assert result.tokens == 99
        assert result.loss == pytest.approx(np.mean(nll), rel=1e-6)
        assert result.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"microbatch of 12 examples .* the 8 devices"):
        check_batch(12, make_mesh())


def test_nothing_to_evaluate_is_refused(tiny):
    model, params = tiny
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(params, [], step=make_eval_step(model), mesh=make_mesh())
