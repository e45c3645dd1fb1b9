"""Property-based fuzzing of everything that reads shards: what a reader is given ends in a result or in a DataError.

    python -m tests.fuzz --inputs 100000 --seed 0

Inputs are mostly sound shards with a few bytes or values changed: random bytes alone rarely pass the first check. Any
other exception, a result that breaks its promise, a call of more than LIMIT_S, or an attempt to run code is a failure,
which hypothesis shrinks and prints. Each target's share of the inputs is by its cost.
"""

from __future__ import annotations

import argparse
import copy
import functools
import io
import itertools
import json
import resource
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from webdataset import tariterators

from mvptr_ds.corpus.building.source_images import ImageError, ImageOptions, check_image
from mvptr_ds.corpus.validating.record_checks import check_content
from mvptr_ds.corpus.validating.repair import Break, Piece, pieces
from mvptr_ds.data import schema
from mvptr_ds.data.features import SampleBuilder, SampleOptions, read_features
from mvptr_ds.data.images import decode_image
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.schema import Record, SidecarEntry, parse_entry, parse_record
from mvptr_ds.data.shards.index_builder import build_index
from mvptr_ds.data.shards.sidecars import merge_sidecar
from mvptr_ds.data.shards.tar_reader import iter_members, read_record
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import DataError
from tests.support.hostile import (
    CONTENT,
    FEATURE_DIM,
    NUM_REGIONS,
    content,
    encoded,
    features,
    members,
    named_members,
    npy,
    picture,
    write_tar,
)
from tests.support.odd_pictures import BUILT, MEANINGLESS, STORED, png, tiff

LIMIT_S = 5.0  # of one input
BATCH = 500  # inputs that hypothesis remembers at a time
BLOCK = tarfile.BLOCKSIZE


class HangError(AssertionError):
    """One input took more than LIMIT_S."""


class CodeRunError(AssertionError):
    """Reading an input looked up a pickled name, started a program, or opened a connection."""


_CODE_EVENTS = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen")
_OTHER_EVENTS = ("socket.connect", "ctypes.dlopen")
_watched: list[str] = []
_is_watching = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _is_watching and event in (*_CODE_EVENTS, *_OTHER_EVENTS):
        _watched.append(f"{event} {arguments!r}"[:200])


@functools.cache
def _install_audit() -> None:
    sys.addaudithook(_audit)  # it can never be removed again, hence the flag


@contextmanager
def guarded() -> Iterator[None]:
    """Fails when what is within takes longer than LIMIT_S, or tries to run code."""
    global _is_watching
    _install_audit()
    hung = []

    def stop(number: int, frame: FrameType | None) -> None:
        hung.append(HangError(f"more than {LIMIT_S} s"))
        raise hung[0]

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    _is_watching = True
    try:
        yield
    finally:
        _is_watching = False
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)
    if hung:  # taken for damage by what was reading
        raise hung[0]
    if _watched:
        seen = ", ".join(_watched)
        _watched.clear()
        raise CodeRunError(seen)


# ---- inputs


@st.composite
def edited(draw: st.DrawFn, kind: str) -> bytes:
    """One of the sound inputs of a kind, with a few edits."""
    blobs = SOUND[kind]()
    data = bytearray(draw(st.sampled_from(blobs)))
    _edit_some(draw, data, blobs, most=4)
    return bytes(data)


def _edit_some(draw: st.DrawFn, data: bytearray, blobs: Sequence[bytes], most: int) -> None:
    """Up to `most` edits: bytes set, cut off, removed, put in, doubled or taken from another input."""
    for _ in range(draw(st.integers(0, most))):
        start = draw(st.integers(0, len(data)))
        length = draw(st.one_of(st.integers(1, 8), st.integers(0, len(data))))
        edit = draw(st.sampled_from(("set", "flip", "cut", "remove", "insert", "double", "splice", "zero")))
        _edit(draw, data, blobs, edit, start, length)


