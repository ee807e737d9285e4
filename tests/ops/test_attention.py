from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.layers import positions_within
from gpt2_jax.ops import attention
from gpt2_jax.ops.attention import (
    QUERIES,
    STAND_IN,
    attention_backend,
    cached_attention,
    causal_attention,
)
from gpt2_jax.runtime.sharding import make_mesh


def reference(q, k, v, positions):
    """One query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = positions[b, t] + 1
        s = k[b, :seen, h] @ q[b, t, h] / np.sqrt(q.shape[-1])
        p = np.exp(s - s.max())
        out[b, t, h] = p / p.sum() @ v[b, :seen, h]
    return out


@pytest.fixture
def qkv():
    return jax.random.normal(jax.random.key(0), (3, 2, 5, 3, 8))


def test_equals_the_reference(qkv):
    out = causal_attention(*qkv, scale=8**-0.5)
    # float32 sums of up to 8 terms of size 1
    expected = reference(*qkv, np.arange(5)[None].repeat(2, 0))
    np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_large_scores_stay_finite(qkv, dtype):
    q, k, v = (x.astype(dtype) for x in qkv)
    out = causal_attention(q, 1e4 * k, v, scale=8**-0.5)
    assert out.dtype == dtype
    assert np.isfinite(np.asarray(out, np.float32)).all()


def test_dropout_takes_out_its_share_and_keeps_the_mean():
    q = jnp.zeros((1, 64, 64, 8))
    v = jnp.ones((1, 64, 64, 8))
    out = causal_attention(
        q, q, v, scale=1.0, dropout_rate=0.25, dropout_key=jax.random.key(0)
    )
    # of 64 heads, rows that are means of 32 draws and more of 0 or 4/3: 2,048 rows,
    # deviation 0.1 / 45 of their mean
    assert abs(float(out[:, 32:, :, 0].mean()) - 1) < 0.01
    first = np.asarray(out[0, 0, :, 0])  # one draw each
    np.testing.assert_allclose(first[first > 0], 4 / 3, rtol=1e-6)
    assert 0.5 < (first > 0).mean() < 0.95  # 0.75, deviation 0.05


def check_same(attend, expected, qkv, tolerance):
    """Output and gradients, relative to the greatest of each."""

    def loss(attend, q, k, v):
        out = attend(q, k, v, scale=q.shape[-1] ** -0.5)
        return jnp.sin(out.astype(jnp.float32)).sum(), out

    def run(attend):
        f = jax.value_and_grad(partial(loss, attend), (0, 1, 2), has_aux=True)
        (_, out), gradients = jax.jit(f)(*qkv)
        return [np.asarray(x, np.float32) for x in (out, *gradients)]

    for a, b in zip(run(attend), run(expected), strict=True):
        assert np.abs(a - b).max() < tolerance * np.abs(b).max()


LONG = 256  # tokens: two blocks of the kernel


@pytest.mark.parametrize(
    ("dtype", "shape", "tolerance"),
    [
        (jnp.float32, None, 1e-5),  # the same sums in another order
        (jnp.float32, (2, 2, 2), 1e-5),
        (jnp.bfloat16, None, 2**-7),  # which has 8 bits, and it rounds q, p and sums
    ],
)
def test_the_kernel_for_tpus_is_the_same_function(dtype, shape, tolerance):
    qkv = jax.random.normal(jax.random.key(0), (3, 4, LONG, 2, 64)).astype(dtype)
    mesh = None if shape is None else make_mesh(*shape)

    kernel = partial(attention._by_pallas, mesh=mesh, interpret=True)
    plain = partial(attention._by_xla, dropout_rate=0.0, dropout_key=None)
    check_same(kernel, plain, qkv, tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-7)],  # as above
)
@pytest.mark.parametrize("segmented", ["no", "apart", "branches"])
def test_blocks_of_queries_are_the_same_function(dtype, tolerance, segmented):
    T = 2 * QUERIES + 40
    qkv = jax.random.normal(jax.random.key(0), (3, 2, T, 3, 16)).astype(dtype)
    segment = None
    if segmented != "no":
        segment = np.concatenate([segments_of([T]), segments_of([130, 20, T - 150])])
    if segmented == "branches":  # the third goes on from the first
        segment = np.stack([segment, np.where(segment == 2, 0, segment)], axis=2)
    blocks = partial(causal_attention, segment_BT=segment)
    plain = partial(
        attention._by_xla, dropout_rate=0.0, dropout_key=None, segment_BT=segment
    )
    check_same(blocks, plain, qkv, tolerance)


@pytest.mark.parametrize("segmented", [False, True])
def test_the_stand_in_is_the_same_function_in_less_memory(segmented):
    T = 256
    qkv = jax.random.normal(jax.random.key(0), (3, 2, T, 3, 16))
    segment = np.repeat(segments_of([130, 20, T - 150]), 2, axis=0)
    segment = segment if segmented else None
    stand_in = partial(causal_attention, attention=STAND_IN, segment_BT=segment)
    plain = partial(
        attention._by_xla, dropout_rate=0.0, dropout_key=None, segment_BT=segment
    )
    check_same(stand_in, plain, qkv, 1e-5)  # the same sums in another order

    def temporaries(attend):
        def loss(*qkv):
            return attend(*qkv, scale=0.25).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*qkv).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    scores = 4 * 2 * 3 * T * T  # bytes
    assert temporaries(stand_in) < scores < temporaries(plain)


def test_scales_that_are_traced_are_the_same_ones(monkeypatch):
    """As under a scan over layers, where the scale goes by the layer."""
    qkv = jax.random.normal(jax.random.key(0), (3, 1, 128, 1, 64))
    monkeypatch.setattr(attention, "attention_backend", lambda *_, **__: "pallas")
    by_pallas = partial(attention._by_pallas, interpret=True)
    monkeypatch.setattr(attention, "_by_pallas", by_pallas)
    constant = causal_attention(*qkv, scale=0.125)
    traced = jax.jit(lambda *qkv, scale: causal_attention(*qkv, scale=scale))
    # a factor of 1/8 is exact
    np.testing.assert_array_equal(traced(*qkv, scale=0.125), constant)


def segments_of(lengths):
    return np.repeat(np.arange(len(lengths)), lengths)[None].astype(np.int32)


@pytest.mark.parametrize("interpret", [False, True], ids=["xla", "pallas"])
def test_a_token_sees_its_own_segment_only(interpret):
    """As if each segment stood alone."""
    segment = np.concatenate([segments_of([128, 64, 64]), segments_of([3, 250, 3])])
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, LONG, 2, 64))
    if interpret:
        attend = partial(
            attention._by_pallas,
            interpret=True,
            mesh=make_mesh(2, 1, 2, devices=jax.devices()[:4]),
        )
        out = jax.jit(lambda *x: attend(*x[:3], 0.125, segment_BT=x[3]))(
            q, k, v, segment
        )
    else:
        out = causal_attention(q, k, v, scale=0.125, segment_BT=segment)
    for row in range(2):
        for i in np.unique(segment[row]):
            own = np.flatnonzero(segment[row] == i)
            part = [x[row : row + 1, own] for x in (q, k, v)]
            alone = causal_attention(*part, scale=0.125)
            # sums of up to 250 terms in another order
            np.testing.assert_allclose(out[row, own], alone[0], atol=2e-6)


def test_branches_see_what_they_go_on_from():
    """As if each branch stood after the stem alone."""
    lengths = [70, 30, 90, 40]  # a stem, two branches of it, and another text
    segment = np.stack([segments_of(lengths), segments_of(lengths)], axis=2)
    segment[:, 70:190, 1] = 0
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, sum(lengths), 2, 64))
    out = causal_attention(q, k, v, scale=0.125, segment_BT=segment)
    stem, others = np.arange(70), np.split(np.arange(70, 230), [30, 120])
    for own, before in zip(others, (stem, stem, stem[:0]), strict=True):
        held = np.append(before, own)
        part = [x[:, held] for x in (q, k, v)]
        alone = causal_attention(*part, scale=0.125)[:, len(before) :]
        # sums of up to 160 terms in another order
        np.testing.assert_allclose(out[:, own], alone, atol=2e-6)
    assert positions_within(jnp.asarray(segment))[0].tolist() == [
        *(*range(70), *range(70, 100), *range(70, 160), *range(40))
    ]


SHAPE = (8, 256, 12, 64)


def here(monkeypatch, platform, capability=None, devices=1):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(attention, "compute_capability", lambda: capability)


@pytest.mark.parametrize(
    ("place", "shape", "dtype", "dropout", "mesh", "chosen"),
    [
        (("cpu",), SHAPE, "bfloat16", False, None, "xla"),
        (("gpu", 9.0), SHAPE, "bfloat16", False, None, "cudnn"),
        (("gpu", 9.0), SHAPE, "bfloat16", False, (2, 2, 2), "cudnn"),
        (("gpu", 9.0), SHAPE, "float16", False, None, "cudnn"),
        (("gpu", 9.0), SHAPE, "float32", False, None, "xla"),
        (("gpu", 9.0), SHAPE, "bfloat16", True, None, "xla"),
        (("gpu", 9.0), (8, 100, 12, 64), "bfloat16", False, None, "cudnn"),
        (("gpu", 9.0), (8, 256, 12, 256), "bfloat16", False, None, "cudnn"),
        (("gpu", 8.6), (8, 256, 12, 256), "bfloat16", False, None, "xla"),
        (("gpu", 9.0), (8, 256, 12, 60), "bfloat16", False, None, "xla"),
        (("gpu", 7.0), SHAPE, "float16", False, None, "xla"),
        (("gpu", None), SHAPE, "bfloat16", False, None, "xla"),  # of another make
        (("tpu",), SHAPE, "bfloat16", False, None, "pallas"),
        (("tpu",), SHAPE, "float32", False, None, "pallas"),
        (("tpu",), SHAPE, "bfloat16", True, None, "xla"),
        (("tpu",), (8, 100, 12, 64), "bfloat16", False, None, "xla"),
        (("tpu", None, 8), SHAPE, "bfloat16", False, None, "xla"),
        (("tpu", None, 8), SHAPE, "bfloat16", False, (2, 2, 2), "pallas"),
        (("tpu", None, 8), (6, 256, 12, 64), "bfloat16", False, (2, 2, 2), "xla"),
        (("tpu", None, 8), (8, 256, 25, 64), "bfloat16", False, (2, 2, 2), "xla"),
    ],
)
def test_what_is_chosen(monkeypatch, place, shape, dtype, dropout, mesh, chosen):
    mesh = None if mesh is None else make_mesh(*mesh)
    here(monkeypatch, *place)
    choose = partial(
        attention_backend, shape_BTHK=shape, dtype=dtype, dropout=dropout, mesh=mesh
    )
    assert choose("auto") == chosen
    assert choose(chosen) == chosen
    assert choose("xla") == "xla"


@pytest.mark.parametrize(
    ("asked", "place", "changed", "why"),
    [
        ("flash", ("cpu",), {}, "'flash' is not one of auto, xla, cudnn, pallas"),
        ("cudnn", ("cpu",), {}, "'cudnn' cannot run: it needs an NVIDIA GPU"),
        ("cudnn", ("gpu", 7.5), {}, r"it needs compute capability 8.0 .* has 7.5"),
        ("cudnn", ("gpu", 9.0), {"dtype": "float32"}, "float16, not float32"),
        ("cudnn", ("gpu", 9.0), {"dropout": True}, r"no dropout .* \(attn_pdrop\)"),
        ("cudnn", ("gpu", 9.0), {"shape_BTHK": (8, 256, 12, 60)}, "head_dim=60 is"),
        ("pallas", ("gpu", 9.0), {}, "'pallas' cannot run: it needs a TPU, .* a gpu"),
        ("pallas", ("tpu",), {"shape_BTHK": (8, 64, 12, 64)}, "T=64 is not a multiple"),
        ("pallas", ("tpu", None, 8), {}, "it needs the mesh of the 8 devices"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(
    monkeypatch, asked, place, changed, why
):
    here(monkeypatch, *place)
    usual = dict(shape_BTHK=SHAPE, dtype="bfloat16", dropout=False, mesh=None)
    with pytest.raises(ValueError, match=why):
        attention_backend(asked, **{**usual, **changed})


@pytest.mark.parametrize(
    ("platform", "place", "call"),
    [
        ("cuda", ("gpu", 9.0), "__cudnn$fmhaSoftmax"),
        ("tpu", ("tpu",), "tpu_custom_call"),
    ],
)
def test_it_lowers_for_devices_that_are_not_here(monkeypatch, platform, place, call):
    here(monkeypatch, *place)
    monkeypatch.setattr(  # which asks a library that comes with jax for GPUs
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000
    )

    def loss(q, k, v):
        out = causal_attention(q, k, v, scale=0.125)
        return out.astype(jnp.float32).sum()

    x = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
    step = jax.jit(jax.grad(loss, (0, 1, 2)))
    lowered = step.trace(x, x, x).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count(call) >= 2  # forward and backward


@pytest.mark.parametrize(
    ("T", "held", "known"),
    [(1, (4, 0), False), (3, (4, 0), False), (1, (4, 4), True)]
    + [(QUERIES + 9, (n, n), True) for n in (0, 4)],
)
def test_over_a_cache_as_over_the_sequence(T, held, known):
    """Whatever lies in the cache beyond what a row holds."""
    size = T + 6
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, size, 3, 8)).astype(np.float32)
    cache = rng.normal(size=(2, 2, size, 3, 8)).astype(np.float32)
    new = np.zeros((3, 2, T, 3, 8), np.float32)
    for b, n in enumerate(held):
        cache[:, b, :n] = k[b, :n], v[b, :n]
        new[:, b] = [x[b, n : n + T] for x in (q, k, v)]
    out, k_BHKS, v_BHSK = jax.jit(cached_attention, static_argnames="start")(
        *new,
        cache[0].transpose(0, 2, 3, 1),
        cache[1].transpose(0, 2, 1, 3),
        jnp.asarray(held),
        scale=8**-0.5,
        start=held[0] if known else None,
    )
    positions = np.asarray(held)[:, None] + np.arange(T)
    np.testing.assert_allclose(out, reference(new[0], k, v, positions), atol=2e-6)
    for b, n in enumerate(held):
        end = n + T
        np.testing.assert_array_equal(
            k_BHKS[b, :, :, :end].transpose(2, 0, 1), k[b, :end]
        )
        np.testing.assert_array_equal(v_BHSK[b, :, :end].swapaxes(0, 1), v[b, :end])
        np.testing.assert_array_equal(
            v_BHSK[b, :, end:].swapaxes(0, 1), cache[1, b, end:]
        )
