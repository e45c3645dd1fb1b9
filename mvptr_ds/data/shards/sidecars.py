"""Sidecars: tars of KEY.json (and KEY.npy) that add regions, features or phrases to the records of other shards.

What an entry has takes the place of the record's: regions, with width and height where it gives them; the phrases of
the captions; the rows of features. A later sidecar wins over an earlier one. Entries and records are joined by key
(sidecar_join.py), however both sides are cut into shards.

A folder of records may stand among the sidecars, too: it gives its pictures with their regions and features, and its
captions are ignored. So the texts of a task share the pictures of the shards that a model was pre-trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import msgspec

from mvptr_ds.data.schema import Caption, Extractor, Record, Region, SidecarEntry, check_phrase_regions, check_size
from mvptr_ds.data.shards.tar_reader import IMAGE_EXTENSIONS
from mvptr_ds.data.shards.tar_writer import json_bytes
from mvptr_ds.errors import DataError


def sidecar_json(
    extractor: Extractor,
    *,
    width: int | None = None,
    height: int | None = None,
    regions: Sequence[Region] | None = None,
    captions: Sequence[Caption] | None = None,
) -> bytes:
    """Encodes the `KEY.json` of a sidecar; it says nothing of what is None.

    Args:
        width, height: size in pixels of the image that the boxes lie in; both or none.
        captions: the captions of the record, in its order, with the phrases to take.

    Raises:
        DataError: only one of width and height, or neither name nor version of the extractor.
    """
    if (width is None) != (height is None):
        raise DataError(f"width is {width} and height {height}: give both or none")
    if not extractor.name.strip() or not extractor.version.strip():
        raise DataError(f"extractor is {extractor!r}; its name and its version must not be empty")
    entry = SidecarEntry(
        extractor,
        width,
        height,
        None if captions is None else tuple(captions),
        None if regions is None else tuple(regions),
    )
    return json_bytes(entry.to_json())


def merge_sidecar(
    record: Record, members: dict[str, bytes], entry: SidecarEntry, npy: bytes | None
) -> tuple[Record, dict[str, bytes]]:
    """Returns the record and its members as a sidecar's entry changes them.

    Regions that are replaced take their features with them, and the references of the record's phrases to them.

    Raises:
        DataError: the captions differ from the record's, or a phrase names a region that is not there.
    """
    captions = record.captions
    if entry.regions is not None:
        members = _without(members, ("npy",))
        captions = tuple(without_region_references(caption) for caption in captions)
    if entry.captions is not None:
        _check_same_texts(record.captions, entry.captions)
        # the sidecar knows phrases, the record its labels
        captions = tuple(
            theirs if ours.labels is None else msgspec.structs.replace(theirs, labels=ours.labels)
            for ours, theirs in zip(record.captions, entry.captions, strict=True)
        )
    if npy is not None:
        members = {**members, "npy": npy}
    merged = dataclasses.replace(
        record,
        width=record.width if entry.width is None else entry.width,
        height=record.height if entry.height is None else entry.height,
        captions=captions,
        regions=record.regions if entry.regions is None else entry.regions,
        extractor=record.extractor if entry.regions is None and npy is None else entry.extractor,
    )
    if merged.regions:
        check_size(merged.width, merged.height)
    check_phrase_regions(merged.captions, len(merged.regions))
    return merged, members


def merge_picture(
    record: Record, members: dict[str, bytes], other: Record, other_members: dict[str, bytes]
) -> tuple[Record, dict[str, bytes]]:
    """Returns the record and its members with what another record of the same key has to see.

    Its picture takes the place of the record's. Its regions and features go together, with their extractor: where it
    has either, the record's own are dropped, and so are the references of the record's phrases to regions.
    """
    if any(extension in other_members for extension in IMAGE_EXTENSIONS):
        members = _without(members, IMAGE_EXTENSIONS) | _only(other_members, IMAGE_EXTENSIONS)
    gives_regions = bool(other.regions) or "npy" in other_members
    if gives_regions:
        members = _without(members, ("npy",)) | _only(other_members, ("npy",))
        captions = tuple(without_region_references(caption) for caption in record.captions)
        record = dataclasses.replace(record, captions=captions, regions=other.regions, extractor=other.extractor)
    # boxes that the record keeps lie in pixels of its own size
    if gives_regions or (other.width and not record.regions):
        record = dataclasses.replace(record, width=other.width, height=other.height)
    return record, members


def _only(members: dict[str, bytes], extensions: Collection[str]) -> dict[str, bytes]:
    return {extension: content for extension, content in members.items() if extension in extensions}


def _without(members: dict[str, bytes], extensions: Collection[str]) -> dict[str, bytes]:
    return {extension: content for extension, content in members.items() if extension not in extensions}


def without_region_references(caption: Caption) -> Caption:
    """Returns the caption with phrases that name no regions."""
    if not any(phrase.regions for phrase in caption.phrases):
        return caption
    phrases = tuple(msgspec.structs.replace(phrase, regions=()) for phrase in caption.phrases)
    return msgspec.structs.replace(caption, phrases=phrases)


def _check_same_texts(captions: Sequence[Caption], others: Sequence[Caption]) -> None:
    if len(captions) != len(others):
        raise DataError(
            f"the sidecar has {len(others)} captions, the record {len(captions)}; make it from these records"
        )
    for number, (caption, other) in enumerate(zip(captions, others, strict=True)):
        if caption.text != other.text:
            raise DataError(
                f"caption {number} is {caption.text!r} in the record and {other.text!r} in the sidecar; make the "
                "sidecar from these records"
            )
