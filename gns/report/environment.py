"""What this process can say of itself for the record: versions of what it has imported, and the commit."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gns._version import __version__

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "pytorch_lightning",
    "lightning",
    "deepspeed",
    "bitsandbytes",
    "numpy",
)
PATIENCE = 5.0  # seconds for git, which may lie on a slow disk


def environment() -> dict[str, Any]:
    """Give "versions", of Python, of this package and of known ones this process has imported, and "commit".

    "commit" is that of the working directory's repository; it is missing where there is none, or no git.
    """
    versions = {"python": platform.python_version(), "gradient-noise-scale": __version__}
    versions |= {name: known for name in PACKAGES if name in sys.modules and (known := _version(name))}
    commit = _commit()
    return {"versions": versions} | ({"commit": commit} if commit else {})


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # imported from a folder
        return getattr(sys.modules[package], "__version__", None)


def _commit() -> str | None:
    """Name the commit that the working directory is at, and whether files in it were changed since."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return None
    changed = _git("status", "--porcelain", "--untracked-files=no")
    if changed is None:
        return f"{head} (whether files were changed since is not known)"
    return f"{head} with uncommitted changes" if changed else head


def _git(*arguments: str) -> str | None:
    """Ask git; None where it cannot answer."""
    try:
        asked = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None
