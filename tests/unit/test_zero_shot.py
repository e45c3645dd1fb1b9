"""Zero-shot classification: planted states give known scores, a folder and shards the same, and damage is named."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mvptr_ds
from mvptr_ds.benchmarks.labelled import LabelledPicture, LabelledPictures, open_labelled, read_class_names
from mvptr_ds.benchmarks.zero_shot import TEMPLATES, classify, prompt, read_templates, table
from mvptr_ds.data.schema import Caption, Record, Region
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.errors import DataError, PassingError
from mvptr_ds.inference import Picture, TrainedModel
from tests.support.labelled_shards import write_labelled
from tests.support.tools import run_tool
from tests.support.untrained_folder import Untrained, untrained_folder

KINDS = ("car", "dog", "hot_dog", "pear", "tree", "zebra")
TWO = ("a picture of a {}.", "there is a {c}.")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Untrained:
    return untrained_folder(tmp_path_factory.mktemp("image"), "image")


@pytest.fixture(scope="module")
def model(untrained: Untrained) -> TrainedModel:
    return mvptr_ds.load(untrained.folder, device="cpu")


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def class_folder(folder: Path, kinds: Sequence[str] = KINDS, num: int = 3) -> Path:
    for number, kind in enumerate(kinds):
        (folder / kind / "deeper").mkdir(parents=True)
        for of_kind in range(num):
            below = "deeper" if of_kind == 0 else "."
            (folder / kind / below / f"{of_kind}.png").write_bytes(png(10 * number + of_kind))
    (folder / ".cache").mkdir()
    (folder / "notes.txt").write_text("no class")
    return folder


def class_shards(folder: Path, labels: Sequence[Any], content: Any = png, label: str = "class") -> Path:
    """One picture for each label, in this order; two captions, of which one has the label."""
    items = (
        (
            f"{number:04d}",
            Record(str(number), 30, 20, (Caption("a picture"), Caption("another one", (), {label: one}))),
            {"png": content(number)},
        )
        for number, one in enumerate(labels)
    )
    write_shards(folder, items, 4)
    return folder


class Planted:
    """Gives each text the direction of its last word, and each picture the state that stands in its `image`."""

    batch_size = 2
    words = ("ant", "bee", "cow", "doe", "elk", "fox")

    def embed_text(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.eye(len(self.words))[[self.words.index(text.split()[-1]) for text in texts]]

    def embed_image(self, pictures: Any) -> torch.Tensor:
        given = [pictures] if isinstance(pictures, Picture) else pictures
        for number, picture in enumerate(given):
            if isinstance(picture.image, DataError):
                raise type(picture.image)(f"picture {number} of {len(given)}: {picture.image}")
        return torch.tensor([picture.image for picture in given])


def planted(states: Sequence[Any], labels: Sequence[int], classes: Sequence[str] = Planted.words) -> Any:
    pictures = [
        LabelledPicture(f"p{number}", label, lambda state=state: Picture(state))  # type: ignore[misc]
        for number, (state, label) in enumerate(zip(states, labels, strict=True))
    ]
    return classify(Planted(), LabelledPictures(tuple(classes), pictures), ["a {}"])  # type: ignore[arg-type]


def test_planted_states_give_known_scores() -> None:
    falling = [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    scores = planted([falling] * 8, [0, 0, 0, 1, 4, 4, 5, 5])
    assert scores.metrics == {"acc1": 3 / 8, "acc5": 6 / 8, "mean_per_class_recall": 1 / 4}
    assert [tuple(one) for one in scores.classes] == [
        ("ant", 3, 1.0), ("bee", 1, 0.0), ("cow", 0, None), ("doe", 0, None), ("elk", 2, 0.0), ("fox", 2, 0.0)
    ]  # fmt: skip
    assert scores.num_pictures == 8 and scores.unreadable == []
    shown = table(scores).splitlines()
    assert shown[0] == "zero-shot: 8 pictures, 6 classes, 1 template; shares in %"
    assert shown[3].split() == ["all", "pictures", "8", "37.5", "75.0"]
    assert shown[5].split() == ["chance", "16.7", "83.3"]
    assert shown[-1].split() == ["doe", "0", "-"]


@pytest.mark.parametrize("state", [[1.0] * 6, [float("nan")] * 6])
def test_a_constant_or_no_score_earns_nothing(state: list[float]) -> None:
    scores = planted([state, state], [0, 5])
    assert (scores.top1, scores.top5) == (0.0, 0.0)


def test_below_five_classes_there_is_no_top_5() -> None:
    scores = planted([[0.1, 0.9, 0, 0, 0, 0]], [1], Planted.words[:4])
    assert (scores.top1, scores.top5) == (1.0, None)
    assert table(scores).splitlines()[3].split()[-1] == "-"


def test_pictures_that_cannot_be_read_are_left_out_and_named() -> None:
    good = [0.9, 0.1, 0, 0, 0, 0]
    bad = DataError("it is cut")

    scores = planted([good, bad, bad, bad, good], [0, 0, 1, 1, 1])
    assert (scores.num_pictures, scores.top1) == (2, 0.5)
    assert scores.unreadable == [("p1", "it is cut"), ("p2", "it is cut"), ("p3", "it is cut")]
    assert "  p2: it is cut" in table(scores).splitlines()
    with pytest.raises(DataError, match=r"none of the 2 pictures can be read; p0: it is cut"):
        planted([bad, bad], [0, 0])
    with pytest.raises(PassingError):
        planted([good, PassingError("storage is away")], [0, 0])


def test_a_class_is_the_normalised_mean_of_its_templates(model: TrainedModel, tmp_path: Path) -> None:
    folder = class_folder(tmp_path)
    given = open_labelled(folder)
    assert given.classes == KINDS
    assert [one.name for one in given.pictures[:3]] == ["car/1.png", "car/2.png", "car/deeper/0.png"]
    texts_CTD = model.embed_text([t.format(k.replace("_", " "), c=k.replace("_", " ")) for k in KINDS for t in TWO])
    states_CD = torch.nn.functional.normalize(texts_CTD.unflatten(0, (6, 2)).mean(1), dim=-1)
    paths = [folder / one.name for one in given.pictures]
    order_NC = (model.embed_image(paths) @ states_CD.T).argsort(dim=1, descending=True)
    hits_NC = order_NC == torch.tensor([one.label for one in given.pictures])[:, None]
    scores = classify(model, given, TWO)
    assert scores.top1 == pytest.approx(hits_NC[:, 0].float().mean().item(), abs=1e-6)
    assert scores.top5 == pytest.approx(hits_NC[:, :5].any(1).float().mean().item(), abs=1e-6)
    names = [kind.replace("_", " ") for kind in KINDS]
    chosen = model.classify(paths, names, TEMPLATES).argmax(1)
    right = (chosen == torch.tensor([one.label for one in given.pictures])).float().mean().item()
    assert classify(model, given).top1 == pytest.approx(right, abs=1e-6)


def test_folder_and_shards_give_the_same(model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = class_folder(tmp_path / "folder")
    given = open_labelled(folder)
    contents = [(folder / one.name).read_bytes() for one in given.pictures]
    labels = [KINDS[one.label] for one in given.pictures]
    shards = class_shards(tmp_path / "shards", labels, contents.__getitem__, "kind")
    of_folder = classify(model, given)
    monkeypatch.setattr(model, "batch_size", 4)
    of_shards = classify(model, open_labelled(shards, "kind"))
    assert of_shards == of_folder
    numbers = class_shards(tmp_path / "numbers", [KINDS.index(one) for one in labels], contents.__getitem__)
    assert classify(model, open_labelled(numbers, names=KINDS)) == of_folder


def test_regions_and_features_of_shards_are_used(tmp_path: Path) -> None:
    made = untrained_folder(tmp_path / "features", "features")
    given = open_labelled(write_labelled(tmp_path / "shards", [{"class": "dog"}, {"class": "car"}, {"class": "dog"}]))
    read = given.pictures[0].read()
    assert read.boxes == [(0.0, 0.0, 8.0, 8.0), (1.0, 1.0, 4.0, 4.0)] and read.tags == ["dog", "cat"]
    assert read.image is None and read.size == (8, 8) and np.asarray(read.features).shape == (2, 5)
    scores = classify(mvptr_ds.load(made.folder, device="cpu"), given)
    assert [one[:2] for one in scores.classes] == [("car", 1), ("dog", 2)] and scores.unreadable == []


def test_what_has_no_class_is_refused(tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "folder", KINDS[:2])
    with pytest.raises(DataError, match="3 names of classes for the 2 folders"):
        open_labelled(folder, names=("a", "b", "c"))
    assert open_labelled(folder, names=("A car", "A dog")).classes == ("A car", "A dog")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no folder with pictures"):
        open_labelled(tmp_path / "empty")
    with pytest.raises(DataError, match="is no folder"):
        open_labelled(tmp_path / "absent")
    shards = class_shards(tmp_path / "shards", ["dog", "car"])
    with pytest.raises(DataError, match=r"record 0000 has no caption with labels\.kind"):
        open_labelled(shards, "kind")
    with pytest.raises(DataError, match=r"record 0001: labels\.class is 'car', none of the 1 classes"):
        open_labelled(shards, names=("dog",))
    for label in (3, True, ["dog"], " ", None):
        odd = class_shards(tmp_path / f"odd-{type(label).__name__}", ["dog", label])
        with pytest.raises(DataError, match=r"record 0001: labels\.class is .*, expected the name of a class"):
            open_labelled(odd)
    captions = (Caption("a", (), {"class": "dog"}), Caption("b", (), {"class": "car"}))
    record = Record("0", 30, 20, captions, (Region((0.0, 0.0, 5.0, 5.0), "dog"),))
    write_shards(tmp_path / "two", [("0", record, {"png": png(0)})], 4)
    with pytest.raises(DataError, match=r"record 0: its captions have different labels\.class"):
        open_labelled(tmp_path / "two")


def test_templates_and_names_from_files(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("a {} here.\n\n  {c} {brace}\n", encoding="utf-8")
    templates = read_templates(file)
    assert [prompt(template, r"hot_dog\1") for template in templates] == [r"a hot dog\1 here.", r"hot dog\1 {brace}"]
    assert read_class_names(file) == ("a {} here.", "{c} {brace}")
    file.write_text("a dog\n")
    with pytest.raises(DataError, match=r"'a dog' has no \{\} or \{c\}"):
        read_templates(file)
    file.write_text("\n")
    with pytest.raises(DataError, match="holds no template"):
        read_templates(file)
    with pytest.raises(DataError, match="names no class"):
        read_class_names(file)


def test_the_command(untrained: Untrained, tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "pictures", KINDS[:4])
    (folder / "dog" / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "templates.txt").write_text("\n".join(TWO))
    (tmp_path / "names.txt").write_text("car\ndog\nsausage\npear\n")
    options = "--templates", tmp_path / "templates.txt", "--class-names", tmp_path / "names.txt", "--batch-size", "5"
    out = tmp_path / "new" / "scores.json"
    done = run_tool("zero_shot.py", untrained.folder, folder, *options, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("zero-shot: 12 pictures, 4 classes, 2 templates; shares in %\n")
    assert "left out, since they cannot be read: 1\n  dog/broken.jpg: the image cannot be decoded" in done.stdout
    written = json.loads(out.read_text())
    details = written.pop("details")
    metrics = written.pop("metrics")
    assert written == {
        "dataset": str(folder), "model": "mvptr", "pretrained": str(untrained.folder), "language": "en",
        "task": "zeroshot_classification",
    }  # fmt: skip
    assert set(metrics) == {"acc1", "acc5", "mean_per_class_recall"} and metrics["acc5"] is None
    found = [(one["name"], one["num_pictures"]) for one in details["classes"]]
    assert found == [("car", 3), ("dog", 3), ("sausage", 3), ("pear", 3)]
    assert list(details["unreadable"]) == ["dog/broken.jpg"]
    done = run_tool("zero_shot.py", untrained.folder, tmp_path / "absent")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
