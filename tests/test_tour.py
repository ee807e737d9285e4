"""docs/tour.ipynb: as it is committed, and when it is run again."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOUR = ROOT / "docs/tour.ipynb"


def code_cells(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def kinds(cell: dict) -> set[str]:
    return {kind for output in cell["outputs"] for kind in output.get("data", ["text"])}


def test_it_was_run_from_top_to_bottom():
    cells = code_cells(TOUR)
    numbers = [cell["execution_count"] for cell in cells]
    assert numbers == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {o["output_type"] for o in outputs}.isdisjoint({"error"})
    assert {o.get("name") for o in outputs}.isdisjoint({"stderr"})
    shown = set().union(*map(kinds, cells))
    assert {"image/png", "text/html"} <= shown
    assert cells[-1]["outputs"][-1]["data"]["text/plain"] == ["True"]


def test_it_is_small_and_tells_nothing_of_its_machine():
    assert TOUR.stat().st_size < 300_000
    assert "/tmp/" not in TOUR.read_text()
    assert str(Path.home()) + "/" not in TOUR.read_text()


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("nbclient", "ipykernel"))),
    reason="needs the extra docs",
)
def test_it_runs_again(tmp_path):
    for name in ("configs", "gpt2_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    again = tmp_path / "tour.ipynb"
    again.write_bytes(TOUR.read_bytes())
    subprocess.run(
        [sys.executable, "-c", "from nbclient.cli import main; main()"]
        + ["--inplace", "--timeout=600", str(again)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    for ours, theirs in zip(code_cells(again), code_cells(TOUR), strict=True):
        assert kinds(ours) == kinds(theirs)
    assert code_cells(again)[-1]["outputs"][-1]["data"]["text/plain"] == ["True"]
