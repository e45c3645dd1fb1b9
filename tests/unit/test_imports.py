"""Imports run one way, and no file shadows a module where a script's folder is on the path."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import json
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


# The rooms of the package from the ground up: a module imports only from its own room and from rooms on lower floors.
# A room is a folder, a file, or a part of a folder that stands lower than the rest of it; the longest name counts.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("streams", "errors", "user_io", "data.pickling"),
    ("config_reading", "data.sampling", "data.schema", "data.sequence_layout"),
    ("config_data", "config_stages", "data.shards"),
    ("config",),
    ("batch_size", "data"),
    ("ds_config", "distributed", "model"),
    ("objectives", "optim", "guards", "stopping"),
    ("monitoring",),
    ("demo", "corpus"),
    ("shard_folders",),
    ("builders",),
    ("checkpoints", "evaluation"),
    ("tasks",),
    ("inference", "exporting"),
    ("benchmarks", "parity"),
    ("engine", "held_out", "planning", "preflight", "demo_page"),
    ("benchmarks.gpu_step",),
    ("trainer",),
    ("train", "eval"),
    ("transfer",),
    ("commands",),
)
FLOOR_OF = {f"mvptr_ds.{room}": number for number, floor in enumerate(FLOORS) for room in floor}


def room_of(module: str) -> str | None:
    """The longest name of FLOORS that the module stands under."""
    return max((room for room in FLOOR_OF if under(module, room)), key=len, default=None)


def modules_imported(module: str) -> set[str]:
    """The package's modules with code in them that a module imports; a name in a module counts as that module."""
    found = set()
    for name in imported(module):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found.add(name)
    return {name for name in found - {"", module} if MODULES[name].name != "__init__.py"}


ARROWS = {module: modules_imported(module) for module in MODULES if MODULES[module].name != "__init__.py"}


def test_every_module_stands_on_a_floor() -> None:
    homeless = sorted(module for module in ARROWS if room_of(module) is None)
    assert not homeless, (
        f"{', '.join(homeless)} stand in no room of FLOORS (tests/unit/test_imports.py). Write the new folder or file "
        "into the lowest floor that lies above everything it imports; nothing on that floor or below may import it."
    )


def test_imports_go_down_the_floors() -> None:
    """No arrow up, and none between two rooms of one floor."""
    up = {
        (module, name)
        for module, names in ARROWS.items()
        for name in names
        if (room := room_of(module)) and (other := room_of(name)) and room != other
        if FLOOR_OF[other] >= FLOOR_OF[room]
    }
    new = sorted(f"{module} imports {name}" for module, name in up)
    assert not new, (
        f"{'; '.join(new)}: imports go to lower floors only (FLOORS). Move what both need to a lower room, or move a "
        "room in the table if nothing below it comes to lie above."
    )


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions count, too."""
    assert "mvptr_ds.data.dataset" in ARROWS["mvptr_ds.data.read_ahead"]
    try:
        graphlib.TopologicalSorter(ARROWS).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}; move what they share to a module of its own")


M, L, D, C = "mvptr_ds.model", "mvptr_ds.objectives.losses", "mvptr_ds.data", "mvptr_ds.corpus"
NOT_THEIRS = (
    "config", "ds_config", "batch_size", "objectives.pretraining", "objectives.table", "tasks", "engine", "trainer",
    "train", "distributed",
    "optim", "builders", "demo", "evaluation", "checkpoints", "monitoring", "preflight", "planning",
)  # fmt: skip
ABOVE = ("deepspeed", *(f"mvptr_ds.{name}" for name in NOT_THEIRS))


@pytest.mark.parametrize(("part", "others"), [(M, (L, D)), (L, (M, D)), (D, (M, L)), (C, (M, L))])
def test_model_losses_and_data_know_neither_each_other_nor_what_is_above(part: str, others: tuple[str, ...]) -> None:
    assert offenders((part,), (*others, *ABOVE)) == []


def test_streams_know_nothing() -> None:
    assert set(imported("mvptr_ds.streams")) == {"__future__", "__future__.annotations", "enum", "hashlib", "numpy"} | {
        f"enum.{name}" for name in ("IntEnum", "unique")
    }


def test_training_reads_shards_without_what_makes_them() -> None:
    others = ("mvptr_ds.inference", "mvptr_ds.commands", "mvptr_ds.demo_page")
    assert offenders(("mvptr_ds",), (C,), but=(C, *others)) == []
    assert offenders((C,), (D,)) != []


def test_only_the_engine_what_mends_zero_and_collectives_import_deepspeed() -> None:
    mends = tuple(f"mvptr_ds.optim.{name}" for name in ("zero_grad_norm", "zero_flat_gradients", "zero_step"))
    counts = "mvptr_ds.benchmarks.gpu_step.engine_step"  # what deepspeed does
    homes = ("mvptr_ds.engine", "mvptr_ds.distributed.collectives", counts, *mends)
    assert offenders(("mvptr_ds",), ("deepspeed",), but=homes) == []
    assert offenders(("mvptr_ds.distributed.collectives",), ("deepspeed",)) != []


def test_only_objectives_and_tasks_join_model_and_losses() -> None:
    names = {m: list(imported(m)) for m in MODULES}
    both = [m for m, used in names.items() if any(under(n, L) for n in used) and any(under(n, M) for n in used)]
    homes = ("mvptr_ds.objectives", "mvptr_ds.tasks")
    assert both != [] and all(any(under(module, home) for home in homes) for module in both)


def test_nothing_in_the_package_imports_tools_or_tests() -> None:
    assert offenders(("mvptr_ds",), ("tools", "tests")) == []


def test_nothing_is_printed_and_no_except_is_bare() -> None:
    """What the package's functions may not do; commands do print."""
    found = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            if is_print and not under(module, "mvptr_ds.commands"):
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


