import numpy as np
import pytest

from gpt2_jax.decoding.text import TextStream, completing_tokens
from gpt2_jax.tokenizers.plain import ByteTokenizer

BYTES = ByteTokenizer().token_bytes
# tokens that straddle what they are compared with
WORDS = [
    b"a",
    b"b",
    b"ab",
    b"\n",
    b"\n\n",
    b"User",
    b":",
    b"er:",
    b"Us",
    b"x\n",
    b"\nb",
]
WORDS += ["é".encode(), b"\xe2\x82", b"\xac", b"\xac a", b"\xff"]


def pieces(ids, stop=(), table=WORDS):
    stream = TextStream(table, stop)
    out = []
    for i in ids:
        out.append(stream.push([i]))
        if stream.stopped:
            return out, stream
    return [*out, stream.finish()], stream


def test_pieces_are_whole_characters_and_add_up_to_the_text():
    text = "naïve 😀 漢字 \U0010ffff end"
    out, _ = pieces(text.encode(), table=BYTES)
    assert "".join(out) == text
    assert [p for p in out if p] == list(text)


def test_bytes_that_are_no_text_become_the_replacement_character():
    rng = np.random.default_rng(0)
    for _ in range(300):
        ids = rng.integers(0, len(WORDS), 12).tolist()
        out, _ = pieces(ids)
        whole = b"".join(WORDS[i] for i in ids).decode(errors="replace")
        assert "".join(out) == whole


@pytest.mark.parametrize("stop", [["\n\n"], ["User:", "ab"], ["aba", "ba\n"], ["€"]])
def test_random_texts_stop_where_the_first_stop_string_is_complete(stop):
    rng = np.random.default_rng(1)
    may_complete = completing_tokens(WORDS, stop)
    n_stopped = 0
    for _ in range(500):
        ids = rng.integers(0, len(WORDS), 10).tolist()
        out, stream = pieces(ids, stop)
        text, at, n = b"", None, 0
        for i in ids:
            n, text = n + 1, text + WORDS[i]
            found = [text.find(s.encode()) for s in stop]
            found = [f for f in found if f >= 0]
            if found:
                at = min(found)
                break
        assert stream.stopped == (at is not None)
        if at is None:
            assert "".join(out) == text.decode(errors="replace")
            assert stream.n_tokens == len(ids)
            continue
        n_stopped += 1
        assert len(out) == n
        assert may_complete[ids[n - 1]]
        expected = text[:at].decode(errors="replace")
        # a character that the cut left incomplete is held back with the stop string
        assert expected.startswith("".join(out))
        assert expected.removeprefix("".join(out)) in ("", "\ufffd")
        starts = np.cumsum([0, *(len(WORDS[i]) for i in ids[: n - 1])])
        assert stream.n_tokens == (starts < at).sum()
        assert all(s not in "".join(out) for s in stop)
    assert n_stopped > 30


def test_a_stop_string_that_begins_in_the_first_tokens_ends_nothing():
    for ids, least, text, n in (
        ([0, 0, 0, 0], 2, "aa", 2),  # "a" each time: the third one ends it
        ([2, 0, 1, 0], 1, "aba", 2),  # ab a b a: the first "ba" begins in "ab"
        ([2, 0, 1, 0, 2, 0], 3, "ababaa", 5),
        ([1, 2, 0, 1, 0], 1, "ba", 2),  # begins within the second token
        ([1, 0], 5, "ba", 2),  # fewer tokens than the least
    ):
        stop = ["a"] if text == "aa" else ["ba"]
        stream = TextStream(WORDS, stop, min_tokens=least)
        whole = stream.push(ids)
        whole += "" if stream.stopped else stream.finish()
        assert (whole, stream.n_tokens) == (text, n)


def test_a_token_without_text_before_a_stop_string_counts():
    table = [b"", b"a", b"b"]
    stream = TextStream(table, ["b"], min_tokens=2)
    assert stream.push([1, 0, 2]) == "a"
    assert (stream.stopped, stream.n_tokens) == (True, 2)


def test_no_piece_holds_the_beginning_of_what_turns_out_to_be_a_stop_string():
    out, stream = pieces([0, 3, 5, 6, 0], ["\nUser:"])  # a, \n, User, :
    assert out == ["a", "", "", ""]
    assert stream.stopped
    out, stream = pieces([0, 3, 5, 0], ["\nUser:"])  # ... and where it doesn't
    assert out == ["a", "", "", "\nUsera", ""]
    out, _ = pieces([3, 3, 5, 6], ["\nUser:"])  # a false start within a true one
    assert "".join(out) == "\n"


def test_what_follows_a_stop_string_in_the_same_push_is_dropped():
    stream = TextStream(WORDS, ["b"])
    assert stream.push([0, 2, 0, 0]) == "aa"
    assert stream.n_tokens == 2


def test_tokens_that_can_complete_a_stop_string():
    found = completing_tokens(WORDS, ["User:", "\n\n"])
    names = {WORDS[i] for i in np.flatnonzero(found)}
    # those that hold one, or begin with an end of one
    assert names == {b"\n", b"\n\n", b":", b"er:", b"\nb"}
    assert not completing_tokens(WORDS, []).any()
