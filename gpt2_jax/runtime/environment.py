"""What a program runs in: versions, devices, revision, command line."""

import contextlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

PACKAGES = (
    "gpt2-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
)
VARIABLES = ("XLA_", "JAX_", "LIBTPU_", "NCCL_")  # beginnings of names


def environment() -> dict[str, Any]:
    """Describes this process, as plain JSON data. It names neither machine nor user.

    `git` is the revision of the checkout that holds this package, with "-dirty" after
    it where tracked files were changed; None: it is not of a checkout.
    """
    devices = jax.devices()
    return {
        "command": [sys.executable, *sys.argv],
        "git": _revision(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "packages": _versions(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(VARIABLES)
        },
        "processes": jax.process_count(),
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "backend": jax.default_backend(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _revision(package: Path) -> str | None:
    # An installed copy may lie in the .venv of a checkout, which says nothing of it.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return _git(
        package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"
    )


def _git(folder: Path, *args: str) -> str | None:
    try:
        process = subprocess.run(
            ["git", "-C", folder, *args], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() if process.returncode == 0 else None
