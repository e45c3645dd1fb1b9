"""Compares this package with recorded numbers of the published code: one line a tensor with its largest difference.

A folder of pre-training holds config.json, weights.safetensors (under the published names), inputs.safetensors,
expected.safetensors and expected.json. One of the downstream tasks also holds heads.safetensors, a file
expected.TASK.safetensors for each task, and the layouts and protocols of evaluation.
A missing, extra, wrongly shaped or NaN tensor fails, and so does a difference above the tolerance.
"""

from __future__ import annotations

import argparse
import sys
from typing import get_args

from mvptr_ds.model.encoder import Execution
from mvptr_ds.parity import downstream, pretraining
from mvptr_ds.parity.comparison import Comparison
from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 where all agrees, 1 where something differs, 2 where there are no such numbers."""
    accept_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=user_path, help="folder of recorded numbers")
    parser.add_argument("--execution", choices=get_args(Execution), default="packed", help="of the encoders")
    arguments = parser.parse_args(argv)
    comparison = Comparison(print)
    form = downstream if downstream.holds(arguments.folder) else pretraining
    try:
        form.check_folder(comparison, arguments.folder, arguments.execution)
    except (OSError, KeyError, ValueError) as error:
        print(f"error: {arguments.folder} is not a folder of recorded numbers: {error!r}", file=sys.stderr)
        return 2
    print(f"{comparison.lines} compared, {comparison.failed} failed")
    return 1 if comparison.failed else 0
