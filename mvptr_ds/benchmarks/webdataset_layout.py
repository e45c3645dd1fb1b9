"""Writes shards in the layout that CLIP_benchmark reads as `wds/NAME`, pictures as they are.

    OUT/dataset_type.txt                      retrieval; missing for classification
    OUT/SPLIT/nshards.txt, 0.tar, 1.tar ...   KEY.jpg with KEY.txt, a caption a line, or with KEY.cls, a class's number
    OUT/classnames.txt                        classification: a class a line
    OUT/zeroshot_classification_templates.txt classification: a template a line, `{c}` stands for the name

Source: `build_wds_dataset` of clip_benchmark/datasets/builder.py, version 1.6.2.
"""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mvptr_ds.benchmarks.labelled import LABEL, of_shards
from mvptr_ds.benchmarks.zero_shot import TEMPLATES, prompt
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.data.shards.tar_reader import IMAGE_EXTENSIONS
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.atomic import replacing_folder

_PER_TAR = 10_000


class Written(NamedTuple):
    """What was written: pictures and captions, and records without a picture or without captions."""

    num_pictures: int
    num_captions: int
    num_left_out: int


def write_retrieval(index: SampleIndex, out: Path, split: str = "test", per_tar: int = _PER_TAR) -> Written:
    """Writes pictures with their captions, each caption on one line.

    Raises:
        DataError: a record cannot be read, or none has both a picture and captions.
        OSError: `out` holds something.
    """
    num_captions = num_left_out = 0

    def items() -> Iterator[tuple[str, bytes, str, str]]:
        nonlocal num_captions, num_left_out
        for number in range(index.num_records):
            record, members = index.read(index.place(number))
            # white space of any kind becomes a space: CLIP_benchmark takes what follows a line feed, but also what
            # follows a form feed or U+2028, for another caption
            captions = [" ".join(caption.text.split()) for caption in record.captions]
            captions = [caption for caption in captions if caption]
            extension = next((one for one in IMAGE_EXTENSIONS if one in members), None)
            if extension is None or not captions:
                num_left_out += 1
                continue
            num_captions += len(captions)
            yield extension, members[extension], "txt", "\n".join(captions)

    with replacing_folder(out) as folder:
        num_pictures = _write_tars(folder / split, items(), per_tar)
        if not num_pictures:
            raise DataError("no record has both a picture and captions; retrieval needs pairs")
        _write_lines(folder / "dataset_type.txt", ["retrieval"])
    return Written(num_pictures, num_captions, num_left_out)


def write_classification(
    index: SampleIndex,
    out: Path,
    label: str = LABEL,
    names: Sequence[str] | None = None,
    templates: Sequence[str] = TEMPLATES,
    split: str = "test",
    per_tar: int = _PER_TAR,
) -> Written:
    """Writes pictures with the numbers of their classes, and the names and templates; raises as `write_retrieval`.

    Args:
        label: the name of the label that holds the class.
        names: of all classes, see `labelled.open_labelled`.
    """
    given = of_shards(index, label, names)
    num_left_out = 0

    def items() -> Iterator[tuple[str, bytes, str, str]]:
        nonlocal num_left_out
        for number, picture in enumerate(given.pictures):
            members = index.read(index.place(number))[1]
            extension = next((one for one in IMAGE_EXTENSIONS if one in members), None)
            if extension is None:
                num_left_out += 1
                continue
            yield extension, members[extension], "cls", str(picture.label)

    with replacing_folder(out) as folder:
        num_pictures = _write_tars(folder / split, items(), per_tar)
        if not num_pictures:
            raise DataError("no record has a picture; CLIP_benchmark reads no features")
        _write_lines(folder / "classnames.txt", [prompt("{}", name) for name in given.classes])
        _write_lines(folder / "zeroshot_classification_templates.txt", [prompt(one, "{c}") for one in templates])
    return Written(num_pictures, 0, num_left_out)


def _write_tars(folder: Path, items: Iterator[tuple[str, bytes, str, str]], per_tar: int) -> int:
    """Writes 0.tar and so on of (extension, picture, extension, text), and returns the number of pictures."""
    folder.mkdir()
    num = num_tars = 0
    while (first := next(items, None)) is not None:
        with tarfile.open(folder / f"{num_tars}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for extension, picture, kind, text in itertools.chain([first], itertools.islice(items, per_tar - 1)):
                for name, content in ((extension, picture), (kind, text.encode())):
                    member = tarfile.TarInfo(f"s{num:07d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                num += 1
        num_tars += 1
    _write_lines(folder / "nshards.txt", [str(num_tars)])
    return num


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
