from __future__ import annotations

import dataclasses
import errno
import io
import logging
import os
import pickle
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mvptr_ds.data.collate import IGNORE, Batch, Sample, collate
from mvptr_ds.data.dataset import SampleDataset, ShardDataset, load_samples
from mvptr_ds.data.features import SampleBuilder, SampleOptions
from mvptr_ds.data.loader import eval_batches, make_loader
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.sampling.batches import Batches
from mvptr_ds.data.sampling.plan import Plan
from mvptr_ds.data.schema import Caption, Phrase, Record, Region
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.storage import LocalFiles
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.data.sharing import SentBatch
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import DataError, PassingError
from tests.conftest import REPO
from tests.support.batch_equality import assert_equal_batches
from tests.support.tiny_models import whole_batch

WORDS = WordPiece()
NOUNS = ["dog", "cat", "tree", "house", "frisbee", "cow"]
VOCAB = PhraseVocab.build({(noun,): 1 for noun in NOUNS} | {(noun, "big"): 1 for noun in NOUNS}, WORDS, 1)
OPTIONS = SampleOptions(
    feature_dim=4,
    word_prob=0.3,
    phrase_prob=0.3,
    tag_prob=0.5,
    predict_phrases=True,
    tag_drop_prob=0.2,
    tag_wrong_prob=0.2,
    tag_withhold_prob=0.1,
    tag_list=NOUNS,
)
BATCH, STEPS, SEED = 8, 7, 3


def _item(number: int, rng: np.random.Generator) -> tuple[str, Record, dict[str, bytes]]:
    captions = []
    for _ in range(1 + number % 3):
        noun = NOUNS[rng.integers(6)]
        text = f"picture {number} of a big {noun}" + " here" * int(rng.integers(4))
        start = text.index(" big ") + 1
        spans = ((start, start + 3), (start + 4, start + 4 + len(noun)))
        captions.append(Caption(text, (Phrase((noun, "big"), spans), Phrase((noun,), spans[1:]))))
    regions = tuple(Region((0, 0, 9 + r, 9), NOUNS[rng.integers(6)]) for r in range(1 + number % 4))
    stream = io.BytesIO()
    np.save(stream, rng.random((len(regions), 4)).astype(np.float16))
    return f"k{number}", Record(f"id{number}", 64, 48, tuple(captions), regions), {"npy": stream.getvalue()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """21 records, 42 samples, in uneven shards: 16 and 5 records."""
    rng = np.random.default_rng(0)
    write_shards(tmp_path, (_item(n, rng) for n in range(21)), records_per_shard=16)
    return tmp_path


def _dataset(folder: Path) -> ShardDataset:
    index = Index.open(folder)
    plan = Plan(len(index), SEED, block_samples=4, window_blocks=3)
    return ShardDataset(index, plan, SampleBuilder(WORDS, VOCAB, OPTIONS))


def _rows(batch: Batch) -> list[dict[str, object]]:
    """Each sample without its padding, so that shares of a batch compare with the whole one."""
    masks = {
        "T": batch.text_mask_BT,
        "G": batch.tag_mask_BG,
        "R": batch.region_mask_BR,
    }
    rows = []
    for number in range(len(batch)):
        row: dict[str, object] = {}
        for field in dataclasses.fields(Batch):
            value = getattr(batch, field.name)
            if isinstance(value, torch.Tensor):
                axis = field.name.rsplit("_", 1)[1][1:2]
                kept = value[number][masks[axis][number]] if axis in masks else value[number]
                row[field.name] = kept.tolist()
        rows.append(row)
    return rows


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_global_batches_do_not_depend_on_the_number_of_ranks(
    folder: Path, num_ranks: int, accumulation_steps: int
) -> None:
    dataset = _dataset(folder)
    whole = [_rows(batch) for batch in make_loader(dataset, Batches(BATCH), 0, STEPS)]
    shares = [
        list(make_loader(dataset, Batches(BATCH), 0, STEPS, rank, num_ranks, accumulation_steps))
        for rank in range(num_ranks)
    ]
    assert {len(share) for share in shares} == {STEPS * accumulation_steps}  # 5.25 epochs of uneven shards
    for step in range(STEPS):
        rows = [
            row
            for accumulation in range(accumulation_steps)
            for share in shares
            for row in _rows(share[step * accumulation_steps + accumulation])
        ]
        assert rows == whole[step]


def test_number_of_workers_changes_nothing(folder: Path) -> None:
    dataset = _dataset(folder)
    for alone, helped in zip(
        make_loader(dataset, Batches(BATCH), 0, STEPS),
        make_loader(dataset, Batches(BATCH), 0, STEPS, num_workers=2, prefetch_batches=2),
        strict=True,
    ):
        assert_equal_batches(alone, helped)


def test_a_batch_of_a_worker_is_one_piece_of_memory(folder: Path) -> None:
    for batch in make_loader(_dataset(folder), Batches(BATCH), 0, STEPS, num_workers=1):
        tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) == 17 and len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
        assert all(tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 for tensor in tensors)


