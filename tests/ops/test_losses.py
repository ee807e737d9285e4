import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.ops import kernels, losses
from gpt2_jax.ops.linear import project_rows
from gpt2_jax.ops.losses import (
    MIN_PART,
    chunk_tokens,
    part_of_vocabulary,
    summed_cross_entropy,
    token_log_probs,
)
from gpt2_jax.runtime.platform import traced_for
from gpt2_jax.runtime.sharding import BATCH, make_mesh

B, T, D, V, N_VALID = 8, 13, 24, 128, 123
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(B, T, D)).astype(np.float32)
EMBEDDING = RNG.normal(size=(V, D)).astype(np.float32)
TARGETS = RNG.integers(0, N_VALID, (B, T)).astype(np.int32)
MASK = RNG.random((B, T)) < RNG.random((B, 1))  # ragged


def plain(hidden, embedding, targets, mask=None, n_valid=None):
    """Of all logits at once, and of the rows up to n_valid alone."""
    embedding = embedding[:n_valid].astype(jnp.float32)
    nll = optax.softmax_cross_entropy_with_integer_labels(
        hidden.astype(jnp.float32) @ embedding.T, targets
    )
    return nll.sum() if mask is None else jnp.where(mask, nll, 0).sum()


def value_and_gradients(loss):
    return jax.jit(jax.value_and_grad(loss, (0, 1)))


def in_chunks_of(monkeypatch, size):
    """Tokens where there is a gradient, tens of the vocabulary where there is none."""
    monkeypatch.setattr(losses, "chunk_tokens", lambda *_: size)
    monkeypatch.setattr(losses, "part_of_vocabulary", lambda M, V: min(10 * size, V))


NOTHING = np.zeros((B, T), bool)


@pytest.fixture(params=["cpu", "tpu", "gpu"])
def platform(request, monkeypatch):
    """Whose form is traced; what only a GPU can run is interpreted."""
    kernel, calls = kernels.softmax_cross_entropy, []

    def interpreted(*args, **kwargs):
        calls.append(args)
        return kernel(*args, **kwargs, interpret=True)

    monkeypatch.setattr(losses, "compute_capability", lambda: 9.0)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(kernels, "softmax_cross_entropy", interpreted)
    monkeypatch.setattr(kernels, "COLUMNS", 32)
    with traced_for(request.param):
        yield request.param
    assert bool(calls) == (request.param == "gpu")


@pytest.mark.parametrize(
    ("size", "mask"),
    [(1, MASK), (2, None), (5, MASK), (12, NOTHING), (T, None), (T, MASK)],
)
@pytest.mark.usefixtures("platform")
def test_value_and_gradients_are_those_of_all_logits(monkeypatch, size, mask):
    in_chunks_of(monkeypatch, size)
    args = HIDDEN, EMBEDDING, TARGETS, mask
    expected, gradients = value_and_gradients(plain)(*args)
    value, ours = value_and_gradients(summed_cross_entropy)(*args)
    for got in (value, jax.jit(summed_cross_entropy)(*args)):
        assert float(got) == pytest.approx(float(expected), rel=1e-6)  # rounding
    for got, wanted in zip(ours, gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)  # sums of 104


@pytest.mark.parametrize("size", [4, T])
@pytest.mark.usefixtures("platform")
def test_low_precision_is_that_of_the_factors_alone(monkeypatch, size):
    in_chunks_of(monkeypatch, size)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (HIDDEN, EMBEDDING)]
    expected, gradients = value_and_gradients(plain)(
        *(x.astype(jnp.float32) for x in low), TARGETS, MASK
    )
    value, ours = value_and_gradients(summed_cross_entropy)(
        low[0], EMBEDDING, TARGETS, MASK
    )
    # products of bfloat16 are exact in float32, and so is the softmax
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert [x.dtype for x in ours] == [jnp.bfloat16, jnp.float32]
    for got, wanted in zip(ours, gradients, strict=True):
        # The gradient of the logits is rounded to 8 bits before the products, that of
        # the hidden states after them: off by 2**-8 at most, and by less on average.
        off = jnp.linalg.norm(got.astype(jnp.float32) - wanted)
        assert float(off / jnp.linalg.norm(wanted)) < 2**-8


@pytest.mark.parametrize("size", [4, T])
@pytest.mark.usefixtures("platform")
def test_padding_of_the_vocabulary_has_no_part(monkeypatch, size):
    in_chunks_of(monkeypatch, size)
    args = HIDDEN, EMBEDDING, TARGETS, MASK
    expected, gradients = value_and_gradients(partial(plain, n_valid=N_VALID))(*args)
    value, ours = value_and_gradients(partial(summed_cross_entropy, n_valid=N_VALID))(
        *args
    )
    assert float(value) == pytest.approx(float(expected), rel=1e-6)  # rounding
    assert not ours[1][N_VALID:].any()  # exactly zero
    for got, wanted in zip(ours, gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)  # sums of 104


