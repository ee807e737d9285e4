"""Beam search, token for token that of transformers: pip install '.[test,parity]'."""

import importlib

import numpy as np
import pytest

import gpt2_jax
from gpt2_jax.decoding.beam import beam_search
from gpt2_jax.decoding.sampling import Sampling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
make_goldens = importlib.import_module("make_goldens")  # needs both

V, NEW, BEAMS = 101, 16, 4
SIZES = dict(vocab_size=V, n_positions=64, n_embd=48, n_head=3, n_layer=3)
RNG = np.random.default_rng(7)
PROMPTS = [RNG.integers(1, V, n).tolist() for n in RNG.integers(1, 30, 50)]
ENDS = (2, 9, 60)  # these occur
FEW = PROMPTS[:8]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    model = make_goldens.random_model(3, **SIZES)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # enough for so small a model, and far faster
    yield model, gpt2_jax.load(folder)
    torch.set_num_threads(threads)


def their_search(model, prompt, ends, **options):
    """(new tokens without the end, score), one prompt at a time."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            num_beams=BEAMS,
            max_new_tokens=NEW,
            eos_token_id=list(ends) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    found = []
    for row, score in zip(out.sequences, out.sequences_scores, strict=True):
        new = row[len(prompt) :].tolist()
        at = [i for i, token in enumerate(new) if token in ends]
        found.append((new[: at[0]] if at else new, score.item()))
    return found


def our_search(lm, prompts, ends, *, keep=1, bias=None, bad_words=(), **options):
    names = ("length_penalty", "early_stopping")
    named = {k: options.pop(k) for k in names if k in options}
    sampling = Sampling.create(len(prompts), V, **options)
    sampling.ends_BV[:, list(ends)] = True
    for token, value in (bias or {}).items():
        sampling.bias_BV[:, token] = value
    for i, word in enumerate(bad_words):
        sampling.bad_words_BWL[:, i, -len(word) :] = word
    return beam_search(
        lm.model,
        lm.params,
        prompts,
        sampling,
        num_beams=BEAMS,
        num_return_sequences=keep,
        max_new_tokens=NEW,
        n_valid=V,
        **named,
    )


def check(ours, theirs):
    for hypotheses, reference in zip(ours, theirs, strict=True):
        assert [h.ids for h in hypotheses] == [new for new, _ in reference]
        # float32: sums in another order, of log-probabilities of size 5; with a
        # length_penalty of -1 scores are of size 300, of which 1e-6 are a few last bits
        np.testing.assert_allclose(
            [h.score for h in hypotheses], [s for _, s in reference], 1e-6, atol=1e-4
        )


@pytest.mark.parametrize("length_penalty", [0.6, 2.0])
def test_fifty_prompts(pair, length_penalty):
    model, lm = pair
    options = dict(length_penalty=length_penalty)
    ours = our_search(lm, PROMPTS, ENDS, **options)
    check(ours, [their_search(model, p, ENDS, **options) for p in PROMPTS])
    stopped = sum(h.finish_reason == "stop" for (h,) in ours)
    print(f"{stopped} of 50 stopped")
    assert 0 < stopped < 50


@pytest.mark.parametrize("ends", [(), ENDS[:1]], ids=len)
def test_none_or_one_end(pair, ends):
    model, lm = pair
    ours = our_search(lm, FEW, ends, keep=4)
    options = dict(num_return_sequences=4)
    check(ours, [their_search(model, p, ends, **options) for p in FEW])


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_all_four_with_their_scores(pair, early_stopping, length_penalty):
    model, lm = pair
    options = dict(length_penalty=length_penalty, early_stopping=early_stopping)
    ours = our_search(lm, FEW, ENDS, keep=4, **options)
    options["num_return_sequences"] = 4
    check(ours, [their_search(model, p, ENDS, **options) for p in FEW])
    assert "stop" in {h.finish_reason for hypotheses in ours for h in hypotheses}


EDITS = {
    "no_repeat_ngram_size": (2, dict(no_repeat_ngram_size=2)),
    "min_new_tokens": (6, dict(min_new_tokens=6)),
    "repetition_penalty": (1.3, dict(repetition_penalty=1.3)),
    "sequence_bias": ([[[9], 2.0], [[50], -3.0]], dict(bias={9: 2.0, 50: -3.0})),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits(pair, name):
    model, lm = pair
    theirs, ours = EDITS[name]
    options = {name: theirs, "num_return_sequences": 4}
    found = our_search(lm, FEW, ENDS, keep=4, **ours)
    check(found, [their_search(model, p, ENDS, **options) for p in FEW])
    assert found != our_search(lm, FEW, ENDS, keep=4)


def test_bad_words(pair):
    model, lm = pair
    free = our_search(lm, FEW, ENDS, keep=4)
    words = sorted({tuple(h[0].ids[:2]) for h in free if len(h[0].ids) > 1})[:8]
    found = our_search(lm, FEW, ENDS, keep=4, bad_words=words)
    options = dict(bad_words_ids=[list(w) for w in words], num_return_sequences=4)
    check(found, [their_search(model, p, ENDS, **options) for p in FEW])
    assert found != free
