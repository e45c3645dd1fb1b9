"""README.md: it is short, its commands can be typed as they stand, its links lead somewhere, its outputs are printed.

docs/corpus.md, whose commands README shortens, is run as a whole by tests/end_to_end/test_corpus_docs.py.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import mvptr_ds
from mvptr_ds.config import load_config, override_config
from tests.conftest import REPO

README = (REPO / "README.md").read_text(encoding="utf-8")
DEMO = (REPO / "docs/measurements/demo.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OVERRIDE = re.compile(r"[a-z]\w*(\.\w+)+=.*")
FIELD = re.compile(r"%[-+.\d]*[a-z]|%%")
LEAST_FIXED = 12  # characters that a template must hold by itself, or it would fit any line
MAX_LINES = 199


class Parsed(Exception):
    """The arguments of a command, raised in place of running it."""


def blocks(text: str, language: str) -> list[str]:
    return [content for found, content in BLOCK.findall(text) if found == language]


COMMANDS = [line for block in blocks(README, "sh") for line in block.splitlines()]
TEXT = [line for block in blocks(README, "text") for line in block.splitlines()]
OUTPUT = [line for line in TEXT if re.match(r"demo|preflight|stage\d", line)]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= MAX_LINES


def test_every_section_is_there_in_its_order() -> None:
    assert re.findall(r"^## (.*)$", README, re.MULTILINE) == [
        "Install", "Quick start", "Your own data", "Train and evaluate", "Use the model",
        "Fine-tune for a task", "On a cluster", "Results",
        "The published code", "Layout", "Citation",
    ]  # fmt: skip


def test_every_link_leads_somewhere() -> None:
    paths = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(paths) >= 20
    assert [path for path in paths if not (REPO / path).exists()] == []


def test_every_path_of_the_layout_is_there() -> None:
    layout = README.partition("## Layout")[2].partition("## Citation")[0]
    spine, folders = layout.partition("| folder | holds |")[::2]
    files = re.findall(r"`([\w/]+\.py)`", spine)
    assert len(files) == 10
    assert [path for path in files if not (REPO / "mvptr_ds" / path).is_file()] == []
    names = re.findall(r"`([\w/]+/)`", "".join(re.findall(r"^\|(.*?)\|", folders, re.MULTILINE)))
    assert len(names) >= 15
    assert [name for name in names if not (REPO / name).is_dir()] == []
    rooms = {path.parent.name for path in (REPO / "mvptr_ds").glob("*/__init__.py")}
    assert rooms - {Path(name).name for name in names} <= {"user_io"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_be_typed(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # the environment of slurm/
        variable = words.pop(0).partition("=")[0]
        assert variable.startswith("SBATCH_") or variable in (REPO / "slurm/README.md").read_text(encoding="utf-8")
    program, *arguments = words
    if program == "make":
        makefile = (REPO / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE)
    elif program in ("pip", "."):
        named = [word for word in arguments if word.endswith(".txt")]
        assert all((REPO / name).is_file() for name in named)
    elif program == "sbatch" or program.startswith("slurm/"):
        script = arguments.pop(0) if program == "sbatch" else program
        assert os.access(REPO / script, os.X_OK)
        load_config("demo", arguments)
    else:
        assert program in ("python", "deepspeed")
        parsed = arguments_of(arguments[0], arguments[1:], monkeypatch)
        overrides = getattr(parsed, "overrides", [])
        assert all(OVERRIDE.fullmatch(override) for override in overrides)
        if arguments[0].endswith("train.py"):
            assert (REPO / parsed.deepspeed).is_file() or (REPO / f"ds_configs/{parsed.deepspeed}.json").is_file()
        override_config(the_example(tmp_path), overrides)


def arguments_of(script: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a script makes of its command line. Raises SystemExit where it does not know an argument."""

    def stop_after(parse: Any) -> Any:
        def parsed(self: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
            raise Parsed(parse(self, *given, **named))

        return parsed

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop_after(getattr(argparse.ArgumentParser, name)))
    monkeypatch.setattr(sys, "argv", [script, *words])
    spec = importlib.util.spec_from_file_location(f"readme_{Path(script).stem}", REPO / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    with pytest.raises(Parsed) as caught:
        module.main()
    return caught.value.args[0]


def the_example(folder: Path) -> Any:
    """README's configuration, as `load_config` reads it."""
    (content,) = blocks(README, "yaml")
    assert "`my_corpus.yaml`" in README
    path = folder / "my_corpus.yaml"
    path.write_text(content, encoding="utf-8")
    return load_config(path)


def test_an_unknown_argument_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments_of("tools/validate_shards.py", ["shards", "--no-such-option"], monkeypatch)
    assert "no-such-option" in capsys.readouterr().err


def test_the_example_is_of_the_folders_that_the_commands_write(tmp_path: Path) -> None:
    config = the_example(tmp_path)
    for folder in (config.data.train, config.data.phrase_vocab, config.run.dir, *config.data.sidecars):
        assert any(str(folder) in command for command in COMMANDS), folder
    assert config.visual.grid_size**2 <= config.data.max_regions


@functools.cache
def templates() -> list[list[str | None]]:
    """Every text of the package that may be printed with values in it: its parts, None for a value."""
    found: list[list[str | None]] = []
    for path in (REPO / "mvptr_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append([str(part.value) if isinstance(part, ast.Constant) else None for part in node.values])
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append([part for text in FIELD.split(node.value) for part in (text, None)][:-1])
    return [parts for parts in found if sum(len(part) for part in parts if part) >= LEAST_FIXED]


def is_printed(line: str) -> bool:
    """Whether some text of the package may read so, up to the `...` that ends a shortened line."""
    shortened = line.endswith("...")
    for parts in templates():
        for end in range(1, len(parts) + 1) if shortened else [len(parts)]:
            fixed = [part for part in parts[:end] if part]
            if sum(map(len, fixed)) < LEAST_FIXED or not all(part in line for part in fixed):
                continue  # most of them, so that few patterns are compiled
            pattern = "".join(".+" if part is None else re.escape(part) for part in parts[:end])
            if re.fullmatch(pattern, line.removesuffix("...")):
                return True
    return False


@pytest.mark.parametrize("line", OUTPUT)
def test_every_line_of_the_output_is_one_that_is_printed(line: str) -> None:
    assert is_printed(line)
    assert not is_printed(line.replace(" ", "_"))


def test_the_rows_of_the_demos_table_are_those_of_the_evaluation() -> None:
    source = (REPO / "mvptr_ds/evaluation/table.py").read_text(encoding="utf-8")
    (table,) = blocks(DEMO, "text")
    rows = [re.split(r"  +", line)[0] for line in table.splitlines() if re.search(r"[a-z)]  .*\d$", line)]
    assert len(rows) >= 15
    of_sizes = re.compile(r"(small|medium|large) box \(.* of picture\)")
    assert [row for row in rows if f'"{row}"' not in source and not of_sizes.fullmatch(row)] == []


def test_the_citation_can_be_read() -> None:
    cff = yaml.safe_load((REPO / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= cff.keys()
    assert cff["version"] == mvptr_ds.__version__
    for author in cff["preferred-citation"]["authors"]:
        assert f"{author['given-names']} {author['family-names']}" in README


def test_the_package_says_that_it_is_typed() -> None:
    assert (REPO / "mvptr_ds/py.typed").is_file()
    assert '"py.typed"' in (REPO / "setup.py").read_text(encoding="utf-8")
