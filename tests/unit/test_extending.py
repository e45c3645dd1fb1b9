"""The examples of docs/extending.md, applied to a copy of the package as the page says, and run there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.support.labelled_shards import small_run, write_labelled

PAGE = (REPO / "docs/extending.md").read_text(encoding="utf-8")
EDIT = re.compile(
    r"^ *(?:(?P<end>At the end of) `(?P<end_path>[^`]+)`"
    r"|In `(?P<path>[^`]+)`, (?P<where>above|below) `(?P<anchor>[^`]+)`"
    r"|The new file `(?P<new_path>[^`]+)`):\n\n(?P<fence> *)```python\n(?P<code>.*?)\n(?P=fence)```"
    r"|^ *In `(?P<in_path>[^`]+)`, replace `(?P<old>[^`]+)` by `(?P<new>[^`]+)`\.",
    re.MULTILINE | re.DOTALL,
)
CLASSES = ("poor", "fair", "good")
NUM_RECORDS, LIMIT_S = 16, 200


def apply(edit: re.Match[str], tree: Path) -> None:
    """Does what one sentence of the page says."""
    if edit["in_path"]:
        path, text = tree / edit["in_path"], (tree / edit["in_path"]).read_text(encoding="utf-8")
        assert text.count(edit["old"]) == 1, f"{edit['in_path']} holds {edit['old']} {text.count(edit['old'])} times"
        path.write_text(text.replace(edit["old"], edit["new"]), encoding="utf-8")
        return
    indent = len(edit["fence"])
    code = "".join(line[indent:] if line.strip() else line for line in edit["code"].splitlines(keepends=True)) + "\n"
    if edit["new_path"]:
        (tree / edit["new_path"]).write_text(code, encoding="utf-8")
        return
    path = tree / (edit["end_path"] or edit["path"])
    text = path.read_text(encoding="utf-8")
    if edit["end"]:
        path.write_text(f"{text}\n\n{code}", encoding="utf-8")
        return
    lines = text.splitlines(keepends=True)
    found = [number for number, line in enumerate(lines) if line.rstrip("\n").strip() == edit["anchor"].strip()]
    assert len(found) == 1, f"{edit['path']} has {len(found)} lines {edit['anchor']!r}"
    at = found[0] + (edit["where"] == "below")
    if edit["anchor"].startswith("class ") and lines[at].lstrip().startswith('"""'):
        at += 1 + (not lines[at].rstrip().endswith('"""'))  # fields stand below the docstring
    path.write_text("".join([*lines[:at], code, *lines[at:]]), encoding="utf-8")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with every example of the page."""
    folder = tmp_path_factory.mktemp("extended") / "repo"
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("mvptr_ds", "tests", "tools", "ds_configs"):
        shutil.copytree(REPO / name, folder / name, ignore=ignored)
    shutil.copy(REPO / "pyproject.toml", folder)
    edits = list(EDIT.finditer(PAGE))
    assert len(edits) >= 11
    for edit in edits:
        apply(edit, folder)
    return folder


def run(tree: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.timeout(LIMIT_S + 60)
def test_the_objective_of_the_page_passes_its_own_tests_and_the_general_ones(tree: Path) -> None:
    general = [
        "tests/unit/test_metrics.py::test_every_objective_has_its_targets_named",
        "tests/unit/test_preflight_records.py::test_what_objectives_need_is_what_is_looked_for",
        "tests/unit/test_tasks.py",
        "tests/unit/test_task.py::test_the_engine_gets_exactly_what_the_objectives_reach",
    ]
    said = run(
        tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not wpg or vsc_sigmoid",
        "tests/unit/test_vsc_sigmoid.py", "tests/unit/test_metrics.py::test_tags_of_a_sample", *general,
    )  # fmt: skip
    assert " passed" in said and "failed" not in said, said


@pytest.fixture(scope="module")
def trained(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The page's task, trained for two steps from a stage of pre-training and evaluated, and what that printed."""
    folder = tmp_path_factory.mktemp("quality")
    labels = [{"quality": CLASSES[n % 3], "kind": ("short", "long")[n % 2]} for n in range(NUM_RECORDS)]
    shards = write_labelled(folder / "shards", labels)
    small = small_run(shards)
    names = ("mcr_tags", "mlm", "vsc", "wpg", "itm", "vsc_sigmoid")
    weights = [f"joint.weights.{name}={int(name in ('mlm', 'vsc_sigmoid'))}" for name in names]
    train = [str(tree / "mvptr_ds/train.py"), "--config", "demo", *small]
    run(tree, *train, f"run.dir={folder / 'before'}", "run.stages=[joint]", "joint.max_steps=2", *weights)
    said = run(
        tree, *train, f"run.dir={folder / 'run'}", "run.stages=[quality]", f"run.init_from={folder / 'before'}",
        "quality.max_steps=2", "train.evaluate_every_steps=2",
    )  # fmt: skip
    said += run(tree, str(tree / "mvptr_ds/eval.py"), str(folder / "run"))
    return folder / "run/quality", said


@pytest.mark.timeout(2 * LIMIT_S)
def test_the_task_of_the_page_trains_evaluates_and_keeps_its_head(trained: tuple[Path, str]) -> None:
    folder, said = trained
    assert "quality starts with fresh weights for head.weight, head.bias" in said, said
    (model,) = folder.glob("checkpoints/step-00000002/model")
    assert (model / "head.safetensors").is_file()
    assert json.loads((model / "task.json").read_text(encoding="utf-8"))["classes"] == list(CLASSES)
    lines = reports(folder)
    assert 0 < lines[0]["loss/quality"] < 5
    scores = [line for line in lines if "eval/quality/score" in line]
    assert len(scores) == 1
    score, short, long = (scores[0][f"eval/quality/{name}"] for name in ("score", "kind/short", "kind/long"))
    assert score == pytest.approx((short + long) / 2) and (NUM_RECORDS * score * 2) % 1 == pytest.approx(0)
    rows = [re.split(r"  +", line) for line in said.splitlines()]  # of eval.py
    assert ["the model", *(f"{100 * share:.1f}" for share in (score, long, short))] in rows, said


def test_the_metric_of_the_page_is_reported_and_every_key_stands_in_its_table(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    keys = {key for line in (*reports(folder), *reports(folder.parents[1] / "before/joint")) for key in line}
    per_sample = [line["data/tags_per_sample"] for line in reports(folder) if "data/tags_per_sample" in line]
    assert len(per_sample) == 2 and all(0 < number <= 2 for number in per_sample)  # of two; some are withheld
    table = PAGE[PAGE.index("### Keys of metrics.jsonl") :]
    first_cells = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    patterns = [
        re.sub("NAME|PHASE|TASK|KIND", r"\\w+", re.escape(name)).replace(r"\.\.\.", ".+")
        for name in re.findall(r"`([^`]+)`", first_cells)
    ]
    assert {"loss/vsc_sigmoid", "samples_per_s"} <= keys
    unnamed = {key for key in keys if not any(re.fullmatch(pattern, key) for pattern in patterns)}
    assert unnamed == {"data/tags_per_sample"}  # the example's own, which its third step adds


def reports(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
