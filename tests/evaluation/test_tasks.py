import json
import math
import re

import numpy as np
import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.decoding.detokenize import detokenize
from gpt2_jax.evaluation import task_runs
from gpt2_jax.evaluation.task_runs import evaluate_task, run
from gpt2_jax.evaluation.tasks import TASKS, Options, prepare
from gpt2_jax.formats import hf
from gpt2_jax.lm import LanguageModel, load
from gpt2_jax.tokenizers.plain import ByteTokenizer
from shapes import TINY, random_params

CFG = GPT2Config.from_dict({**TINY.__dict__, "vocab_size": 257, "n_positions": 128})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    hf.write(folder, CFG, random_params(CFG, 0.2), ByteTokenizer())
    return folder


@pytest.fixture(scope="module")
def lm(folder):
    return load(folder)


def figures(lm, task, path, **options):
    prepared = prepare(task, str(path), lm, Options(**options))
    found = prepared.figures(run(lm, prepared.examples))
    assert all(figure.protocol for figure in found.values())
    return found


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PAGE = " \n = Quick Fox = \n \n The quick brown fox , aged 1 @,@ 234 , jumps . \n"


def test_perplexities_of_documents(lm, tmp_path):
    texts = ["The quick brown fox jumps. " * 9, "one two"]
    path = write_rows(tmp_path / "a.jsonl", [{"text": t} for t in texts])
    found = figures(lm, "perplexity", path, stride=32)
    nll = -sum(lm.score(t, stride=32).total for t in texts)
    n = sum(map(len, texts))  # a byte is a token
    words = 9 * 5 + 2
    for name, value in {
        "token_perplexity": math.exp(nll / n),
        "byte_perplexity": math.exp(nll / n),
        "word_perplexity": math.exp(nll / words),
        "bits_per_byte": nll / n / math.log(2),
    }.items():
        assert found[name].value == pytest.approx(value, rel=1e-6), name
    assert found["token_perplexity"].protocol == (
        f"over {n} tokens: 2 documents apart, each token once, windows of 128 tokens "
        "that advance by 32, first token given end of text, detokenizer none"
    )
    assert f"over {words} words of the text as pub" in found["word_perplexity"].protocol


def test_wikitext_in_its_forms(lm, tmp_path):
    """A file of tokens and rows of its lines are the same text."""
    tokens = tmp_path / "wiki.test.tokens"
    tokens.write_text(PAGE)
    lines = [x.removesuffix(" \n") and x for x in PAGE.splitlines(keepends=True)]
    assert lines[0] == ""  # as the hub's rows are
    rows = write_rows(tmp_path / "wiki.jsonl", [{"text": x} for x in lines])
    pa = pytest.importorskip("pyarrow")
    columns = tmp_path / "wiki.parquet"
    pa.parquet = pytest.importorskip("pyarrow.parquet")
    pa.parquet.write_table(pa.table({"text": lines}), columns)
    whole = figures(lm, "wikitext", tokens)
    expected = math.exp(-lm.score(PAGE).total / len(PAGE.split()))
    assert whole["word_perplexity"].value == pytest.approx(expected, rel=1e-6)
    for path in (rows, columns):
        for name, figure in figures(lm, "wikitext", path).items():
            assert figure.value == pytest.approx(whole[name].value, rel=1e-9)


def test_a_detokenizer_changes_the_text_and_not_what_is_counted(lm, tmp_path):
    path = tmp_path / "wiki.test.tokens"
    path.write_text(PAGE)
    found = figures(lm, "wikitext", path, detokenizer="wikitext")
    text = "\n= Quick Fox =\n\nThe quick brown fox, aged 1,234, jumps.\n"
    assert detokenize(PAGE, "wikitext") == text
    total = -lm.score(text).total
    for name, count in (("token", len(text)), ("word", 16), ("byte", len(PAGE))):
        value = found[f"{name}_perplexity"].value
        assert value == pytest.approx(math.exp(total / count), rel=1e-6), name
    assert "detokenizer wikitext" in found["word_perplexity"].protocol


@pytest.mark.parametrize(
    ("name", "text", "plain"),
    [
        ("wikitext", '( a ) [ b ] " c " = = D = =', '(a) [b] "c" == D =='),
        (
            "wikitext",
            "the girls ' 20 @-@ year @.@ old : x",
            "the girls' 20-year.old: x",
        ),
        ("lambada", "“ Yes , ” he said ", '\n" Yes , " he said'),
        ("lambada", "`` Yes , ''", '\n" Yes , "'),
        ("ptb", "`` I do n't , '' said Tom 's cat .", "\"I don't,\" said Tom's cat."),
        ("ptb", "-LRB- $ 5 -RRB- a.b", "($5) a.b"),
        ("none", " a , b ", " a , b "),
    ],
)
def test_detokenizers(name, text, plain):
    assert detokenize(text, name) == plain