def test_a_batch_that_finds_no_shared_memory_ends_the_run_instead_of_being_lost(folder: Path) -> None:
    """A limit on the size of files, which the memory of a batch is one of, holds for the loader process, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DataError) as error:
            next(iter(make_loader(_dataset(folder), Batches(BATCH), 0, STEPS, num_workers=1, prefetch_batches=3)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(error.value).rpartition("DataError: ")[2]
    assert "no shared memory for a batch of 0.0 MiB ([Errno 27] File too large): /dev/shm has " in message
    assert "the 3 that a rank's loader processes hold ready take 0.0 MiB" in message and "--shm-size" in message


IN_A_SMALL_SHM = """
import gc, os, sys, time
from tests.unit.test_loader import BATCH, STEPS, Batches, DataError, Path, _dataset, make_loader
def refuse(*_): raise PermissionError(1, "Operation not permitted")
memfd_create = os.memfd_create
free = os.statvfs("/dev/shm").f_bfree
for memory in ("", "forbidden", "full"):
    until = time.monotonic() + 30
    while os.statvfs("/dev/shm").f_bfree < free and time.monotonic() < until:  # semaphores of processes that are ending
        gc.collect()
        time.sleep(0.02)
    os.memfd_create = refuse if memory == "forbidden" else memfd_create  # as a sandbox answers
    if memory == "full":
        Path("/dev/shm/ballast").touch()
        try:
            with open("/dev/shm/ballast", "ab", buffering=0) as file:
                while file.write(bytes(4096)): pass
        except OSError: pass
    try:
        print(len(list(make_loader(_dataset(Path(sys.argv[1])), Batches(BATCH), 0, STEPS, num_workers=1))), "batches")
    except DataError as error:
        print(str(error).rpartition("DataError: ")[2].strip())
"""


@pytest.fixture(scope="module")
def said_in_a_small_shm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A line for each kind of memory, of one start of Python in a mount namespace of its own."""
    folder = tmp_path_factory.mktemp("small-shm")
    rng = np.random.default_rng(0)
    write_shards(folder, (_item(n, rng) for n in range(21)), records_per_shard=16)
    mount = "mount -t tmpfs -o size=48k tmpfs /dev/shm"  # a page for each of 11 semaphores, and one besides
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        pytest.skip("a mount namespace of its own needs root")
    script = [sys.executable, "-c", IN_A_SMALL_SHM, str(folder)]
    done = subprocess.run([*command, *script], cwd=REPO, capture_output=True, text=True, timeout=200)
    lines = done.stdout.splitlines(keepends=True)
    assert len(lines) == 3, done.stderr
    return dict(zip(("", "forbidden", "full"), lines, strict=True))


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("memory", "said"),
    [
        ("", r"7 batches\n"),  # they do not lie in /dev/shm
        ("forbidden", r"no shared memory for a batch of .*No space left on device.*/dev/shm has .*--shm-size.*\n"),
        ("full", r"loader processes cannot be started, .* semaphores: /dev/shm has .* 0.0 MiB of it free; .*\n"),
    ],
)
def test_a_small_shm_is_no_hindrance_or_is_said(said_in_a_small_shm: dict[str, str], memory: str, said: str) -> None:
    assert re.fullmatch(said, said_in_a_small_shm[memory])


@pytest.mark.parametrize("source", ["features", "image"])
def test_a_batch_with_nothing_to_see_goes_to_another_process(source: str) -> None:
    record = Record("0", 0, 0, (Caption("a big dog"),))
    builder = SampleBuilder(WORDS, VOCAB, dataclasses.replace(OPTIONS, visual_source=source, feature_dim=None))
    batch = collate([builder.build({}, 0, 0, 7, np.random.default_rng(0), record)] * 3)
    copy = pickle.loads(pickle.dumps(SentBatch(batch)))
    assert_equal_batches(batch, copy)
    assert copy.position_B.tolist() == [7, 7, 7]
    if source == "image":
        assert copy.region_features_BRF is None
        assert copy.images_B3HW.is_contiguous(memory_format=torch.channels_last)
        assert not copy.images_B3HW.is_contiguous()


