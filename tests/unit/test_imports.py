"""Imports run one way, and no file shadows a module where a script's folder is on the path."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO

PACKAGE = REPO / "mvptr_ds"
MODULES = {
    ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(module: str) -> Iterator[str]:
    """Every module or name that a module imports, anywhere in it, as a dotted path."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def offenders(importers: tuple[str, ...], forbidden: tuple[str, ...], but: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{module} imports {name}"
        for module in MODULES
        if under(module, *importers) and not under(module, *but)
        for name in imported(module)
        if under(name, *forbidden)
    ]


def test_the_reading_of_imports_itself() -> None:
    assert "mvptr_ds.config.Config" in set(imported("mvptr_ds.trainer"))
    assert offenders(("mvptr_ds.engine",), ("deepspeed",)) == ["mvptr_ds.engine imports deepspeed"]


M, L, D, C = "mvptr_ds.model", "mvptr_ds.objectives.losses", "mvptr_ds.data", "mvptr_ds.corpus"
OURS_ABOVE = (
    "config", "ds_config", "objectives.task", "engine", "trainer", "train", "distributed", "optim", "builders", "demo",
    "evaluation", "checkpoints", "monitoring", "preflight", "planning",
)  # fmt: skip
ABOVE = ("deepspeed", *(f"mvptr_ds.{name}" for name in OURS_ABOVE))


@pytest.mark.parametrize(("part", "others"), [(M, (L, D)), (L, (M, D)), (D, (M, L)), (C, (M, L))])
def test_model_losses_and_data_know_neither_each_other_nor_what_is_above(part: str, others: tuple[str, ...]) -> None:
    assert offenders((part,), (*others, *ABOVE)) == []


def test_streams_know_nothing() -> None:
    assert set(imported("mvptr_ds.streams")) == {"__future__", "__future__.annotations", "enum", "hashlib", "numpy"} | {
        f"enum.{name}" for name in ("IntEnum", "unique")
    }


def test_training_reads_shards_without_what_makes_them() -> None:
    assert offenders(("mvptr_ds",), (C,), but=(C,)) == []
    assert offenders((C,), (D,)) != []


def test_only_engine_grad_norm_and_parallel_import_deepspeed() -> None:
    assert (
        offenders(
            ("mvptr_ds",),
            ("deepspeed",),
            but=("mvptr_ds.engine", "mvptr_ds.optim.zero_grad_norm", "mvptr_ds.distributed.collectives"),
        )
        == []
    )
    assert offenders(("mvptr_ds.distributed.collectives",), ("deepspeed",)) != []


def test_only_the_objectives_join_model_and_losses() -> None:
    names = {m: list(imported(m)) for m in MODULES}
    both = [m for m, used in names.items() if any(under(n, L) for n in used) and any(under(n, M) for n in used)]
    assert both != [] and all(under(module, "mvptr_ds.objectives") for module in both)


def test_nothing_in_the_package_imports_tools_or_tests() -> None:
    assert offenders(("mvptr_ds",), ("tools", "tests")) == []


def test_nothing_is_printed_and_no_except_is_bare() -> None:
    """What the package's functions may not do."""
    found = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                found.append(f"{module}:{node.lineno} prints")
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                found.append(f"{module}:{node.lineno} bare except")
    assert found == []


SCRIPTS = [path for folder in (PACKAGE, REPO / "tools") for path in sorted(folder.rglob("*.py"))]
ENTRIES = [path for path in SCRIPTS if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]


def test_no_file_beside_a_script_bears_the_name_of_a_module() -> None:
    """Also for tools that put another folder first: a script run by path has its own folder first on sys.path."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    assert [str(path.relative_to(REPO)) for path in SCRIPTS if path.stem in taken] == []


# runs a script as `python PATH --help` does, then looks at what it left of the path
RUN_BY_PATH = """
import importlib.util, runpy, sys
script, folder = sys.argv[1:]
sys.argv, sys.path[0] = [script, "--help"], folder
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
if folder.endswith("mvptr_ds"):
    shadows = [name for name in ("config", "losses", "optim", "task") if importlib.util.find_spec(name)]
    assert not shadows and folder not in sys.path, (shadows, sys.path)
"""


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.stem)
def test_scripts_run_from_any_folder_and_entries_drop_their_own_from_the_path(path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN_BY_PATH, str(path), str(path.parent)]
    environment = {**os.environ, "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