def _edit(draw: st.DrawFn, data: bytearray, blobs: Sequence[bytes], edit: str, start: int, length: int) -> None:
    if edit == "set":
        payload = draw(st.binary(min_size=1, max_size=8))
        data[start : start + len(payload)] = payload
    elif edit == "flip" and start < len(data):
        data[start] ^= 1 << draw(st.integers(0, 7))
    elif edit == "cut":
        del data[start:]
    elif edit == "remove":
        del data[start : start + length]
    elif edit == "insert":
        data[start:start] = draw(st.binary(max_size=32))
    elif edit == "double":
        data[start:start] = data[start : start + length]
    elif edit == "splice":
        other = draw(st.sampled_from(blobs))
        data[start : start + length] = other[start : start + length]
    elif edit == "zero":
        data[start : start + length] = bytes(len(data[start : start + length]))


# bytes of a header where something is decided: name, size, sum, kind, magic, prefix
_FIELDS = ((0, 100), (124, 12), (148, 8), (156, 1), (157, 100), (257, 8), (345, 155))
_NAMES = (
    b"k0000.jpg",
    b"k0001.json",
    b"../k0001.jpg",
    b"/k0001.jpg",
    b"k.0.jpg",
    b"k0001",
    b"\xff\xfe.jpg",
    b"",
    b"./a.npy",
)
_SIZES = (
    b"00000000000",
    b"00000000017",
    b"77777777777",
    b"\x80" + bytes(10) + b"\1",
    b"\xff" * 12,
    b"zzz",
    b"00000002000",
)
_KINDS = (b"0", b"\0", b"1", b"2", b"3", b"5", b"7", b"x", b"g", b"L", b"K", b"S", b"D", b"V")


@st.composite
def tars(draw: st.DrawFn) -> bytes:
    """One of the tars, with blocks moved and headers changed, mostly with a sum that holds, then with any edit."""
    blobs = sound_tars()
    data = bytearray(draw(st.sampled_from(blobs)))
    for _ in range(draw(st.integers(0, 3))):
        num_blocks = len(data) // BLOCK
        first = BLOCK * draw(st.integers(0, num_blocks))
        span = BLOCK * draw(st.integers(0, 8))
        edit = draw(st.sampled_from(("header", "header", "header", "remove", "double", "zero", "move", "join")))
        if edit == "header":
            _edit_header(draw, data)
        elif edit == "remove":
            del data[first : first + span]
        elif edit == "double":
            data[first:first] = data[first : first + span]
        elif edit == "zero":
            data[first : first + span] = bytes(len(data[first : first + span]))
        elif edit == "move":
            part = data[first : first + span]
            del data[first : first + span]
            place = BLOCK * draw(st.integers(0, len(data) // BLOCK))
            data[place:place] = part
        else:
            data[first:] = draw(st.sampled_from(blobs))
    if draw(st.booleans()):
        _edit_some(draw, data, blobs, most=1)
    return bytes(data)


def _edit_header(draw: st.DrawFn, data: bytearray) -> None:
    starts = [start for start in range(0, len(data) - BLOCK + 1, BLOCK) if data[start + 257 : start + 262] == b"ustar"]
    if not starts:
        return
    start = draw(st.sampled_from(starts))
    field, size = draw(st.sampled_from(_FIELDS))
    known = {0: _NAMES, 124: _SIZES, 156: _KINDS}.get(field)
    value = draw(st.sampled_from(known)) if known and draw(st.booleans()) else draw(st.binary(max_size=size))
    data[start + field : start + field + size] = value[:size].ljust(size, b"\0")
    if draw(st.integers(0, 3)):
        block = data[start : start + BLOCK]
        block[148:156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(block)


def _deep(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


_ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**400), 0.5, 1e308, float("nan"), float("inf"), "",
    " ", "dog", "\ud800", "\0", "é" * 300, "[MASK] [SEP]", "\u202e", "x" * 5000, [], {}, [[]], _deep(40), _deep(400),
    {"box": 1}, "7",
)  # fmt: skip
values = st.one_of(
    st.sampled_from(_ODD),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.recursive(st.none() | st.integers(-3, 9) | st.text(max_size=3), lambda v: st.lists(v, max_size=3), max_leaves=4),
)


@st.composite
def contents(draw: st.DrawFn, of_sidecars: bool = False) -> dict[str, Any]:
    """The JSON of a sound record with up to three of its values replaced, removed, doubled, or joined by one more."""
    value = copy.deepcopy(draw(st.sampled_from(SIDECARS if of_sidecars else RECORDS)))
    for _ in range(draw(st.integers(0, 3))):
        parent, name = value, draw(st.sampled_from(sorted(value) or [""]))
        while parent and isinstance(parent[name], dict | list) and parent[name] and draw(st.integers(0, 3)):
            parent = parent[name]
            name = draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
        edit = draw(st.sampled_from(("replace", "replace", "remove", "double", "add")))
        if not parent:
            continue
        if edit == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(("own", "tag", "x")))] = copy.deepcopy(draw(values))
        elif edit in ("replace", "add"):
            parent[name] = copy.deepcopy(draw(values))
        elif edit == "remove":
            del parent[name]
        elif isinstance(parent, list):
            parent.insert(name, copy.deepcopy(parent[name]))
    return value


