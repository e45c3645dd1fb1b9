"""Builds shards from annotations and images: OUT/SPLIT/shard-000000.tar ... with manifest and index."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from mvptr_ds.corpus.building.build import BuildOptions, build_listed, build_streamed, finish, parse_shares
from mvptr_ds.corpus.building.source_images import ImageOptions
from mvptr_ds.corpus.record_keys import KEY_SCHEMES
from mvptr_ds.corpus.resumable_jobs import Summary
from mvptr_ds.corpus.sources.annotations import read_coco, read_flickr30k, read_karpathy, read_visual_genome
from mvptr_ds.corpus.sources.entailment_labels import parse_label_order
from mvptr_ds.corpus.sources.plain import read_image_folder, read_text
from mvptr_ds.corpus.sources.refcoco import read_refcoco
from mvptr_ds.corpus.sources.rows import Row
from mvptr_ds.corpus.sources.snli_ve import read_snli_ve
from mvptr_ds.corpus.sources.tables import read_csv, read_jsonl, read_parquet
from mvptr_ds.corpus.sources.task_tables import TASK_TABLES, TaskTable, read_task_tables
from mvptr_ds.corpus.sources.vqa import read_vqa
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.shared_keys import shared_keys
from mvptr_ds.errors import USER_ERRORS, DataError
from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path, whole_number

FORMATS = {
    "coco": "captions JSON of COCO, such as captions_train2014.json; keys are the image ids in twelve digits",
    "karpathy": "Karpathy's dataset_coco.json, dataset_flickr30k.json, dataset_flickr8k.json, with their own splits",
    "flickr30k": "results_20130124.token (NAME.jpg#0<TAB>caption), or results.csv (NAME.jpg| 0| caption)",
    "visual-genome": "region_descriptions.json; the description of each region is a caption of its image",
    "img2dataset": "tars of KEY.jpg KEY.txt KEY.json, or folders of them; every tar gives a shard of each split",
    "jsonl": "one JSON object a line, or a JSON array of them (ALBEF, BLIP), with an image and a caption field; a "
    "caption field may hold a list",
    "csv": "a table with a heading (.tsv: separated by tabs); a caption cell may hold a JSON list",
    "parquet": "a table in Parquet (needs pyarrow); the image column holds paths, a caption cell may hold a list",
    "text": "one sentence a line; makes records without images, for stage 1",
    "image-folder": "every image below a folder, links followed; makes records without captions, for stage 1",
    "vqa": "VQA v2: files of questions and of annotations, together in one call; splits as the files say",
    "snli_ve": "SNLI-VE: snli_ve_train.jsonl, snli_ve_dev.jsonl, snli_ve_test.jsonl, with pictures of Flickr30k",
    "refcoco": "RefCOCO, RefCOCO+ or RefCOCOg: refs(unc).p and instances.json together, or lists of expressions with "
    "boxes; splits as the files say",
    "jsonl-tasks": "one's own questions, statements or expressions with their answers, labels or boxes: JSON lines, a "
    "JSON array, .csv or .tsv. Columns: image; question, statement, expression or text; answer or answers, label "
    "(entailment, neutral, contradiction) or box (x1, y1, x2, y2 in pixels)",
}
TASK_FORMATS = ("vqa", "snli_ve", "refcoco", "jsonl-tasks")
OWN_SPLITS = ("karpathy", "vqa", "snli_ve", "refcoco")
TABLES: dict[str, Callable[[Path, str, str, Summary], Iterator[Row]]] = {
    "jsonl": read_jsonl,
    "csv": read_csv,
    "parquet": read_parquet,
}
EXAMPLES = """\
examples:
  %(prog)s karpathy dataset_coco.json --images coco/ --out shards/coco
  %(prog)s coco captions_train2017.json --images train2017/ --out shards/coco17 --split train=0.98,held_out=0.02
  %(prog)s coco captions_train2014.json --images none --out shards/coco     (regions come from a sidecar)
  %(prog)s csv Train_GCC.tsv --image-column path --images cc3m/ --out shards/cc3m --reencode 90 --max-side 512
  %(prog)s text sentences.txt --out shards/text
  %(prog)s vqa v2_OpenEnded_*_questions.json v2_mscoco_*_annotations.json --images coco/ --out shards/vqa
  %(prog)s snli_ve snli_ve_*.jsonl --images flickr30k-images/ --out shards/snli_ve --pretraining shards/coco/train
  %(prog)s refcoco 'refs(unc).p' instances.json --images coco/train2014 --out shards/refcoco_plus
  %(prog)s jsonl-tasks mine.jsonl --task vqa --images photos/ --out shards/mine --split train=0.9,val=0.1

