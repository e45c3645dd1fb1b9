"""The real launcher on a mixture of pairs, texts and images, in buckets, from a few lines of YAML: ranks, a resume."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from mvptr_ds.data.schema import Caption, Record
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.tar_reader import record_key
from mvptr_ds.data.shards.writer import write_shards
from tests.end_to_end.conftest import Launch

pytestmark = pytest.mark.timeout(600)
SHARES = {"pairs": 0.5, "texts": 0.375, "images": 0.125}


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> Path:
    """A quarter of the records are pairs; of two others the captions are kept, or the picture."""
    index = Index.open(shards / "train")

    def items(part: int) -> Iterator[tuple[str, Record, dict[str, bytes]]]:
        for number in range(part, index.num_records, 4):
            place = index.place(number)
            record, members = index.read(place)
            del members["json"]
            yield record_key(place.path, place.offset, place.num_bytes), record, members

    def text_alone(record: Record) -> Record:
        captions = (
            Caption(c.text, tuple(msgspec.structs.replace(p, regions=()) for p in c.phrases)) for c in record.captions
        )
        return dataclasses.replace(record, captions=tuple(captions), regions=(), width=0, height=0)

    write_shards(tmp_path / "pairs", items(0), 8)
    write_shards(tmp_path / "texts", ((key, text_alone(record), {}) for key, record, _ in items(1)), 8)
    write_shards(
        tmp_path / "images", ((k, dataclasses.replace(r, captions=()), members) for k, r, members in items(2)), 8
    )
    lines = [f"    {name}: {{shards: {tmp_path / name}, weight: {share}}}\n" for name, share in SHARES.items()]
    head = "extends: demo\ndata:\n  train: null\n  demo_source: null\n  bucket_batches: 4\n  sources:\n"
    (tmp_path / "mixture.yaml").write_text(head + "".join(lines), encoding="utf-8")
    return tmp_path / "mixture.yaml"


def test_a_mixture_trains_and_resumes_bit_for_bit(train: Launch, config: Path, tmp_path: Path) -> None:
    given = ["--config", str(config), "data.train=null", "run.stages=[1]", "train.log_every_steps=1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, output = train(whole, *given)
    assert code == 0, output
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "stage1/checkpoints/step-00000004")
    code, output = train(cut, *given)  # goes on in the middle of the pool
    assert code == 0 and "stage1 goes on from step 2" in output, output
    wanted, found = (load_file(d / "stage1/checkpoints/step-00000004/model/model.safetensors") for d in (whole, cut))
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []

    lines = [json.loads(line) for line in (cut / "stage1/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    num_samples = {name: len(Index.open(tmp_path / name)) for name in SHARES}
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    seen = dict.fromkeys(SHARES, 0.0)
    for line in lines:
        assert line["data/bad_samples"] == 0
        assert any(line[f"loss/{name}"] is not None for name in ("mlm", "mcr_tags"))
        for name, share in SHARES.items():
            seen[name] += line[f"source/{name}/samples"]
            epochs = 8 * line["step"] * share / num_samples[name]
            assert line[f"source/{name}/epochs"] == pytest.approx(epochs)
    assert any(line["source/texts/loss/mlm"] is not None for line in lines)
    assert all(line["source/images/loss/mlm"] is None for line in lines)
    assert seen == {name: 32 * share for name, share in SHARES.items()}  # exact in the four batches of the pool
    assert len(list((cut / "joins").glob("lengths-*.npy"))) == len(SHARES)
