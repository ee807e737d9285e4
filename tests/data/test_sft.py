"""Examples of prompts and completions: targets, packing, cutting, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.data.sft import (
    Example,
    SftExamples,
    check_template,
    pack,
    read_examples,
    split_examples,
)
from gpt2_jax.tokenizers.plain import ByteTokenizer

BYTES = ByteTokenizer()
EOT = BYTES.eot_id


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def targets(example) -> list[str]:
    """What counts, run by run; $ is the end of text."""
    text = "".join("$" if t == EOT else chr(t) for t in example.tokens)
    runs = "".join(
        c if counts else "\0" for c, counts in zip(text, example.counts, strict=True)
    )
    return [run for run in runs.split("\0") if run]


def test_completions_and_their_end_are_targets(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "2 + 2 = ", "completion": "4"},
        {"prompt": "", "completion": "Once"},
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "Bye"},
                {"role": "assistant", "content": "So long"},
            ]
        },
    )
    examples, n_cut = read_examples(
        path, BYTES, block_size=99, template="{role}: {content}\n"
    )
    assert n_cut == 0
    assert [targets(e) for e in examples] == [
        ["4$"],
        ["Once$"],
        ["Hello\n", "So long\n$"],
    ]
    assert BYTES.decode(examples[2].tokens[:-1]) == (
        "user: Hi\nassistant: Hello\nuser: Bye\nassistant: So long\n"
    )
    assert examples[1].tokens[0] == EOT  # what an empty prompt is when generating


def test_long_prompts_are_cut_at_their_beginning(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "abcdefgh", "completion": "xyz"})
    for block_size, left in [(11, "abcdefgh"), (7, "efgh"), (4, "h")]:
        [example], n_cut = read_examples(path, BYTES, block_size=block_size)
        assert BYTES.decode(example.tokens[:-1]) == left + "xyz"
        assert targets(example) == ["xyz$"]
        assert n_cut == (block_size < 11)
    with pytest.raises(
        ValueError, match=r"line 1: a completion of 4 tokens .* exceeds block_size=3"
    ):
        read_examples(path, BYTES, block_size=3)


def test_packing_puts_each_example_whole_into_one_window():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 33, 500).tolist()
    windows = pack(lengths, 64)
    assert sorted(i for window in windows for i in window) == list(range(500))
    assert max(sum(lengths[i] for i in window) for window in windows) <= 64
    # little room is left: the fewest that could be, and a twentieth
    assert len(windows) <= 1.05 * sum(lengths) / 64


def examples_of(tmp_path, n=40, **kwargs):
    rng = np.random.default_rng(1)
    lines = [
        {"prompt": "p" * int(a), "completion": chr(97 + i % 26) * int(b)}
        for i, (a, b) in enumerate(rng.integers(1, 9, (n, 2)))
    ]
    examples, _ = read_examples(
        write(tmp_path / "a.jsonl", *lines), BYTES, block_size=24
    )
    kwargs = {"block_size": 24, "eot_id": EOT, "seed": 0, **kwargs}
    return lines, SftExamples(examples, **kwargs)


def test_an_epoch_goes_through_all_examples_once(tmp_path):
    lines, data = examples_of(tmp_path)
    n = len(data.windows)
    expected = sorted(line["completion"] + "$" for line in lines)
    for batch in (data.train(np.arange(n)), data.train(np.arange(n, 2 * n))):
        assert batch.tokens.shape == (n, 25)
        assert batch.tokens.dtype == np.int32
        found = []
        for tokens, mask, segments in zip(*batch, strict=True):
            for i in np.unique(segments[mask]):
                ids = tokens[1:][mask & (segments == i)]
                found.append("".join("$" if t == EOT else chr(t) for t in ids))
        assert sorted(found) == expected
    first, second = (data.train(np.arange(k, k + n)).tokens for k in (0, n))
    assert (first != second).any()
    # any of them is reached at once, and the evaluation has them too
    some = np.array([n + 3, 5, 2 * n - 1])
    np.testing.assert_array_equal(data.train(some).tokens[1], first[5])
    whole = data.evaluation()
    total = sum(len(line["completion"]) + 1 for line in lines)
    mask = whole.read(np.arange(whole.count + 3)).mask
    assert mask.sum() == total
    assert mask.any(1).tolist() == [True] * whole.count + [False] * 3
    assert data.evaluation(3).count == 3


def test_the_first_token_of_an_example_is_never_a_target():
    """Not even where it is a completion's, its turn being cut: what it follows is
    another example.
    """
    whole = Example(np.array([1, 2, EOT], np.int32), np.array([True] * 3))
    data = SftExamples([whole] * 3, block_size=9, eot_id=EOT, seed=0)
    batch = data.evaluation().read(np.arange(1))
    assert batch.tokens[0].tolist() == [1, 2, EOT] * 3 + [EOT]
    assert batch.segments[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert batch.mask[0].tolist() == [True, True, False] * 3


def test_splits_are_disjoint_and_none_is_empty(tmp_path):
    lines = [{"prompt": "p", "completion": str(i)} for i in range(100)]
    path = write(tmp_path / "a.jsonl", *lines)
    examples, _ = read_examples(path, BYTES, block_size=24)
    splits = split_examples(examples, (0.8, 0.15, 0.05))
    assert [len(s) for s in splits.values()] == [80, 15, 5]
    assert len({id(e) for s in splits.values() for e in s}) == 100
    assert "test" not in split_examples(examples, (0.9, 0.1, 0.0))
    with pytest.raises(ValueError, match=r"validation split, 0.1 of 3 examples, is"):
        split_examples(examples[:3], (0.9, 0.1, 0.0))
    with pytest.raises(ValueError, match=r"data.splits=\(0.9, 0.2, 0\) must be three"):
        split_examples(examples, (0.9, 0.2, 0))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: not JSON"),
        (b'"text"', "line 2: 'text' is no JSON object"),
        (b'{"prompt": "a"}', "line 2: no field 'completion', only prompt"),
        (b'{"completion": "a"}', "line 2: no field 'prompt', only completion"),
        (b'{"prompt": 5, "completion": "a"}', "line 2: 'prompt' is 5"),
        (b'{"prompt": "\xff", "completion": "a"}', "line 2: not UTF-8"),
        (b'{"messages": []}', "line 2: messages is not a list with a message"),
        (b'{"messages": ["hi"]}', "line 2: a message is not an object"),
        (b'{"messages": [{"role": "user"}]}', "line 2: no field 'content', only role"),
        (
            b'{"messages": [{"role": "user", "content": "a"}]}',
            "line 2: the last message is of role 'user', not 'assistant'",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        read_examples(path, BYTES, block_size=9, template="{content}")


def test_bad_files_and_templates_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file of examples: .*none"):
        read_examples(tmp_path / "none", BYTES, block_size=9)
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(ValueError, match="empty holds no example"):
        read_examples(tmp_path / "empty", BYTES, block_size=9)
    path = write(tmp_path / "m", {"messages": [{"role": "assistant", "content": ""}]})
    with pytest.raises(ValueError, match=r"line 1: messages: data.template must say"):
        read_examples(path, BYTES, block_size=9)
    for template in (
        "",
        "{role}",
        "{content}{content}",
        "{content} {name}",
        "{content",
    ):
        with pytest.raises(ValueError, match=r"must have \{content\} once"):
            check_template(template)
    check_template("<{role}>{content}\n")
