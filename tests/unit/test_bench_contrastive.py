"""tools/bench/bench_contrastive.py: its simulated ranks count what real ones exchange, and its memory is memory.

Legend: B samples, D hidden.
"""

from __future__ import annotations

import dataclasses

import pytest

from tools.bench import bench_contrastive
from tools.bench.bench_contrastive import Setting, in_processes, lengths_of, wanted_of

SMALL = Setting("states", num_ranks=2, per_rank=8, hidden=16, scores_mib=16.0, repeats=2, gloo=False)


def rows_from_elsewhere(limits: tuple[int, int]) -> int:
    """Rows that rank 0's samples ask of rank 1."""
    lengths_B = lengths_of(1, SMALL, limits)
    return sum(int(lengths_B[i - 8]) for i in wanted_of(0, SMALL, limits).tolist() if i >= 8)


def rows_to_elsewhere(limits: tuple[int, int]) -> int:
    lengths_B = lengths_of(0, SMALL, limits)
    return sum(int(lengths_B[i]) for i in wanted_of(1, SMALL, limits).tolist() if i < 8)


@pytest.mark.timeout(240)
def test_simulated_ranks_receive_what_real_ones_do() -> None:
    """Rows in bfloat16 and back their gradients, the phrase mask in bytes, two int64 a sample for each choice."""
    text, regions = bench_contrastive.TEXT_LENGTHS, bench_contrastive.REGION_LENGTHS
    there = sum(rows_from_elsewhere(limits) for limits in (text, regions))
    back = sum(rows_to_elsewhere(limits) for limits in (text, regions))
    wanted = (there + back) * 16 * 2 + rows_from_elsewhere(text) + 2 * 8 * 2 * 8
    assert there > 0 and back > 0
    for gloo in (False, True):
        assert in_processes(dataclasses.replace(SMALL, gloo=gloo)).bytes_received == wanted, gloo


@pytest.mark.timeout(240)
def test_memory_of_known_tensors() -> None:
    """The plain gather keeps all states of all ranks: 8 x 64 x 90 x 256 bfloat16 are 22.5 MiB, and hardly more."""
    setting = Setting("states_plain", num_ranks=8, per_rank=64, hidden=256, scores_mib=16.0, repeats=1, gloo=False)
    cost = in_processes(setting)
    assert 22.5 <= cost.gib * 1024 < 40
    assert cost.bytes_received == bench_contrastive.at_least(setting).bytes_received
    assert cost.gib >= bench_contrastive.at_least(setting).gib


def test_a_process_that_fails_is_reported() -> None:
    with pytest.raises(RuntimeError, match=r"ended with 1:[\s\S]*KeyError: 'nothing'"):
        in_processes(dataclasses.replace(SMALL, part="nothing"))
