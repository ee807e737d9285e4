"""How programs say what is wrong."""

import pytest

from gpt2_jax.commands import cli


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n b\x1b[2J\u202e"), "error: a b\\x1b[2J\\u202e"),
        (ValueError("x" * 10**6), f"error: {'x' * 290}..."),
        (
            OSError(28, "No space left", "\udce9/\x07"),
            "error: No space left: \\udce9/\\x07",
        ),
    ],
)
def test_an_error_is_one_line_of_plain_text(error, line, capsys):
    assert cli._fail(error) == 2
    assert capsys.readouterr().err == f"{line}\n"
