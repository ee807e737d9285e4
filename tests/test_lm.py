import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.lm import LanguageModel
from gpt2_jax.model import GPT2
from gpt2_jax.tokenizers.no_tokenizer import NoTokenizer
from gpt2_jax.tokenizers.plain import ByteTokenizer
from shapes import TINY, random_params


@pytest.fixture(scope="module")
def lm():
    cfg = GPT2Config.from_dict({**TINY.__dict__, "vocab_size": 264})  # 257, padded
    return LanguageModel(GPT2(cfg), random_params(cfg, 0.2), ByteTokenizer(), step=0)


class Latin(ByteTokenizer):
    """A byte is a character, so that any ids are text."""

    def __init__(self):
        super().__init__()
        self._table = [chr(b).encode() for b in range(256)] + [b"<|endoftext|>"]

    def encode(self, text):
        return list(text.encode("latin-1"))


@pytest.fixture(scope="module")
def latin(lm):
    return LanguageModel(lm.model, lm.params, Latin(), step=0)


def test_text_in_text_out_and_ids_in_ids_out(lm):
    text = lm.generate("hello", max_new_tokens=12, temperature=0)
    assert isinstance(text, str)
    ids = lm.generate(list(b"hello"), max_new_tokens=12, temperature=0)
    assert isinstance(ids, list)
    assert all(isinstance(i, int) for i in ids)
    assert text == bytes(ids).decode(errors="replace")
    array = np.frombuffer(b"hello", np.uint8)
    assert lm.generate(array, max_new_tokens=12, temperature=0) == ids


def test_a_list_of_prompts_of_different_lengths(lm):
    prompts = ["a", "hello there", ""]
    texts = lm.generate(prompts, max_new_tokens=10, temperature=0)
    assert texts == [lm.generate(p, max_new_tokens=10, temperature=0) for p in prompts]
    rows = [list(p.encode()) or [256] for p in prompts]
    ids = lm.generate(rows, max_new_tokens=10, temperature=0)
    assert [len(i) for i in ids] == [10] * 3
    assert [bytes(i).decode(errors="replace") for i in ids] == texts


def test_seeds(lm):
    kwargs = dict(max_new_tokens=20, top_k=50, top_p=0.95)
    assert lm.generate("x", seed=3, **kwargs) == lm.generate("x", seed=3, **kwargs)
    fresh = {lm.generate("x", **kwargs) for _ in range(3)}
    assert len(fresh) == 3


OUT = dict(max_new_tokens=24, seed=4)


def test_sequences_of_one_prompt(lm):
    one = lm.generate("hello", **OUT)
    three = lm.generate("hello", num_return_sequences=3, **OUT)
    assert three[0] == one
    assert len(set(three)) == 3
    both = lm.generate(["hello", "you"], num_return_sequences=3, **OUT)
    assert both[0] == three
    assert [len(texts) for texts in both] == [3, 3]


def test_the_best_of_several_is_the_one_of_greatest_mean_log_probability(lm):
    five = lm.complete("hello", num_return_sequences=5, **OUT)
    means = [np.mean(c.logprobs) for c in five]
    best = lm.complete("hello", best_of=5, num_return_sequences=2, **OUT)
    order = np.argsort(means)[::-1]
    assert [c.text for c in best] == [five[i].text for i in order[:2]]
    assert best[0].mean_logprob == pytest.approx(max(means))


def test_a_completion_says_how_it_came_about(lm):
    c = lm.complete("hello", logprobs=3, **OUT)
    assert c.text == bytes(c.token_ids).decode(errors="replace")
    assert c.n_prompt_tokens == 5
    assert c.finish_reason == "length"
    assert len(c.token_ids) == len(c.logprobs) == len(c.top_logprobs) == 24
    assert all(len(top) == 3 for top in c.top_logprobs)
    assert 0 < c.first_token_seconds <= c.seconds
    assert lm.complete("hello", max_length=9, seed=0).n_prompt_tokens == 5
    assert len(lm.complete("hello", max_length=9, seed=0).token_ids) == 4


def test_do_sample_false_is_temperature_zero(lm):
    greedy = lm.generate("hello", max_new_tokens=20, temperature=0)
    assert lm.generate("hello", max_new_tokens=20, do_sample=False) == greedy
    assert lm.generate("hello", max_new_tokens=20, top_k=1) == greedy


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_stop_string_ends_its_row_alone_and_the_loop_with_the_last(lm, latin, n):
    prompts = ["hello", "what", "x"]
    free = lm.complete(prompts, **OUT)
    at = free[0].token_ids.index(max(free[0].token_ids, key=free[0].token_ids.index))
    # `n` bytes that are complete with the token that comes latest for the first time
    stop = bytes(free[0].token_ids[at - n + 1 : at + 1])
    texts = [bytes(c.token_ids) for c in free]
    stop_text = stop.decode("latin-1")
    out = latin.complete(prompts, stop=stop_text, **OUT)
    for c, text in zip(out, texts, strict=True):
        cut = text.split(stop)[0]
        assert c.text == cut.decode("latin-1")
        assert c.token_ids == list(cut)
        assert c.finish_reason == ("stop" if stop in text else "length")
        assert len(c.logprobs) == len(c.token_ids)
    assert out[0].finish_reason == "stop"
    many = {c.index: c for c in latin.generate_many(prompts, stop=stop_text, **OUT)}
    assert [many[i].text for i in range(3)] == [c.text for c in out]


