"""Every Triton kernel compiled for A100 and H100, which need not be there: nothing spills, loads take 16 bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

pytest.importorskip("triton", reason="triton is not installed")
TOOL = REPO / "tools" / "bench" / "compile_kernels.py"


def compile_kernels(cache: Path, *args: str) -> list[dict[str, str | int]]:
    """Results of the tool, in a process where nothing is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(TOOL), *args]
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=850).stdout
    *lines, last = said.splitlines()
    rows: list[dict[str, str | int]] = json.loads(last)
    assert len(lines) == 2 + len(rows)
    return rows


@pytest.mark.timeout(600)  # two starts of torch, on a machine that may be busy
def test_a_kernel_is_compiled_and_alignment_decides_over_its_loads(tmp_path: Path) -> None:
    """The smallest kernel alone: the tool itself works, and finds loads that are not wide."""
    (aligned,) = compile_kernels(tmp_path, "--arch", "90", "--only", "sum_rows")
    assert aligned["name"] == "sum_rows" and aligned["spilled_bytes"] == 0 and aligned["wide_loads"] == 1
    (unaligned,) = compile_kernels(tmp_path, "--arch", "90", "--only", "sum_rows", "--unaligned")
    assert unaligned["wide_loads"] == 0 and unaligned["loads"] > aligned["loads"]


@pytest.mark.compiled
@pytest.mark.timeout(900)
def test_no_kernel_spills_and_all_load_16_bytes_at_a_time(tmp_path: Path) -> None:
    rows = compile_kernels(tmp_path)
    names = {str(row["name"]) for row in rows}
    assert len(rows) == 2 * len(names) == 28
    assert {name for name in names if "attention" in name} == {
        f"short_attention {way} {tile}" for way in ("forward", "backward") for tile in (32, 64, 128)
    }
    problems = [row for row in rows if row["spilled_bytes"] or not row["wide_loads"]]
    assert problems == []
    assert all(row["tensor_cores"] != "-" for row in rows if "attention" in str(row["name"]))
