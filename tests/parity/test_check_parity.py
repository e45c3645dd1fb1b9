"""tools/check_parity.py passes on the published code's numbers, and fails on anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tools import run_tool


def test_every_tensor_loss_and_gradient_agrees(parity_folder: Path) -> None:
    result = run_tool("check_parity.py", parity_folder)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    names = set(load_file(parity_folder / "expected.safetensors"))
    reported = {line.split()[2] for line in lines if line.startswith("ok")}
    assert {n for n in names if n != "grad32.word_embeddings_rows"} <= reported
    assert lines[-1].endswith(" 0 failed")


def _edit(change: Callable[[dict[str, torch.Tensor]], None], file: str = "expected") -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / f"{file}.safetensors")
        change(tensors)
        save_file(tensors, folder / f"{file}.safetensors")

    return edit


def _without(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["sim_mat"]


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["pooled"][0, 0] = float("nan")


def _shift_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors["bert.mul_encoder.layer.0.attention.self.value.weight"][0, 0] += 1e-3


def _shift_loss(folder: Path) -> None:
    scalars = json.loads((folder / "expected.json").read_text())
    scalars["losses_fp64"]["wra"] += 1e-8
    (folder / "expected.json").write_text(json.dumps(scalars))


def _other_choice(folder: Path) -> None:
    scalars = json.loads((folder / "expected.json").read_text())
    scalars["random"]["wpg"][1]["neg_image"] = 4
    (folder / "expected.json").write_text(json.dumps(scalars))


SPOILED: dict[str, Callable[[Path], None]] = {
    "missing tensor": _edit(_without),
    "extra tensor": _edit(lambda t: t.update(surprise=torch.zeros(2))),
    "wrong shape": _edit(lambda t: t.update(pooled=t["pooled"][:5].clone())),
    "NaN": _edit(_nan),
    "changed weight": _edit(_shift_weight, "weights"),
    "changed loss": _shift_loss,
    "another random choice": _other_choice,
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_folder_fails(
    parity_folder: Path,
    tmp_path: Path,
    name: str,
) -> None:
    folder = tmp_path / "spoiled"
    shutil.copytree(parity_folder, folder)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    SPOILED[name](folder)
    result = run_tool("check_parity.py", folder)
    assert result.returncode == 1 and "FAIL" in result.stdout


def test_a_folder_without_numbers_is_refused(tmp_path: Path) -> None:
    result = run_tool("check_parity.py", tmp_path)
    assert result.returncode == 2
    assert "not a folder of recorded numbers" in result.stderr
