"""Reads RefCOCO, RefCOCO+ and RefCOCOg: expressions that say which thing of a picture is meant, with its box.

Files are given together, in any order, and told apart by what they hold:

- refs: `refs(unc).p`, `refs(umd).p`, `refs(google).p`, or the same list as JSON. Each ref has a split, an `ann_id` and
  sentences: {"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent_id", "sent"}]}
- instances: `instances.json` of COCO's form, with the boxes and the pictures' names and sizes.
- lists: {"image" | "image_id", "text" | "sentence", "bbox": [x, y, w, h]} as other projects publish them, as one list
  (the file's name says the split) or by split: {"train": [...], "testA": [...]}. Boxes that a list lacks are looked up
  by `ref_id` in refs and instances, and so are splits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from mvptr_ds.corpus.resumable_jobs import Summary
from mvptr_ds.corpus.sources.boxes import BoxError, check_box, corners, picture_size
from mvptr_ds.corpus.sources.closed_pickle import read_closed_pickle
from mvptr_ds.corpus.sources.coco_names import coco_picture, subset_folder
from mvptr_ds.corpus.sources.rows import (
    UNREADABLE,
    Row,
    is_array,
    iter_array,
    iter_fields,
    number_or_name,
    size_of,
    whole,
)
from mvptr_ds.errors import DataError

NO_BOX = "row: no bbox, and no refs(unc).p and instances.json beside the list that say it"
SPLITS = ("train", "val", "testA", "testB", "test")
_IN_NAME = re.compile(r"(?:^|[^A-Za-z])(train|val|testA|testB|test)(?![A-Za-z])")
_NUMBER = re.compile(r"(\d{12})\.(?:jpg|jpeg|png)$", re.IGNORECASE)
_WRONG = (KeyError, TypeError, ValueError, AttributeError, IndexError)  # what an entry of another layout gives
_PICKLES = (".p", ".pkl", ".pickle")
_SUBSET = "train2014"  # all pictures of these sets are of it


class _Instances(NamedTuple):
    """What files of instances say: box and picture of each annotation, name and size of each picture."""

    boxes: dict[int, tuple[int, list[float]]]
    pictures: dict[int, tuple[str, int, int]]


@dataclass
class _Given:
    """The files of one call, by what they hold."""

    refs: list[Path] = field(default_factory=list)
    instances: list[Path] = field(default_factory=list)
    lists: list[tuple[Path, str | None]] = field(default_factory=list)  # None: the file is one array


def read_refcoco(sources: Sequence[Path], images: Path | None, summary: Summary) -> Iterator[Row]:
    """Yields a row for each expression, with box and id as labels, in the splits of the source.

    A box is cut to its picture; one outside it or without an area is counted and left out. Where lists are given, the
    refs serve for their boxes and splits alone.

    Raises:
        DataError: a file is none of those above, refs come without instances, or a pickle holds more than plain data.
    """
    given = _sort(sources)
    if given.refs and not given.instances:
        raise DataError(f"{given.refs[0]} has no boxes; give the instances.json that stands beside it, too")
    instances = _read_instances(given.instances, summary)
    refs = chain.from_iterable(_entries(path) for path in given.refs)
    if given.lists:
        yield from _rows_of_lists(given.lists, _refs_by_id(refs), instances, images, summary)
    elif given.refs:
        yield from _rows_of_refs(refs, instances, images, summary)
    else:
        raise DataError("there are boxes only; give refs(unc).p, or another file of expressions, beside instances.json")


def _sort(sources: Sequence[Path]) -> _Given:
    given = _Given()
    for path in sources:
        if path.suffix.lower() in _PICKLES:
            given.refs.append(path)
        elif is_array(path):
            first = next(iter_array(path), None)
            if isinstance(first, dict) and "sentences" in first:
                given.refs.append(path)
            else:
                given.lists.append((path, None))
        else:
            fields = [name for name, _ in iter_fields(path)]
            splits = [name for name in fields if name in SPLITS]
            if {"images", "annotations"} <= set(fields):
                given.instances.append(path)
            elif splits:
                given.lists += [(path, split) for split in splits]
            else:
                raise DataError(f"{path} is no file of refs, instances or expressions: it has the fields {fields[:20]}")
    return given


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields place and content of each ref of a pickle or of a JSON array."""
    if path.suffix.lower() in _PICKLES:
        refs = read_closed_pickle(path)
        if not isinstance(refs, list):
            raise DataError(f"{path} holds a {type(refs).__name__}, not the list of refs")
    else:
        refs = iter_array(path)
    for number, ref in enumerate(refs):
        yield f"{path.name}, [{number}]", ref


def _read_instances(paths: Sequence[Path], summary: Summary) -> _Instances:
    found = _Instances({}, {})
    for path in paths:
        for number, entry in enumerate(iter_array(path, "images")):
            try:
                found.pictures[whole(entry["id"])] = (str(entry["file_name"]), *size_of(entry))
            except _WRONG as error:
                summary.drop(UNREADABLE, f"{path.name}, images[{number}]: {error!r}")
        for number, entry in enumerate(iter_array(path, "annotations")):
            try:
                found.boxes[whole(entry["id"])] = (whole(entry["image_id"]), corners(entry["bbox"]))
            except _WRONG as error:
                summary.drop(UNREADABLE, f"{path.name}, annotations[{number}]: {error!r}")
    return found


