"""The command `mvptr ask`: what a model of each task says of a picture, as text, JSON and a drawing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mvptr_ds
from mvptr_ds.inference.asking import Said, ask_any
from tests.support.finetuned_folder import finetuned_folder
from tests.support.tools import run_tool
from tests.support.untrained_folder import Untrained, untrained_folder

TEXTS = ["Is the dog red?", "A dog stands beside a car."]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Untrained:
    return untrained_folder(tmp_path_factory.mktemp("ask"), "image")


@pytest.fixture(scope="module")
def picture(made: Untrained) -> Path:
    path = made.folder.parent / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


def folder_of(made: Untrained, task: str, tmp_path: Path) -> Path:
    return made.folder if task == "matching" else finetuned_folder(made, task, tmp_path / task)


def wanted(task: str, folder: Path, picture: Path) -> list[list[dict[str, Any]]]:
    """The answers by the methods of the model itself."""
    model = mvptr_ds.load(folder, device="cpu")
    if task == "vqa":
        return [[{"answer": a, "probability": p} for a, p in one] for one in model.ask(picture, TEXTS, 3)]
    if task == "referring":
        found = model.find(picture, TEXTS, 3)
        return [[{"box": [round(s, 2) for s in b], "probability": p} for b, p in one] for one in found]
    if task == "entailment":
        return [
            [{"answer": name, "probability": p} for name, p in sorted(one.items(), key=lambda item: -item[1])]
            for one in model.entails(picture, TEXTS)
        ]
    chances = model.match(picture, TEXTS).tolist()
    return [[{"answer": "the text describes the picture", "probability": chance}] for chance in chances]


@pytest.mark.parametrize("task", ["vqa", "entailment", "referring", "matching"])
def test_a_model_is_asked_what_it_was_trained_for(task: str, made: Untrained, picture: Path, tmp_path: Path) -> None:
    folder, out = folder_of(made, task, tmp_path), tmp_path / "found.png"
    done = run_tool("ask.py", folder, picture, *TEXTS, "--num", "3", "--json", "--out", out)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    texts = content.pop("texts")
    assert content == {"model": str(folder), "task": task, "picture": str(picture)}
    assert [one["text"] for one in texts] == TEXTS
    assert [one["answers"] for one in texts] == wanted(task, folder, picture)
    with Image.open(out) as drawn:
        assert drawn.format == "PNG" and drawn.width > drawn.height > 300  # two panels side by side

    done = run_tool("ask.py", folder, picture, TEXTS[0], "--num", "1")
    lines = done.stdout.splitlines()
    best = wanted(task, folder, picture)[0][0]
    assert lines[0] == TEXTS[0] and lines[1].startswith(f"  {100 * best['probability']:5.1f} %  ")
    assert len(lines) == (4 if task == "entailment" else 2)


def test_scores_that_are_no_probabilities_are_called_scores(made: Untrained, picture: Path, tmp_path: Path) -> None:
    folder = finetuned_folder(made, "referring", tmp_path / "cosine", ["referring.score=cosine"])
    ((best, *_),) = ask_any(mvptr_ds.load(folder, device="cpu"), picture, ["a dog"], 2)
    assert not best.is_probability and best.as_json().keys() == {"box", "score"}
    assert str(Said("box 1 2 3 4", -1.25, False, (1.0, 2.0, 3.0, 4.0))) == " -1.250  box 1 2 3 4"
    assert str(Said("dog", 0.5)) == " 50.0 %  dog"


def test_what_is_wrong_is_said_in_one_line(made: Untrained, picture: Path, tmp_path: Path) -> None:
    for arguments, code, message in (
        ((made.folder, tmp_path / "no.png", "a dog"), 1, "picture 0 of 1: "),
        ((tmp_path / "nowhere", picture, "a dog"), 1, "nowhere is no folder"),
        ((made.folder, picture, " "), 1, "text 0 of 1 is ' ', expected words"),
        ((made.folder, picture, "a dog", "--num", "0"), 2, "0 is not at least 1"),
        ((made.folder, picture), 2, "the following arguments are required: TEXT"),
    ):
        done = run_tool("ask.py", *arguments)
        assert done.returncode == code and message in done.stderr.splitlines()[-1], done.stderr
        assert done.stdout == ""
