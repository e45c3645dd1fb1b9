"""What of flash_attn, NVIDIA's apex and Triton is really there: whole, built for this torch, of a version that serves.

Every answer is what is missing, for the report of kernels; empty where all is there.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path

import torch


@functools.lru_cache
def flash_attn_lacks(function: str) -> str:
    """Returns what the flash_attn package lacks of a function of its version 2.

    Other wheels share its folder: that of flash-attn-4 leaves a package of this name without anything in it.
    """
    if importlib.util.find_spec("flash_attn") is None:
        return "flash_attn is not installed"
    problem = _problem("flash_attn", function)
    return f"the flash_attn that is installed {problem}" if problem else ""


@functools.lru_cache
def apex_lacks(file: str, extension: str, *names: str) -> str:
    """Returns what NVIDIA's apex lacks of a file's names and its built kernels.

    It is imported only when it has the file: PyPI's `apex` is another project.
    """
    found = importlib.util.find_spec("apex")
    if found is None:
        return "apex is not installed"
    if not any((Path(folder) / file).is_file() for folder in found.submodule_search_locations or []):
        return "the apex that is installed is not NVIDIA's"
    if importlib.util.find_spec(extension) is None:
        return "apex was built without its CUDA extensions"
    module = ".".join(("apex", *Path(file).with_suffix("").parts))
    for name, wanted in ((extension, ()), (module, names)):
        problem = _problem(name, *wanted)
        if problem:
            return f"apex is installed, but {name} {problem}"
    return ""


@functools.lru_cache
def triton_lacks(kernels: str) -> str:
    """Returns what there lacks for our kernels in Triton: the package of that name, or triton itself."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    problem = _problem("triton.language", "philox", "join", "range")
    if problem:
        return f"the triton that is installed {problem}"
    return "" if importlib.util.find_spec(kernels) else "the files of an exported model have none of its kernels"


def _problem(module: str, *names: str) -> str:
    """What keeps a module from serving, as the end of a sentence; empty where nothing does."""
    try:
        found = importlib.import_module(module)
    except Exception as error:  # built for another torch, or half of it: what that raises has no common class
        first = next(iter(str(error).splitlines()), "")
        return f"cannot be imported beside torch {torch.__version__} ({type(error).__name__}: {first})"
    missing = [name for name in names if not hasattr(found, name)]
    return f"has no {', '.join(missing)}" if missing else ""