def test_resume_gives_the_same_batches(folder: Path) -> None:
    dataset, fresh = _dataset(folder), _dataset(folder)
    whole = list(make_loader(dataset, Batches(BATCH), 0, STEPS))
    rest = list(make_loader(fresh, Batches(BATCH), 4, STEPS))
    assert len(rest) == STEPS - 4
    for first, second in zip(whole[4:], rest, strict=True):
        assert_equal_batches(first, second)


def test_masking_differs_between_epochs_and_every_sample_comes_once(folder: Path) -> None:
    dataset = _dataset(folder)
    num = len(dataset.index)
    first, second = (
        sorted(
            (s.image_index, tuple(s.text_ids_T[s.mlm_labels_T == IGNORE][:4]), s.mlm_labels_T.tobytes())
            for s in (dataset[position] for position in range(epoch * num, (epoch + 1) * num))
        )
        for epoch in range(2)
    )
    assert [row[0] for row in first] == [row[0] for row in second]
    assert len({row[0] for row in first}) == 21
    assert first != second


def _built(dataset: ShardDataset, number: int, position: int, key: list[int]) -> Batch:
    """The sample `number` as the generator of this key masks it."""
    asked = [(number, position, np.random.default_rng(key))]
    return collate(load_samples(dataset.index, dataset.builder, asked))


def test_a_sample_is_masked_anew_in_every_epoch(folder: Path) -> None:
    """Its generator is frozen: a resume with a later version must draw what the run began with."""
    dataset = _dataset(folder)
    for place, number in ((0, 0), (5, 20), (41, 41)):
        labels = set()
        for epoch in range(4):
            position = epoch * len(dataset.index) + place
            batch = collate([dataset.load(position, epoch, number)])
            assert_equal_batches(batch, _built(dataset, number, position, [11, SEED, epoch, position]))
            labels.add((tuple(batch.mlm_labels_BT[0].tolist()), tuple(batch.tag_labels_BG[0].tolist())))
        assert len(labels) == 4


def _damage(folder: Path, record: int) -> str:
    """Overwrites the features of one record, so that its samples cannot be built; its size stays."""
    index = Index.open(folder)
    place = index.locate(index.samples_of(record)[0])
    content = bytearray(Path(place.path).read_bytes())
    start = content.index(b"\x93NUMPY", place.offset)
    content[start : start + 6] = b"broken"
    Path(place.path).write_bytes(content)
    return place.path


