"""What whole runs are trained on."""

import random
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    rng = random.Random(0)
    path.write_text("\n".join(" ".join(rng.choices(words, k=9)) for _ in range(300)))
    return path