SOUND_TARS = [
    (lambda path, tar_format=tar_format, named=named: write_tar(path, named, tar_format))
    for tar_format, named in (
        (tarfile.USTAR_FORMAT, named_members([0, 1, 2])),
        (tarfile.USTAR_FORMAT, [item for item in named_members([1, 2, 3]) if item[0] != "k0001.jpg"]),
        (tarfile.GNU_FORMAT, [("./" + "x" * 120 + name, data) for name, data in named_members([4, 5])]),
        (tarfile.PAX_FORMAT, [("é" + name, data) for name, data in named_members([6, 7], txt=b"more")]),
    )
]


@functools.cache
def sound_tars() -> tuple[bytes, ...]:
    with tempfile.TemporaryDirectory() as folder:
        return tuple(make(Path(folder) / "s.tar").read_bytes() for make in SOUND_TARS)


PICTURES = (
    *(picture(image_format, size) for image_format in ("JPEG", "PNG", "WEBP") for size in ((32, 24), (5, 3))),
    *(shown.content for shown in STORED.values()),
)
BUILDER_PICTURES = (*(shown.content for shown in BUILT.values()), *(data for data, _ in MEANINGLESS.values()))
ARRAYS = (
    npy(features()), npy(features().astype(np.float32)), npy(features(0)), npy(features().astype(">f2")),
    npy(np.array([[1, {}]], dtype=object), allow_pickle=True), npy(np.zeros((2, 4), dtype="U3")), npy(np.zeros(3)),
    npy(np.zeros((2, 4), dtype=[("a", "f2")])), npy(np.asfortranarray(features())),
)  # fmt: skip
RECORDS = (
    CONTENT,
    content(regions=[]),
    content(captions=CONTENT["captions"][:1]),
    content(captions=[]),
    content(extractor={"name": "a", "version": "1"}),
)
_PNG_KINDS = {  # -> how many numbers a pixel of it has, and the depths that go with it
    0: (1, (1, 2, 4, 8, 16)),
    2: (3, (8, 16)),
    3: (1, (1, 2, 4, 8)),
    4: (2, (8, 16)),
    6: (4, (8, 16)),
}
_MADE_BY = {"schema": 1, "extractor": {"name": "a", "version": "1"}}
SIDECARS: tuple[dict[str, Any], ...] = (
    {**_MADE_BY, "width": 32, "height": 24, "regions": CONTENT["regions"]},
    {**_MADE_BY, "captions": CONTENT["captions"]},
    {**_MADE_BY, "regions": [], "captions": CONTENT["captions"]},
)
RAW_RECORDS = tuple(map(encoded, RECORDS))
SOUND: dict[str, Callable[[], Sequence[bytes]]] = {
    "tar": sound_tars,
    "npy": lambda: ARRAYS,
    "picture": lambda: PICTURES,
    "builder-picture": lambda: BUILDER_PICTURES,
    "json": lambda: RAW_RECORDS,
}


