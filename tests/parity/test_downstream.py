"""tools/check_parity.py on the recorded numbers of the downstream tasks: all agree, and a spoiled folder fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mvptr_ds.parity import downstream, layouts, protocols, trajectories
from mvptr_ds.parity.comparison import Comparison
from mvptr_ds.parity.finetuned_cases import Recorded
from tests.support.golden_heads import GOLDEN, golden_heads
from tests.support.tools import run_tool

TASKS = ("retrieval", "vqa", "ve", "re")


@pytest.fixture(scope="module")
def folder(parity_folder: Path) -> Path:
    folder = parity_folder.with_name("downstream")
    if not folder.is_dir():
        pytest.skip("the recorded numbers of the downstream tasks are not here (downstream beside those of parity)")
    return folder


def test_every_tensor_of_every_case_agrees(folder: Path) -> None:
    result = run_tool("check_parity.py", folder)
    assert result.returncode == 0, "\n".join(line for line in result.stdout.splitlines() if "FAIL" in line)
    lines = result.stdout.splitlines()
    assert lines[-1].endswith(" 0 failed")
    reported = {line.removeprefix("ok").strip().rsplit(None, 1)[0].strip() for line in lines[:-1]}
    scalars = json.loads((folder / "expected.json").read_text("utf-8"))
    for name in (name for task in TASKS for name in load_file(folder / f"expected.{task}.safetensors")):
        case, _, tensor = name.partition(".")
        if tensor.endswith("word_embeddings.rows"):  # which rows the gradients are of
            continue
        expected = tensor.replace("float32.", "float32 ", 1)
        assert f"fp32 {case} {expected}" in reported, name
        assert f"fp64 {case} {expected}" in reported or "float32." in tensor, name
    for case, norms in scalars["grad_norms"].items():
        assert all(f"{dtype} {case} gradient norm {name}" in reported for name in norms for dtype in ("fp64", "fp32"))
    assert sum(line.startswith("trajectory") for line in reported) == 3 * (4 * 3 + 1)
    assert sum(line.startswith("layout") for line in reported) == 28 * 6
    assert sum(line.startswith("retrieval") for line in reported) == 4 * 4
    assert sum(line.startswith("vqa accuracy") for line in reported) == 7
    assert sum(line.startswith("boxes") for line in reported) == 6 + 2 * 6 * 3


# --- a change anywhere fails


def _tensors(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / f"{file}.safetensors")
        change(tensors)
        save_file(tensors, folder / f"{file}.safetensors")

    return edit


def _shift(name: str, by: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[0] += by

    return change


def _scalars(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        scalars = json.loads((folder / "expected.json").read_text("utf-8"))
        change(scalars)
        (folder / "expected.json").write_text(json.dumps(scalars), encoding="utf-8")

    return edit


def _gives_one(scalars: dict[str, Any]) -> None:
    scalars["grad_norms"]["vqa"]["bert.pooler.dense.weight"] = 0.0


def _other_dice(scalars: dict[str, Any]) -> None:
    scalars["random"]["retrieval"]["dice_index"] = [0, 1, 2, 3, 4, 5]


SPOILED: dict[str, tuple[Callable[[Path], None], str, str]] = {  # a change, a case, and a line of it that fails
    "a logit": (_tensors("expected.ve", _shift("ve.logits", 1e-8)), "ve", "fp64 ve logits"),
    "a gradient": (
        _tensors("expected.re", _shift("re_mod3.grad.classifier.bias", 1e-8)),
        "re_mod3",
        "fp64 re_mod3 grad.classifier.bias",
    ),
    "a weight of a head": (_tensors("heads", _shift("vqa_linear.classifier.bias", 1e-3)), "vqa_linear", "logits"),
    "a shared weight": (_tensors("weights", _shift("bert.pooler.dense.bias", 1e-3)), "retrieval", "pooled"),
    "a tag of the text": (_tensors("inputs", _shift("vqa.input_ids_a", 1)), "vqa_published", "logits"),
    "a missing tensor": (_tensors("expected.vqa", lambda t: t.pop("vqa.scores")), "vqa", "fp64 vqa scores"),
    "an extra tensor": (_tensors("expected.ve", lambda t: t.update({"ve.x": torch.zeros(2)})), "ve", "ve x"),
    "a tensor of no case": (_tensors("expected.ve", lambda t: t.update({"v.x": torch.zeros(2)})), "ve", "v.x"),
    "a loss": (_scalars(lambda s: s["losses"]["ve"].update(loss=[1.1, 1.1])), "ve", "fp64 ve recorded loss"),
    "a gradient that is not there": (_scalars(_gives_one), "vqa", "gradient norm bert.pooler.dense.weight"),
    "another choice": (_scalars(_other_dice), "retrieval", "hard_txt_index"),
}


def _check(function: Callable[..., None], *arguments: object) -> tuple[int, int]:
    comparison = Comparison(lambda line: None)
    function(comparison, *arguments)
    return comparison.lines, comparison.failed


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_folder_fails(folder: Path, tmp_path: Path, name: str) -> None:
    spoiled = tmp_path / "spoiled"
    shutil.copytree(folder, spoiled)
    for path in (spoiled, *spoiled.iterdir()):
        path.chmod(0o755)
    edit, case, line = SPOILED[name]
    edit(spoiled)
    said: list[str] = []
    comparison = Comparison(said.append)
    recorded = Recorded.read(spoiled)
    downstream.check_cases(comparison, spoiled, recorded, [of for of in recorded.cases() if of.name == case])
    failed = [text for text in said if text.startswith("FAIL")]
    assert comparison.failed == len(failed) and any(line in text for text in failed), failed[:9]


def test_spoiled_protocols_fail(folder: Path, tmp_path: Path) -> None:
    changes: dict[str, tuple[Callable[..., None], Callable[[Any], None]]] = {
        "retrieval_protocol": (protocols.check_retrieval, lambda c: c["reranked"]["text_to_image"]["ranks"].reverse()),
        "vqa_accuracy": (protocols.check_accuracy, lambda c: c["cases"][0].update(prediction="quite another")),
        "layouts": (layouts.check, lambda cases: cases[0]["tags_listed"].reverse()),
    }
    for name, (check, change) in changes.items():
        content = json.loads((folder / f"{name}.json").read_text("utf-8"))
        assert _check(check, folder / f"{name}.json")[1] == 0
        change(content)
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
        assert _check(check, tmp_path / name)[1] > 0, name


def test_another_optimiser_fails(folder: Path) -> None:
    recorded = Recorded.read(folder)
    assert _check(trajectories.check, recorded, "packed") == (39, 0)
    recorded.scalars["trajectories"] = {"ve": recorded.scalars["trajectories"]["ve"] | {"weight_decay": 0.06}}
    lines, failed = _check(trajectories.check, recorded, "packed")
    assert (lines, failed) == (13, 7)  # from the second step on: all but the learning rates


def test_the_golden_numbers_are_of_the_folder(folder: Path) -> None:
    assert json.loads(GOLDEN.read_text("utf-8")) == golden_heads(folder)