def test_a_bad_sample_is_replaced_in_the_same_way_every_time(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = _dataset(folder)
    good = [before[position] for position in range(len(before.index))]
    path = _damage(folder, 5)
    dataset = _dataset(folder)
    with caplog.at_level(logging.WARNING):
        first = [dataset[position] for position in range(len(dataset.index))]
    again = _dataset(folder)
    second = again.__getitems__(list(range(len(again.index))))
    num_replaced = 0
    for position, (was, now, then) in enumerate(zip(good, first, second, strict=True)):
        assert_equal_batches(collate([now]), collate([then]))
        assert now.position == position and now.image_index != 5
        if was.image_index == 5:
            num_replaced += 1
        else:
            assert_equal_batches(collate([was]), collate([now]))
    assert num_replaced == len(dataset.index.samples_of(5)) == 3
    assert path in caplog.text and "'k5'" in caplog.text and "npy member cannot be read" in caplog.text
    assert sum(sample.num_bad > 0 for sample in first) == 3
    place = dataset.index.locate(dataset.index.samples_of(5)[0])
    for sample in first:
        for bad in sample.bad:
            assert (bad.position, bad.shard, bad.key, bad.byte) == (sample.position, path, "k5", place.offset)
            assert "npy member cannot be read" in bad.reason and not bad.passes
    assert sorted(bad.caption for sample in first for bad in sample.bad[:1]) == [0, 1, 2]
    (batch,) = make_loader(dataset, Batches(42), 0, 1, num_workers=1)
    assert batch.bad == tuple(bad for sample in first for bad in sample.bad)
    assert int(collate(first).num_bad_B.sum()) == sum(sample.num_bad for sample in first) >= 3


def test_substitutes_are_drawn_apart_from_the_masking(folder: Path) -> None:
    """Each by a generator of its own, frozen."""
    _damage(folder, 5)
    dataset = _dataset(folder)
    bad = dataset.index.samples_of(5)
    for position in range(8):
        tried = np.random.default_rng([12, SEED, 3, position]).integers(len(dataset.index), size=9).tolist()
        num_bad = next(i for i, number in enumerate(tried) if number not in bad) + 1
        wanted = _built(dataset, tried[num_bad - 1], position, [11, SEED, 3, position])
        found = dataset.load(position, 3, bad[0])
        assert len(found.bad) == num_bad
        assert_equal_batches(collate([dataclasses.replace(found, bad=())]), wanted)


def test_a_read_that_fails_names_the_key_and_may_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second read of a place fails: that of a record, and not the look at its key."""
    read, times = LocalFiles.read, Counter[tuple[str, int]]()

    def fail(files: LocalFiles, path: str, offset: int, num_bytes: int) -> bytes:
        times[path, offset] += 1
        if times[path, offset] % 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return read(files, path, offset, num_bytes)

    monkeypatch.setattr(LocalFiles, "read", fail)
    with pytest.raises(PassingError, match=r"9 samples in a row .* key 'k\d+', byte \d+, caption \d: .Errno 5. Input"):
        _dataset(folder)[0]
    with pytest.raises(PassingError, match="9 samples in a row"):  # it stays what it is on the way from a process
        next(iter(make_loader(_dataset(folder), Batches(BATCH), 0, 1, num_workers=1)))
    with pytest.raises(PassingError, match="key 'k0'"):
        next(eval_batches(Index.open(folder), SampleBuilder(WORDS, VOCAB, SampleOptions(feature_dim=4)), 10))


def test_nothing_but_bad_samples_ends_with_the_reason(folder: Path) -> None:
    for record in range(21):
        _damage(folder, record)
    with pytest.raises(DataError, match=r"9 samples in a row .* key 'k\d+'"):
        _dataset(folder)[0]


def test_indivisible_ranks_are_refused_before_reading(folder: Path) -> None:
    dataset = _dataset(folder)
    with pytest.raises(ValueError, match="3 ranks"):
        make_loader(dataset, Batches(BATCH), 0, 1, 0, 3)
    with pytest.raises(ValueError, match="the index holds 42"):
        ShardDataset(dataset.index, Plan(41, 0), dataset.builder)


def test_a_dataset_that_lacks_a_method_cannot_be_made() -> None:
    class Half(SampleDataset):
        def __getitems__(self, positions: list[int]) -> list[Sample]:
            return []

    with pytest.raises(TypeError, match=r"abstract.* remote_extents"):
        Half()  # type: ignore[abstract]


def test_eval_batches_run_in_order_without_masking(folder: Path) -> None:
    index = Index.open(folder)
    builder = SampleBuilder(WORDS, VOCAB, SampleOptions(feature_dim=4))
    batches = list(eval_batches(index, builder, 10))
    assert [len(batch) for batch in batches] == [10, 10, 10, 10, 2]
    assert torch.cat([batch.position_B for batch in batches]).tolist() == list(range(42))
    assert all((batch.mlm_labels_BT == IGNORE).all() and (batch.tag_labels_BG == IGNORE).all() for batch in batches)
    numbers = [index.samples_of(record)[0] for record in range(5)]
    (batch,) = eval_batches(index, builder, 10, numbers)
    assert batch.image_index_B.tolist() == [0, 1, 2, 3, 4]
    assert batch.position_B.tolist() == numbers == [0, 1, 3, 6, 7]
    _damage(folder, 2)
    with pytest.raises(DataError, match="'k2'"):
        list(eval_batches(Index.open(folder), builder, 10))


def test_records_of_one_modality_are_read_in_their_places(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    key, record, members = _item(2, rng)
    items = [
        (key, record, members),
        ("text", Record("t", 0, 0, record.captions[:2]), {}),
        ("image", dataclasses.replace(record, captions=()), members),
    ]
    write_shards(tmp_path, items, 2)
    dataset = _dataset(tmp_path)
    (batch,) = eval_batches(dataset.index, SampleBuilder(WORDS, VOCAB, SampleOptions(feature_dim=4)), 10)
    assert batch.image_index_B.tolist() == [0, 0, 0, 1, 1, 2]
    assert batch.region_mask_BR.sum(1).tolist() == [3, 3, 3, 0, 0, 3]
    assert batch.text_mask_BT[5].sum() == 2 and (batch.text_mask_BT[:5].sum(1) > 4).all()
    assert [dataset[position].num_bad for position in range(12)] == [0] * 12


def test_a_view_of_a_longer_tensor_goes_to_another_process_as_it_is() -> None:
    """As one tensor with the others, of which it takes only its own bytes."""
    batch = whole_batch()
    text_ids_BT = batch.text_ids_BT[:, 1:4]
    sent = SentBatch(dataclasses.replace(batch, text_ids_BT=text_ids_BT, image_index_B=torch.tensor([7]).expand(4)))
    copied = pickle.loads(pickle.dumps(sent))
    assert torch.equal(copied.text_ids_BT, text_ids_BT) and copied.image_index_B.tolist() == [7] * 4
    assert torch.equal(copied.tag_ids_BG, batch.tag_ids_BG)
