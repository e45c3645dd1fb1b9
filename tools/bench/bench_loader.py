#!/usr/bin/env python3
"""How fast samples are read, on one processor core: this loader beside others on the same pictures, interleaved.

Speeds are of CPU time of the process, so that other work on the machine disturbs them little. Every figure of
docs/measurements/loading.md is printed by this command. The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from mvptr_ds.user_io.signals import end_on_interrupt

    end_on_interrupt()

import bench_data
import numpy as np
import torch
import webdataset
from bench_index import bench_index, bench_workers
from PIL import Image
from published_layout import PublishedDataset, write_tsv
from torch.utils.data import DataLoader

from mvptr_ds.data import images
from mvptr_ds.data.collate import Sample, collate
from mvptr_ds.data.dataset import ShardDataset
from mvptr_ds.data.features import SampleBuilder, SampleOptions, read_features
from mvptr_ds.data.loader import make_loader
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.sampling.batches import Batches
from mvptr_ds.data.sampling.plan import Plan
from mvptr_ds.data.schema import parse_sample_record
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.tar_reader import read_record
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path

BATCH = 32
IMAGE_SIZE = 224


@dataclass
class Contender:
    """Something that makes samples: `run(round)` makes `num` of them."""

    name: str
    num: int
    run: Callable[[int], None]


def measure(contenders: list[Contender], rounds: int) -> dict[str, list[float]]:
    """Samples per CPU-second of each contender in each round; they take turns, after one round that does not count."""
    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in range(rounds + 1):
        for contender in contenders:
            started_s = time.process_time()
            contender.run(number)
            taken_s = time.process_time() - started_s
            if number:
                rates[contender.name].append(contender.num / taken_s)
    return rates


def show(title: str, rates: dict[str, list[float]], base: str) -> None:
    print(f"\n{title:58}  per CPU-s   to {base}")
    for name, values in rates.items():
        print(f"  {name:56}{statistics.median(values):11,.0f}{ratio(rates, name, base):12.2f}")


def ratio(rates: dict[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of the two speeds' ratio in a round."""
    return statistics.median(a / b for a, b in zip(rates[name], rates[base], strict=True))


class Setup:
    """Shards of one kind, what reads them, and vocabularies that they share."""

    def __init__(self, folder: Path, kind: str, num_records: int, words: WordPiece, phrases: PhraseVocab) -> None:
        self.folder = folder / kind
        bench_data.write(self.folder, kind, num_records)
        self.index = Index.open(self.folder)
        uses_features = kind == "features"
        options = SampleOptions(
            visual_source="features" if uses_features else "image",
            feature_dim=bench_data.FEATURE_DIM if uses_features else None,
            image_size=IMAGE_SIZE,
            word_prob=0.15,
            phrase_prob=0.15,
            tag_prob=0.15,
            predict_phrases=True,
            tag_drop_prob=0.1,
            tag_wrong_prob=0.1,
            tag_list=list(self.index.tags),
        )
        self.builder = SampleBuilder(words, phrases, options)
        self.dataset = ShardDataset(self.index, Plan(len(self.index), seed=0), self.builder)

    def ours(self, num_batches: int) -> Contender:
        def run(number: int) -> None:
            start = number * num_batches
            consume(make_loader(self.dataset, Batches(BATCH), start, start + num_batches))

        return Contender("this loader", num_batches * BATCH, run)

    def webdataset(self, num_batches: int) -> Contender:
        """Its own reader and shuffle; its raw members go into the same sample builder and collation."""
        urls = [str(path) for path in sorted(self.folder.glob("*.tar"))]
        stream: Iterator[dict[str, Any]] = iter(
            webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(200).repeat()
        )

        def run(number: int) -> None:
            for _ in range(num_batches):
                samples: list[Sample] = []
                for _ in range(BATCH):
                    members = {name: value for name, value in next(stream).items() if not name.startswith("__")}
                    rng = np.random.default_rng([number, len(samples)])
                    samples.append(self.builder.build(members, number % bench_data.NUM_CAPTIONS, 0, 0, rng))
                collate(samples)

        return Contender("webdataset's reader, same builder and collation", num_batches * BATCH, run)