@st.composite
def pngs(draw: st.DrawFn) -> bytes:
    """Of any depth, kind, palette and transparency, which need not go together; its sums hold."""
    width, kind = draw(st.integers(1, 9)), draw(st.sampled_from(sorted(_PNG_KINDS)))
    num_numbers, depths = _PNG_KINDS[kind]
    bits = draw(st.sampled_from(depths) | st.sampled_from(depths) | st.sampled_from((1, 2, 4, 8, 16)))
    num_bytes = -(-width * bits * num_numbers // 8)
    row = draw(st.binary(min_size=num_bytes, max_size=num_bytes) | st.binary(max_size=20))
    palette = st.just(bytes(range(48))) | st.binary(max_size=800)
    chunks = {"PLTE": palette, "tRNS": st.binary(max_size=6) | st.binary(max_size=300), "acTL": st.binary(max_size=9)}
    names = draw(st.lists(st.sampled_from(("PLTE", "tRNS", "acTL")), unique=True, max_size=3))
    return png(width, bits, kind, row, **{name: draw(chunks[name]) for name in names})


@st.composite
def tiffs(draw: st.DrawFn) -> bytes:
    """Of any depths and meaning of its numbers."""
    width, bits = draw(st.integers(1, 9)), draw(st.integers(1, 6)) * (draw(st.sampled_from((1, 2, 4, 8, 12, 16, 32))),)
    num_bytes = -(-width * sum(bits) // 8)
    row = draw(st.binary(min_size=num_bytes, max_size=num_bytes))
    return tiff(width, bits, row, draw(st.integers(0, 9)), draw(st.none() | st.integers(0, 3)))


record_bytes = st.one_of(*[contents().map(encoded)] * 3, edited("json"))


# ---- targets


def _accepts(read: Callable[[], Any]) -> bool:
    """Whether the input was accepted. A DataError that says nothing is no use to anybody."""
    try:
        read()
    except DataError as error:
        assert str(error).strip()
        return False
    return True


def walk_a_tar(data: bytes) -> bool:
    def read() -> None:
        end = 0
        for member in iter_members(io.BytesIO(data), len(data), whole=True):
            assert end <= member.start < member.data <= member.data + member.size <= member.end <= len(data)
            end = member.end

    _accepts(lambda: list(iter_members(io.BytesIO(data), len(data), whole=False)))
    return _accepts(read)


def salvage_a_tar(data: bytes) -> bool:
    """Never an error; what is not passed over is what the walk finds, when that finds nothing wrong."""
    found = list(pieces(io.BytesIO(data), len(data)))
    is_sound = not any(isinstance(item, Break) for item in found)
    assert is_sound == _accepts(lambda: list(iter_members(io.BytesIO(data), len(data), whole=True)))
    ends = [0, *(item.end for item in found if isinstance(item, Piece))]
    starts = [*(item.start for item in found if isinstance(item, Piece)), len(data)]
    if is_sound:
        assert all(end <= start for end, start in zip(ends, starts, strict=True))
    return is_sound


def parse(data: bytes) -> bool:
    def read() -> None:
        record = parse_record(data)
        assert record == schema._record(schema.load_json(data))  # the quick way takes nothing that this would not

    return _accepts(read)


def read_npy(data: bytes) -> bool:
    def read() -> None:
        array = read_features({"npy": data}, NUM_REGIONS, FEATURE_DIM)
        assert array.shape == (NUM_REGIONS, FEATURE_DIM) and np.isfinite(array).all()
        assert array.dtype in (np.float16, np.float32) and array.dtype.isnative

    return _accepts(read)


def decode_a_picture(data: bytes) -> bool:
    def read() -> None:
        image = decode_image({"jpg": data}, 8)
        assert image.shape == (3, 8, 8) and image.dtype == np.uint8

    return _accepts(read)


def store_a_picture(data: bytes) -> bool:
    """As it is, or encoded again: what a builder stores, training reads."""

    def read(reencode: int | None) -> None:
        try:
            stored = check_image(data, ImageOptions(reencode=reencode))
        except ImageError as error:
            raise DataError(str(error)) from error
        assert decode_image({stored.extension: stored.content}, 8).shape == (3, 8, 8)

    accepted = [_accepts(functools.partial(read, reencode)) for reencode in (None, 60)]
    assert accepted[0] == accepted[1]
    return accepted[0]


@functools.cache
def builder(visual_source: str) -> SampleBuilder:
    words = WordPiece()
    phrases = PhraseVocab.build({("dog", "brown"): 2, ("dog", "chase", "woman"): 1}, words, 1)
    options = SampleOptions(
        visual_source=visual_source, feature_dim=FEATURE_DIM, image_size=8, word_prob=0.3, phrase_prob=0.3,
        tag_prob=0.3, predict_phrases=True, tag_drop_prob=0.3, tag_wrong_prob=0.3, tag_withhold_prob=0.1,
        tag_list=("cat", "cup"),
    )  # fmt: skip
    return SampleBuilder(words, phrases, options)


def build_a_sample(given_members: Mapping[str, bytes]) -> bool:
    def read(visual_source: str) -> None:
        sample = builder(visual_source).build(given_members, 0, 0, 0, np.random.default_rng(0))
        slots, tags, regions = len(sample.text_ids_T), len(sample.tag_ids_G), len(sample.region_geometry_R6)
        assert len(sample.mlm_labels_T) == len(sample.phrase_labels_T) == len(sample.phrase_mask_T) == slots >= 2
        assert len(sample.tag_labels_G) == tags >= 2
        assert sample.region_geometry_R6.shape == (regions, 6)
        assert np.isfinite(sample.region_geometry_R6).all()
        assert (sample.region_geometry_R6 >= 0).all() and (sample.region_geometry_R6 <= 1).all()
        if sample.region_features_RF is not None:
            assert sample.region_features_RF.shape[0] == regions

    return any([_accepts(functools.partial(read, source)) for source in ("features", "image")])


def check_a_record(given_members: Mapping[str, bytes]) -> bool:
    """Never an error: a check says what is wrong."""
    return not check_content(given_members, decode=True).problems


def join_a_sidecar(given: tuple[dict[str, bytes], bytes, bytes | None]) -> bool:
    own, sidecar, features_of_sidecar = given

    def read() -> None:
        record, entry = parse_record(own["json"]), parse_entry(sidecar)
        if isinstance(entry, Record):
            raise DataError("a record where a sidecar's entry belongs")
        assert isinstance(entry, SidecarEntry)
        merged, merged_members = merge_sidecar(record, own, entry, features_of_sidecar)
        assert [caption.text for caption in merged.captions] == [caption.text for caption in record.captions]
        sample = builder("features").build(merged_members, 0, 0, 0, np.random.default_rng(0), merged)
        assert sample.region_features_RF is not None
        assert len(sample.region_features_RF) == len(sample.region_geometry_R6)

    return _accepts(read)


@functools.cache
def scratch() -> Path:
    folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    _folders.append(folder)
    return Path(folder.name)


_folders: list[tempfile.TemporaryDirectory[str]] = []  # removed when this process ends


def index_a_tar(data: bytes) -> bool:
    """What the index accepts, webdataset reads to the same end, member by member."""
    path = scratch() / "s.tar"
    path.write_bytes(data)

    def read() -> None:
        index = build_index(scratch())
        samples = list(_by_webdataset(data))
        places = [index.locate(index.samples_of(record)[0]) for record in range(index.num_records)]
        assert len(samples) == len(places)
        for place, sample in zip(places, samples, strict=True):
            found = read_record(place.path, place.offset, place.num_bytes)
            assert {name: sample.get(name) for name in found} == found

    return _accepts(read)


def _by_webdataset(data: bytes) -> Iterator[dict[str, Any]]:
    members_found = tariterators.tar_file_iterator(io.BytesIO(data))
    return tariterators.group_by_keys({**member, "__url__": ""} for member in members_found)


def read_a_place(place: tuple[bytes, int, int]) -> bool:
    data, offset, num_bytes = place
    path = scratch() / "place.bin"
    with open(path, "r+b" if path.exists() else "w+b") as file:  # the reader keeps the file open
        file.truncate(0)
        file.write(data)
    return _accepts(lambda: read_record(str(path), offset, num_bytes))


@st.composite
def places(draw: st.DrawFn) -> tuple[bytes, int, int]:
    data = draw(tars())
    blocks = st.integers(0, len(data) // BLOCK).map(lambda block: block * BLOCK)
    return data, draw(blocks | st.integers(0, len(data) + 9)), draw(blocks | st.integers(0, len(data) + 9))


def _without(whole: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {extension: data for extension, data in whole.items() if extension != name}


_SOUND = members()
record_members = st.fixed_dictionaries(
    {
        "json": st.one_of(st.sampled_from(RAW_RECORDS), record_bytes),
        "npy": st.one_of(st.just(_SOUND["npy"]), st.sampled_from(ARRAYS), edited("npy")),
        "jpg": st.one_of(st.just(_SOUND["jpg"]), st.sampled_from(PICTURES), edited("picture")),
    }
).flatmap(
    lambda whole: st.one_of(st.just(whole), st.sampled_from(sorted(whole)).map(lambda name: _without(whole, name)))
)


@st.composite
def joins(draw: st.DrawFn) -> tuple[dict[str, bytes], bytes, bytes | None]:
    own = {**draw(record_members), "json": draw(st.sampled_from(RAW_RECORDS) | record_bytes)}
    features_of_sidecar = draw(st.none() | st.just(_SOUND["npy"]) | edited("npy"))
    return own, encoded(draw(contents(of_sidecars=True))), features_of_sidecar


Run = Callable[[Any], bool]


@dataclass(frozen=True)
class Target:
    name: str
    inputs: st.SearchStrategy[Any]
    run: Run  # whether an input is accepted
    share: int  # of a hundred inputs


TARGETS = (
    Target("walk", tars(), walk_a_tar, 16),
    Target("walk-bytes", edited("tar"), walk_a_tar, 6),
    Target("salvage", tars(), salvage_a_tar, 14),
    Target("parse", record_bytes, parse, 18),
    Target("features", edited("npy"), read_npy, 10),
    Target("picture", edited("picture") | pngs(), decode_a_picture, 8),
    Target("store", edited("picture") | edited("builder-picture") | pngs() | tiffs(), store_a_picture, 4),
    Target("sample", record_members, build_a_sample, 8),
    Target("join", joins(), join_a_sidecar, 4),
    Target("check", record_members.filter(lambda found: "json" in found), check_a_record, 4),
    Target("place", places(), read_a_place, 4),
    Target("index", tars(), index_a_tar, 4),
)


def examine(target: Target, value: Any) -> bool:
    """Whether an input is accepted. Raises AssertionError, or whatever it makes the target raise."""
    with guarded():
        return target.run(value)


def run_target(target: Target, num_inputs: int, first_seed: int, found: Counter[str]) -> None:
    """Gives a target `num_inputs` inputs; counts them as accepted or refused. Raises what the first bad one raises."""

    @seed(first_seed)
    @settings(
        max_examples=num_inputs,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def give(value: Any) -> None:
        found["accepted" if examine(target, value) else "refused"] += 1

    give()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, metavar="N", help="in all (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the inputs (%(default)s)")
    return parser.parse_args()


def fuzz_target(target: Target, num_inputs: int, first_seed: int) -> tuple[Counter[str], int]:
    """Gives a target all its inputs, in batches, with a line of progress; how they ended, and failures (0 or 1)."""
    found = Counter[str]()
    for number in itertools.count():
        done = found.total()
        print(f"\r{target.name}: {done:,} of {num_inputs:,} ", end="", file=sys.stderr, flush=True)
        if done >= num_inputs:
            break
        try:
            run_target(target, min(BATCH, num_inputs - done), first_seed + number, found)
        except Exception:  # whatever a target raises is the finding
            traceback.print_exc()
            return found, 1
    print(file=sys.stderr)
    return found, 0


def main() -> int:
    """Returns the exit status: 0 every input was accepted or refused, 1 one ended otherwise and was printed."""
    arguments = _parse_arguments()
    started_s = time.monotonic()
    counts, num_failures = {}, 0
    for target in TARGETS:
        num_inputs = arguments.inputs * target.share // 100
        found, failures = fuzz_target(target, num_inputs, arguments.seed * 1_000_000)
        counts[target.name] = dict(sorted(found.items()))
        num_failures += failures
    usage = resource.getrusage(resource.RUSAGE_SELF)
    summary = {
        "inputs": sum(sum(count.values()) for count in counts.values()),
        "failures": num_failures,
        "seed": arguments.seed,
        "targets": counts,
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "wall_s": round(time.monotonic() - started_s, 1),
        "max_memory_mib": usage.ru_maxrss // 1024,
    }
    print(json.dumps(summary))
    return 1 if num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
