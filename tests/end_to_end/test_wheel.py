"""The package as a wheel, in an environment of its own, from a folder that holds nothing: README's quick start.

The environment sees the packages of the one that runs the tests, but neither the repository nor an installed mvptr_ds.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import mvptr_ds
from tests.conftest import REPO
from tests.end_to_end.conftest import LIMIT_S, SMALL
from tests.support.launch import free_port, run

BUILT_FROM = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
Type = Callable[..., str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the repository, built in a copy: setuptools would take what an earlier build has left."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("mvptr_ds", "ds_configs"):
        shutil.copytree(REPO / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BUILT_FROM:
        shutil.copy(REPO / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-index", "--no-deps"]
    command = [*pip, "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=False)
    python = str(folder / "bin/python")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-index", "--no-deps", str(wheel)], check=True, capture_output=True, timeout=120)
    # a path in a .pth file comes behind the environment's own, and the .pth files in it, of an editable install, are
    # not heeded
    others = [path for path in sys.path if path.endswith("-packages") and Path(path).is_dir()]
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "of_the_tests.pth").write_text("\n".join(others) + "\n", encoding="utf-8")
    assert others and str(own) not in site.getsitepackages()
    return folder


@pytest.fixture
def typed(installed: Path, tmp_path: Path) -> Type:
    """`typed(command ...)` runs a command of the environment in an empty folder; returns what it prints."""
    folder = tmp_path / "work"
    folder.mkdir()

    def call(name: str, *arguments: str, code: int = 0) -> str:
        paths = f"{installed / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = [str(installed / "bin" / name), *arguments]
        port = str(free_port())
        log = tmp_path / "log"
        ended, said = run(command, log, LIMIT_S, cwd=folder, PYTHONPATH="", PATH=paths, MASTER_PORT=port)
        assert ended == code, said
        return said

    return call


def test_the_wheel_holds_all_that_is_read(wheel: Path) -> None:
    """Every file of the package, and the DeepSpeed JSONs."""
    there = [path for folder in ("mvptr_ds", "ds_configs") for path in (REPO / folder).rglob("*") if path.is_file()]
    files = [path.relative_to(REPO) for path in there if "__pycache__" not in path.parts]
    expected = {str(Path("mvptr_ds") / file if file.parts[0] == "ds_configs" else file) for file in files}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("mvptr_ds/")}
    assert len(expected) >= 150 and names == expected


@pytest.mark.timeout(400)
def test_the_quick_start_of_an_installed_package(typed: Type, installed: Path, tmp_path: Path) -> None:
    (packages,) = installed.glob("lib/python*/site-packages")
    (own,) = [line for line in typed("python", "-c", "import mvptr_ds; print(mvptr_ds.__file__)").splitlines() if line]
    assert Path(own).is_relative_to(packages)
    assert typed("mvptr", "--version") == f"mvptr_ds {mvptr_ds.__version__}\n"
    before = {path for path in packages.rglob("*") if "__pycache__" not in path.parts}

    small = [*SMALL, "stage1.max_steps=2", "stage2.max_steps=2"]
    said = typed("mvptr", "demo", "--ranks", "1", *small)  # by the launcher; two take twice as long to start
    work = tmp_path / "work"
    assert "demo shards built: runs/demo/shards" in said and "parameters trained on 1 rank" in said
    assert "text -> image" in said and "written: runs/demo/report.json" in said
    assert json.loads((work / "runs/demo/report.json").read_text(encoding="utf-8"))["num_scenes"] == 16

    said = typed("mvptr", "train", "--deepspeed", "z1", *small, "run.dir=one", "run.stages=[1]")
    assert "parameters trained on 1 rank" in said
    assert '"stage": 1' in (work / "one/stage1/ds_config.json").read_text(encoding="utf-8")

    assert "index of " in typed("mvptr", "validate", "runs/demo/shards/train", "--processes", "1")
    typed("mvptr", "preview", "runs/demo/shards/train", "--out", "preview.html", "--num", "2", "--stats-records", "8")
    assert "data:image/" in (work / "preview.html").read_text(encoding="utf-8")
    assert "dog | chase | ball" in typed("mvptr", "phrases", "--show", "A brown dog chases a ball.")
    remedy = typed("mvptr", "vocab", "runs", "--out", "vocab.json", code=1)
    assert "tools/" not in remedy

    assert {path for path in packages.rglob("*") if "__pycache__" not in path.parts} == before
    assert {path.name for path in work.iterdir()} == {"runs", "one", "preview.html"}