def consume(batches: Iterable[Any]) -> None:
    for _ in batches:
        pass


def published(setup: Setup, folder: Path, words: WordPiece, phrases: PhraseVocab, num_batches: int) -> Contender:
    def records() -> Iterator[Any]:
        for number in range(setup.index.num_records):
            record, members = setup.index.read(setup.index.place(number))
            yield record, read_features(members, len(record.regions), None)

    dataset = PublishedDataset(folder, write_tsv(folder, records()), words, phrases)

    def run(number: int) -> None:
        order = np.random.default_rng(number).integers(0, len(dataset), num_batches * BATCH).tolist()
        consume(DataLoader(dataset, batch_size=BATCH, sampler=order))

    return Contender("published layout (base64 TSV, Python)", num_batches * BATCH, run)


def stages(setup: Setup, num: int, rounds: int) -> None:
    """Each part of a sample's way by itself."""
    index, builder = setup.index, setup.builder
    numbers = np.random.default_rng(1).integers(0, len(index), num).tolist()
    places = [index.locate(n) for n in numbers]
    members = [read_record(*place[:3]) for place in places]
    records = [parse_sample_record(m["json"], place.caption) for m, place in zip(members, places, strict=True)]
    rng = np.random.default_rng(0)
    both = list(zip(records, members, strict=True))
    begun = [builder.begin(r, m, 0, 0, 0, rng) for r, m in both]
    whole = [builder.build(m, 0, 0, 0, rng, r) for r, m in both]

    def pictures() -> None:
        for sample, member in zip(begun, members, strict=True):
            builder.add_visual(sample, member)

    parts: dict[str, Callable[[], Any]] = {
        "read: find the place, read its bytes": lambda: [read_record(*index.locate(n)[:3]) for n in numbers],
        "decode: JSON, checked": lambda: [
            parse_sample_record(m["json"], p.caption) for m, p in zip(members, places, strict=True)
        ],
        "tokenise: the caption": lambda: [builder.words.encode(r.captions[0].text) for r in records],
        "tokenise, mask, lay out: caption, phrases, tags, boxes": lambda: [
            builder.begin(r, m, 0, 0, 0, rng) for r, m in both
        ],
        "decode: features or picture": pictures,
        "collate": lambda: [collate(whole[start : start + BATCH]) for start in range(0, num, BATCH)],
    }

    def run(part: Callable[[], Any]) -> Callable[[int], None]:
        return lambda _: part()

    rates = measure([Contender(name, num, run(part)) for name, part in parts.items()], rounds)
    for name, values in rates.items():
        rate = statistics.median(values)
        print(f"  {name:56}{rate:11,.0f}{1e6 / rate:9.0f} us")


