"""Batches: coverage, order, seeking, rows, shard borders, evaluation, refusals."""

from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.data.loader import (
    TextExamples,
    TokenDataset,
    eval_examples,
    mixed,
    mixture_shares,
    train_examples,
    windows_per_epoch,
)
from gpt2_jax.data.prepare import prepare
from gpt2_jax.tokenizers.plain import ByteTokenizer, CharTokenizer


class CountTokenizer(ByteTokenizer):
    """A text "n" of a number is 0, 1, ... n - 1, from `base` on; vocabulary `size`."""

    def __init__(self, size: int, base: int = 0):
        super().__init__()
        self._size, self._base = size, base

    def encode(self, text: str) -> list[int]:
        return [self._base + i for i in range(int(text))]

    @property
    def vocab_size(self) -> int:
        return self._size


def dataset(
    folder: Path,
    tokens: int,
    *,
    shard_tokens: int = 10**6,
    vocab_size: int = 2000,
    base: int = 0,
) -> TokenDataset:
    """Tokens base, base + 1, ... and last the end of text, 256."""
    (folder / "n.txt").write_text(str(tokens - 1))
    prepare(
        folder / "n.txt",
        folder / "out",
        CountTokenizer(vocab_size, base),
        splits=(1, 0, 0),
        shard_tokens=shard_tokens,
    )
    return TokenDataset(folder / "out", "train")


def batch_of(
    data: TokenDataset, *, seed: int, step: int, batch_size: int, block_size: int
) -> np.ndarray:
    """The batch of a step when all batches have the same size."""
    numbers = np.arange(step * batch_size, (step + 1) * batch_size)
    return train_examples(data, numbers, seed=seed, block_size=block_size)


def test_windows_cross_shard_borders(tmp_path: Path):
    whole = np.append(np.arange(99), 256)
    for shard_tokens in (100, 40, 7, 1):
        data = dataset(tmp_path, 100, shard_tokens=shard_tokens)
        assert len(data) == 100
        starts = np.array([0, 6, 7, 39, 33, 80], np.int64)
        got = data.windows(starts, 20)
        assert got.dtype == np.int32
        assert got.shape == (6, 20)
        assert (got == whole[starts[:, None] + np.arange(20)]).all()
    assert (data.windows(np.array([0]), 100)[0] == whole).all()
    assert data.windows(np.array([], np.int64), 5).shape == (0, 5)
    for start in (-1, 81):
        with pytest.raises(IndexError, match=rf"window {start} \+ 20 exceeds 100"):
            data.windows(np.array([start]), 20)


def test_uint32_ids(tmp_path: Path):
    data = dataset(tmp_path, 500, vocab_size=70_000, base=69_000)
    assert data.index.dtype == "uint32"
    batch = batch_of(data, seed=0, step=0, batch_size=4, block_size=8)
    assert batch.dtype == np.int32
    assert batch.max() >= 69_000


@pytest.mark.parametrize(
    ("tokens", "block"), [(1000, 8), (1001, 8), (17, 8), (9, 8), (50, 1)]
)
def test_an_epoch_has_each_window_once(tmp_path: Path, tokens: int, block: int):
    """No target twice in an epoch; all but two blocks of them, at most, are there."""
    data = dataset(tmp_path, tokens)
    count = windows_per_epoch(tokens, block)
    phases = set()
    for epoch in range(6):
        batch = batch_of(data, seed=3, step=epoch, batch_size=count, block_size=block)
        assert batch.shape == (count, block + 1)
        starts = np.sort(batch[:, 0])
        assert (np.diff(starts) == block).all()
        assert 0 <= starts[0] <= block
        assert starts[-1] + block <= tokens - 1
        assert count * block > tokens - 1 - 2 * block
        whole = np.append(np.arange(tokens - 1), 256)
        assert (batch == whole[batch[:, :1] + np.arange(block + 1)]).all()
        phases.add(int(starts[0]))
    assert len(phases) > 1 or tokens < 17 or block == 1


def test_a_batch_is_a_function_of_seed_and_step(tmp_path: Path):
    data = dataset(tmp_path, 1000)
    same = TokenDataset(tmp_path / "out", "train")

    def batch(source: TokenDataset, seed: int, step: int) -> np.ndarray:
        return batch_of(source, seed=seed, step=step, batch_size=6, block_size=16)

    late = batch(data, 5, 10**9)  # a seek, before anything else was read
    for step in (0, 1, 9, 10, 11, 50):
        assert (batch(data, 5, step) == batch(same, 5, step)).all()
    assert (batch(same, 5, 10**9) == late).all()
    assert (batch(data, 5, 0) != batch(data, 6, 0)).any()
    assert (batch(data, 5, 0) != batch(data, 5, 1)).any()
    first, second = (np.concatenate([batch(data, 5, s) for s in r])[:, 0]
                     for r in (range(10), range(10, 20)))  # fmt: skip
    assert (first != second).any()


