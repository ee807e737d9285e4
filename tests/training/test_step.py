import dataclasses
import re
import time
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy
from test_optim import CFG, MUON

from gpt2_jax.data.sft import Example, SftExamples
from gpt2_jax.model import GPT2
from gpt2_jax.runtime import sharding
from gpt2_jax.runtime.sharding import make_mesh
from gpt2_jax.training.optim import make_optimizer
from gpt2_jax.training.step import (
    TrainState,
    abstract_state,
    eval_step,
    gradients,
    init_state,
    train_step,
)
from shapes import TINY

SMALL = dataclasses.replace(TINY, vocab_size=64, n_positions=16, n_layer=1)
RNG = np.random.default_rng(0)


ONE = make_mesh(devices=jax.devices()[:1])


@lru_cache
def compiled(cfg, mesh=ONE):
    """A fresh state, the same on every mesh, and the jitted step."""
    model, optimizer = GPT2(cfg, mesh=mesh), make_optimizer(CFG, 100)
    state = init_state(GPT2(cfg), optimizer, ONE, 0)
    shardings = sharding.tree_shardings(state, mesh)
    step = partial(train_step, model=model, optimizer=optimizer, seed=0)
    step = jax.jit(step, out_shardings=(shardings, sharding.replicated(mesh)))
    return jax.device_put(state, shardings), step


def losses(mesh, cfg, batches):
    state, step = compiled(cfg, mesh)
    spread = sharding.batch_sharding(mesh, ndim=3, axis=1)
    out = []
    for tokens in batches:
        state, metrics = step(state, jax.device_put(tokens, spread))
        out.append(float(metrics["loss"]))
    return np.array(out), state


def bytes_per_device(tree):
    """[8]: what of a tree lies on each device, and what all of it takes."""
    held = [0] * 8
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    return held, sum(x.nbytes for x in jax.tree.leaves(tree))


def test_eight_devices_equal_one(capfd):
    cfg = dataclasses.replace(SMALL, n_head=8)
    # a text that can be learned, so that the losses move
    batches = (RNG.integers(0, 4, (50, 1, 8, 17)) * 16).astype(np.int32)
    one, _ = losses(ONE, cfg, batches)
    assert one[0] - one[-1] > 0.5  # it learns
    for shape in [(8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 2, 1), (1, 1, 8)]:
        many, state = losses(make_mesh(*shape), cfg, batches)
        np.testing.assert_allclose(many, one, rtol=1e-5)
        _, fsdp, tensor = shape
        for name in ("params", "opt_state"):
            held, total = bytes_per_device(getattr(state, name))
            print(f"{shape} {name}: {held} of {total} bytes")
            # all but vectors and, over tensor, wpe: here a fifth of it all
            assert max(held) < total * (1 / (fsdp * tensor) + 0.2)
    assert "rematerialization" not in capfd.readouterr().err  # XLA finds its way


def scanning(n_layer, n_embd, vocab_size, optimizer=CFG):
    """The jitted step of a model that scans its layers, and abstract arguments."""
    cfg = dataclasses.replace(
        TINY, n_layer=n_layer, n_embd=n_embd, vocab_size=vocab_size
    )
    model, transformation = GPT2(cfg, scan_layers=True), make_optimizer(optimizer, 100)
    state = abstract_state(model, transformation, ONE)
    step = partial(train_step, model=model, optimizer=transformation, seed=0)
    tokens = jax.ShapeDtypeStruct((1, 2, 33), jnp.int32)
    return jax.jit(step, donate_argnums=0), (state, tokens)


@pytest.mark.parametrize("optimizer", [CFG, MUON], ids=["adamw", "muon"])
def test_the_program_does_not_grow_with_depth(optimizer):
    lines = []
    for n_layer in (3, 6):
        step, args = scanning(n_layer, 32, 64, optimizer)
        lines.append(len(step.lower(*args).as_text().splitlines()))
    assert lines[0] == lines[1]