def _rows_of_refs(
    refs: Iterator[tuple[str, Any]], instances: _Instances, images: Path | None, summary: Summary
) -> Iterator[Row]:
    folder = subset_folder(images, _SUBSET)
    for where, ref in refs:
        try:
            split, ann_id, image_id = ref["split"], whole(ref["ann_id"]), whole(ref["image_id"])
            texts = [(whole(sentence["sent_id"]), _text(sentence)) for sentence in ref["sentences"]]
            name = number_or_name(image_id)
            if split not in SPLITS:
                raise ValueError(f"split is {split!r:.80}, expected one of {', '.join(SPLITS)}")
            if ann_id not in instances.boxes or image_id not in instances.pictures:
                summary.drop("row: its box or picture is not in instances.json", f"{where}: {ann_id}", len(texts))
                continue
            box_of, box = instances.boxes[ann_id]
            file_name, *size = instances.pictures[image_id]
            if box_of != image_id:
                summary.drop("row: its box is of another picture", f"{where}: {ann_id}", len(texts))
                continue
            box = check_box(box, (size[0], size[1]), summary)
        except BoxError as error:
            summary.drop(error.reason, f"{where}: {error.detail}", len(texts))
            continue
        except _WRONG as error:
            summary.drop(UNREADABLE, f"{where}: {error!r}")
            continue
        labels = tuple({"box": box, "id": sent_id} for sent_id, _ in texts)
        yield Row(name, tuple(text for _, text in texts), f"{folder}{file_name}", size[0], size[1], split, labels)


def _text(entry: Mapping[str, Any]) -> str:
    text = next((entry[name] for name in ("sent", "text", "sentence", "raw") if name in entry), None)
    if not isinstance(text, str):
        raise TypeError(f"expression is {text!r:.80}, expected a text")
    return text


def _refs_by_id(refs: Iterator[tuple[str, Any]]) -> dict[int, tuple[str, int]]:
    """Returns split and `ann_id` of each ref by its id; those that say something else are left out."""
    found = {}
    for _, ref in refs:
        if isinstance(ref, dict):
            ref_id, ann_id, split = whole(ref.get("ref_id")), whole(ref.get("ann_id")), ref.get("split")
            if isinstance(ref_id, int) and isinstance(ann_id, int) and isinstance(split, str):
                found[ref_id] = (split, ann_id)
    return found


def _rows_of_lists(
    lists: Sequence[tuple[Path, str | None]],
    refs: Mapping[int, tuple[str, int]],
    instances: _Instances,
    images: Path | None,
    summary: Summary,
) -> Iterator[Row]:
    for path, named_split in lists:
        in_name = _IN_NAME.search(path.stem)
        by_name = named_split or (in_name[1] if in_name else None)
        for number, entry in enumerate(iter_array(path, named_split)):
            where = f"{path.name}, {named_split or ''}[{number}]"
            try:
                split, box = _split_and_box(entry, by_name, refs, instances)
                image_id, name, size = _picture(entry, instances, images)
                labels = {"box": check_box(box, size, summary), "id": _id(entry, f"{path.stem}-{number}")}
                row = Row(image_id, (_text(entry),), name, *size, split, (labels,))
            except BoxError as error:
                summary.drop(error.reason, f"{where}: {error.detail}")
            except DataError as error:
                raise DataError(f"{where} {error}") from error
            except _WRONG as error:
                summary.drop(UNREADABLE, f"{where}: {error!r}")
            else:
                yield row


def _split_and_box(
    entry: Mapping[str, Any], by_name: str | None, refs: Mapping[int, tuple[str, int]], instances: _Instances
) -> tuple[str, list[float]]:
    """Returns split and box of a list's entry: its own, else those of its ref.

    Raises:
        BoxError: neither says a box.
        DataError: neither says a split.
    """
    split, ann_id = refs.get(whole(entry.get("ref_id")), (entry.get("split", by_name), -1))
    if split not in SPLITS:
        raise DataError(f"has the split {split!r:.80}; name one of {', '.join(SPLITS)} in the file's name")
    if "bbox" in entry:
        return split, corners(entry["bbox"])
    if ann_id not in instances.boxes:
        raise BoxError(NO_BOX, f"fields {list(entry)[:10]}")
    return split, instances.boxes[ann_id][1]


def _id(entry: Mapping[str, Any], otherwise: str) -> int | str:
    """Returns the id of an expression; a ref has several, so that its id alone does not name one."""
    found = whole(next((entry[name] for name in ("sent_id", "id") if name in entry), otherwise))
    if isinstance(found, bool) or not isinstance(found, (int, str)):
        raise TypeError(f"id is {found!r:.80}, expected a number or a text")
    return found


def _picture(entry: Mapping[str, Any], instances: _Instances, images: Path | None) -> tuple[str, str, tuple[int, int]]:
    """Returns id, path and size of the picture of a list's entry, by its `image`, else by its number."""
    name, image_id = entry.get("image", entry.get("file_name")), whole(entry.get("image_id"))
    if isinstance(name, str):
        found = _NUMBER.search(name)
        image_id = int(found[1]) if found else name
    if isinstance(image_id, str) and image_id.isdecimal():
        image_id = int(image_id)
    if image_id is None:
        raise KeyError("image")
    known = instances.pictures.get(image_id)
    path = name if isinstance(name, str) else coco_picture(images, _SUBSET)(image_id)
    size = (known[1], known[2]) if known else picture_size(images, path)
    return number_or_name(image_id), path, size
