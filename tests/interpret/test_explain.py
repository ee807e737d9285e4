import dataclasses
import json
import re
from base64 import b64decode
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.decoding.weights import quantize
from gpt2_jax.interpret import explain
from gpt2_jax.interpret.explain import attention_weights
from gpt2_jax.lm import LanguageModel
from gpt2_jax.model import GPT2
from gpt2_jax.runtime.sharding import make_mesh, tree_shardings
from gpt2_jax.tokenizers.tokenizer import ByteTokenizer, NoTokenizer
from shapes import TINY, random_params

CFG = dataclasses.replace(TINY, vocab_size=264)  # 257, padded
TEXT = "a </script><b>bold</b> <!-- &amp; \u2028 日\n"


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(GPT2(CFG), random_params(CFG, 0.2), ByteTokenizer(), step=0)


@pytest.fixture(scope="module")
def explained(lm):
    return lm.explain(TEXT, top_k=5)


class Page(HTMLParser):
    """The tags of a page, what they refer to, and what its scripts hold."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.references, self.scripts = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "action")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags[-1:] == ["script"]:
            self.scripts[-1] += data

    @property
    def data(self):
        return json.loads(self.scripts[0])


def test_on_a_mesh(lm, explained):
    mesh = make_mesh(2, 1, 4)
    placed = jax.device_put(lm.params, tree_shardings(lm.params, mesh))
    spread = dataclasses.replace(lm, params=placed, mesh=mesh)
    found = spread.explain(TEXT, top_k=5)
    for name in ("logprobs", "entropies", "attention"):
        # the same sums in float32, in another order
        np.testing.assert_allclose(
            getattr(found, name), getattr(explained, name), rtol=0, atol=1e-5
        )


def test_probabilities_are_those_of_the_logits(lm, explained):
    ids = list(TEXT.encode())
    logits = np.asarray(lm.logits([ids])[0], np.float64)[:, :257]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    # Softmax in float32 of logits up to about 10.
    close = dict(rtol=0, atol=1e-5)
    expected = logp[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(explained.logprobs, expected, **close)
    entropies = -(np.exp(logp) * logp).sum(-1)
    np.testing.assert_allclose(explained.entropies, entropies, **close)
    np.testing.assert_array_equal(explained.ranks, 1 + (logp[:-1].T > expected).sum(0))
    order = np.argsort(-logp, axis=-1)[:, :5]
    np.testing.assert_array_equal(explained.top_ids, order)
    best = np.take_along_axis(logp, order, -1)
    np.testing.assert_allclose(explained.top_logprobs, best, **close)


def test_attention_is_causal_and_sums_to_one(explained):
    T = len(TEXT.encode())
    assert explained.attention.shape == (3, 4, T, T)
    assert (explained.attention[:, :, *np.triu_indices(T, 1)] == 0).all()
    assert (explained.attention >= 0).all()
    # A sum of 47 terms in float32.
    np.testing.assert_allclose(explained.attention.sum(-1), 1, rtol=0, atol=1e-6)


def test_attention_of_the_first_layer_is_that_of_its_formula(lm):
    T, K, params = 8, CFG.head_dim, lm.params
    tokens = jnp.arange(40, 40 + T)[None]
    _, attention = attention_weights(lm.model, params, tokens)
    attn, ln = params["h_0"]["attn"], params["h_0"]["ln_1"]
    x = params["wte"]["embedding"][tokens[0]] + params["wpe"]["embedding"][:T]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * ln["scale"] + ln["bias"]
    qkv = jnp.einsum("td,dchk->cthk", x, attn["c_attn"]["kernel"])
    q, k, _ = qkv + attn["c_attn"]["bias"].reshape(3, 1, CFG.n_head, K)
    scores = jnp.einsum("thk,shk->hts", q, k) / np.sqrt(K)
    scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
    expected = np.exp(scores - scores.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    # Both in float32, in another order.
    np.testing.assert_allclose(attention[0, 0], expected, rtol=0, atol=1e-5)


def test_it_is_the_same_however_layers_are_run(lm):
    tokens = jnp.arange(1, 21)[None]
    plain = attention_weights(lm.model, lm.params, tokens)
    scanned = lm.model.clone(scan_layers=True, remat="block")
    for ours, theirs in zip(
        attention_weights(scanned, lm.params, tokens), plain, strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    int8 = quantize(jax.tree.map(jnp.copy, lm.params))
    logits, attention = attention_weights(lm.model, int8, tokens)
    assert logits.shape == (1, 20, CFG.vocab_size)
    # int8 moves a weight by 1/254 of its channel's greatest at most.
    np.testing.assert_allclose(attention, plain[1], rtol=0, atol=0.1)


def test_page_says_what_was_computed(explained):
    data = Page(explained.to_html()).data
    assert "".join(data["tokens"][:12]) == "a </script><"
    assert data["tokens"][-4:] == ["\\xe6", "\\x97", "\\xa5", "\n"]
    assert data["ids"] == list(TEXT.encode())
    assert data["vocabulary"] == 257
    np.testing.assert_allclose(data["logprobs"], explained.logprobs, atol=6e-5)
    np.testing.assert_allclose(data["entropies"], explained.entropies, atol=6e-5)
    assert [row[0] for row in data["top"][3]] == explained.top_ids[3].tolist()
    assert len(data["top"]) == len(data["ids"]) == len(data["ranks"]) + 1
    T = len(data["ids"])
    weights = np.zeros((3, 4, T, T))
    flat = np.frombuffer(b64decode(data["attention"]), np.uint8)
    weights[:, :, *np.tril_indices(T)] = flat.reshape(3, 4, -1) / 255
    # Rounded to multiples of 1/255.
    np.testing.assert_allclose(weights, explained.attention, rtol=0, atol=0.5 / 255)


class Hostile(ByteTokenizer):
    """Each token is what would end the script that it stands in."""

    def __init__(self):
        super().__init__()
        self._table = [b"</script><b>&amp;<!--\xe2\x80\xa8"] * 257


def test_nothing_breaks_out_of_the_page(lm):
    hostile = dataclasses.replace(lm, tokenizer=Hostile())
    page, harmless = (Page(x.explain([1, 2], top_k=5).to_html()) for x in (hostile, lm))
    assert page.tags == harmless.tags
    assert page.scripts[1] == harmless.scripts[1]
    assert page.data["tokens"] == ["</script><b>&amp;<!--\u2028"] * 2


def test_page_asks_for_nothing(explained):
    page = Page(explained.to_html())
    assert page.references == []
    assert "default-src 'none'" in explained.to_html()
    assert not re.search(r"https?:|url\(|@import|import\(|fetch\(", explained.to_html())
    assert "innerHTML" not in page.scripts[1]


def test_notebook_shows_the_page_in_a_frame(explained):
    frame = explained._repr_html_()
    assert frame.count("<") == 2
    assert 'sandbox="allow-scripts"' in frame


def test_ids_without_a_tokenizer(lm):
    bare = dataclasses.replace(
        lm, tokenizer=NoTokenizer(CFG.vocab_size, None, "none came")
    )
    explained = bare.explain([1, 2, 263])
    assert explained.tokens == ["1 ", "2 ", "263 "]
    assert len(explained.top_tokens[0]) == 10


def test_one_token_and_no_text(lm):
    one = lm.explain("a")
    assert one.logprobs.shape == (0,)
    assert one.attention.tolist() == [[[[1.0]]] * 4] * 3
    assert lm.explain("").tokens == ["<|endoftext|>"]
    assert Page(one.to_html()).data["logprobs"] == []


@pytest.mark.parametrize(
    ("prompt", "top_k", "error"),
    [
        ([1, 257], 5, r"token id 257 is outside \[0, vocab_size=257\)"),
        (["a", "b"], 5, "explain takes one prompt, not a list of 2"),
        ("a" * 65, 5, "65 tokens exceed n_positions=64"),
        ("a", 0, r"top_k=0 must be in \[1, 100\]"),
        ("a", 101, r"top_k=101 must be in \[1, 100\]"),
    ],
)
def test_bad_input(lm, prompt, top_k, error):
    with pytest.raises(ValueError, match=error):
        lm.explain(prompt, top_k=top_k)


def test_page_is_bounded(lm, monkeypatch):
    monkeypatch.setattr(explain, "MOST_WEIGHTS", 12 * 55)  # of 12 heads, 10 tokens
    assert len(lm.explain("a" * 10).tokens) == 10
    with pytest.raises(ValueError, match="11 tokens exceed the 10 whose attention"):
        lm.explain("a" * 11)
