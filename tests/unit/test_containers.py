"""Dockerfile and mvptr.def, which are not built here: they agree with each other and with the checkout.

The real hadolint reads Dockerfile where it is installed. A wheel is built of exactly the files that are copied.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPO

DOCKERFILE = (REPO / "Dockerfile").read_text(encoding="utf-8")
DEFINITION = (REPO / "mvptr.def").read_text(encoding="utf-8")
INSTRUCTIONS = {"FROM", "RUN", "ARG", "ENV", "WORKDIR", "COPY", "USER", "CMD"}
SECTIONS = {"help", "files", "post", "environment", "runscript"}


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with their arguments; lines that are continued are joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined)]


def sections(text: str) -> dict[str, str]:
    """The header of a definition file, as section '', and its sections."""
    header, *rest = re.split(r"^%", text, flags=re.MULTILINE)
    return {"": header} | {name: body for name, _, body in (part.partition("\n") for part in rest)}


OF_DOCKER = instructions(DOCKERFILE)
OF_APPTAINER = sections(DEFINITION)
COMMANDS = {
    "Dockerfile": [line for name, rest in OF_DOCKER if name == "RUN" for line in rest.split(" && ")],
    "mvptr.def": [line.strip() for line in OF_APPTAINER["post"].splitlines() if line.strip()],
}


def copied() -> dict[str, set[str]]:
    return {
        "Dockerfile": {word for name, rest in OF_DOCKER if name == "COPY" for word in rest.split()[:-1]},
        "mvptr.def": {line.split()[0] for line in OF_APPTAINER["files"].splitlines() if line.strip()},
    }


def test_the_forms() -> None:
    assert OF_DOCKER[0][0] == "FROM" and {name for name, _ in OF_DOCKER} <= INSTRUCTIONS
    assert OF_APPTAINER[""].startswith("Bootstrap: docker\n") and set(OF_APPTAINER) - {""} <= SECTIONS
    users = [rest for name, rest in OF_DOCKER if name == "USER"]
    assert users and users[-1].isdigit() and int(users[-1]) > 0  # not root, by a number that a cluster can check
    for scripts in (*COMMANDS.values(), [OF_APPTAINER["environment"]], [OF_APPTAINER["runscript"]]):
        done = subprocess.run(["sh", "-n"], input="\n".join(scripts), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    assert "mvptr_ds.train" in OF_DOCKER[-1][1] and "mvptr_ds.train" in OF_APPTAINER["runscript"]


def test_both_make_the_same_image() -> None:
    base = OF_DOCKER[0][1]
    assert f"From: {base}\n" in OF_APPTAINER[""]
    for start in ("apt-get install", "pip install"):
        of_both = [[line for line in lines if line.startswith(start)] for lines in COMMANDS.values()]
        assert of_both[0] == of_both[1] != []
    python = re.fullmatch(r"python:(\d+\.\d+)-slim-\w+", base)  # of the official images, no other registry
    assert python is not None and tuple(map(int, python[1].split("."))) >= (3, 10)
    environment = [rest for name, rest in OF_DOCKER if name == "ENV"]
    assert all(f"export {setting}\n" in OF_APPTAINER["environment"] for setting in environment)


def test_torch_is_that_of_the_constraints() -> None:
    (pinned,) = re.findall(r"^torch==\S+$", (REPO / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    for lines in COMMANDS.values():
        torch, package = [shlex.split(line) for line in lines if line.startswith("pip install")]
        assert torch[-1] == pinned and package[-1].startswith(".[")
        assert all(command[command.index("-c") + 1] == "constraints.txt" for command in (torch, package))
        extras = package[-1].removeprefix(".[").removesuffix("]").split(",")
        assert all(f'"{extra}":' in (REPO / "setup.py").read_text(encoding="utf-8") for extra in extras)


def test_what_is_copied_is_there() -> None:
    of_docker, of_apptainer = copied().values()
    assert of_docker == of_apptainer and all((REPO / name).exists() for name in of_docker)
    ignored = (REPO / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[1] == "*" and {line[1:] for line in ignored if line.startswith("!")} == of_docker
    (folder,) = {rest for name, rest in OF_DOCKER if name == "WORKDIR" and rest.startswith("/opt/")}
    for line in OF_APPTAINER["files"].split("\n"):
        name, _, target = line.strip().partition(" ")
        assert not name or target == f"{folder}/{name}"
    assert f"cd {folder}" in COMMANDS["mvptr.def"]


def test_no_address_is_in_them() -> None:
    for text in (DOCKERFILE, DEFINITION):
        assert "://" not in text and not re.search(r"\b[\w-]+\.(?:com|org|io|net|edu|local)\b", text)


@pytest.mark.timeout(180)
def test_the_copied_files_make_the_package(tmp_path: Path) -> None:
    for name in copied()["Dockerfile"]:
        source = REPO / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / "copy" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (tmp_path / "copy").mkdir(exist_ok=True)
            shutil.copy(source, tmp_path / "copy" / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."]
    done = subprocess.run(command, cwd=tmp_path / "copy", capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("mvptr_ds-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {"mvptr_ds/train.py", "mvptr_ds/py.typed", "mvptr_ds/configs/base.yaml"} <= held


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(["hadolint", str(REPO / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