def bare_decoders(setup: Setup, num: int) -> list[Contender]:
    """JPEG bytes in memory -> RGB of IMAGE_SIZE, and nothing else."""
    index = setup.index
    pictures = [index.read(index.place(n))[1]["jpg"] for n in range(min(num, index.num_records))]
    size = (IMAGE_SIZE, IMAGE_SIZE)

    def pillow(content: bytes, draft: bool) -> np.ndarray:
        image = Image.open(io.BytesIO(content), formats=("JPEG",))
        if draft:
            image.draft("RGB", size)
        return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))

    decoders: dict[str, Callable[[bytes], Any]] = {
        "Pillow, bicubic": lambda content: pillow(content, False),
        "Pillow, draft + bicubic": lambda content: pillow(content, True),
    }
    if images.simplejpeg is not None:
        decode = images.simplejpeg.decode_jpeg
        reduced = {"min_height": IMAGE_SIZE, "min_width": IMAGE_SIZE, "min_factor": 2}
        decoders["simplejpeg reduced + Pillow bicubic"] = lambda content: np.asarray(
            Image.fromarray(decode(content, **reduced)).resize(size, Image.Resampling.BICUBIC)
        )
        decoders["simplejpeg + torch bicubic"] = lambda content: images._resize(decode(content), IMAGE_SIZE)
        decoders["simplejpeg reduced + torch bicubic"] = lambda content: images._resize(
            decode(content, **reduced), IMAGE_SIZE
        )
    try:
        import cv2

        cv2.setNumThreads(1)

        def opencv(content: bytes, how: int) -> np.ndarray:
            return cv2.resize(cv2.imdecode(np.frombuffer(content, np.uint8), how), size, interpolation=cv2.INTER_AREA)

        decoders["OpenCV, area"] = lambda content: opencv(content, cv2.IMREAD_COLOR)
        decoders["OpenCV reduced, area"] = lambda content: opencv(content, cv2.IMREAD_REDUCED_COLOR_2)
    except ImportError:
        print("OpenCV is not installed: not measured")

    def run(decoder: Callable[[bytes], Any]) -> Callable[[int], None]:
        return lambda _: consume(decoder(picture) for picture in pictures)

    return [Contender(name, len(pictures), run(decoder)) for name, decoder in decoders.items()]


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = f"{os.cpu_count()} cores ({names[0] if names else 'unknown'})"
    return f"{platform.machine()}, {cores}, Python {platform.python_version()}"


def bench(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    words = WordPiece()
    phrases = bench_data.vocabulary(words)
    out: dict[str, float] = {}

    setup = Setup(folder, "features", args.records, words, phrases)
    rates = measure(
        [setup.ours(20), setup.webdataset(20), published(setup, folder / "tsv", words, phrases, 4)], args.rounds
    )
    show("features: 10-50 regions x 2,048 float16, to the batch", rates, "published layout (base64 TSV, Python)")
    stages(setup, 320, args.rounds)
    out["features_samples_per_cpu_s"] = round(statistics.median(rates["this loader"]), 1)
    out["features_vs_published"] = round(ratio(rates, "this loader", "published layout (base64 TSV, Python)"), 2)

    setup = Setup(folder, "images", args.records // 2, words, phrases)
    contenders = bare_decoders(setup, 96)
    rates = measure([setup.ours(12), setup.webdataset(12), *contenders], args.rounds)
    best = max((c.name for c in contenders), key=lambda name: statistics.median(rates[name]))
    show(f"JPEG 640 x 480 to {IMAGE_SIZE} x {IMAGE_SIZE}; the first two to the batch", rates, best)
    stages(setup, 96, args.rounds)
    out["jpeg_images_per_cpu_s"] = round(statistics.median(rates["this loader"]), 1)
    out["jpeg_vs_bare_decode"] = round(ratio(rates, "this loader", best), 3)

    out |= bench_index(folder / "index", args.index_samples, setup.builder.words, phrases)
    if args.worker_samples:
        bench_workers(folder / "index", args.worker_samples, words, phrases)
    return out


def main() -> None:
    accept_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("--records", default=400, **number, help="with features; half as many JPEGs (%(default)s)")
    parser.add_argument("--rounds", default=7, **number, help="turns that each contender takes (%(default)s)")
    parser.add_argument("--index-samples", default=10_000_000, **number, help="of the large index (%(default)s)")
    parser.add_argument(
        "--worker-samples", default=100_000, **number, help="over which workers are watched; 0: not (%(default)s)"
    )
    parser.add_argument("--folder", type=user_path, help="where to write 400 MB of shards; default: a temporary folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}, torch {torch.__version__}, numpy {np.__version__}; one thread, batches of {BATCH}")
    folder = Path(tempfile.mkdtemp(prefix="bench-loader-", dir=args.folder))
    try:
        out = bench(folder, args)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