def test_examples_do_not_depend_on_the_batch_size(tmp_path: Path):
    """Example g is the same window in batches of 1, 5 and 60, across epochs."""
    data = dataset(tmp_path, 300)
    streams = [
        np.concatenate(
            [
                batch_of(data, seed=1, step=step, batch_size=size, block_size=16)
                for step in range(60 // size)
            ]
        )
        for size in (1, 5, 60)
    ]
    assert windows_per_epoch(300, 16) == 17  # 60 examples span 4 epochs
    assert (streams[0] == streams[1]).all()
    assert (streams[0] == streams[2]).all()


def test_each_host_may_read_its_own_rows(tmp_path: Path):
    data = dataset(tmp_path, 500)
    full = batch_of(data, seed=2, step=7, batch_size=12, block_size=10)
    for rows in (slice(0, 4), slice(4, 12), slice(None, None, 5), slice(3, 3)):
        numbers = np.arange(84, 96)[rows]
        some = train_examples(data, numbers, seed=2, block_size=10)
        assert (some == full[rows]).all()
    some = train_examples(data, np.array([95, 84, 89]), seed=2, block_size=10)
    assert (some == full[[11, 0, 5]]).all()


@pytest.mark.parametrize("tokens", [2, 9, 10, 97, 129, 130, 1000])
@pytest.mark.parametrize(("size", "block"), [(1, 8), (4, 8), (3, 32)])
def test_evaluation_counts_each_target_once(
    tmp_path: Path, tokens: int, size: int, block: int
):
    data = dataset(tmp_path, tokens, shard_tokens=50)
    whole = np.append(np.arange(tokens - 1), 256)
    seen = []
    examples = eval_examples(data, block)
    for i in range(0, examples.count, size):
        ids, mask, _ = examples.read(np.arange(i, i + size))
        assert ids.shape == (size, block + 1)
        assert ids.dtype == np.int32
        assert mask.shape == (size, block)
        assert mask.dtype == bool
        seen.append(np.stack([ids[:, :-1][mask], ids[:, 1:][mask]]))
        assert mask.any()
        assert (ids[:, 1:][~mask] == 0).all()
    inputs, targets = np.concatenate(seen, axis=1)
    assert (inputs == whole[:-1]).all()
    assert (targets == whole[1:]).all()


def test_evaluation_stops_at_max_examples(tmp_path: Path):
    data = dataset(tmp_path, 1000)
    some = eval_examples(data, 8, 11)
    assert some.count == 11
    ids, mask, _ = some.read(np.arange(16))  # as in a batch of 16
    assert (ids[:, 1:][mask] == np.arange(1, 89)).all()
    assert not mask[11:].any()
    every = eval_examples(data, 8)
    assert every.count == 125
    assert eval_examples(data, 8, 999).count == 125
    # any of them is reached at once
    numbers = np.array([3, 124, 7, 125])
    ids, mask, _ = every.read(numbers)
    assert ids[:3, 0].tolist() == [24, 992, 56]
    assert mask.sum(1).tolist() == [8, 7, 8, 0]


def test_bad_inputs_are_refused(tmp_path: Path):
    data = dataset(tmp_path, 10)
    good = {"seed": 0, "step": 0, "batch_size": 2, "block_size": 9}
    assert batch_of(data, **good)[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 256]
    with pytest.raises(ValueError, match=r"has 10 tokens, fewer than .* \+ 1 = 11"):
        batch_of(data, **{**good, "block_size": 10})
    for key, value in {"seed": -1, "block_size": 0}.items():
        with pytest.raises(ValueError, match=f"out of range: .*{key}={value}"):
            batch_of(data, **{**good, key: value})
    with pytest.raises(ValueError, match=r"out of range: .*number=-3"):
        train_examples(data, np.array([0, -3]), seed=0, block_size=9)
    for key in ("block_size", "max_examples"):
        args = {"block_size": 2, "max_examples": 2, key: 0}
        with pytest.raises(ValueError, match=f"out of range: .*{key}=0"):
            eval_examples(data, **args)
    with pytest.raises(ValueError, match="has no test split, only train"):
        TokenDataset(tmp_path / "out", "test")
    with pytest.raises(FileNotFoundError, match="no prepared data"):
        TokenDataset(tmp_path, "train")
    single = dataset(tmp_path, 1)
    with pytest.raises(ValueError, match="has 1 token: no target"):
        eval_examples(single, 1)


def test_a_mixture_has_its_shares_and_leaves_no_example_out():
    numbers = np.arange(7000)
    sources, within = mixed(numbers, (5, 2, 3), seed=1)
    for source, share in enumerate((500, 200, 300)):
        own = sources == source
        np.testing.assert_array_equal(own.reshape(7, 1000).sum(1), share)
        np.testing.assert_array_equal(within[own], np.arange(7 * share))
    # any example is reached at once, and the order is a function of the seed
    some = np.array([6999, 12, 12, 3400])
    for got, whole in zip(mixed(some, (5, 2, 3), 1), (sources, within), strict=True):
        np.testing.assert_array_equal(got, whole[some])
    assert (mixed(numbers, (5, 2, 3), seed=2)[0] != sources).any()
    assert (sources[:1000] != sources[1000:2000]).any()
    assert mixture_shares((1, 1, 1)) == (334, 333, 333)


def test_examples_of_a_mixture_are_those_of_its_parts(tmp_path: Path):
    for name, base in (("a", 0), ("b", 1000)):
        (tmp_path / name).mkdir()
        dataset(tmp_path / name, 300, base=base)
    folders = [tmp_path / "a/out", tmp_path / "b/out"]
    both = TextExamples(folders, "train", block_size=8, seed=3, weights=(1, 3))
    assert len(both) == 600
    numbers = np.arange(500)
    got = both.train(numbers)
    sources, within = mixed(numbers, (1, 3), seed=3)
    assert set(sources) == {0, 1}
    for i, folder in enumerate(folders):
        expected = train_examples(
            TokenDataset(folder, "train"), within[sources == i], seed=3, block_size=8
        )
        np.testing.assert_array_equal(got.tokens[sources == i], expected)
    assert got.mask is got.segments is None
    # evaluation goes through one after the other
    every = both.evaluation()
    assert every.count == 2 * 38  # 299 targets each
    parts = [eval_examples(TokenDataset(f, "train"), 8) for f in folders]
    expected = [part.read(np.arange(38)) for part in parts]
    numbers = np.random.default_rng(0).permutation(every.count + 3)
    ids, mask, _ = every.read(numbers)
    for field, rows in (("tokens", ids), ("mask", mask)):
        whole = np.concatenate([getattr(x, field) for x in expected])
        inside = numbers < every.count
        np.testing.assert_array_equal(rows[inside], whole[numbers[inside]])
    assert not mask[numbers >= every.count].any()
    assert both.evaluation(5).count == 10


def test_folders_of_another_tokenizer_are_not_mixed(tmp_path: Path):
    for name, text in (("a", "abc"), ("b", "abcd")):
        (tmp_path / f"{name}.txt").write_text(99 * text)
        tokenizer = CharTokenizer(text)
        prepare(tmp_path / f"{name}.txt", tmp_path / name, tokenizer, splits=(1, 0, 0))
    with pytest.raises(ValueError, match=r"b was made with another tokenizer than .*a"):
        TextExamples([tmp_path / "a", tmp_path / "b"], "train", block_size=8)


@pytest.mark.parametrize(
    ("weights", "message"),
    [((1, 0), "must be > 0"), ((1, 1e-4), "has no share of a thousand")],
)
def test_weights_without_a_share_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        mixture_shares(weights)


def test_segments_begin_at_each_end_of_text(tmp_path: Path):
    for i, n in enumerate((5, 3, 9)):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / f"texts/{i}.txt").write_text("x" * n)
    prepare(tmp_path / "texts", tmp_path / "out", ByteTokenizer(), splits=(1, 0, 0))
    whole = TextExamples(
        [tmp_path / "out"], "train", block_size=19, packing="documents"
    )
    batch = whole.train(np.array([0]))
    inputs = batch.tokens[0, :-1]
    ends = np.flatnonzero(inputs == 256)
    assert len(ends) == 2
    for i, segment in enumerate(batch.segments[0]):
        assert segment == (ends <= i).sum()
    flat = TextExamples([tmp_path / "out"], "train", block_size=19)
    assert flat.train(np.array([0])).segments is None
    with pytest.raises(ValueError, match=r"data.packing='rows' is not one of flat"):
        TextExamples([tmp_path / "out"], "train", block_size=19, packing="rows")
