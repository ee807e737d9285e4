"""The shape of the house: who imports whom, and what stays outside."""

import ast
import gc
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import gpt2_jax
from gpt2_jax.lm import load

ROOT = Path(__file__).resolve().parents[1]

# The floors, from top to bottom: a file imports from its own and from lower ones.
# __init__ is what `import gpt2_jax` gives.
FLOORS = [
    "commands",
    "evaluation",
    "__init__",
    "lm",
    "interpret",
    "training",
    "decoding",
    "data",
    "formats",
    "checkpoints",
    "tokenizers",
    "lora",
    "model",
    "layers",
    "layout",
    "cache",
    "ops",
    "runtime",
    "config",
    "fields",
    "checks",
]


def files_of(folder: str) -> dict[str, Path]:
    """Dotted name -> file, a package's __init__.py under the package's name."""
    files = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT / folder).with_suffix("").parts
        if len(parts) > 1 and parts[-1] == "__init__":
            parts = parts[:-1]
        files[".".join(parts)] = path
    return files


LIBRARY = files_of("gpt2_jax")


def imports(source: str, *, in_functions: bool = True) -> Iterator[str]:
    """What a file imports: `import a.b` gives a.b, `from a import b` gives a.b too.

    Raises:
      ValueError: on a relative import; the house has none.
    """
    stack: list[ast.AST] = [ast.parse(source)]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"line {node.lineno}: relative import")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if in_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            stack.extend(ast.iter_child_nodes(node))


def is_of(imported: str, package: str) -> bool:
    return f"{imported}.".startswith(f"{package}.")


def floor_of(name: str) -> str:
    return name.partition(".")[0] or "__init__"


def upward_imports(floor: str, source: str) -> list[str]:
    """The floors above its own that a file imports from."""
    floors = set()
    for imported in imports(source):
        if is_of(imported, "gpt2_jax"):
            found = floor_of(imported.removeprefix("gpt2_jax").removeprefix("."))
            floors.add(found if found in FLOORS else "__init__")
    return sorted(floors.difference(FLOORS[FLOORS.index(floor) :]))


def importers_of(package: str, files: dict[str, Path], **kwargs: bool) -> list[str]:
    return [
        name
        for name, path in files.items()
        if any(is_of(i, package) for i in imports(path.read_text(), **kwargs))
    ]


def test_every_file_has_its_floor():
    assert {floor_of(name) for name in LIBRARY} == {*FLOORS}


@pytest.mark.parametrize("name", LIBRARY)
def test_imports_point_downward(name):
    assert upward_imports(floor_of(name), LIBRARY[name].read_text()) == []


@pytest.mark.parametrize(
    ("floor", "source", "expected"),
    [
        ("model", "from gpt2_jax.cache import KVCache", []),
        ("model", "from gpt2_jax import cache, config", []),
        ("model", "import gpt2_jax.training.train", ["training"]),
        ("model", "from gpt2_jax.training.train import train", ["training"]),
        ("model", "from gpt2_jax import cache, training", ["training"]),
        ("model", "from gpt2_jax.model import GPT2", []),
        ("model", "def f():\n    from gpt2_jax import lm", ["lm"]),
        ("model", "if TYPE_CHECKING:\n    from gpt2_jax import lm", ["lm"]),
        ("model", "class C:\n    async def f():\n        import gpt2_jax.lm", ["lm"]),
        ("model", "import gpt2_jax", ["__init__"]),
        ("model", "from gpt2_jax import GPT2", ["__init__"]),
        ("model", "import gpt2_jaxlike, optax", []),
        ("training", "from gpt2_jax.decoding.score import score", []),
        ("training", "from gpt2_jax.training.step import train_step", []),
        ("data", "from gpt2_jax.data.prepare import load_index", []),
        ("data", "import gpt2_jax.decoding.score as s", ["decoding"]),
        ("data", "from gpt2_jax.config import GPT2Config", []),
    ],
)
def test_upward_imports_are_found(floor, source, expected):
    assert upward_imports(floor, source) == expected


def test_relative_imports_are_found():
    with pytest.raises(ValueError, match="line 2: relative import"):
        list(imports("import jax\nfrom . import train"))


def test_only_the_model_and_its_layers_know_linen():
    assert importers_of("flax.linen", LIBRARY) == ["layers", "model"]


