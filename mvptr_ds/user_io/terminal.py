"""What every entry script does first to the streams it writes to."""

from __future__ import annotations

import io
import sys


def accept_any_text() -> None:
    """Lets stdout and stderr write what their encoding lacks as escapes: 犬 as \\u72ac where a terminal is ASCII.

    File names, captions and tags are any text, and names of files need not even be Unicode.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
