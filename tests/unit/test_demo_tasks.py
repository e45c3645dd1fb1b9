"""Task shards of the demo: texts that take the pictures of the demo shards by key, and what builds them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from mvptr_ds import shard_folders
from mvptr_ds.builders import SampleNeeds, build_dataset, build_vocabs
from mvptr_ds.config import Config, load_config
from mvptr_ds.config_data import DataConfig
from mvptr_ds.corpus.validating.validation import validate
from mvptr_ds.data.schema import Record
from mvptr_ds.data.shards.index import Index
from mvptr_ds.demo import build, tasks
from mvptr_ds.demo.build import build_demo_shards
from mvptr_ds.demo.marker import FolderTakenError
from mvptr_ds.demo.plan import SplitRule
from mvptr_ds.demo.scene import SPLITS, make_scene
from mvptr_ds.demo.shapes import ShapesSource
from mvptr_ds.demo.tasks import Task, build_task_shards, known_concepts, make_items, remake_scenes
from mvptr_ds.errors import DataError

NUM_TRAIN, NUM_HELD_OUT, NUM_ASKED, SEED = 150, 40, 100, 2
LABELS: dict[Task, set[str]] = {
    "vqa": {"answers", "question_id", "kind"},
    "entailment": {"label", "pair_id", "kind"},
    "referring": {"box", "rivals", "id", "kind"},
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "shards"
    build_demo_shards(out, "shapes", NUM_TRAIN, NUM_HELD_OUT, seed=SEED, num_processes=1)
    return out


@pytest.fixture(scope="module")
def folders(demo: Path) -> dict[Task, Path]:
    out = {task: demo.parent / task for task in LABELS}
    for task, folder in out.items():
        build_task_shards(folder, demo, task, NUM_ASKED, seed=5)
    return out


def records(folder: Path) -> dict[str, Record]:
    index = Index.open(folder)
    places = [index.place(number) for number in range(index.num_records)]
    return {index.key_of(place): index.read(place)[0] for place in places}


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rule_of(split: str, demo: Path) -> SplitRule:
    return SplitRule(SEED, None if split == "train" else known_concepts(demo))


def test_known_concepts_are_those_that_the_demo_was_built_with(demo: Path) -> None:
    usage = build._Usage()
    for record in records(demo / "train").values():
        usage.add(record)
    assert known_concepts(demo) == usage.known_concepts() != frozenset()


@pytest.mark.parametrize("split", SPLITS)
def test_remade_scenes_are_those_of_the_stored_records(demo: Path, split: str) -> None:
    stored = records(demo / split)
    scenes = remake_scenes(demo / split, ShapesSource(), rule_of(split, demo), len(stored))
    assert {scene.key: scene.record for scene in scenes} == stored
    whole = make_scene(ShapesSource(), rule_of(split, demo), 7)
    assert scenes[7].objects == whole.objects and scenes[7].image_HW3.size == 0


@pytest.mark.parametrize("task", LABELS)
def test_the_shards_hold_the_items_of_their_scenes(demo: Path, folders: dict[Task, Path], task: Task) -> None:
    num_scenes = {"train": NUM_ASKED, "held_out": NUM_HELD_OUT}
    for split in SPLITS:
        found = records(folders[task] / split)
        scenes = remake_scenes(demo / split, ShapesSource(), rule_of(split, demo), num_scenes[split])
        items = make_items(task, scenes, known_concepts(demo), 5)
        assert list(found) == [s.key for n, s in enumerate(scenes) if any(item.scene == n for item in items)]
        for number, scene in enumerate(scenes):
            captions = tuple(item.caption for item in items if item.scene == number)
            assert not captions or found[scene.key] == Record(scene.key, 0, 0, captions)
        assert all(set(c.labels or {}) == LABELS[task] for record in found.values() for c in record.captions)
        assert validate(folders[task] / split).is_clean
    marker = json.loads((folders[task] / "task.json").read_text())
    assert marker["num_items"] == {split: len(Index.open(folders[task] / split)) for split in SPLITS}


def test_answers_are_those_of_training_by_first_appearance(folders: dict[Task, Path]) -> None:
    answers = json.loads((folders["vqa"] / "answers.json").read_text())
    captions = [c for record in records(folders["vqa"] / "train").values() for c in record.captions]
    captions.sort(key=lambda caption: caption.labels["question_id"])  # type: ignore[index]
    assert answers == list(dict.fromkeys(a for c in captions for a in c.labels["answers"]))  # type: ignore[index]
    assert {"yes", "no", "0", "2", "left of", "red"} <= set(answers)
    assert not (folders["entailment"] / "answers.json").exists()


def shared(demo: Path, folder: Path, **changes: object) -> DataConfig:
    data = load_config("demo").data
    return replace(
        data, demo_source=None, train=str(folder / "train"), held_out=str(folder / "held_out"),
        sidecars=[str(demo / "train")], held_out_sidecars=[str(demo / "held_out")],
        word_vocab=str(demo / "word_vocab.txt"), phrase_vocab=str(demo / "phrase_vocab.json"), **changes,
    )  # fmt: skip


@pytest.mark.parametrize("permute", [None, "picture"])
def test_samples_show_the_demo_pictures(
    demo: Path, folders: dict[Task, Path], tmp_path: Path, permute: str | None
) -> None:
    data = shared(demo, folders["referring"], permute_pictures=permute)
    index = shard_folders.open_held_out(data, tmp_path)
    assert index.num_text_only_samples == 0
    pictures = records(demo / "held_out")
    own = 0
    for number in range(index.num_records):
        place = index.place(number)
        record, members = index.read(place)
        assert members["jpg"][:2] == b"\xff\xd8" and (record.width, record.height) == (128, 128)
        boxes = [list(region.box) for region in record.regions]
        if permute is None:
            assert record.regions == pictures[index.key_of(place)].regions
            assert all(caption.labels["box"] in boxes for caption in record.captions)  # type: ignore[index]
        own += record.regions == pictures[index.key_of(place)].regions
    assert own == (index.num_records if permute is None else 0)
    config: Config = replace(load_config("demo"), data=data)
    needs = SampleNeeds(labels={"box": [0, 0, 1, 1]})
    dataset = build_dataset(config, build_vocabs(data), "referring", needs, 0, tmp_path)
    for sample in dataset.__getitems__(list(range(50))):
        assert sample.bad == () and sample.image_3HW is not None and sample.image_3HW.any()
        assert len(sample.labels["box"]) == 4 and 6 <= len(sample.region_geometry_R6) <= 10


def test_equal_arguments_give_equal_bytes_and_return_at_once(
    demo: Path, folders: dict[Task, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_task_shards(tmp_path / "again", demo, "vqa", NUM_ASKED, seed=5)
    assert digest(tmp_path / "again") == digest(folders["vqa"])
    assert [path.name for path in tmp_path.iterdir()] == ["again"]  # no partial folder is left
    monkeypatch.setattr(tasks, "load_source", lambda _: pytest.fail("built again"))
    build_task_shards(folders["vqa"], demo, "vqa", NUM_ASKED, seed=5)


def test_other_arguments_and_other_files_are_refused(demo: Path, folders: dict[Task, Path], tmp_path: Path) -> None:
    before = digest(folders["vqa"])
    others: list[tuple[Task, int, int, str]] = [
        ("entailment", NUM_ASKED, 5, "task vqa there, entailment here"),
        ("vqa", 90, 5, "training scenes 100 there, 90 here"),
        ("vqa", NUM_ASKED, 6, "seed 5 there, 6 here"),
    ]
    for task, num, seed, differ in others:
        with pytest.raises(FolderTakenError, match=differ):
            build_task_shards(folders["vqa"], demo, task, num, seed)
    with pytest.raises(FolderTakenError, match=f"held-out scenes {NUM_HELD_OUT} there, 7 here"):
        build_task_shards(folders["vqa"], demo, "vqa", NUM_ASKED, 5, num_held_out_scenes=7)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(FolderTakenError, match=r"taken holds other files and no task\.json"):
        build_task_shards(tmp_path / "taken", demo, "vqa", NUM_ASKED, 5)
    assert digest(folders["vqa"]) == before


def test_fewer_held_out_scenes_are_the_first_ones(demo: Path, tmp_path: Path) -> None:
    build_task_shards(tmp_path, demo, "vqa", NUM_ASKED, seed=5, num_held_out_scenes=12)
    assert set(records(tmp_path / "held_out")) <= set(list(records(demo / "held_out"))[:12])
    assert json.loads((tmp_path / "task.json").read_text())["num_held_out_scenes"] == 12


def test_what_cannot_be_built_is_told(demo: Path, tmp_path: Path) -> None:
    for num, message in ((151, "151 training scenes are asked for, but .* holds 150"), (1, "take at least 2")):
        with pytest.raises(DataError, match=message):
            build_task_shards(tmp_path / "out", demo, "vqa", num, 0)
    for num, message in (
        (NUM_HELD_OUT + 1, f"{NUM_HELD_OUT + 1} held-out scenes are asked for, but .* holds {NUM_HELD_OUT}"),
        (1, "1 held-out scenes: items come from pairs"),
    ):
        with pytest.raises(DataError, match=message):
            build_task_shards(tmp_path / "out", demo, "vqa", 9, 0, num)
    with pytest.raises(DataError, match="'captions', expected one of retrieval, vqa, entailment, referring"):
        build_task_shards(tmp_path / "out", demo, "captions", 9, 0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"holds no demo shards \(demo\.json is missing\)"):
        build_task_shards(tmp_path / "out", tmp_path, "vqa", 9, 0)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("train", "held_out", "phrase_vocab.json", "word_vocab.txt"):
        (other / name).symlink_to(demo / name)
    marker = json.loads((demo / "demo.json").read_text())
    for changes, message in (
        ({"generator": 1}, "built by version 1 of the generator, and this is 2: build the demo shards again"),
        ({"num_known_concepts": 1}, "concepts, but the demo was built with 1; build the demo shards again"),
        ({"seed": 3}, r"record train-000000 of .* is not the scene that this version draws"),
    ):
        (other / "demo.json").write_text(json.dumps(marker | changes))
        with pytest.raises(DataError, match=message):
            build_task_shards(tmp_path / "out", other, "vqa", 9, 0)
    assert not (tmp_path / "out").exists()


def test_the_configuration_builds_both(tmp_path: Path) -> None:
    demo, folder = tmp_path / "demo", tmp_path / "tasks" / "entailment"
    data = replace(
        shared(demo, folder), demo_source="shapes", demo_train_scenes=150, demo_held_out_scenes=30,
        demo_task="entailment", demo_task_scenes=60,
    )  # fmt: skip
    assert not shard_folders.demo_shards_are_there(data, 4)
    shard_folders.prepare_shards(data, 4, 1)
    assert shard_folders.demo_shards_are_there(data, 4)
    before = digest(tmp_path)
    shard_folders.prepare_shards(data, 4, 1)
    assert digest(tmp_path) == before
    build_task_shards(tmp_path / "other", demo, "entailment", 60, seed=4)
    assert digest(tmp_path / "other") == digest(folder)
    (index,) = shard_folders.open_sources(data, "entailment", True, tmp_path / "joins").values()
    assert {label["label"] for n in range(index.num_records) for label in labels_of(index.read(index.place(n))[0])} == {
        "entailment", "neutral", "contradiction"
    }  # fmt: skip
    with pytest.raises(
        DataError, match=r"data\.demo_task=entailment builds the shards of .*training scenes 60 there, 9"
    ):
        shard_folders.prepare_shards(replace(data, demo_task_scenes=9), 4, 1)


def labels_of(record: Record) -> list[dict[str, str]]:
    return [caption.labels or {} for caption in record.captions]