def test_pieces_add_up_to_the_text(latin):
    lm = latin
    whole = lm.generate("hello", **OUT)
    for extra in ({}, {"draft": "prompt_lookup"}, {"draft": lm, "n_draft": 2}):
        found = list(lm.stream("hello", **extra, **OUT))
        assert "".join(found) == whole
        assert len(found) > 5
        assert lm.generate("hello", **extra, **OUT) == whole
    stop = whole[10:13]
    text = "".join(lm.stream("hello", stop=[stop], **OUT))
    assert text == whole.split(stop)[0]
    assert lm.generate("hello", stop=[stop], **OUT) == text


def test_closing_a_stream_ends_the_work(lm):
    stream = lm.stream("hello", max_new_tokens=50, seed=1)
    next(stream)
    stream.close()
    assert list(stream) == []


def test_a_queue_gives_what_single_calls_give(lm, compilations):
    rng = np.random.default_rng(0)
    items = [
        {
            "prompt": "x" * int(rng.integers(1, 20)),
            "max_new_tokens": int(rng.integers(1, 30)),
            "seed": i,
            **[{}, {"temperature": 0}, {"top_k": 5, "bad_words": ["e", "th"]}][i % 3],
        }
        for i in range(10)
    ]
    list(lm.generate_many(items[:5], n_slots=3))
    drawn = []

    def feed():
        for item in items:
            drawn.append(item)
            yield item

    with compilations() as n:
        done = {}
        for c in lm.generate_many(feed(), n_slots=3):
            # no more requests are read than there are slots for
            assert len(drawn) <= len(done) + 3
            done[c.index] = c
        assert n() == 0
    for i, item in enumerate(items):
        assert done[i].text == lm.generate(**item)


def test_bad_words_and_biases_of_text(latin):
    lm = latin
    common = lm.generate("hello", max_new_tokens=40, seed=0)
    word = common[3:5]
    out = lm.generate("hello", max_new_tokens=40, seed=0, bad_words=[word])
    assert word not in out
    assert out[:3] == common[:3]
    ids = lm.generate([1], max_new_tokens=9, logit_bias={77: 1e9}, seed=0)
    assert ids == [77] * 9
    some = dict(allowed_tokens=[65, 66], temperature=9.0)
    ids = lm.generate([1], max_new_tokens=30, seed=0, **some)
    assert set(ids) == {65, 66}
    ends = dict(stop_token_ids=[65, 66], allowed_tokens=[65, 66])
    assert lm.generate([1], max_new_tokens=9, **ends) == []


def test_a_table_of_allowed_tokens_of_the_tokenizers_size(lm):
    table = np.full((2, 257), -1)
    table[0, ord("a")], table[1, ord("b")] = 1, 0
    assert lm.generate("x", allowed_tokens=table, max_new_tokens=5) == "ababa"
    many = lm.generate_many(["x", "y"], allowed_tokens=table, max_new_tokens=3)
    assert [c.text for c in many] == ["aba", "aba"]


def test_beams(lm):
    best = lm.complete(["hello", "x"], num_beams=4, max_new_tokens=8)
    assert all(len(c.token_ids) == 8 for c in best)
    greedy = lm.complete(["hello", "x"], temperature=0, max_new_tokens=8)
    for b, g in zip(best, greedy, strict=True):
        assert sum(b.logprobs) >= sum(g.logprobs) - 1e-4
        assert b.score == pytest.approx(sum(b.logprobs) / 8, abs=1e-4)
    four = lm.generate("hello", num_beams=4, num_return_sequences=4, max_new_tokens=8)
    assert four[0] == best[0].text
    assert len(set(four)) == 4
    # prompts of different lengths and one length in all
    texts = lm.generate(["hello", "x"], num_beams=2, max_length=9)
    assert [len(t.encode(errors="replace")) > 0 for t in texts] == [True, True]


def test_past_the_context_it_slides(lm):
    out = lm.complete("hello", max_new_tokens=200, overflow="slide", seed=0)
    assert len(out.token_ids) == 200
    with pytest.raises(ValueError, match=r"max_new_tokens=200 exceeds n_positions=64"):
        lm.generate("hello", max_new_tokens=200)