@pytest.mark.slow
@pytest.mark.parametrize(("n_embd", "vocab_size"), [(32, 64), (768, 50_304)])
def test_48_layers_compile_in_the_time_of_12(n_embd, vocab_size):
    seconds = {12: [], 48: []}
    for _ in range(3):
        for n_layer, taken in seconds.items():
            jax.clear_caches()
            start = time.process_time()  # of all threads, whatever else runs here
            step, args = scanning(n_layer, n_embd, vocab_size)
            step.lower(*args).compile()
            taken.append(time.process_time() - start)
    shallow, deep = (np.median(taken) for taken in seconds.values())
    assert deep <= 1.5 * shallow


def test_scanned_layers_train_alike():
    cfg = dataclasses.replace(SMALL, n_layer=2)
    batches = (RNG.integers(0, 4, (3, 1, 8, 17)) * 16).astype(np.int32)
    expected, _ = losses(ONE, cfg, batches)
    mesh, optimizer = make_mesh(2, 2, 2), make_optimizer(CFG, 100)
    model = GPT2(cfg, scan_layers=True, mesh=mesh)
    state = init_state(model, optimizer, mesh, 0)
    step = jax.jit(partial(train_step, model=model, optimizer=optimizer, seed=0))
    spread, got = sharding.batch_sharding(mesh, ndim=3, axis=1), []
    for tokens in batches:
        state, metrics = step(state, jax.device_put(tokens, spread))
        got.append(float(metrics["loss"]))
    # the same sums in another order
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    evaluate = jax.jit(partial(eval_step, model=model))
    total, count = evaluate(state.params, batches[0, 0], np.ones((8, 16), bool))
    assert float(total / count) < got[0]


def test_accumulation_does_not_change_the_gradient(tiny):
    model, params = tiny
    tokens = RNG.integers(0, TINY.vocab_size, (8, 33))
    mask = RNG.random((8, 32)) < RNG.random((8, 1))  # ragged
    grad = jax.jit(partial(gradients, model=model))

    def split(accumulation):
        shape = (accumulation, 8 // accumulation)
        return tokens.reshape(*shape, 33), mask.reshape(*shape, 32)

    loss, expected = grad(params, *split(1))
    nll = cross_entropy(
        model.apply({"params": params}, tokens[:, :-1])[0], tokens[:, 1:]
    )
    assert float(loss) == pytest.approx(float(nll[mask].mean()), rel=1e-6)
    for accumulation in (2, 4):
        other, grads = grad(params, *split(accumulation))
        assert float(other) == pytest.approx(float(loss), rel=1e-6)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=0, atol=1e-6), grads, expected
        )


def test_no_mask_is_a_mask_of_ones(tiny):
    model, params = tiny
    tokens = RNG.integers(0, TINY.vocab_size, (2, 2, 9))
    loss, _ = gradients(params, tokens, None, model=model)
    masked_loss, _ = gradients(params, tokens, np.ones((2, 2, 8), bool), model=model)
    assert float(loss) == pytest.approx(float(masked_loss), rel=1e-6)


def test_step_metrics_and_dropout_by_step():
    cfg = dataclasses.replace(SMALL, resid_pdrop=0.3)
    mesh = ONE
    batch = RNG.integers(0, 64, (1, 4, 17)).astype(np.int32)
    first, state = losses(mesh, cfg, [batch] * 3)
    again, _ = losses(mesh, cfg, [batch] * 3)
    np.testing.assert_array_equal(first, again)  # dropout is a function of the step
    fresh, step = compiled(cfg)
    later = TrainState(fresh.step + 1, fresh.params, fresh.opt_state)
    at = [float(step(s, batch)[1]["loss"]) for s in (fresh, later)]
    assert at[0] != at[1]  # and of nothing else
    assert int(state.step) == 3


def test_gradient_norm_is_that_before_clipping():
    state, step = compiled(SMALL)
    params = jax.tree.map(lambda x: 5 * x, state.params)
    tokens = RNG.integers(0, 64, (1, 8, 17)).astype(np.int32)
    _, metrics = step(TrainState(state.step, params, state.opt_state), tokens)
    _, grads = gradients(params, tokens, None, model=GPT2(SMALL))
    norm = np.sqrt(
        sum((np.asarray(g, float) ** 2).sum() for g in jax.tree.leaves(grads))
    )
    assert norm > 1
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)


