"""Perplexity beside transformers on torch: pip install '.[test,parity]'."""

import math

import numpy as np
import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.data.corpus import default_corpus
from gpt2_jax.evaluation.task_runs import evaluate_task
from gpt2_jax.evaluation.tasks import Options
from gpt2_jax.formats import hf
from gpt2_jax.lm import load
from gpt2_jax.tokenizers.plain import ByteTokenizer
from shapes import random_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LIMIT, N_BYTES = 128, 3000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    sizes = dict(vocab_size=257, n_positions=LIMIT, n_embd=48, n_head=3, n_layer=3)
    rates = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    cfg = GPT2Config(**sizes, **rates)
    hf.write(folder, cfg, random_params(cfg, 0.2), ByteTokenizer())
    text = "".join(default_corpus()).encode("ascii", "ignore")[:N_BYTES]
    (folder / "text.txt").write_bytes(text)
    return folder


def reference(folder, stride):
    """exp of the mean loss of torch's model, windows that advance by `stride`."""
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = torch.tensor([[256, *(folder / "text.txt").read_bytes()]])
    n, done, losses = ids.shape[1] - 1, 0, []
    while done < n:
        end = min(n, done + stride) if done else LIMIT
        begin = max(0, end - LIMIT)
        inputs, targets = ids[:, begin:end], ids[:, begin + 1 : end + 1].clone()
        targets[:, : done - begin] = -100  # scored in the window before
        with torch.no_grad():
            logits = model(inputs).logits[0].double()
        losses.append(
            torch.nn.functional.cross_entropy(
                logits, targets[0], ignore_index=-100, reduction="sum"
            ).item()
        )
        done = end
    return math.exp(sum(losses) / n)


@pytest.mark.parametrize("stride", [LIMIT, LIMIT // 2, 48])
def test_perplexity_with_a_stride(folder, stride):
    expected = reference(folder, stride)
    path = str(folder / "text.txt")
    found = evaluate_task(str(folder), "perplexity", path, Options(stride=stride))
    ours = found["token_perplexity"].value
    print(f"stride {stride}: {ours:.6f}, torch {expected:.6f}")
    assert ours == pytest.approx(expected, rel=1e-4)  # the bar; rounding is 1e-6
    text = (folder / "text.txt").read_text()
    assert load(folder).score(text, stride=stride).perplexity == pytest.approx(ours)


def test_more_context_is_no_other_text(folder):
    """What differs between strides is the context alone: the first window is one."""
    text = (folder / "text.txt").read_text()
    a, b = (load(folder).score(text, stride=s).logprobs for s in (LIMIT, 48))
    np.testing.assert_allclose(a[:LIMIT], b[:LIMIT], rtol=0, atol=2e-5)  # rounding
    assert np.abs(a - b).max() > 1e-2