def test_a_model_without_a_tokenizer_takes_and_gives_ids(lm):
    bare = LanguageModel(
        lm.model, lm.params, NoTokenizer(264, None, "none here"), step=0
    )
    assert len(bare.generate([1, 2], max_new_tokens=5)) == 5
    assert bare.complete([1, 2], max_new_tokens=5).text is None
    for options in ({"stop": "x"}, {"bad_words": ["x"]}):
        with pytest.raises(ValueError, match=r"needs a tokenizer.*none here"):
            bare.generate([1], **options)
    ids = bare.generate([1], max_new_tokens=5, seed=0)
    assert list(bare.stream([1], max_new_tokens=5, seed=0)) == ids
    [many] = bare.generate_many([[1]], max_new_tokens=5, seed=0)
    assert (many.token_ids, many.text) == (ids, None)
    assert len(bare.generate([1], max_new_tokens=4, num_beams=2)) == 4
    with pytest.raises(ValueError, match=r"needs a tokenizer.*none here"):
        bare.stream("text", max_new_tokens=5)
    ended = LanguageModel(lm.model, lm.params, NoTokenizer(264, 9, "none"), step=0)
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        ended.generate("", max_new_tokens=5)  # it could begin, but not be written


def test_logits(lm):
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    logits = lm.logits(ids)
    assert logits.shape == (2, 3, 264)
    assert logits.dtype == jnp.float32
    expected, _ = lm.model.apply({"params": lm.params}, ids)
    # the same float32 computation, compiled as a whole or op by op, logits of size 5
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    assert lm.config.vocab_size == 264


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2], r"token_ids=\[1, 2\] must have shape \[B, T\] with B, T >= 1"),
        (np.zeros((1, 0), int), r"must have shape \[B, T\]"),
        ([[1, 2], [3]], r"=\[\[1, 2\], \[3\]\] must have .* all rows of one length"),
        ([[1.0]], "token_ids: id=1.0 must be an integer"),
        ([[264]], "token id 264 is outside"),
        ([[0] * 65], "T=65 tokens exceed n_positions=64"),
    ],
)
def test_bad_ids_are_refused(lm, ids, message):
    with pytest.raises(ValueError, match=message):
        lm.logits(ids)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        (["a", 1], {}, "a prompt is text, a list of ids, or a list of such"),
        ([[1], "a"], {}, "a prompt is text, a list of ids, or a list of such"),
        ([264], {}, "token id 264 is outside"),
        ("a" * 60, {"max_new_tokens": 5}, "exceeds n_positions=64"),
        ("a", {"temperature": -1}, "temperature=-1"),
        ("a", {"top_p": 2}, "top_p=2"),
        ("a", {"draft": "ngram"}, "draft='ngram' must be a LanguageModel or"),
        ("a", {"draft": "prompt_lookup", "n_draft": 0}, r"n_draft=0 must be in \[1,"),
        ("a", {"draft": "prompt_lookup", "num_beams": 2}, "num_beams=2 and draft"),
        ("a", {"logit_bias": {257: 1}}, "id 257 is outside"),
        ("a" * 20, {"max_length": 9, "max_new_tokens": None}, "leaves no room"),
    ],
)
def test_bad_prompts_and_options_are_refused(lm, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(prompt, **{"max_new_tokens": 1, **options})


def test_bad_requests_of_a_queue_are_refused_by_their_index(lm):
    for item, message in (
        ({}, "request 1 has no prompt"),
        (["a", "b"], "request 1 takes one prompt, not a list of 2"),
        ({"prompt": "a", "logprobs": 3}, "request 1: logprobs is for all requests"),
        ({"prompt": "a", "top_p": 3}, "top_p=3"),
        ("a" * 70, "prompt 1: a prompt of 70 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            list(lm.generate_many(["a", item], max_new_tokens=2))
    for options, message in (
        ({"num_beams": 2}, "generate_many has no num_beams=2"),
        ({"best_of": 2}, "generate_many has no best_of=2"),
        ({"n_slots": 0}, "n_slots=0 must be >= 1"),
        ({"temperature": -1}, "temperature=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.generate_many(["a"], **options)


def test_what_can_not_be_streamed_is_refused_at_once(lm):
    with pytest.raises(ValueError, match="stream takes one prompt, not a list of 2"):
        lm.stream(["a", "b"])
    with pytest.raises(ValueError, match="stream has no num_return_sequences=2"):
        lm.stream("a", num_return_sequences=2)
    with pytest.raises(ValueError, match="exceeds n_positions=64"):
        lm.stream("a" * 60, max_new_tokens=5)


def test_an_unknown_option_is_refused(lm):
    with pytest.raises(TypeError, match="topk"):
        lm.generate("a", topk=3)
