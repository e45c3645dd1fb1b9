"""Writes TensorBoard's event files: the same run after a resume, without what the resume repeats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = "tensorboard"


class TensorBoardRun:
    """Writes `STAGE/tensorboard/`, which TensorBoard shows as one run.

    What eval.py finds goes to `STAGE/tensorboard/eval/`, a run of its own: TensorBoard reads the files of a folder one
    after the other, so a second writer would hide what the first still writes.

    Args:
        resumed_at: the step that the stage resumes from. Later steps of earlier files are no longer shown, by
            TensorBoard's fast loader once a curve repeats them. None: an evaluation by eval.py.

    Raises:
        RuntimeError: the package `tensorboard` is not installed.
        OSError: the folder cannot be written.
    """

    def __init__(self, stage_dir: Path, resumed_at: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # imported only where used: it is an extra
        except ImportError as error:
            raise RuntimeError(f"{error}; install it: pip install -c constraints.txt -e '.[tensorboard]'") from error
        folder = stage_dir / FOLDER
        if resumed_at is None:
            self._writer = SummaryWriter(str(folder / "eval"))
        else:
            self._writer = SummaryWriter(str(folder), purge_step=resumed_at + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one report to the disk, so that a killed run loses none."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_picture(self, step: int, name: str, path: Path) -> None:
        """Writes a PNG."""
        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Writes what is pending."""
        self._writer.close()
