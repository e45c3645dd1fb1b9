"""Any text can be written to any terminal."""

from __future__ import annotations

import ast
import io
import sys
from pathlib import Path

import pytest

from mvptr_ds.commands import shards as build_shards
from mvptr_ds.user_io.terminal import accept_any_text
from tests.conftest import REPO

SCRIPTS = [
    path
    for path in sorted([*REPO.glob("tools/**/*.py"), *REPO.glob("mvptr_ds/**/*.py")])
    if ("__name__" in path.read_text(encoding="utf-8") or path.parent.name == "commands")
    and "def main(" in path.read_text(encoding="utf-8")
]


def ascii_terminal(patch: pytest.MonkeyPatch) -> io.BytesIO:
    """What both streams write to from now on."""
    written = io.BytesIO()
    for name in ("stdout", "stderr"):
        patch.setattr(sys, name, io.TextIOWrapper(written, encoding="ascii", write_through=True))
    return written


def test_what_a_terminal_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = ascii_terminal(monkeypatch)
    with pytest.raises(UnicodeEncodeError):
        print("犬")
    accept_any_text()
    print("Un café 犬 \udcff")
    assert written.getvalue() == b"Un caf\\xe9 \\u72ac \\udcff\n"


def test_a_tool_on_an_ascii_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = ascii_terminal(monkeypatch)
    arguments = ["build_shards.py", "text", str(tmp_path / "ü.txt"), "--out", str(tmp_path / "out"), "--processes", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert build_shards.main() == 1
    assert b"\\xfc.txt is not a file" in written.getvalue()
    monkeypatch.setattr(sys, "argv", [*arguments, "--keys", "é"])
    with pytest.raises(SystemExit):
        build_shards.main()
    assert b"invalid choice: '\\xe9'" in written.getvalue()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_begins_with_it(script: Path) -> None:
    tree = ast.parse(script.read_text(encoding="utf-8"))
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    statements = main.body[1:] if ast.get_docstring(main) else main.body
    assert ast.unparse(statements[0]) == "accept_any_text()"


def test_the_scripts_are_found() -> None:
    assert len(SCRIPTS) >= 21 and {"train.py", "eval.py", "shards.py", "mvptr.py"} <= {path.name for path in SCRIPTS}
