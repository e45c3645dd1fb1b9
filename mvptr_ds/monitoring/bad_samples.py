"""Records samples that were unusable and replaced: how many, which, and whether they are too many.

RUN/bad_samples.jsonl    one object a line: stage, step, position, shard, key, byte, caption, reason, time
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mvptr_ds.data.collate import BadSample
from mvptr_ds.distributed import collectives
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.tool_names import tool

logger = logging.getLogger(__name__)
NAME = "bad_samples.jsonl"
MAX_FILE_BYTES = 16 << 20
MAX_NOTED = 1_000  # lines of a rank between two reports
MAX_CHARS = 1_000  # characters of a text


class BadSamples:
    """Counts bad samples over all ranks, records which they are, and tells when they are too many.

    Args:
        run_dir: the folder of the file, which only rank 0 writes.
    """

    MIN_SAMPLES = 1_000  # least number of samples for the fraction: one bad among few proves nothing

    def __init__(self, max_fraction: float, run_dir: Path) -> None:
        self.max_fraction, self.path = max_fraction, run_dir / NAME
        self.bad, self.read = 0, 0
        self._noted: list[BadSample] = []
        self._is_full = False

    def note(self, bad: Iterable[BadSample]) -> None:
        """Keeps the bad samples of a batch of this rank until they are written."""
        self._noted += list(bad)[: MAX_NOTED - len(self._noted)]

    def write(self, **more: Any) -> None:
        """Appends what was noted since the last call. All ranks call it, and only rank 0 writes.

        Args:
            more: further fields of each line.
        """
        noted = [bad for of_rank in collectives.gather_objects(self._noted) for bad in of_rank]
        self._noted = []
        if noted and collectives.is_main():
            noted.sort(key=lambda bad: bad.position)
            self._append("".join(_line(bad, more) for bad in noted).encode())
            logger.info(
                "%d samples were replaced by others since the last report; %s says which and why",
                len(noted), self.path,
            )  # fmt: skip

    def _append(self, lines: bytes) -> None:
        try:
            with self.path.open("ab+") as file:
                num_bytes = file.tell()
                if num_bytes + len(lines) > MAX_FILE_BYTES:
                    if not self._is_full:
                        logger.warning("%s has %d bytes and gets no more lines", self.path, num_bytes)
                    self._is_full = True
                    return
                if num_bytes:  # a killed start may have left part of a line
                    file.seek(-1, 2)
                    lines = lines if file.read(1) == b"\n" else b"\n" + lines
                file.write(lines)
        except OSError as error:  # the log has them
            logger.error("%s: %s; training goes on without these lines", self.path, error)

    def count(self, bad: int, read: int) -> None:
        """Adds to the numbers of samples that were bad, and that were read."""
        self.bad += bad
        self.read += read

    def check(self, save: Callable[[], int]) -> None:
        """Raises DataError above the allowed fraction, once the run is saved.

        Args:
            save: saves a checkpoint, and returns the step of the newest one; 0: there is none.
        """
        counted = max(self.read, self.MIN_SAMPLES)
        if self.bad <= self.max_fraction * counted:
            return
        saved = save()
        remedy = "allow more with a larger data.max_bad_fraction"
        if saved:
            remedy = (
                f"the run is saved at step {saved}. It resumes there with the same folder and a larger "
                f"data.max_bad_fraction; with a repaired one, start in another run.dir with run.init_from="
                f"{self.path.parent}"
            )
        raise DataError(
            f"{self.bad} samples could not be read among {self.read}, more than data.max_bad_fraction="
            f"{self.max_fraction} allows ({int(self.max_fraction * counted)} of {counted}); {self.path} says which and "
            f"why, and {tool('validate')} FOLDER --repair OUT leaves them out: {remedy}"
        )


def _line(bad: BadSample, more: Mapping[str, Any]) -> str:
    content = {name: value for name, value in bad._asdict().items() if name != "passes"}
    content |= {name: content[name][:MAX_CHARS] for name in ("shard", "key", "reason")}
    return json.dumps({**more, **content, "time": time.time()}) + "\n"
