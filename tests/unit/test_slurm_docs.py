"""slurm/README.md names every variable that the scripts read, and no other; the scripts parse."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.conftest import REPO

FOLDER = REPO / "slurm"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
SET_BY_SLURM = re.compile(r"SLURM_|TMPDIR$")
NOT_FOR_USERS = {"PYTHONUNBUFFERED", "TOKENIZERS_PARALLELISM", "PWD", "BASH_SOURCE"}
READ_BY_PYTHON = {"MASTER_ADDR", "MASTER_PORT"}


def variables() -> set[str]:
    """Those with a default: `${NAME:-...}` and `${NAME-}`."""
    found = {name for path in SCRIPTS for name in re.findall(r"\$\{([A-Z_]+):?-", path.read_text(encoding="utf-8"))}
    return {name for name in found if not SET_BY_SLURM.match(name)} - NOT_FOR_USERS


def test_every_variable_is_documented() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row)}
    in_a_cell = {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR"}  # of LOCAL_CACHE
    assert documented == (variables() - in_a_cell) | READ_BY_PYTHON
    assert all(f"`{name}`" in text for name in in_a_cell)


@pytest.mark.parametrize("name", [path.name for path in SCRIPTS])
def test_a_script_parses(name: str) -> None:
    done = subprocess.run(["bash", "-n", str(FOLDER / name)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
