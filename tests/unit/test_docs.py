"""The pages are easy to read, and every link, path, test and configuration key in them exists."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvptr_ds.config import Config
from mvptr_ds.config_data import SourceConfig
from tests.conftest import REPO
from tools.dev.check_prose import FENCE, check, pages

PAGES = pages()
ALL = [str(page.relative_to(REPO)) for page in PAGES]
NO_PATHS = {"mvptr_ds/forward"}  # the name of a phase in a trace
NO_TESTS = {"test_tuples"}  # a key of SPICE's results
SECTIONS = "|".join(field.name for field in dataclasses.fields(Config))
KEY = re.compile(rf"(?<![\w./~-])(?:{SECTIONS})(?:\.[a-z]\w*)+(?![\w/]|\.\w)")
SUFFIXES = ("py", "json", "jsonl", "yaml", "npy", "safetensors", "txt", "tar", "md", "csv", "html", "png", "sh")
PATH = re.compile(r"(?<![\w./~-])(?:mvptr_ds|tools|tests|docs|slurm|ds_configs)/[\w./*{},-]*")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
TEST = re.compile(r"\btest_\w+\b(?!\.py)")


def without_output(text: str) -> str:
    """A page without its ```text blocks, which hold what commands have printed."""
    kept, language = [], None
    for line in text.splitlines():
        if FENCE.match(line):
            language = line.strip("`~ ") if language is None else None
        elif language != "text":
            kept.append(line)
    return "\n".join(kept)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        found.add(anchor if anchor not in found else f"{anchor}-1")
    return found


def resolves(key: str) -> bool:
    """Whether `section.key` names a key of the configuration, or a section of it."""
    kind: typing.Any = Config
    names = key.split(".")
    while names:
        if not dataclasses.is_dataclass(kind):
            return names == [] or "dict" in str(kind)
        kinds = typing.get_type_hints(kind)
        name = names.pop(0)
        if name not in kinds:
            return False
        kind = kinds[name]
        if kind == dict[str, SourceConfig] and names:
            names.pop(0)
            kind = SourceConfig
    return True


def keys(text: str) -> Iterator[str]:
    for found in KEY.finditer(without_output(text)):
        if found.group().rsplit(".", 1)[-1] not in SUFFIXES:
            yield found.group()


@pytest.mark.parametrize("name", ALL)
def test_the_prose_is_plain(name: str) -> None:
    page = REPO / name
    assert [str(finding) for finding in check(page, page.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("name", ALL)
def test_every_relative_link_leads_somewhere(name: str) -> None:
    page = REPO / name
    broken = []
    for link in LINK.findall(without_output(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def without_examples(name: str) -> str:
    """A page without the files that its examples add, which tests/unit/test_extending.py runs."""
    text = re.sub(r"^( *)```python\n.*?^\1```", "", (REPO / name).read_text(encoding="utf-8"), flags=re.M | re.S)
    for new in re.findall(r"The new file `([^`]+)`", text):
        text = text.replace(new, "")
    return text


@pytest.mark.parametrize("name", ALL)
def test_every_path_exists(name: str) -> None:
    missing = set()
    for found in PATH.findall(without_examples(name)):
        path = found.rstrip(".,-")
        if "{" in path or "NAME" in path or path in NO_PATHS:
            continue
        if not any(REPO.glob(path.rstrip("/"))):
            missing.add(path)
    assert missing == set()


@pytest.mark.parametrize("name", ALL)
def test_every_key_exists(name: str) -> None:
    text = without_examples(name)
    assert {key for key in keys(text) if not resolves(key)} == set()


@pytest.fixture(scope="module")
def tests_here() -> set[str]:
    """The names of all test functions and test files."""
    files = sorted((REPO / "tests").rglob("*.py"))
    return {name for path in files for name in re.findall(r"\bdef (test_\w+)", path.read_text(encoding="utf-8"))} | {
        path.stem for path in files
    }


@pytest.mark.parametrize("name", ALL)
def test_every_test_exists(name: str, tests_here: set[str]) -> None:
    """A page may name a test without its file."""
    assert set(TEST.findall(without_examples(name))) - tests_here - NO_TESTS == set()


def test_long_sentences_semicolons_and_private_words_are_found() -> None:
    text = "# A page\n\nIt is fine; or not.\n" + "w " * 26 + "end.\n- The run goes on\n  here.\n\n"
    text += "Code:\n\n    x; goes on in code\n\n| a; b | nobody |\n\n```sh\ngoes on\n```\nSee `a; b`, [x](y;z).\n"
    found = check(Path("page.md"), text)
    assert [(f.line, f.rule.split(" (")[0]) for f in found] == [(3, "semicolon"), (3, "27 words"), (5, "'goes on'")]


def test_a_wrong_key_is_found() -> None:
    text = (
        "`train.batch_size`, `train.batchsize=8`, `data.sources.coco.shards`, `task.vsc.scope`, train.py, `task.vsc.x`"
    )
    assert [key for key in keys(text) if not resolves(key)] == ["train.batchsize", "task.vsc.x"]