All captions of an image become one record. An id that names two images is dropped and counted.
After an interruption, the same command resumes where it stopped and gives the same bytes.
The plan needs disk space in OUT/.plan, twice the text of the corpus. Memory holds 1/128 of it at a time and 8 bytes a
record; coco also holds the list of images, a few hundred bytes each, vqa the questions of one split, and refcoco all.
Exit status: 0 done, whatever was dropped; 1 nothing is left, more was dropped than allowed, or an error;
2 wrong usage.
"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=raw)
    formats = parser.add_subparsers(
        dest="format", required=True, metavar="FORMAT", help="FORMAT --help lists its options"
    )
    for name, text in FORMATS.items():
        _add_arguments(name, formats.add_parser(name, help=text, description=text))
    arguments = parser.parse_args(argv)
    if getattr(arguments, "max_side", None) is not None and arguments.reencode is None:
        parser.error("--max-side changes pictures only when they are encoded again; give --reencode QUALITY too")
    if getattr(arguments, "task", None) == "referring" and arguments.reencode is not None:
        parser.error("--reencode turns and shrinks pictures, and boxes are pixels of the pictures as they are; drop it")
    if getattr(arguments, "pretraining", ()) and arguments.keys == "number":
        parser.error("--pretraining compares keys, and numbers name other pictures in each folder; use other --keys")
    return arguments


def _add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "source",
        type=user_path,
        nargs=1 if name == "image-folder" else "+",
        metavar="SOURCE",
        help="files or folders of this format",
    )
    add("--out", type=user_path, required=True, metavar="DIR", help="folder to write; each split gets a folder in it")
    if name not in ("img2dataset", "text", "image-folder"):
        add(
            "--images",
            type=user_path,
            required=True,
            metavar="DIR",
            help="folder of the images; none: records without images",
        )
    if name == "karpathy":
        add("--no-restval", action="store_true", help="leave restval out; by default it joins train")
    if name not in OWN_SPLITS:
        add(
            "--split",
            type=_shares,
            default=(),
            metavar="NAME=SHARE,...",
            help="splits and their shares, drawn by a hash of the image id (default: all is train)",
        )
    if name == "visual-genome":
        add("--image-data", type=user_path, metavar="FILE", help="image_data.json: sizes and folders of the images")
    if name in TABLES or name == "jsonl-tasks":
        add("--image-column", default="image", metavar="NAME", help="column of the paths below --images (%(default)s)")
    if name in TABLES:
        add("--caption-column", default="caption", metavar="NAME", help="column of the captions (%(default)s)")
    if name in TASK_FORMATS:
        _add_task_arguments(name, parser)
    keys = "how records are named: the source's id, a running number, or a hash of the id (%(default)s)"
    add("--keys", choices=KEY_SCHEMES, default=KEY_SCHEMES[0], help=keys)
    if name != "img2dataset":
        add(
            "--records-per-shard",
            type=whole_number(1),
            default=10_000,
            metavar="N",
            help="records of a shard (%(default)s)",
        )
        add("--shuffle-seed", type=int, default=0, metavar="S", help="seed of the order of the records (%(default)s)")
    if name != "image-folder":
        add(
            "--max-caption-chars",
            type=whole_number(1),
            default=1000,
            metavar="N",
            help="drop longer captions (%(default)s)",
        )
    if name != "text":
        add(
            "--min-side",
            type=whole_number(1),
            default=1,
            metavar="PX",
            help="drop images with a shorter side (%(default)s)",
        )
    if name not in ("text", "refcoco"):
        reencode = (
            "store every image as JPEG of this quality (1 to 100), turned as EXIF says, transparency on white; "
            "by default JPEG, PNG and WebP are stored unchanged"
        )
        add("--reencode", type=whole_number(1, 100), metavar="QUALITY", help=reencode)
        add("--max-side", type=whole_number(1), metavar="PX", help="with --reencode: shrink images to this longer side")
    limit = "end with 1 when a larger share of the captions (or images) is dropped (%(default)s)"
    add("--max-dropped-fraction", type=_fraction, default=0.5, metavar="X", help=limit)
    add(
        "--processes",
        type=whole_number(1),
        default=os.cpu_count() or 1,
        metavar="P",
        help="processes that work (%(default)s, the cores here)",
    )


def _add_task_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    if name == "jsonl-tasks":
        add("--task", choices=TASK_TABLES, required=True, help="what the texts are for")
    if name in ("jsonl-tasks", "snli_ve"):
        order = "the classes that the numbers 0, 1, 2 mean, where labels are numbers: entailment,neutral,contradiction"
        add("--label-order", type=_label_order, metavar="A,B,C", help=order)
    add(
        "--pretraining",
        type=user_path,
        nargs="+",
        default=(),
        metavar="SHARDS",
        help="say how many pictures each split shares with these folders of shards",
    )