LINES = ["he gave the dog a bone", "  she came home late  ", "it is 7"]


def test_lambada_by_the_last_word(lm, tmp_path):
    path = tmp_path / "lambada.txt"
    path.write_text("\n".join(LINES) + "\n\n")
    found = figures(lm, "lambada", path)
    pairs = [
        ("he gave the dog a", " bone"),
        ("  she came home", " late"),
        ("it is", " 7"),
    ]
    scores = [lm.logprobs(*pair) for pair in pairs]
    mean = np.mean([s.total for s in scores])
    assert found["perplexity"].value == pytest.approx(math.exp(-mean), rel=1e-5)
    assert found["accuracy"].value == np.mean([s.is_greedy.all() for s in scores])
    assert "target the last word with the space before it" in found["accuracy"].protocol
    rows = write_rows(tmp_path / "lambada.jsonl", [{"text": x} for x in LINES])
    assert figures(lm, "lambada", rows) == found


def test_lambada_by_the_last_token(lm, tmp_path):
    rows = write_rows(tmp_path / "lambada.jsonl", [{"text": x} for x in LINES])
    found = figures(lm, "lambada", rows, target="token", detokenizer="lambada")
    texts = ["\n" + x.strip() for x in LINES]
    scores = [lm.logprobs(x[:-1], x[-1]) for x in texts]
    mean = np.mean([s.total for s in scores])
    assert found["perplexity"].value == pytest.approx(math.exp(-mean), rel=1e-5)
    assert "the last token, as OpenAI did; detok" in found["perplexity"].protocol


def right_endings(lm, n=4):
    """Examples whose label is the model's choice by sum; by mean it may be another."""
    rows = []
    for i in range(n):
        ctx, endings = (
            f"A man {i} sits",
            ["down", "on it at once", "x", "up and sings."],
        )
        sums = [lm.logprobs(ctx, " " + x).total for x in endings]
        means = [s / (1 + len(x)) for s, x in zip(sums, endings, strict=True)]
        rows.append((ctx, endings, int(np.argmax(sums)), int(np.argmax(means))))
    return rows


def test_hellaswag(lm, tmp_path):
    rows = right_endings(lm)
    by_sum = [{"ctx": c, "endings": e, "label": a} for c, e, a, _ in rows]
    by_mean = [{"ctx": c, "endings": e, "label": str(b)} for c, e, _, b in rows]
    same = np.mean([a == b for *_, a, b in rows])
    assert same < 1  # else the two would not be told apart
    found = figures(lm, "hellaswag", write_rows(tmp_path / "a.jsonl", by_sum))
    assert (found["acc"].value, found["acc_norm"].value) == (1, same)
    found = figures(lm, "hellaswag", write_rows(tmp_path / "b.jsonl", by_mean))
    assert (found["acc"].value, found["acc_norm"].value) == (same, 1)
    assert "a token, over 4 examples: compl" in found["acc_norm"].protocol
    by_sum[0]["label"] = (by_sum[0]["label"] + 1) % 4
    found = figures(lm, "hellaswag", write_rows(tmp_path / "c.jsonl", by_sum))
    assert found["acc"].value == 3 / 4


SENTENCES = [f"s{i} ." for i in range(20)]
CANDIDATES = ["cat", "dog", "big fox", "hen"]


def block(answer, question="The XXXXX ran ."):
    lines = [f"{i} {s}" for i, s in enumerate(SENTENCES, 1)]
    lines.append(f"21 {question}\t{answer}\t\t{'|'.join(CANDIDATES)}")
    return "\n".join(lines) + "\n\n"


@pytest.mark.parametrize("name", ["none", "ptb"])
def test_cloze(lm, tmp_path, name):
    before = detokenize(" ".join([*SENTENCES, "The"]), name)
    sums = [
        lm.logprobs(before, detokenize(f" {x} ran .", name)).total for x in CANDIDATES
    ]
    best, worst = CANDIDATES[np.argmax(sums)], CANDIDATES[np.argmin(sums)]
    path = tmp_path / "cbtest_NE.txt"
    path.write_text(block(best) + block(worst) + block(best))
    found = figures(lm, "cloze", path, detokenizer=name)
    assert found["acc"].value == pytest.approx(2 / 3)
    assert "over 3 questions: sentences joined by spaces" in found["acc"].protocol
    keys = ("sentences", "question", "answer", "options")
    row = SENTENCES, "The XXXXX ran .", worst, CANDIDATES
    rows = write_rows(tmp_path / "cbt.jsonl", [dict(zip(keys, row, strict=True))])
    assert figures(lm, "cloze", rows, detokenizer=name)["acc"].value == 0