def test_eval_step_sums_over_the_mask(tiny):
    model, params = tiny
    tokens = RNG.integers(0, TINY.vocab_size, (3, 9))
    mask = RNG.random((3, 8)) < 0.5
    total, count = eval_step(params, tokens, mask, model=model)
    logits, _ = model.apply({"params": params}, tokens[:, :-1])
    expected = np.asarray(cross_entropy(logits, tokens[:, 1:]))[mask].sum()
    assert int(count) == mask.sum()
    assert float(total) == pytest.approx(float(expected), rel=1e-6)


def test_padding_of_the_vocabulary_is_never_in_the_loss(tiny):
    model, params = tiny
    padded = GPT2(dataclasses.replace(TINY, vocab_size=64))
    rows = jnp.full((3, TINY.n_embd), 2.0)  # large enough to be seen
    embedding = jnp.concatenate([params["wte"]["embedding"], rows])
    padded_params = {**params, "wte": {"embedding": embedding}}
    tokens = RNG.integers(0, TINY.vocab_size, (2, 3, 9))
    mask = RNG.random((2, 3, 8)) < 0.5
    loss, expected = gradients(params, tokens, mask, model=model)
    n_valid = TINY.vocab_size
    got, grads = gradients(padded_params, tokens, mask, model=padded, n_valid=n_valid)
    assert float(got) == pytest.approx(float(loss), rel=1e-6)
    assert not grads["wte"]["embedding"][n_valid:].any()  # exactly zero
    grads["wte"]["embedding"] = grads["wte"]["embedding"][:n_valid]
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=0, atol=1e-6), grads, expected
    )
    total, _ = eval_step(
        padded_params, tokens[0], mask[0], model=padded, n_valid=n_valid
    )
    expected, _ = eval_step(params, tokens[0], mask[0], model=model)
    assert float(total) == pytest.approx(float(expected), rel=1e-6)
    with_padding, _ = eval_step(padded_params, tokens[0], mask[0], model=padded)
    assert abs(float(with_padding - expected)) > 0.1


def test_bfloat16_computes_near_float32(tiny):
    _, params = tiny
    tokens = RNG.integers(0, TINY.vocab_size, (1, 4, 33))
    results = [
        jax.jit(partial(gradients, model=GPT2(TINY, dtype=dtype)))(params, tokens, None)
        for dtype in (jnp.float32, jnp.bfloat16)
    ]
    (loss, grads), (low_loss, low_grads) = results
    # 8 bits of mantissa through three layers
    assert float(low_loss) == pytest.approx(float(loss), rel=0.02)
    for g, low in zip(jax.tree.leaves(grads), jax.tree.leaves(low_grads), strict=True):
        assert low.dtype == jnp.float32
        cosine = float((g * low).sum() / (jnp.linalg.norm(g) * jnp.linalg.norm(low)))
        assert cosine > 0.98


def packed(documents, eot, length):
    """Each document after an end of text, end to end, and their segments."""
    tokens = np.concatenate([[eot, *document] for document in documents])
    tokens = np.pad(tokens, (0, length - len(tokens)), constant_values=eot)
    return tokens[None], np.cumsum(tokens[:-1] == eot)[None].astype(np.int32)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_packed_documents_do_not_know_of_each_other(tiny, scan_layers):
    _, params = tiny
    model, eot = GPT2(TINY, scan_layers=scan_layers), 60
    documents = [RNG.integers(0, 60, n) for n in (7, 12, 9)]
    tokens, segments = packed(documents, eot, 40)
    begins = np.cumsum([0, 8, 13])

    def nll(added_BTD, document):
        """Of a document, with something added to what is looked up of each token."""
        rows = params["wte"]["embedding"][tokens[0, :-1]] + added_BTD[0]
        ids = np.arange(len(rows))[None]  # a row of its own for each
        table = jnp.zeros((TINY.vocab_size, TINY.n_embd)).at[: len(rows)].set(rows)
        own = {**params, "wte": {"embedding": table}}
        hidden, _ = model.apply(
            {"params": own}, ids, segment_BT=segments, method="hidden"
        )
        logits = hidden @ params["wte"]["embedding"].T
        losses = cross_entropy(logits, tokens[:, 1:])[0]
        first = begins[document]
        return losses[first : first + len(documents[document])].sum(), logits

    added = jnp.zeros((1, 39, TINY.n_embd))
    for i, document in enumerate(documents):
        grad, logits = jax.jit(jax.grad(nll, has_aux=True), static_argnums=1)(added, i)
        own = slice(begins[i], begins[i] + len(document))
        norms = np.abs(grad[0]).sum(-1)
        assert (norms[own] > 0).all()
        norms[own] = 0
        assert not norms.any()  # exactly zero: of those before it, and after
        alone, _ = model.apply({"params": params}, np.array([[eot, *document]])[:, :-1])
        # sums in another order; logits reach 10
        np.testing.assert_allclose(logits[0, own], alone[0], atol=1e-4)


