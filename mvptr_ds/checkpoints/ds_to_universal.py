"""DeepSpeed's converter to universal checkpoints, as a process that ends with the rank that started it (reshard.py)."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

CONVERTER = "deepspeed.checkpoint.ds_to_universal"


def end_with_parent() -> None:
    """Ends this process with the rank that started it: a conversion left behind would write beside the next one."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # see train.py
    from mvptr_ds.user_io.terminal import accept_any_text

    # schedulers and terminals send these signals to every process, and the rank alone decides
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    accept_any_text()
    runpy.run_module(CONVERTER, run_name="__main__", alter_sys=True)
