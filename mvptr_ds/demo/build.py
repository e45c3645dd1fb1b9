"""Builds demo shards: scenes drawn by several processes, written in order, with their vocabularies.

OUT/train/ OUT/held_out/     shards with manifest and index
OUT/word_vocab.txt           the wordpieces that the training split and the texts of tasks need, in BERT's order
OUT/phrase_vocab.json        phrases of at least MIN_PHRASE_COUNT training captions
OUT/demo.json                the arguments; written last, so that a folder that has it is complete
"""

from __future__ import annotations

import io
import logging
import multiprocessing
import signal
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.schema import Record
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.data.wordpiece import SPECIALS, WordPiece
from mvptr_ds.demo import expressions, questions, statements
from mvptr_ds.demo.expressions import SIDES
from mvptr_ds.demo.marker import was_made, write_marker
from mvptr_ds.demo.plan import Concept, SplitRule
from mvptr_ds.demo.relations import WAYS
from mvptr_ds.demo.scene import SPLITS, Scene, Source, make_scene
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.atomic import replacing_folder
from mvptr_ds.user_io.progress import progress_bar
from mvptr_ds.user_io.signals import blocked, end_with_parent

logger = logging.getLogger(__name__)

GENERATOR_VERSION = 2  # raise it with every change of what is drawn or written
MARKER = "demo.json"
SOURCES = ("shapes", "stamps")
MIN_PHRASE_COUNT = 3
RECORDS_PER_SHARD = 1_000
# what the texts of tasks say beside the nouns and attributes of captions
_TEMPLATES = (*questions.TEMPLATES, *statements.TEMPLATES, *expressions.TEMPLATES)
TASK_TEXTS = frozenset((*(template.fixed_text for template in _TEMPLATES), *WAYS, *SIDES, "a", "an"))
CHUNK_SCENES = 32  # of one task of a process, and the batch of the feature extractor

Item = tuple[str, Record, dict[str, bytes]]
Chunk = tuple[SplitRule, int, int]  # rule, first scene, end


# what the arguments are called in messages
_NAMES = {
    "generator": "version of the generator",
    "source": "source",
    "seed": "seed",
    "num_train": "training scenes",
    "num_held_out": "held-out scenes",
}


def load_source(name: str) -> Source:
    """Returns the source of that name; stamps bring their region features.

    Raises:
        DataError: unknown name, or the stamps can be neither found nor fetched.
    """
    if name == "shapes":
        from mvptr_ds.demo.shapes import ShapesSource

        return ShapesSource()
    if name == "stamps":
        from mvptr_ds.demo.stamps import StampsSource  # brings torch, which shapes do without

        return StampsSource()
    raise DataError(f"demo source is {name!r}, expected one of {', '.join(SOURCES)}")


def check_source(name: str) -> None:
    """Finds or fetches what a source needs, once, so that drawing processes neither race for it nor die of its lack.

    Raises:
        DataError: the stamps or the weights of their features are missing and cannot be fetched.
    """
    if name == "stamps":
        from mvptr_ds.demo.efficientnet_lite import weights_path
        from mvptr_ds.demo.stamps import find_stamps

        find_stamps()
        weights_path()


def build_demo_shards(
    out_dir: str | Path, source: str, num_train: int, num_held_out: int, seed: int, num_processes: int
) -> None:
    """Builds both splits into `out_dir`; returns at once when they are there, made with the same arguments.

    Every scene is a function of (seed, split, number) and of the concepts that the training captions use, so equal
    arguments give equal bytes with any number of processes. The folder appears whole or not at all.

    Raises:
        DataError: missing stamps or no process, or as `demo_shards_are_there`.
    """
    if num_processes < 1:
        raise DataError(f"{num_processes} processes: there must be at least 1")
    out_dir = Path(out_dir)
    if demo_shards_are_there(out_dir, source, num_train, num_held_out, seed):
        logger.info("demo shards are there: %s (%s, %d + %d scenes)", out_dir, source, num_train, num_held_out)
        return
    arguments = _arguments(source, num_train, num_held_out, seed)
    with replacing_folder(out_dir) as partial:  # `out_dir` is not there, or empty
        _build(partial, arguments, num_processes)
    logger.info("demo shards built: %s (%s, %d + %d scenes)", out_dir, source, num_train, num_held_out)


def demo_shards_are_there(out_dir: str | Path, source: str, num_train: int, num_held_out: int, seed: int) -> bool:
    """Returns whether `out_dir` holds the shards of these arguments already.

    Raises:
        DataError: unknown source or counts below 1.
        FolderTakenError: `out_dir` holds something else, or demo shards of other arguments.
    """
    if source not in SOURCES:
        raise DataError(f"demo source is {source!r}, expected one of {', '.join(SOURCES)}")
    if min(num_train, num_held_out) < 1:
        raise DataError(f"{num_train} training scenes, {num_held_out} held-out scenes: each must be >= 1")
    arguments = _arguments(source, num_train, num_held_out, seed)
    return was_made(Path(out_dir), MARKER, arguments, "demo shards", _NAMES)