def _label_order(text: str) -> tuple[str, ...]:
    try:
        return parse_label_order(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _shares(text: str) -> tuple[tuple[str, float], ...]:
    try:
        return parse_shares(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def rows_of(arguments: argparse.Namespace, images: Path | None, summary: Summary) -> Iterator[Row]:
    """Returns the rows of all sources."""
    match arguments.format:
        case "vqa":
            return read_vqa(arguments.source, images, summary)
        case "refcoco":
            return read_refcoco(arguments.source, images, summary)
        case "jsonl-tasks":
            table = TaskTable(arguments.task, arguments.image_column, images, arguments.label_order)
            return read_task_tables(arguments.source, table, summary)
    return chain.from_iterable(_rows_of_one(arguments, images, path, summary) for path in arguments.source)


def _rows_of_one(arguments: argparse.Namespace, images: Path | None, source: Path, summary: Summary) -> Iterator[Row]:
    match arguments.format:
        case "coco":
            return read_coco(source, summary)
        case "karpathy":
            return read_karpathy(source, not arguments.no_restval, summary)
        case "flickr30k":
            return read_flickr30k(source, summary)
        case "visual-genome":
            return read_visual_genome(source, arguments.image_data, images, summary)
        case "text":
            return read_text(source, summary)
        case "image-folder":
            return read_image_folder(source, summary)
        case "snli_ve":
            return read_snli_ve(source, arguments.label_order, summary)
    return TABLES[arguments.format](source, arguments.image_column, arguments.caption_column, summary)


def build(arguments: argparse.Namespace) -> Summary:
    """Builds the shards that the arguments describe."""
    image_folder = arguments.source[0] if arguments.format == "image-folder" else getattr(arguments, "images", "none")
    images = None if str(image_folder) == "none" else Path(image_folder)
    if images is not None and not images.is_dir():
        raise DataError(f"--images {images} is not a folder; give the folder of the pictures, or none")
    defaults = BuildOptions()
    options = BuildOptions(
        images=None if images is None else str(images),
        key_scheme=arguments.keys,
        records_per_shard=getattr(arguments, "records_per_shard", defaults.records_per_shard),
        shares=getattr(arguments, "split", ()),
        seed=getattr(arguments, "shuffle_seed", defaults.seed),
        max_caption_chars=getattr(arguments, "max_caption_chars", defaults.max_caption_chars),
        image_only=arguments.format == "image-folder",
        pictures=ImageOptions(
            min_side=getattr(arguments, "min_side", defaults.pictures.min_side),
            reencode=getattr(arguments, "reencode", None),
            max_side=getattr(arguments, "max_side", None),
        ),
    )
    source: dict[str, Any] = {"format": arguments.format, "sources": [str(path) for path in arguments.source]}
    if arguments.format == "img2dataset":
        summary = build_streamed(arguments.source, arguments.out, options, source, arguments.processes)
    else:
        planned = Summary()
        rows, apart = rows_of(arguments, images, planned), arguments.format in TASK_FORMATS
        summary = build_listed(rows, planned, arguments.out, options, source, arguments.processes, apart)
    return summary


def shared_lines(splits: Mapping[str, Index], others: Mapping[str, Index]) -> list[str]:
    """Returns a line for each pair of a split and another split or folder: how many pictures both have, and which."""
    lines = []
    names = list(splits)
    for number, name in enumerate(names):
        for other, index in {**{later: splits[later] for later in names[number + 1 :]}, **others}.items():
            shared = shared_keys(splits[name], index)
            examples = f" ({shared})" if shared.num else ""
            lines.append(f"{name} and {other}: {shared.num:,} pictures in both{examples}")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 something is wrong, 2 wrong usage."""
    accept_any_text()
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        others = {str(folder): Index.open(folder) for folder in getattr(arguments, "pretraining", ())}
        summary = build(arguments)
        print("\n".join(summary.lines()))
        image_only = arguments.format == "image-folder"
        splits = finish(arguments.out, summary, image_only, arguments.max_dropped_fraction)
        for name, index in splits.items():
            print(
                f"{name}: {index.num_shards} shards, {index.num_records} records, {len(index)} samples, "
                f"{index.num_bytes / 2**20:.1f} MiB"
            )
        if arguments.format in TASK_FORMATS and arguments.keys != "number":
            print("\n".join(shared_lines(splits, others)))
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
