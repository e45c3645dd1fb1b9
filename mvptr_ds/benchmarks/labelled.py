"""Pictures with a class each: a folder of class folders, or shards whose captions carry a label."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mvptr_ds.data.features import read_features
from mvptr_ds.data.schema import Record
from mvptr_ds.data.shards.index import RecordLocation, SampleIndex
from mvptr_ds.data.shards.index_builder import ensure_index
from mvptr_ds.data.shards.index_format import MANIFEST_NAME
from mvptr_ds.data.shards.tar_reader import IMAGE_EXTENSIONS
from mvptr_ds.data.shards.urls import is_url
from mvptr_ds.errors import DataError
from mvptr_ds.inference.pictures import Picture
from mvptr_ds.user_io.user_files import read_text

LABEL = "class"
_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff",
)  # fmt: skip


class LabelledPicture(NamedTuple):
    """A picture with its class, read when it is asked for.

    Attributes:
        name: what messages call it.
        label: number of its class.
        read: returns it; raises DataError where it cannot be read.
    """

    name: str
    label: int
    read: Callable[[], Picture]


class LabelledPictures(NamedTuple):
    """Pictures and the names of their classes, in the order of the numbers."""

    classes: tuple[str, ...]
    pictures: list[LabelledPicture]


def read_class_names(path: Path) -> tuple[str, ...]:
    """Returns the names of classes, one a line, as `classnames.txt` of CLIP_benchmark has them.

    Raises:
        ValueError: the file cannot be read, or names no class.
    """
    names = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    if not names:
        raise DataError(f"{path} names no class; write one a line")
    return names


def open_labelled(source: str | Path, label: str = LABEL, names: Sequence[str] | None = None) -> LabelledPictures:
    """Opens a folder of class folders, or shards.

    Args:
        label: of shards, the name of the label in `captions[].labels` that holds the class.
        names: of all classes. In a folder they stand for the class folders in sorted order. In shards they are the
            labels that may occur, and a label that is a number counts among them from 0. Default: the names of the
            folders, or the labels that occur, sorted.

    Raises:
        DataError: it is neither, or a record or folder has no class, or one that `names` lacks.
    """
    if is_url(source) or any(Path(source).glob("*.tar")) or (Path(source) / MANIFEST_NAME).is_file():
        return of_shards(ensure_index(source), label, names)
    return of_folder(Path(source), names)


def of_folder(folder: Path, names: Sequence[str] | None = None) -> LabelledPictures:
    """Returns the pictures below the folders of a folder, as torchvision's ImageFolder finds them."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give one with a folder of pictures for each class, or shards")
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    pictures = [
        LabelledPicture(path.relative_to(folder).as_posix(), number, partial(Picture, path))
        for number, of_class in enumerate(folders)
        for path in _pictures_below(of_class)
    ]
    if not pictures:
        raise DataError(f"{folder} holds no folder with pictures; give one with a folder for each class, or shards")
    if names is not None and len(names) != len(folders):
        raise DataError(f"{len(names)} names of classes for the {len(folders)} folders of {folder}; give one for each")
    return LabelledPictures(tuple(names or (path.name for path in folders)), pictures)


def _pictures_below(folder: Path) -> Iterator[Path]:
    for here, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(here, name) for name in sorted(files) if name.lower().endswith(_SUFFIXES))


def of_shards(index: SampleIndex, label: str = LABEL, names: Sequence[str] | None = None) -> LabelledPictures:
    """Returns the pictures of shards, with the regions and features of their records."""
    places = [index.place(number) for number in range(index.num_records)]
    keys = [index.key_of(place) for place in places]
    found = [
        _label_of(index.describe(place)[0], key, label, names is not None)
        for place, key in zip(places, keys, strict=True)
    ]
    classes = tuple(names or sorted({str(one) for one in found}))
    numbers: dict[str | int, int] = {name: number for number, name in reversed([*enumerate(classes)])}
    if names is not None:
        numbers |= {number: number for number in range(len(names))}
    for one, key in zip(found, keys, strict=True):
        if one not in numbers:
            raise DataError(
                f"record {key}: labels.{label} is {one!r}, none of the {len(classes)} classes that are named"
            )
    pictures = [
        LabelledPicture(key, numbers[one], partial(_read, index, place))
        for one, key, place in zip(found, keys, places, strict=True)
    ]
    return LabelledPictures(classes, pictures)


def _label_of(record: Record, key: str, label: str, may_be_number: bool) -> str | int:
    """Returns the class of a record, which all captions that have the label agree on."""
    found = [caption.labels[label] for caption in record.captions if caption.labels and label in caption.labels]
    if not found:
        raise DataError(f"record {key} has no caption with labels.{label}; name the label that holds the class")
    if any(one != found[0] for one in found):
        raise DataError(f"record {key}: its captions have different labels.{label}; a picture needs one class")
    value = found[0]
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int) and not isinstance(value, bool) and may_be_number:
        return value
    remedy = "" if may_be_number else "; classes that are numbers need a list of their names"
    raise DataError(f"record {key}: labels.{label} is {value!r}, expected the name of a class{remedy}")


def _read(index: SampleIndex, place: RecordLocation) -> Picture:
    record, members = index.read(place)
    image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
    return Picture(
        image=image,
        boxes=[region.box for region in record.regions] or None,
        tags=[region.tag for region in record.regions],
        features=read_features(members, len(record.regions), None) if record.regions and "npy" in members else None,
        size=(record.width, record.height),
    )