# Runs each script as `python PATH --help` does, in a process of its own, then looks at what it left of the path. Torch
# and DeepSpeed, which take seconds to import, are there before the processes are forked; nothing of the project is.
RUN_BY_PATH = """
import importlib.util, json, os, pathlib, runpy, sys, traceback
import deepspeed, torch
assert not [name for name in sys.modules if name.partition(".")[0] == "mvptr_ds"]
def run(script):
    folder = os.path.dirname(script)
    sys.argv, sys.path[0] = [script, "--help"], folder
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, stop.code
    if folder.endswith("mvptr_ds"):
        shadows = [name for name in ("config", "losses", "optim", "task") if importlib.util.find_spec(name)]
        assert not shadows and folder not in sys.path, (shadows, sys.path)
codes = {}
for number, script in enumerate(sys.argv[1:]):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(f"{number}.txt", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        code = 1
        try:
            run(script)
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    codes[script] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), number
said = {script: [code, pathlib.Path(f"{number}.txt").read_text()] for script, (code, number) in codes.items()}
pathlib.Path("said.json").write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def help_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and output of every script's --help, by its path."""
    folder = tmp_path_factory.mktemp("anywhere")
    command = [sys.executable, "-c", RUN_BY_PATH, *map(str, ENTRIES)]
    environment = {**os.environ, "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=250)
    return {path: tuple(said) for path, said in json.loads((folder / "said.json").read_text(encoding="utf-8")).items()}


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.stem)
def test_scripts_run_from_any_folder_and_entries_drop_their_own_from_the_path(
    path: Path, help_of: dict[str, tuple[int, str]]
) -> None:
    code, said = help_of[str(path)]
    assert code == 0 and "usage:" in said, said


SAMPLING_MAY_USE = ("numpy", "mvptr_ds.streams", "mvptr_ds.errors", "mvptr_ds.data.pickling", "mvptr_ds.data.sampling")


def test_sampling_needs_nothing_but_numpy() -> None:
    """The order of a run is a function of seeds and positions."""
    sampling = [module for module in MODULES if under(module, "mvptr_ds.data.sampling")]
    foreign = [
        f"{module} imports {name}"
        for module in sampling
        for name in imported(module)
        if name.partition(".")[0] not in sys.stdlib_module_names and not under(name, *SAMPLING_MAY_USE)
    ]
    assert len(sampling) >= 5 and foreign == []