@pytest.mark.parametrize("size", [1, 5, V])
@pytest.mark.parametrize("shape", [None, (8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_log_probabilities_of_tokens(monkeypatch, size, shape):
    in_chunks_of(monkeypatch, size)
    mesh = None if shape is None else make_mesh(*shape)
    logits = np.asarray(HIDDEN.astype(np.float64) @ EMBEDDING[:N_VALID].T)
    targets = np.where(MASK, logits.argmax(-1), TARGETS).astype(np.int32)
    at = targets[..., None]
    expected = np.take_along_axis(logits, at, -1)[..., 0]
    expected -= np.log(np.exp(logits).sum(-1))
    f = jax.jit(partial(token_log_probs, n_valid=N_VALID, mesh=mesh))
    got, is_greedy = f(HIDDEN, EMBEDDING, targets)
    # logits up to 20 in float32: rounding
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(is_greedy, targets == logits.argmax(-1))
    assert MASK.sum() < is_greedy.size


@pytest.mark.parametrize("n_valid", [0, V + 1])
def test_impossible_paddings_are_refused(n_valid):
    for f in (summed_cross_entropy, token_log_probs):
        with pytest.raises(
            ValueError, match=rf"n_valid={n_valid} must be in \[1, 128\]"
        ):
            f(HIDDEN, EMBEDDING, TARGETS, n_valid=n_valid)


@pytest.mark.usefixtures("platform")
def test_large_and_low_precision_logits_stay_finite():
    hidden = jnp.ones((1, 1, 1), jnp.bfloat16)
    embedding = jnp.array([[1e4], [-1e4], [0.0]])
    value, gradients = jax.value_and_grad(summed_cross_entropy, (0, 1))(
        hidden, embedding, jnp.array([[1]])
    )
    assert float(value) == 19968  # bfloat16 holds 1e4 as 9984
    np.testing.assert_array_equal(gradients[1], [[1], [-1], [0]])


def test_int8_embeddings_are_evaluated_and_have_no_gradient(monkeypatch):
    in_chunks_of(monkeypatch, 4)
    embedding = RNG.integers(-127, 128, (V, D)).astype(np.int8)
    scale = RNG.uniform(0.01, 0.02, V).astype(np.float32)
    args = jnp.asarray(HIDDEN), embedding, TARGETS, MASK
    value = summed_cross_entropy(*args, scale_V=scale)
    logits = project_rows(HIDDEN.reshape(-1, D), embedding, scale)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, TARGETS.ravel())
    expected = np.asarray(nll)[MASK.ravel()].sum()
    assert float(value) == pytest.approx(float(expected), rel=1e-6)  # rounding
    with pytest.raises(ValueError, match="an int8 embedding has no gradient"):
        jax.grad(summed_cross_entropy)(*args, scale_V=scale)


def test_chunks_are_of_what_fits(monkeypatch):
    monkeypatch.setattr(losses, "chunk_bytes", lambda: 2**20)
    # logits of 100 tokens of each of 2 rows: 4 * 2 * 100 * 1000 bytes
    assert chunk_tokens(B=2, T=100, V=1000) == 100
    assert chunk_tokens(B=2, T=200, V=1000) == 128  # of at most 131
    assert chunk_tokens(B=2, T=200, V=2000) == 64
    assert chunk_tokens(B=2**20, T=200, V=2000) == 1


def test_parts_of_the_vocabulary_stay_in_caches():
    # logits of 512 tokens for 2048 rows are 4 MiB
    assert part_of_vocabulary(M=512, V=50257) == 2048
    assert part_of_vocabulary(M=600, V=50257) == 1024
    assert part_of_vocabulary(M=512, V=2048) == 2048
    assert part_of_vocabulary(M=2**20, V=50257) == MIN_PART


def test_without_a_gradient_none_is_computed():
    def products(f):
        return str(jax.make_jaxpr(f)(HIDDEN, EMBEDDING, TARGETS)).count("dot_general")

    assert products(summed_cross_entropy) == 1
    assert products(jax.value_and_grad(summed_cross_entropy, (0, 1))) == 3


@pytest.mark.parametrize("differentiated", [False, True])
def test_all_logits_are_never_held(monkeypatch, differentiated):
    monkeypatch.setattr(losses, "chunk_bytes", lambda: 2**20)
    rows, tokens, width, vocab_size = 4, 500, 16, 16384  # 500 leaves a last chunk
    args = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in [
            ((rows, tokens, width), np.float32),
            ((vocab_size, width), np.float32),
            ((rows, tokens), np.int32),
        ]
    ]

    def temporaries(loss):
        f = value_and_gradients(loss) if differentiated else jax.jit(loss)
        return f.lower(*args).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * rows * tokens * vocab_size  # 125 MiB
    assert temporaries(plain) >= logits
    if differentiated:
        # a chunk's logits, exponentials and gradient; that of the embedding, twice
        bound = 3.25 * 2**20 + 2 * 4 * vocab_size * width
    else:  # logits and exponentials of a part of the vocabulary
        bound = 2.25 * 4 * rows * tokens * MIN_PART
        assert temporaries(lambda *args: token_log_probs(*args)) < bound
    assert temporaries(summed_cross_entropy) < bound < logits / 8


COLLECTIVE = re.compile(
    r"= (.*) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def collectives(hlo: str) -> tuple[list[int], list[int]]:
    """Of a compiled program, the elements of each: those in loops, and the others."""
    bodies: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            body = bodies.setdefault(opened[1], [])
        elif line.startswith("  "):
            body.append(line)
    looped, found = set(), set(re.findall(r"body=%?([\w.-]+)", hlo))
    assert found
    while found:
        looped |= found
        named = {n for x in found for n in re.findall(r"%([\w.-]+)", str(bodies[x]))}
        found = (named & bodies.keys()) - looped
    inside: list[int] = []
    outside: list[int] = []
    for name, lines in bodies.items():
        for line in lines:
            if shapes := COLLECTIVE.search(line):
                sizes = [
                    int(np.prod([int(n) for n in dims.split(",") if n]))
                    for dims in re.findall(r"\w+\[([\d,]*)\]", shapes[1])
                ]
                (inside if name in looped else outside).extend(sizes)
    return inside, outside


@pytest.mark.parametrize("shape", [(2, 4, 1), (2, 2, 2)])
def test_a_kernel_is_for_whole_rows(monkeypatch, shape):
    def has_rows(logits_MV, *args, **kwargs):
        seen.append(logits_MV.shape)
        return kernel(logits_MV, *args, **kwargs, interpret=True)

    seen, kernel = [], kernels.softmax_cross_entropy
    monkeypatch.setattr(losses, "compute_capability", lambda: 9.0)
    monkeypatch.setattr(kernels, "softmax_cross_entropy", has_rows)
    monkeypatch.setattr(kernels, "COLUMNS", 32)
    args = HIDDEN, EMBEDDING, TARGETS, MASK
    expected, wanted = value_and_gradients(plain)(*args)
    with traced_for("gpu"):
        value, gradients = value_and_gradients(
            partial(summed_cross_entropy, mesh=make_mesh(*shape))
        )(*args)
    assert seen == ([(T, V)] if shape[2] == 1 else [])  # a row of the batch a device
    assert float(value) == pytest.approx(float(expected), rel=1e-6)  # rounding
    for got, by in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, by, rtol=0, atol=1e-5)  # sums of 104


@pytest.mark.parametrize(
    "shape",
    [
        (8, 1, 1),
        pytest.param((1, 8, 1), marks=pytest.mark.slow),
        (2, 2, 2),
        (1, 1, 8),
    ],
)
def test_on_a_mesh_the_gradient_of_the_embedding_is_summed_once(monkeypatch, shape):
    in_chunks_of(monkeypatch, 4)
    mesh = make_mesh(*shape)
    whole, rows, vocab = (
        NamedSharding(mesh, spec) for spec in (P(), P(BATCH), P("tensor", "fsdp"))
    )
    loss = partial(summed_cross_entropy, n_valid=N_VALID, mesh=mesh)
    f = jax.jit(
        # something else is computed too, as in a model
        jax.value_and_grad(lambda hidden, *args: loss(jnp.sin(hidden), *args), (0, 1)),
        out_shardings=(whole, (rows, vocab)),
    )
    args = HIDDEN, EMBEDDING, TARGETS, MASK
    args = jax.device_put(args, (rows, vocab, rows, rows))
    compiled = f.lower(*args).compile()
    inside, outside = collectives(compiled.as_text())
    part = V // shape[2] * D
    # summed over the parts of the batch, gathered over fsdp
    assert outside.count(part) == int(shape[2] < 8) + int(shape[1] > 1)
    if shape[2] == 1:
        assert inside == []
    else:  # sums over the vocabulary; the widest is the gradient of a chunk's states
        assert max(inside) == 4 * (B * D) // (shape[0] * shape[1])
        assert part not in inside
    value, gradients = compiled(*args)
    assert float(loss(jnp.sin(args[0]), *args[1:])) == pytest.approx(float(value))
    expected, wanted = value_and_gradients(partial(plain, n_valid=N_VALID))(
        np.sin(HIDDEN), EMBEDDING, TARGETS, MASK
    )
    assert float(value) == pytest.approx(float(expected), rel=1e-6)  # rounding
    for got, by, slope in zip(gradients, wanted, (np.cos(HIDDEN), 1), strict=True):
        np.testing.assert_allclose(got, slope * by, rtol=0, atol=1e-5)  # sums of 104
