"""Runs a tool's `main()` in this process: what it prints and how it ends, without the seconds that a start takes.

That a tool starts as a script, wherever one stands, is tested by tests/unit/test_imports.py.
"""

from __future__ import annotations

import importlib
import io
import logging
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from subprocess import CompletedProcess
from unittest.mock import patch

from tests.conftest import REPO


def run_tool(name: str, *arguments: object) -> CompletedProcess[str]:
    """`python tools/NAME ARGUMENTS`; an exception that it does not catch is raised here.

    Raises:
        AssertionError: it ended with something else than a code.
    """
    command = [str(REPO / "tools" / name), *map(str, arguments)]
    main = importlib.import_module(f"tools.{name.removesuffix('.py').replace('/', '.')}").main
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    root = logging.getLogger()
    with ExitStack() as stack:
        stack.enter_context(patch.object(sys, "argv", command))
        stack.enter_context(patch.object(root, "handlers", []))  # so that the tool's basicConfig is heeded
        stack.enter_context(patch.object(root, "level", root.level))
        stack.enter_context(redirect_stdout(stdout))
        stack.enter_context(redirect_stderr(stderr))
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code or 0
    assert code is None or isinstance(code, int), code
    texts = [stream.buffer.getvalue().decode("utf-8") for stream in (stdout, stderr)]  # type: ignore[attr-defined]
    return CompletedProcess(command, code or 0, *texts)
