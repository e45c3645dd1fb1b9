"""The benchmark of a training step: what it compares with computes the same, and its last line is what it promises."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from mvptr_ds.data.collate import IGNORE
from mvptr_ds.objectives.hard_negatives import RandomDraws
from tests.conftest import REPO
from tests.support.tools import run_tool

sys.path.append(str(REPO / "tools/bench"))  # as `python tools/bench/bench_step.py` has it

import bench_models
import bench_step


def test_the_reference_computes_our_losses_and_gradients() -> None:
    config = bench_step.model_config(small=True)
    batch = bench_models.make_batch(5, 0, config)
    draws = RandomDraws.keyed(0, 0, 0, 5, bench_models.TEXT_SLOTS)
    task = bench_models.build_task(config, "packed")
    reference = bench_models.Reference(task.model)
    ours = bench_step.step(task, batch, draws)
    theirs = bench_step.step(reference, bench_models.fixed_slots(batch), draws)
    assert ours.keys() == theirs.keys() == {"mcr_tags", "vsc", "mlm", "itm", "wpg"}
    for name, part in ours.items():
        assert part.count == theirs[name].count > 0
        assert part.sum.item() == pytest.approx(theirs[name].sum.item(), abs=1e-4), name  # float32 sums
    model = task.model
    for mine, other in (
        (model.embeddings.word_embeddings.weight, reference.words.weight),
        (model.region_embedding.projection.weight, reference.img_embedding.weight),
        (
            model.cross_encoder.layers[0].ffn_in.weight,
            reference.encoders["mul_encoder"].layer[0].intermediate.dense.weight,
        ),
    ):
        assert mine.grad is not None and other.grad is not None
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_batches_have_the_lengths_they_say() -> None:
    config = bench_step.model_config(small=True)
    batch = bench_models.make_batch(200, 1, config)
    phrases = batch.phrase_mask_BT.sum(1)
    tokens = torch.tensor(batch.text_lengths) - 2 - phrases
    assert (tokens.min(), tokens.max(), phrases.min(), phrases.max()) == (8, 20, 0, 5)
    assert (min(batch.tag_lengths), max(batch.tag_lengths)) == (10, 20)
    assert (min(batch.region_lengths), max(batch.region_lengths)) == (20, 50)
    assert 0.1 < (batch.tag_labels_BG != IGNORE).sum().item() / (sum(batch.tag_lengths) - 400) < 0.2
    given = bench_models.make_batch(20, 1, config, [9, 12])
    words = torch.tensor(given.text_lengths) - 2 - given.phrase_mask_BT.sum(1)
    assert set(words.tolist()) == {9, 12}


@pytest.mark.timeout(900)  # four processes that import torch, on a machine that may be busy
def test_the_tool_ends_with_one_line_of_json() -> None:
    sizes = ("--batch", 2, "--steps", 1, "--score", 2, "--threads", torch.get_num_threads())
    done = run_tool("bench/bench_step.py", "--small", *sizes)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    wanted = {"speedup_vs_reference", "speedup_vs_padded", "gflops_per_cpu_s", "gemm_peak_gflops_per_cpu_s"}
    assert wanted | {"peak_rss_gib", "losses_max_abs_diff", "scoring_speedup"} <= found.keys()
    assert found["losses_max_abs_diff"] < 1e-4 and found["scoring_max_abs_diff"] < 1e-6


@pytest.mark.timeout(600)  # two processes that import torch, on a machine that may be busy
def test_memory_of_many_steps_beside_the_reference() -> None:
    sizes = ("--batch", 2, "--steps", 3, "--threads", torch.get_num_threads())
    done = run_tool("bench/bench_memory.py", "--small", *sizes)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ratio = found["packed_peak_rss_gib"] / found["reference_peak_rss_gib"]
    assert found["memory_vs_reference"] == pytest.approx(ratio, rel=1e-3)
    assert 0 < found["packed_peak_rss_gib"] < 3 and found["steps"] == 3
    assert found["packed_growth_of_second_half_gib"] >= 0