def test_what_does_not_fit_is_cut_on_the_left_and_said(lm, tmp_path):
    rows = [{"text": "x" * 200 + " y"}, {"text": "short text"}]
    found = figures(lm, "lambada", write_rows(tmp_path / "a.jsonl", rows))
    scores = [lm.logprobs("x" * 127, " y"), lm.logprobs("short", " text")]
    mean = np.mean([s.total for s in scores])
    assert found["perplexity"].value == pytest.approx(math.exp(-mean), rel=1e-5)
    assert "1 rows cut on the left to fit 128" in found["perplexity"].protocol


# --- Going on -------------------------------------------------------------------------


@pytest.fixture
def evaluation(lm, folder, tmp_path):
    rows = [{"ctx": c, "endings": e, "label": a} for c, e, a, _ in right_endings(lm, 6)]
    path = write_rows(tmp_path / "data.jsonl", rows)
    out = tmp_path / "out" / "result.json"

    def evaluate(**options):
        given = {"model": str(folder), "task": "hellaswag", "path": str(path)}
        return evaluate_task(**{**given, "out": out, **options})

    return evaluate, out, path


class Killed(Exception):
    pass


def test_killed_it_goes_on_and_ends_the_same(evaluation, monkeypatch):
    evaluate, out, _ = evaluation
    whole = evaluate()
    said = json.loads(out.read_text())
    assert said["figures"]["acc"] == {"value": 1.0, "protocol": whole["acc"].protocol}
    assert (said["task"], said["dtype"]) == ("hellaswag", "float32")
    partial = out.with_suffix(".jsonl")
    records = partial.read_text().splitlines()
    assert len(records) == 1 + 6
    partial.unlink()
    out.unlink()

    add = task_runs.Results.add

    def add_three(self, i, found):
        if len(self.found) == 3:
            raise Killed
        add(self, i, found)

    monkeypatch.setattr(task_runs.Results, "add", add_three)
    with pytest.raises(Killed):
        evaluate(batch_size=4)
    monkeypatch.undo()
    with partial.open("a") as file:
        file.write('{"example": 5, "logpr')  # cut in mid-write
    scored = []
    score_rows = LanguageModel.score_rows

    def counting(self, rows, **options):
        scored.extend(rows)
        return score_rows(self, rows, **options)

    monkeypatch.setattr(LanguageModel, "score_rows", counting)
    assert not out.exists()
    again = evaluate()
    assert len(scored) == 3 * 4  # what was there is not computed again
    assert again == whole
    assert sorted(partial.read_text().splitlines()[1:]) != []
    assert len(partial.read_text().splitlines()) == 1 + 6
    scored.clear()
    assert evaluate() == whole
    assert scored == []


