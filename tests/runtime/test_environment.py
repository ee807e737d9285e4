import json
import subprocess

import flax
import jax

from gpt2_jax.runtime import environment as module
from gpt2_jax.runtime.environment import environment


def test_what_a_run_ran_in(monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    said = json.loads(json.dumps(environment()))
    assert said["packages"]["jax"] == jax.__version__
    assert said["packages"]["flax"] == flax.__version__
    assert said["devices"] == 8
    assert said["device_kind"] == "cpu"
    assert said["processes"] == 1
    assert said["variables"]["NCCL_DEBUG"] == "INFO"
    assert "hush" not in json.dumps(said)


def test_the_revision_is_that_of_the_checkout_that_holds_the_package(tmp_path):
    def git(*args):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", tmp_path, *who, *args], check=True)

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    assert module._revision(package) is None  # no checkout
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "none")
    assert module._revision(package) is None  # copied into one
    git("add", "package")
    git("commit", "-qm", "one")
    revision = module._revision(package)
    assert len(revision) == 40
    (package / "__init__.py").write_text("a = 2\n")
    assert module._revision(package) == f"{revision}-dirty"
