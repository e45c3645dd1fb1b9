"""Trains as mvptr_ds/train.py does, but the loss of one step of this rank is NaN: faults.py starts a rank so.

python tools/dev/train_with_nan.py --stage stage2 --step 5 [arguments of train.py ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(REPO)
    from mvptr_ds.user_io.signals import end_on_interrupt

    end_on_interrupt()

from mvptr_ds import train
from mvptr_ds.objectives.module import TaskOutput
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.user_io.terminal import accept_any_text


def main() -> int:
    accept_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", required=True, help="stage1, stage2 or joint")
    parser.add_argument("--step", required=True, type=int, help="of that stage, counted from 0")
    arguments, sys.argv[1:] = parser.parse_known_args()
    forward = PretrainingLosses.forward

    def poisoned(task: PretrainingLosses, batch: Any, step: int, *rest: Any, **named: Any) -> TaskOutput:
        output = forward(task, batch, step, *rest, **named)
        if (task.stage.name, step) == (arguments.stage, arguments.step):
            return output._replace(loss=output.loss * float("nan"))
        return output

    PretrainingLosses.forward = poisoned  # type: ignore[method-assign,assignment]
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