def test_results_of_another_evaluation_are_refused(evaluation, tmp_path):
    evaluate, out, path = evaluation
    evaluate()
    refused = rf"{out.with_suffix('.jsonl')} holds results of another evaluation"
    other = tmp_path / "other"
    other.mkdir()
    params = random_params(CFG, 0.2)
    params["h_1"]["mlp"]["c_fc"]["bias"] += 1e-3
    hf.write(other, CFG, params, ByteTokenizer())
    rows = path.read_text()
    with pytest.raises(ValueError, match=refused):
        evaluate(model=str(other))
    with pytest.raises(ValueError, match=refused):
        evaluate(dtype="bfloat16")
    with pytest.raises(ValueError, match=refused):
        evaluate(options=Options(detokenizer="lambada"))
    path.write_text(rows.replace("man 0", "man 9"))
    with pytest.raises(ValueError, match=refused):
        evaluate()
    path.write_text(rows)
    lines = out.with_suffix(".jsonl").read_text().splitlines()
    lines[2] = lines[2][:-9]
    out.with_suffix(".jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="line 3: not JSON"):
        evaluate()


@pytest.mark.parametrize(
    "gap", [" ", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"]
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_end_at_line_feeds_alone(lm, tmp_path, gap, end, mark):
    """White space of every kind, line ends and byte order marks: the same passages."""
    texts = [f"the quick{gap}brown fox jumps", "a lazy dog sleeps"]
    (tmp_path / "a.txt").write_bytes((mark + end.join(texts) + end).encode())
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_bytes((mark + end.join(rows) + end).encode())
    expected = [(*text.encode(),) for text in texts]
    for name in ("a.txt", "a.jsonl"):
        found = prepare("lambada", str(tmp_path / name), lm, Options()).examples
        assert [tuple(example.rows[0].ids) for example in found] == expected


# --- Bad input ------------------------------------------------------------------------


GOOD = {"ctx": "a b", "endings": ["c", "d"], "label": 0}


@pytest.mark.parametrize(
    ("task", "content", "options", "line"),
    [
        ("swag", [GOOD], {}, "task='swag' is not one of perplexity, wikitext, lambada"),
        ("hellaswag", "\n", {}, "no example in it"),
        ("lambada", "\n", {}, "no example in it"),
        ("wikitext", " \n", {}, "no example in it, or white space alone"),
        ("wikitext", [{"text": " \n"}], {}, "no example in it, or white space alone"),
        ("perplexity", [{"text": " \n"}], {}, "in it, or white space alone"),
        ("perplexity", [], {}, "every file is empty"),
        ("hellaswag", [GOOD, {"ctx": "a"}], {}, "line 2: no field 'endings', only ctx"),
        ("hellaswag", [{**GOOD, "label": 2}], {}, "line 1: label 2 is not in [0, 2)"),
        ("hellaswag", [{**GOOD, "label": "x"}], {}, "label 'x' is not in [0, 2)"),
        ("hellaswag", [{**GOOD, "label": None}], {}, "line 1: 'label' is None"),
        ("hellaswag", [{**GOOD, "endings": [1]}], {}, "line 1: 'endings' is 1"),
        ("hellaswag", [{**GOOD, "endings": []}], {}, "line 1: 'endings' is []"),
        ("hellaswag", [[1]], {}, "line 1: [1] is no JSON object"),
        ("hellaswag", "{", {}, "line 1: not JSON"),
        ("lambada", [{"text": 5}], {}, "line 1: 'text' is 5"),
        ("lambada", [{"text": "one"}], {}, "line 1: 'one' has no word before its last"),
        ("lambada", [{"text": "a " + "x" * 200}], {}, "201 tokens to score must be in"),
        ("perplexity", [{"text": "a"}], {"stride": 129}, "stride=129 must be in [1, "),
        ("perplexity", [{"text": "a"}], {"stride": 0}, "stride=0 must be in [1, 128]"),
        ("hellaswag", [GOOD], {"stride": 4}, "stride=4: hellaswag has no windows"),
        ("hellaswag", [GOOD], {"target": "word"}, "target='word' is of lambada"),
        ("lambada", [{"text": "a b"}], {"target": "x"}, "target='x' is not one of"),
        ("lambada", [{"text": "a b"}], {"detokenizer": "x"}, "detokenizer='x' is"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(lm, tmp_path, task, content, options, line):
    path = tmp_path / "a.jsonl"
    path.write_text(content) if isinstance(content, str) else write_rows(path, content)
    with pytest.raises(ValueError, match=re.escape(line)) as error:
        prepare(task, str(path), lm, Options(**options))
    assert "\n" not in str(error.value)


def test_a_deep_row_is_one_line(lm, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}")
    for task in TASKS:
        with pytest.raises(ValueError, match=r"line 1: not JSON \(nested too deep"):
            prepare(task, str(path), lm, Options())


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("1 a\n2 b\n", "line 1: no block of 21 lines numbered 1 to 21"),
        (block("cat") + "1 a\n", "line 23: no block of 21 lines"),
        (block("cat", "No blank ."), "line 1: 'No blank .' must have one XXXXX"),
        (block("cow"), "line 1: 'cow' is not among ['cat', 'dog'"),
        (
            block("cat").replace("\t", " "),
            "no question, answer and candidates with tabs",
        ),
        ("", "every file is empty"),
        ("\n", "no example in it"),
    ],
)
def test_bad_blocks_are_one_line(lm, tmp_path, text, line):
    path = tmp_path / "cbt.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(line)):
        prepare("cloze", str(path), lm, Options())


def test_bad_files_and_names(folder, tmp_path):
    with pytest.raises(FileNotFoundError):
        evaluate_task(str(folder), "lambada", str(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes(b"a b\xff")
    with pytest.raises(ValueError, match=r"latin.txt: line 1: not UTF-8 .* at byte 3"):
        evaluate_task(str(folder), "lambada", str(tmp_path / "latin.txt"))
    with pytest.raises(ValueError, match=r"out='x.txt' must end in .json"):
        evaluate_task(str(folder), "lambada", "x", out="x.txt")
    with pytest.raises(ValueError, match="batch_size=0 must be >= 1"):
        evaluate_task(str(folder), "lambada", "x", batch_size=0)
    pytest.importorskip("pyarrow")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"bad\.parquet: damaged"):
        evaluate_task(str(folder), "hellaswag", str(tmp_path / "bad.parquet"))