def test_dropping_the_segments_is_noticed(tiny):
    model, params = tiny
    rng = np.random.default_rng(0)
    tokens, segments = packed([rng.integers(0, 60, 9) for _ in range(3)], 60, 33)
    losses = [
        float(gradients(params, tokens[None], None, x, model=model)[0])
        for x in (None, segments[None])
    ]
    assert abs(losses[0] - losses[1]) > 1e-3  # rounding is some 1e-6


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_loss_of_examples_is_the_mean_over_their_completions(tiny, accumulation):
    """Computed example by example, each alone, in float64 from the logits on."""
    model, params = tiny
    apply = jax.jit(partial(model.apply, {"params": params}))
    examples, nll = [], []
    for prompt, completion in RNG.integers(1, 14, (23, 2)):
        tokens = np.append(RNG.integers(0, 60, prompt + completion), 60)
        counts = np.arange(len(tokens)) >= prompt
        examples.append(Example(tokens.astype(np.int32), counts))
        padded = np.pad(tokens, (0, 32 - len(tokens)))  # one program for all
        logits = np.asarray(apply(padded[None])[0][0], np.float64)
        for i in range(prompt, len(tokens)):
            row = logits[i - 1] - logits[i - 1].max()
            nll.append(np.log(np.exp(row).sum()) - row[tokens[i]])
    data = SftExamples(examples, block_size=32, eot_id=60, seed=0)
    rows = 4 * -(-len(data.windows) // 4)
    batch = data.evaluation().read(np.arange(rows))
    assert batch.mask.sum() == len(nll)
    assert len(set(batch.mask.sum(1))) > 2  # ragged
    cut = (accumulation, rows // accumulation, -1)
    loss, _ = jax.jit(partial(gradients, model=model))(
        params, *(x.reshape(cut) for x in batch)
    )
    assert float(loss) == pytest.approx(np.mean(nll), rel=1e-6)
    total, count = eval_step(params, *batch, model=model)
    assert float(total) / int(count) == pytest.approx(np.mean(nll), rel=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "block"),
    [
        ({}, "h_0/.*"),
        ({"scan_layers": True}, "h/while/body/.*"),
        ({"remat": "block"}, "h_0/.*"),
    ],
)
def test_a_trace_reads_by_layer(kwargs, block):
    model, optimizer = GPT2(SMALL, **kwargs), make_optimizer(CFG, 100)
    state = abstract_state(model, optimizer, ONE)
    step = jax.jit(partial(train_step, model=model, optimizer=optimizer, seed=0))
    tokens = jax.ShapeDtypeStruct((1, 2, 17), jnp.int32)
    text = step.lower(state, tokens).compile().as_text()
    names = "\n".join(sorted(set(re.findall(r'op_name="([^"]*)"', text))))
    forward, backward = r"/jvp\(GPT2.hidden\)/", r"/transpose\(jvp\(GPT2.hidden\)\)/"
    for path in ("embedding/w(t|p)e/", f"{block}attn/c_attn/", f"{block}mlp/", "ln_f/"):
        assert re.search(forward + f"(.*/)?{path}", names), path
        assert re.search(backward + f"(.*/)?{path}", names), path
    assert re.search(r"/jvp\(loss\)/.*(dot_general|exp)", names)
    assert re.search(r"/optimizer/.*sqrt", names)
