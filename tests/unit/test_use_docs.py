"""The Python examples of docs/use.md and docs/export.md, run in their order in a folder that holds what they name."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvptr_ds.exporting.exported_folder import export_model
from tests.conftest import REPO
from tests.support.finetuned_folder import ANSWERS, finetuned_folder
from tests.support.untrained_folder import untrained_folder

BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def examples(page: str) -> list[str]:
    found = BLOCK.findall((REPO / "docs" / page).read_text(encoding="utf-8"))
    return [textwrap.dedent(code) for _, code in found]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    made = untrained_folder(folder / "made", "image")
    (folder / "runs").mkdir()
    for task in ("vqa", "entailment", "referring"):
        finetuned_folder(made, task, folder / "runs" / task)
    made.folder.rename(folder / "runs/mine")
    export_model(folder / "runs/mine", folder / "exported")
    for name in ("street", "park"):
        pixels = np.random.default_rng(len(name)).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize(("page", "num"), [("use.md", 10), ("export.md", 1)])
def test_the_examples_run(
    page: str, num: int, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    found = examples(page)
    assert len(found) == num
    names: dict[str, object] = {}
    for code in found:
        *statements, last = re.split(r"\n(?=\S)", code.strip())
        exec("\n".join(statements), names)
        if not re.match(r"\w+ = |\w+\.\w+ = |for |import |from ", last):
            shown = eval(last, names)
            assert isinstance(shown, torch.Tensor) and bool(torch.isfinite(shown).all()), last
        else:
            exec(last, names)
    if page == "use.md":
        said = capsys.readouterr().out
        assert "car red (" in said and "dog (" in said
        answers = [line.rpartition(" ")[0] for line in said.splitlines()]
        assert len([answer for answer in answers if answer in ANSWERS]) == 3
