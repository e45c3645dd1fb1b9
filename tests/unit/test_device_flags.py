"""Flags that are decided on the device and read a step later."""

from __future__ import annotations

import pytest
import torch

from mvptr_ds.optim.device_flags import DeviceFlags


def test_all_but_the_newest_are_told_in_their_order() -> None:
    flags = DeviceFlags()
    assert flags.take(newest=True) == flags.take(newest=False) == []
    for value in (1.0, 0.0, 1.0):
        flags.note(torch.tensor(value))
    assert flags.take(newest=False) == [True, False]
    assert flags.newest() is True
    assert flags.take(newest=False) == []
    flags.note(torch.tensor(0.0))
    assert flags.take(newest=True) == [True, False]
    assert flags.newest() is False and flags.take(newest=True) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_flag_comes_behind_the_work_that_decides_it() -> None:
    flags, device = DeviceFlags(), torch.device("cuda")
    product = torch.randn(4096, 4096, device=device)
    for value in (1.0, 0.0):
        for _ in range(20):
            product = product @ product / 64
        flags.note((product[0, 0] * 0 + value).nan_to_num(value))
    assert flags.take(newest=True) == [True, False]
