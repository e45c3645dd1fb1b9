"""The real launcher on shards whose regions come from a sidecar: two ranks, both stages, evaluation, a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mvptr_ds.data.schema import Extractor
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.sidecars import sidecar_json
from mvptr_ds.data.shards.tar_reader import read_keyed_record
from mvptr_ds.data.shards.tar_writer import write_tar
from mvptr_ds.eval import evaluate
from tests.end_to_end.conftest import Launch

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def sidecar(shards: Path, tmp_path: Path) -> Path:
    """Regions of both splits, but for four records of the training split; its index is made by the run."""
    items = []
    for split, left_out in (("train", 4), ("held_out", 0)):
        index = Index.open(shards / split)
        for number in range(index.num_records - left_out):
            place = index.place(number)
            key = read_keyed_record(place.path, place.offset, place.num_bytes)[0]
            record = index.read(place)[0]
            items.append((key, {"json": sidecar_json(Extractor("drawn", "1"), regions=record.regions[:2])}))
    (tmp_path / "sidecar").mkdir()
    write_tar(tmp_path / "sidecar" / "shard-000000.tar", items)
    return tmp_path / "sidecar"


def test_two_ranks_train_resume_and_evaluate_on_joined_shards(train: Launch, sidecar: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [f"data.sidecars=[{sidecar}]", "run.stages=[1,2]", "train.evaluate_every_steps=4"]
    code, output = train(run_dir, *overrides)
    assert code == 0, output
    assert f"sidecar {sidecar} (drawn 1): 60 of 64 records have a partner, the others are left out" in output
    assert f"sidecar {sidecar} (drawn 1): 16 of 16 records" in output
    assert len(list((run_dir / "joins").glob("joined-*.npy"))) == 2  # one a split, for both stages and both ranks
    for stage in ("stage1", "stage2"):
        lines = [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == 4 and all(line.get("data/bad_samples", 0) == 0 for line in lines)
    code, output = train(run_dir, *overrides, "run.stages=[2]", "stage2.max_steps=6")
    assert code == 0 and "goes on from step 4" in output, output
    report = evaluate(run_dir, [], tmp_path / "out")
    assert report["num_scenes"] == 16 and len(list((tmp_path / "out" / "joins").glob("*.npy"))) == 1
    code, output = train(run_dir, "run.stages=[2]", "stage2.max_steps=8")
    assert code == 2 and "was trained on other shards" in output
