#!/usr/bin/env python3
"""The command `mvptr demo-tasks` as a file, for a checkout that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from mvptr_ds.user_io.signals import end_on_interrupt

    end_on_interrupt("interrupted; the same command goes on from here")

from mvptr_ds.commands.demo_tasks import main

if __name__ == "__main__":
    sys.exit(main())
