import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.losses import cross_entropy


def test_equals_log_softmax_value_and_gradient():
    logits = 5 * jax.random.normal(jax.random.key(0), (2, 3, 11))
    targets = jnp.array([[0, 10, 5], [1, 1, 2]])

    def reference(logits):
        logp = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]

    # float32 rounding of values up to 20
    np.testing.assert_allclose(
        cross_entropy(logits, targets), reference(logits), atol=2e-6
    )
    ours = jax.grad(lambda x: cross_entropy(x, targets).sum())(logits)
    theirs = jax.grad(lambda x: reference(x).sum())(logits)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_large_and_low_precision_logits_stay_finite():
    logits = jnp.array([[[1e4, -1e4, 0.0]]], jnp.bfloat16)
    loss = cross_entropy(logits, jnp.array([[1]]))
    assert loss.dtype == jnp.float32
    # bfloat16 holds 1e4 as 9984, so the difference is 19968
    np.testing.assert_array_equal(loss, [[19968.0]])
