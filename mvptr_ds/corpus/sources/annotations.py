"""Reads annotation files of COCO, Karpathy's splits, Flickr30k and Visual Genome."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mvptr_ds.corpus.resumable_jobs import Summary
from mvptr_ds.corpus.sources.rows import (
    UNREADABLE,
    Row,
    captions_of,
    iter_array,
    iter_lines,
    normal_path,
    number_or_name,
    size_of,
    whole,
)
from mvptr_ds.errors import DataError

_WRONG = (KeyError, TypeError, ValueError, AttributeError, IndexError)  # what an entry of another layout gives
_KARPATHY_SPLITS = ("train", "restval", "val", "test")
_GENOME_FOLDERS = ("VG_100K", "VG_100K_2")


def read_coco(source: Path, summary: Summary) -> Iterator[Row]:
    """Yields the captions of COCO.

    `{"images": [{"id", "file_name", "width", "height"}], "annotations": [{"image_id", "caption"}]}`

    Raises:
        DataError: not JSON, or without these two fields.
    """
    images: dict[int | str, tuple[str, int, int]] = {}
    others: dict[int | str, tuple[str, int, int]] = {}  # of an id that is listed with a second picture
    for number, entry in enumerate(iter_array(source, "images")):
        try:
            image_id = whole(entry["id"])
            number_or_name(image_id)
            image = (str(entry["file_name"]), *size_of(entry))
            if normal_path(images.setdefault(image_id, image)[0]) != normal_path(image[0]):
                others[image_id] = image
        except _WRONG as error:
            summary.drop(UNREADABLE, f"{source.name}, images[{number}]: {error!r}")
    with_caption = set()
    for number, entry in enumerate(iter_array(source, "annotations")):
        try:
            image_id, captions = whole(entry["image_id"]), captions_of(entry["caption"])
            name = number_or_name(image_id)
            if image_id not in images:
                summary.drop("row: of an image that the file does not list", f"{source.name}, image {image_id}")
                continue
        except _WRONG as error:
            summary.drop(UNREADABLE, f"{source.name}, annotations[{number}]: {error!r}")
            continue
        yield Row(name, captions, *images[image_id])
        if image_id in others and image_id not in with_caption:
            yield Row(name, (), *others[image_id])  # whose captions these are cannot be told: planning drops them
        with_caption.add(image_id)
    for image_id in (image_id for image_id in images if image_id not in with_caption):
        summary.drop("image: listed without a caption", f"{source.name}, image {image_id}")


def read_karpathy(source: Path, use_restval: bool, summary: Summary) -> Iterator[Row]:
    """Yields the rows of Karpathy's `dataset_*.json` with its splits; `restval` joins train, or is left out.

    Raises:
        DataError: not JSON, or without the field `images`.
    """
    for number, entry in enumerate(iter_array(source, "images")):
        try:
            name, split = normal_path(str(entry["filename"])), entry["split"]
            if split not in _KARPATHY_SPLITS:
                raise ValueError(f"split is {_short(split)}, expected one of {', '.join(_KARPATHY_SPLITS)}")
            captions = captions_of([sentence["raw"] for sentence in entry["sentences"]])
            image_id = number_or_name(entry.get("cocoid", name))
            path = str(PurePosixPath(str(entry.get("filepath", "")), name))
        except _WRONG as error:
            summary.drop(UNREADABLE, f"{source.name}, images[{number}]: {error!r}")
            continue
        if split == "restval" and not use_restval:
            summary.drop("image: of the split restval (--no-restval)", f"{source.name}, {name}")
            continue
        yield Row(image_id, captions, path, split="train" if split == "restval" else split)


def read_flickr30k(source: Path, summary: Summary) -> Iterator[Row]:
    """Yields the rows of Flickr30k: lines `NAME.jpg#0<TAB>caption`, or a table `NAME.jpg| 0| caption` with heading."""
    for number, line in iter_lines(source, summary):
        name, tab, caption = line.partition("\t")
        if tab:
            name, _, count = name.rpartition("#")
        else:
            name, count, caption = (*(part.strip() for part in line.split("|", 2)), "", "")[:3]
        if not tab and number == 1 and not count.isdigit():
            continue  # the heading
        if not name or not count.isdigit():
            summary.drop(UNREADABLE, f"{source.name}, line {number}: {line[:80]!r}")
            continue
        yield Row(name, (caption,), name)


def read_visual_genome(source: Path, image_data: Path | None, images: Path | None, summary: Summary) -> Iterator[Row]:
    """Yields the rows of Visual Genome's `region_descriptions.json`: each description is a caption of its image.

    Sizes and folders come from `image_data.json` where it is given; otherwise the picture is looked for in `images`
    and its folders VG_100K and VG_100K_2.

    Raises:
        DataError: not JSON, or not an array.
    """
    known = {} if image_data is None else _genome_images(image_data)
    for number, entry in enumerate(iter_array(source)):
        try:
            regions = entry["regions"]
            image_id = _genome_id(entry["id"] if "id" in entry else regions[0]["image_id"])
            captions = captions_of([region["phrase"] for region in regions])
            if any(_genome_id(region.get("image_id", image_id)) != image_id for region in regions):
                summary.drop(
                    "row: a region of another image than its entry", f"{source.name}, image {image_id}", len(captions)
                )
                continue
            folder, width, height = known.get(image_id, ("", 0, 0))
            row = Row(str(image_id), captions, _genome_path(image_id, folder, images), width, height)
        except _WRONG as error:
            summary.drop(UNREADABLE, f"{source.name}, [{number}]: {error!r}")
            continue
        yield row


def _genome_id(value: Any) -> int:
    """Returns 7 for 7, 7.0, "7" and "007": some tools write ids as text or as floats."""
    value = whole(value)
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, str) and value.isdecimal())):
        raise TypeError(f"image id is {_short(value)}, expected a whole number")
    return int(value)


def _genome_images(image_data: Path) -> dict[int, tuple[str, int, int]]:
    """Returns the folder, width and height of each image. Raises DataError for another file or a contradiction."""
    found: dict[int, tuple[str, int, int]] = {}
    for number, entry in enumerate(iter_array(image_data)):
        try:
            folder = PurePosixPath(str(entry["url"])).parent.name
            image_id, image = (
                _genome_id(entry["image_id"]),
                (folder if folder in _GENOME_FOLDERS else "", *size_of(entry)),
            )
        except _WRONG as error:
            raise DataError(
                f"{image_data}, [{number}] is {_short(entry)}: {error!r}; give Visual Genome's image_data.json"
            ) from error
        if found.setdefault(image_id, image) != image:
            raise DataError(
                f"{image_data}, [{number}]: image {image_id} is {image}, and was {found[image_id]} before (folder, "
                "width, height); leave one of the two in"
            )
    return found


def _genome_path(image_id: int, folder: str, images: Path | None) -> str:
    name = f"{image_id}.jpg"
    places = [f"{place}/{name}" for place in ([folder] if folder else _GENOME_FOLDERS)]
    if images is None:
        return places[0]
    return next((place for place in (*places, name) if (images / place).exists()), places[0])


def _short(value: Any) -> str:
    return repr(value)[:80]
