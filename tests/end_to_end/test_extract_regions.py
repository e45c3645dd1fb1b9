"""tools/extract_regions.py on real shards with small detectors."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from mvptr_ds.corpus.regions.detection import RegionChoice, choose_regions
from mvptr_ds.corpus.regions.detector import Detector, DetectorSource
from mvptr_ds.corpus.regions.extraction import extract_regions
from mvptr_ds.corpus.resumable_jobs import Summary
from mvptr_ds.data.features import read_features, region_geometry
from mvptr_ds.data.schema import Caption, Record, SidecarEntry, parse_entry
from mvptr_ds.data.shards.sidecars import merge_sidecar
from mvptr_ds.data.shards.tar_writer import npy_bytes
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.errors import DataError
from tests.conftest import REPO
from tests.support.tiny_detector import HIDDEN, save_detector

CHOICE = RegionChoice(score_threshold=0.2)
SIZES = ((100, 80), (60, 90), (200, 50), (33, 90), (80, 80))  # width, height


def picture(number: int, form: str = "PNG", **options: Any) -> bytes:
    width, height = SIZES[number % len(SIZES)]
    pixels = np.random.default_rng(number).integers(0, 255, (height // 10 + 1, width // 10 + 1, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(buffer, form, **options)
    return buffer.getvalue()


def item(number: int, members: dict[str, bytes] | None = None) -> tuple[str, Record, dict[str, bytes]]:
    width, height = SIZES[number % len(SIZES)]
    record = Record(f"image {number}", width, height, (Caption(f"caption {number}"),))
    return f"k{number:03d}", record, {"png": picture(number)} if members is None else members


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures in three shards."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, (item(number) for number in range(12)), records_per_shard=5)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_detector(kind, folder / kind) for kind in ("detr", "yolos", "rt_detr")}


def read(out: Path) -> dict[str, dict[str, Any]]:
    """The sidecar through plain webdataset, undecoded."""
    records = {}
    for sample in webdataset.WebDataset([str(path) for path in sorted(out.glob("*.tar"))], shardshuffle=False):
        content = {"json": json.loads(sample["json"]), "npy": None}
        if "npy" in sample:
            content["npy"] = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
        records[sample["__key__"]] = content
    return records


def join(image: tuple[str, Record, dict[str, bytes]], entry: dict[str, Any]) -> tuple[Record, dict[str, bytes]]:
    """The record with what the sidecar says of it, as training reads it."""
    parsed = parse_entry(entry["json"])
    assert isinstance(parsed, SidecarEntry)
    return merge_sidecar(image[1], image[2], parsed, npy_bytes(entry["npy"]))


def tars(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


Run = Callable[..., Summary]


@pytest.fixture
def run(shards: Path, models: dict[str, Path], tmp_path: Path) -> Run:
    def call(kind: str = "yolos", **options: Any) -> Summary:
        arguments = {"shards": shards, "out": tmp_path / "out", "choice": CHOICE, "device": "cpu", **options}
        return extract_regions(model=str(models[kind]), **arguments)

    return call


@pytest.mark.parametrize("kind", ["yolos", "rt_detr"])
def test_the_sidecar_holds_what_the_detector_finds(
    kind: str, run: Run, models: dict[str, Path], tmp_path: Path
) -> None:
    """Records in the order of the shards, whatever the batches; features are of their regions."""
    summary = run(kind, features=True, batch_size=3)
    assert summary.counts["records"] == 12 and not summary.dropped
    records = read(tmp_path / "out")
    assert list(records) == [f"k{number:03d}" for number in range(12)]
    assert [path.name for path in sorted((tmp_path / "out").glob("*.tar"))] == [f"shard-00000{n}.tar" for n in range(3)]
    detector = Detector(DetectorSource(str(models[kind]), states=True))
    for number, (key, record) in enumerate(records.items()):
        size = SIZES[number % len(SIZES)]
        (found,) = detector.detect([Image.open(io.BytesIO(picture(number))).convert("RGB")], [size])
        assert found is not None and found.states_QD is not None
        regions, queries = choose_regions(found, *size, RegionChoice(0.2, at_least_one=True))
        content = record["json"]
        assert (content["schema"], content["width"], content["height"]) == (1, *size), key
        assert content["extractor"]["name"] == f"{kind} ({kind})" and len(content["extractor"]["version"]) == 12
        assert [region["tag"] for region in content["regions"]] == [region.tag for region in regions]
        boxes = [region["box"] for region in content["regions"]]
        np.testing.assert_allclose(boxes, [region.box for region in regions], atol=0.05)
        assert record["npy"].dtype == np.float16 and record["npy"].shape == (len(regions), HIDDEN)
        np.testing.assert_allclose(record["npy"], found.states_QD[queries], rtol=2e-3, atol=2e-3)
        joined, members = join(item(number), record)
        assert read_features(members, len(region_geometry(joined, grid_size=4)), HIDDEN).shape == record["npy"].shape


def test_without_features_a_picture_may_have_no_region(run: Run, tmp_path: Path) -> None:
    """With them it has one, because features must have a row."""
    never = RegionChoice(score_threshold=1.0)
    summary = run("detr", choice=never)
    records = read(tmp_path / "out")
    assert all(record["json"]["regions"] == [] and record["npy"] is None for record in records.values())
    assert summary.counts["pictures without a detection above the threshold"] == len(records) == 12
    summary = run("detr", choice=never, features=True, out=tmp_path / "with")
    assert all(record["npy"].shape == (1, HIDDEN) for record in read(tmp_path / "with").values())
    assert summary.counts["pictures without a detection above the threshold"] == summary.counts["regions"] == 12


def test_what_cannot_be_used_is_dropped_and_counted(run: Run, tmp_path: Path) -> None:
    whole = picture(0, "JPEG")
    turned = Image.Exif()
    turned[274] = 6  # a camera held upright; the loader does not turn it, so boxes must not be turned either
    thin = io.BytesIO()
    Image.new("RGB", (400, 2)).save(thin, "PNG")
    items = [
        item(0, {"jpg": whole[: len(whole) // 2]}),
        item(1, {"jpg": b"no picture"}),
        item(2, {"npy": b"0"}),
        item(3, {"png": thin.getvalue()}),
        item(4, {"jpg": picture(5, "JPEG", exif=turned)}),  # 100 x 80, and the record says 80 x 80
        item(6),
    ]
    write_shards(tmp_path / "shards", items, records_per_shard=4)
    summary = run(shards=tmp_path / "shards")
    assert dict(summary.dropped) == {"the picture cannot be used": 3, "the record has no image": 1}
    assert summary.counts["pictures of another size than their record says"] == 1
    records = read(tmp_path / "out")
    assert list(records) == ["k004", "k006"] and records["k004"]["json"]["width"] == 100
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == [
        "shard-000001.tar"
    ]  # nothing of the first is left


def test_limit_and_other_arguments(run: Run, tmp_path: Path) -> None:
    assert run(limit=7).counts["records"] == 7
    assert list(read(tmp_path / "out")) == [f"k{number:03d}" for number in range(7)]
    before = tars(tmp_path / "out")
    assert run(limit=7, batch_size=2).counts["records"] == 7  # finished: nothing is done again
    assert tars(tmp_path / "out") == before
    with pytest.raises(DataError, match=r"other arguments .*limit"):
        run()
    with pytest.raises(DataError, match=r"other arguments .*extractor"):
        run("rt_detr", limit=7)
    with pytest.raises(DataError, match="is a sidecar"):
        run(shards=tmp_path / "out", out=tmp_path / "again")


def tool(*arguments: object) -> list[str]:
    return [sys.executable, str(REPO / "tools" / "extract_regions.py"), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(tool(*arguments), env=environment(), capture_output=True, text=True, timeout=120)


def test_killed_and_started_again_gives_the_same_bytes(models: dict[str, Path], tmp_path: Path) -> None:
    """Also with another number of processes: one torch thread each, in both runs."""
    write_shards(tmp_path / "shards", (item(number) for number in range(60)), records_per_shard=3)
    arguments = [tmp_path / "shards", "--model", models["yolos"], "--features", "--score-threshold", 0.2]
    out = tmp_path / "out"
    with subprocess.Popen(tool(*arguments, "--out", out), env=environment(), stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list((out / ".progress").glob("0*.json")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert len(tars(out)) < 20 and not (out / "summary.json").exists()
    again = call(*arguments, "--out", out)
    assert again.returncode == 0 and "records: 60" in again.stdout, again.stderr
    whole = call(*arguments, "--out", tmp_path / "whole", "--processes", 2)
    assert whole.returncode == 0, whole.stderr
    assert tars(out) == tars(tmp_path / "whole") and len(tars(out)) == 20
    assert not list(out.glob("*.partial")) and not (out / ".progress").exists()


def test_errors_of_the_tool(shards: Path, models: dict[str, Path], tmp_path: Path) -> None:
    wrong = call(shards, "--model", models["yolos"], "--out", tmp_path / "out", "--nms-iou", 2)
    assert wrong.returncode == 2 and "nms_iou is 2.0" in wrong.stderr
    broken = Path(shutil.copytree(models["yolos"], tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"no weights")
    failed = call(shards, "--model", broken, "--out", tmp_path / "out")
    assert failed.returncode == 1 and "cannot be loaded as an object detector" in failed.stderr
    assert "Traceback" not in failed.stderr and not (tmp_path / "out").exists()