@pytest.mark.parametrize(
    "package", ["torch", "transformers", "tensorflow", "ml_collections"]
)
def test_library_does_without(package):
    assert importers_of(package, LIBRARY) == []


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("tensorboardX", "training.metrics"),
        ("wandb", "training.metrics"),
        ("matplotlib", "training.plot"),
    ],
)
def test_imported_where_it_is_used_only(package, line):
    assert importers_of(package, LIBRARY) == [line]
    assert importers_of(package, LIBRARY, in_functions=False) == []


@pytest.mark.parametrize(
    ("source", "everywhere", "at_the_top"),
    [
        ("import flax.linen as nn", True, True),
        ("from flax import linen as nn", True, True),
        ("from flax.linen import Module", True, True),
        ("try:\n    import flax.linen\nexcept ImportError:\n    pass", True, True),
        ("class C:\n    import flax.linen", True, True),
        ("class C:\n    def f(self):\n        import flax.linen", True, False),
        ("import flax.struct", False, False),
        ("import flax.linens", False, False),
    ],
)
def test_imports_are_found(tmp_path, source, everywhere, at_the_top):
    path = tmp_path / "file.py"
    path.write_text(source)
    files = {"file": path}
    assert importers_of("flax.linen", files) == ["file"] * everywhere
    found = importers_of("flax.linen", files, in_functions=False)
    assert found == ["file"] * at_the_top


# `open` of what is no text file.
NO_FILES = ("os.open", "self.open", "ts.open", "ts.KvStore.open")


def texts_of_no_encoding(source: str) -> list[str]:
    """Calls that read or write text as the locale of the machine has it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function, words = ast.unparse(node.func), {k.arg for k in node.keywords}
        name, n = function.split(".")[-1], len(node.args) + ("encoding" in words)
        modes = [
            ast.unparse(x) for x in [*node.args, *(k.value for k in node.keywords)]
        ]
        binary = any(re.fullmatch("'[rwax+]*b[+]?'", mode) for mode in modes)
        opens = name == "open" and function not in NO_FILES
        if (
            (name == "read_text" and n < 1)
            or (name == "write_text" and n < 2)
            or (opens and "encoding" not in words and not binary)
        ):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("name", LIBRARY)
def test_docstrings_open_with_a_verb_or_a_noun(name):
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = ast.walk(ast.parse(LIBRARY[name].read_text()))
    docs = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
    assert [doc for doc in docs if doc and doc.startswith("Of ")] == []


@pytest.mark.parametrize("name", [*LIBRARY])
def test_text_is_utf_8_everywhere(name):
    assert texts_of_no_encoding(LIBRARY[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("path.read_text()", 1),
        ("path.write_text(text)", 1),
        ("open(path)", 1),
        ("(folder / 'x').open('a', buffering=1)", 1),
        ("path.read_text('utf-8')", 0),
        ("path.write_text(text, encoding='utf-8')", 0),
        ("open(path, 'rb')", 0),
        ("path.open('w', encoding='utf-8')", 0),
        ("path.open('r+b')", 0),
        ("os.open(path, os.O_RDONLY)", 0),
    ],
)
def test_texts_of_no_encoding_are_found(source, found):
    assert len(texts_of_no_encoding(source)) == found


@pytest.mark.parametrize("path", files_of("scripts").values(), ids=lambda p: p.name)
def test_scripts_are_thin(path):
    assert len(path.read_text().splitlines()) <= 60


@pytest.mark.parametrize(
    "folder", ["gpt2_jax", "scripts", "configs", "tests", "benchmarks"]
)
def test_no_file_of_odds_and_ends(folder):
    names = {path.name for path in files_of(folder).values()}
    assert names.isdisjoint({"utils.py", "util.py", "common.py", "helpers.py"})


@pytest.mark.parametrize("name", files_of("configs"))
def test_configs_say_how_to_run_them(name):
    tree = ast.parse((ROOT / f"configs/{name}.py").read_text())
    functions = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    assert "get_config" in functions
    named = re.findall(r"--config=configs/(\w+)\.py", ast.get_docstring(tree) or "")
    # The default alone is no run: it shows how any config is run.
    assert named
    assert set(named) == {"NAME" if name == "default" else name}


@pytest.mark.parametrize("collects", [True, False])
def test_an_import_leaves_the_garbage_collector_as_it_was(collects):
    if not collects:
        gc.disable()
    try:
        assert importlib.reload(gpt2_jax).load is load
        assert gc.isenabled() == collects
    finally:
        gc.enable()
