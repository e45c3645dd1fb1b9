"""Identifies the code and the packages that a run was made with."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

# simplejpeg decodes JPEG where it is installed, else Pillow, and their pixels differ slightly
PACKAGES = (
    "mvptr_ds",
    "torch",
    "deepspeed",
    "transformers",
    "tokenizers",
    "webdataset",
    "numpy",
    "pillow",
    "simplejpeg",
)


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of Python and of relevant packages, and the commit of a checkout, with `+` when changed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # it runs from a checkout that is not installed
            continue
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit:
        found["commit"] = commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    return found


def code_sha256() -> str:
    """Returns the SHA-256 of the package's sources and packaged configurations on this machine."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".yaml")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _git(*arguments: str) -> str:
    try:
        folder = Path(__file__).resolve().parents[2]
        if not (folder / ".git").exists():  # an installed package, which may stand in a repository of something else
            return ""
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
