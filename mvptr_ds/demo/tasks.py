"""Builds the shards of a downstream task on demo shards: texts alone, which take the pictures of the demo's scenes.

OUT/train/       items about the first training scenes of the demo, in records with the keys of the scenes
OUT/held_out/    items about its held-out scenes
OUT/answers.json (vqa) the answers of the training items, in the order in which they first appear
OUT/task.json    the arguments; written last, so that a folder that has it is complete

Used with `data.sidecars=[DEMO/train] data.held_out_sidecars=[DEMO/held_out]`, which bring pictures and regions.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.schema import Caption, Record
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.demo.build import GENERATOR_VERSION, MARKER, RECORDS_PER_SHARD, check_source, load_source
from mvptr_ds.demo.descriptions import make_descriptions
from mvptr_ds.demo.expressions import make_expressions
from mvptr_ds.demo.items import Item
from mvptr_ds.demo.marker import was_made, write_marker
from mvptr_ds.demo.plan import Concept, SplitRule
from mvptr_ds.demo.questions import answer_of, make_questions
from mvptr_ds.demo.scene import SPLITS, Scene, Source, make_scene
from mvptr_ds.demo.statements import make_statements
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.atomic import replacing_folder
from mvptr_ds.user_io.progress import progress_bar
from mvptr_ds.user_io.user_files import parse_json, read_text

logger = logging.getLogger(__name__)

Task = Literal["retrieval", "vqa", "entailment", "referring"]
TASK_VERSION = 2  # raise it with every change of the items
TASK_MARKER = "task.json"
_NAMES = {
    "version": "version of the items",
    "task": "task",
    "num_train_scenes": "training scenes",
    "num_held_out_scenes": "held-out scenes",
    "seed": "seed",
    "demo": "demo shards",
}
_MAKERS: dict[Task, Callable[[Sequence[Scene], frozenset[Concept], int], list[Item]]] = {
    "retrieval": make_descriptions,
    "vqa": make_questions,
    "entailment": make_statements,
    "referring": make_expressions,
}


def make_items(task: Task, scenes: Sequence[Scene], known: frozenset[Concept], seed: int) -> list[Item]:
    """Returns the items of a task about scenes, a function of its arguments.

    Args:
        known: the concepts that captions of the training scenes use (`known_concepts`).
    """
    return _MAKERS[task](scenes, known, seed)


def build_task_shards(
    out_dir: str | Path,
    demo_folder: str | Path,
    task: Task,
    num_train_scenes: int,
    seed: int,
    num_held_out_scenes: int | None = None,
) -> None:
    """Builds both splits into `out_dir`; returns at once when they are there, made with the same arguments.

    The folder appears whole or not at all.

    Args:
        demo_folder: demo shards of this version, which the scenes are compared with.
        num_train_scenes: the items for training are about so many of the first training scenes.
        num_held_out_scenes: the others are about so many of the first held-out scenes; None: about all.

    Raises:
        DataError: as `task_shards_are_there`, or the demo shards hold other scenes than this version draws.
    """
    out_dir, demo_folder = Path(out_dir), Path(demo_folder)
    if task_shards_are_there(out_dir, demo_folder, task, num_train_scenes, seed, num_held_out_scenes):
        logger.info("task shards are there: %s (%s, %d training scenes)", out_dir, task, num_train_scenes)
        return
    demo = _demo_arguments(demo_folder)
    check_source(demo["source"])
    source = load_source(demo["source"])
    known = known_concepts(demo_folder)
    arguments = _arguments(demo, task, num_train_scenes, num_held_out_scenes, seed)
    counts = {SPLITS[0]: num_train_scenes, SPLITS[1]: arguments["num_held_out_scenes"]}
    num_items = {}
    with replacing_folder(out_dir) as partial:
        for split, num_scenes in counts.items():
            rule = SplitRule(int(demo["seed"]), None if split == SPLITS[0] else known)
            scenes = remake_scenes(demo_folder / split, source, rule, num_scenes)
            items = make_items(task, scenes, known, seed)
            if not items:
                raise DataError(f"{num_scenes} scenes of {demo_folder / split} give no item of {task}: take more")
            write_shards(partial / split, _records(scenes, items), RECORDS_PER_SHARD)
            num_items[split] = len(items)
            if task == "vqa" and split == SPLITS[0]:
                answers = list(dict.fromkeys(answer_of(item) for item in items))
                (partial / "answers.json").write_text(json.dumps(answers) + "\n", encoding="utf-8")
        write_marker(partial, TASK_MARKER, {**arguments, "num_items": num_items})
    logger.info("task shards built: %s (%s, items: %s)", out_dir, task, num_items)


def task_shards_are_there(
    out_dir: str | Path,
    demo_folder: str | Path,
    task: Task,
    num_train_scenes: int,
    seed: int,
    num_held_out_scenes: int | None = None,
) -> bool:
    """Returns whether `out_dir` holds the task shards of these arguments already; False without demo shards.

    Raises:
        DataError: unknown task, fewer than 2 scenes of a split or more than the demo has, or a demo of another version.
        FolderTakenError: `out_dir` holds something else, or task shards of other arguments.
    """
    if task not in _MAKERS:
        raise DataError(f"demo task is {task!r}, expected one of {', '.join(_MAKERS)}")
    demo = _demo_arguments(Path(demo_folder))
    arguments = _arguments(demo, task, num_train_scenes, num_held_out_scenes, seed)
    for split in SPLITS:
        num, there, what = arguments[f"num_{split}_scenes"], demo[f"num_{split}"], split.replace("_", "-")
        what = "training" if split == SPLITS[0] else what
        if num < 2:
            raise DataError(f"{num} {what} scenes: items come from pairs of scenes, so take at least 2")
        if num > there:
            raise DataError(
                f"{num} {what} scenes are asked for, but {demo_folder} holds {there}; take fewer, or build larger demo "
                "shards"
            )
    return was_made(Path(out_dir), TASK_MARKER, arguments, "task shards", _NAMES)


def known_concepts(demo_folder: str | Path) -> frozenset[Concept]:
    """Returns the concepts that the training captions of demo shards use: the pairs in their phrase vocabulary.

    Raises:
        DataError: the vocabularies are missing, or not those of the demo shards.
    """
    folder = Path(demo_folder)
    vocab = PhraseVocab.load(folder / "phrase_vocab.json", WordPiece(str(folder / "word_vocab.txt")))
    known = frozenset((words[0], words[1]) for words in vocab.tuples if len(words) == 2)
    num_known = _demo_arguments(folder).get("num_known_concepts")
    if len(known) != num_known:
        raise DataError(
            f"{folder / 'phrase_vocab.json'} holds {len(known)} concepts, but the demo was built with {num_known}; "
            "build the demo shards again"
        )
    return known


def remake_scenes(folder: Path, source: Source, rule: SplitRule, num_scenes: int) -> list[Scene]:
    """Draws the first scenes of a split of demo shards anew, without keeping their pixels.

    Raises:
        DataError: a record of the folder is not the one of its scene.
    """
    index = Index.open(folder)
    no_pixels = np.zeros((0, 0), dtype=np.uint8)
    scenes = []
    for number in progress_bar(range(num_scenes), desc=f"scenes of {folder.name}", unit="scene"):
        scene = make_scene(source, rule, number)
        if index.describe(index.place(number))[0] != scene.record:
            raise DataError(
                f"record {scene.key} of {folder} is not the scene that this version draws: build the demo shards again"
            )
        scenes.append(replace(scene, image_HW3=no_pixels, owner_HW=no_pixels))
    return scenes


def _demo_arguments(folder: Path) -> dict[str, Any]:
    path = folder / MARKER
    if not path.is_file():
        raise DataError(f"{folder} holds no demo shards ({MARKER} is missing): build them first")
    demo = parse_json(read_text(path), str(path))
    if demo.get("generator") != GENERATOR_VERSION:
        raise DataError(
            f"{folder} was built by version {demo.get('generator')} of the generator, and this is {GENERATOR_VERSION}: "
            "build the demo shards again, in another folder"
        )
    return dict(demo)


def _arguments(
    demo: dict[str, Any], task: Task, num_train_scenes: int, num_held_out_scenes: int | None, seed: int
) -> dict[str, Any]:
    return {
        "version": TASK_VERSION,
        "task": task,
        "num_train_scenes": num_train_scenes,
        "num_held_out_scenes": demo["num_held_out"] if num_held_out_scenes is None else num_held_out_scenes,
        "seed": seed,
        "demo": f"{demo['source']} of seed {demo['seed']}, {demo['num_train']} + {demo['num_held_out']} scenes",
    }


def _records(scenes: Sequence[Scene], items: Sequence[Item]) -> Iterator[tuple[str, Record, dict[str, bytes]]]:
    """Yields a text-only record for each scene that has items, in the order of the scenes."""
    captions: dict[int, list[Caption]] = defaultdict(list)
    for item in items:
        captions[item.scene].append(item.caption)
    for number, scene in enumerate(scenes):
        if number in captions:
            yield scene.key, Record(scene.key, 0, 0, tuple(captions[number])), {}