def _arguments(source: str, num_train: int, num_held_out: int, seed: int) -> dict[str, Any]:
    return {
        "generator": GENERATOR_VERSION,
        "source": source,
        "seed": seed,
        "num_train": num_train,
        "num_held_out": num_held_out,
    }


@dataclass
class _Usage:
    """What the captions and tags of a split use."""

    phrase_counts: Counter[tuple[str, ...]] = field(default_factory=Counter)  # captions a phrase occurs in
    texts: set[str] = field(default_factory=set)

    def add(self, record: Record) -> None:
        for caption in record.captions:
            self.texts.add(caption.text)
            self.phrase_counts.update({phrase.tuple for phrase in caption.phrases})
        self.texts.update(region.tag for region in record.regions)

    def known_concepts(self) -> frozenset[Concept]:
        """Returns the (noun, attribute) pairs that are frequent enough for the phrase vocabulary, with their nouns."""
        counts = self.phrase_counts
        pairs = (p for p, count in counts.items() if len(p) == 2 and count >= MIN_PHRASE_COUNT)
        return frozenset((noun, attribute) for noun, attribute in pairs)


def _build(folder: Path, arguments: dict[str, Any], num_processes: int) -> None:
    seed, source = int(arguments["seed"]), str(arguments["source"])
    usage = _Usage()
    with _mapper(source, num_processes) as map_chunks:
        train = _items(map_chunks, SplitRule(seed), int(arguments["num_train"]), usage)
        write_shards(folder / SPLITS[0], train, RECORDS_PER_SHARD)
        rule = SplitRule(seed, usage.known_concepts())
        held_out = _items(map_chunks, rule, int(arguments["num_held_out"]), _Usage())
        write_shards(folder / SPLITS[1], held_out, RECORDS_PER_SHARD)
    word_path = folder / "word_vocab.txt"
    word_path.write_text("\n".join(word_subset(WordPiece(), usage.texts | TASK_TEXTS)) + "\n", encoding="utf-8")
    phrases = PhraseVocab.build(usage.phrase_counts, WordPiece(str(word_path)), MIN_PHRASE_COUNT)
    phrases.save(folder / "phrase_vocab.json")
    write_marker(folder, MARKER, {**arguments, "num_known_concepts": len(rule.known or ())})


def word_subset(words: WordPiece, texts: Iterable[str]) -> list[str]:
    """Returns the special pieces, those that the texts use, in the order of `words`, and all that spelling needs."""
    spelling = set(string.ascii_lowercase + string.digits)
    needed = spelling | {"##" + letter for letter in spelling}
    for text in texts:
        needed.update(words.tokens[row] for row in words.encode(text)[0])
    return [*SPECIALS, *(token for token in words.tokens if token in needed and token not in SPECIALS)]


def _items(map_chunks: _Mapper, rule: SplitRule, num_scenes: int, usage: _Usage) -> Iterator[Item]:
    chunks = [(rule, first, min(first + CHUNK_SCENES, num_scenes)) for first in range(0, num_scenes, CHUNK_SCENES)]
    name = SPLITS[0] if rule.is_train else SPLITS[1]
    with progress_bar(total=num_scenes, desc=f"demo scenes, {name}", unit="scene") as bar:
        for items in map_chunks(_make_items, chunks):
            for item in items:
                usage.add(item[1])
                yield item
            bar.update(len(items))


_Mapper = Callable[[Callable[[Chunk], list[Item]], list[Chunk]], Iterable[list[Item]]]
_source: Source | None = None  # of this process


@contextmanager
def _mapper(source: str, num_processes: int) -> Iterator[_Mapper]:
    """Provides an ordered map, in this process or spawned ones (a fork may inherit a lock of torch's threads)."""
    global _source
    check_source(source)
    if num_processes == 1:
        _source = load_source(source)
        try:
            yield map
        finally:
            _source = None
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, initializer=_start_process, initargs=(source,)) as pool:

        def map_quietly(*arguments: Any) -> Iterator[Any]:
            with blocked([signal.SIGINT]):  # which a terminal sends to all: the processes start here
                return pool.map(*arguments)

        try:
            yield map_quietly
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_process(source: str) -> None:
    global _source
    end_with_parent()
    _source = load_source(source)


def _make_items(chunk: Chunk) -> list[Item]:
    rule, first, end = chunk
    assert _source is not None
    scenes = [make_scene(_source, rule, number) for number in range(first, end)]
    features = _source.region_features(scenes)
    items = []
    for index, scene in enumerate(scenes):
        members = {"jpg": scene.jpeg()}
        if features is not None:
            members["npy"] = _npy(scene, features[index])
        items.append((scene.key, scene.record, members))
    return items


def _npy(scene: Scene, features_RF: np.ndarray) -> bytes:
    assert len(features_RF) == len(scene.record.regions)
    buffer = io.BytesIO()
    np.save(buffer, features_RF.astype(np.float16), allow_pickle=False)
    return buffer.getvalue()
