"""Reports prose of the pages that is hard to read: long sentences, long lines, semicolons and private words.

python tools/dev/check_prose.py                      # every page, with the rule that each finding breaks
python tools/dev/check_prose.py --check docs/gpu.md  # exit code 1 if anything is found

Code, tables and URLs are left out. Inline code counts as one word.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

if __name__ == "__main__":
    from mvptr_ds.user_io.signals import end_on_interrupt

    end_on_interrupt()

from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path

PAGES = ("README.md", "CONTRIBUTING.md", "slurm/README.md")  # and docs/**/*.md
MAX_WORDS = 25
MAX_COLUMNS = 150
BANNED = {
    r"\bg(?:o|oes|oing|one) on\b|\bwent on\b": "continues, resumes",
    r"\b(?:the|its) (?:whole )?way\b": "transfer, method, path",
    r"\basks? the device\b": "depends on the device",
    r"\b(?:some|no)body\b": "name who, or use the passive",
}
FENCE = re.compile(r"\s*(```|~~~)")
ITEM = re.compile(r"^\s*(?:[-*+]|\d+[.)])\s+")
URL = re.compile(r"<?https?://[^\s)>]+>?")
ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|vs|al|cf|Fig|No)\.")
SENTENCE_END = re.compile(r"(?<=[.!?])[)\"'*_]*\s+")


@dataclass(frozen=True)
class Finding:
    """One place of a page that breaks a rule."""

    path: Path
    line: int
    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.text}"


def pages(repo: Path = REPO) -> list[Path]:
    """Every page of a repository that exists."""
    return [repo / name for name in PAGES if (repo / name).is_file()] + sorted((repo / "docs").rglob("*.md"))


def prose_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line) of a page; the line is empty where it is code or a table."""
    fence, before_is_blank, in_list = "", True, False
    for number, line in enumerate(text.splitlines(), start=1):
        found = FENCE.match(line)
        if fence or found:
            if not fence and found:
                fence = found.group(1)
            elif found and found.group(1) == fence:
                fence = ""
            yield number, ""
            continue
        in_list = bool(ITEM.match(line)) or (in_list and (not line.strip() or line.startswith(" ")))
        deep = 6 if in_list else 4  # the text of an item is indented by as much as its mark
        is_code = line.startswith(" " * deep) and (before_is_blank or (in_list and not ITEM.match(line)))
        before_is_blank = not line.strip() or is_code
        yield number, "" if is_code or line.lstrip().startswith("|") else line


def plain(text: str) -> str:
    """Prose without marks: inline code becomes one word, a link its text, a URL one word."""
    text = re.sub(r"(`+).+?\1", "CODE", text, flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return URL.sub("URL", text)


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """Yields (number of its first line, text) of every paragraph, list item and heading."""
    first = 0
    lines: list[str] = []
    for number, line in (*prose_lines(text), (0, "")):
        begins = bool(ITEM.match(line)) or line.startswith("#")
        if lines and (begins or not line.strip() or lines[0].startswith("#")):
            yield first, " ".join(lines)
            lines = []
        if line.strip():
            first = first if lines else number
            lines.append(ITEM.sub("", line).strip() if not lines else line.strip())


def sentences(block: str) -> list[str]:
    """The sentences of a block of plain prose."""
    masked = ABBREVIATION.sub(lambda found: found.group().replace(".", "\0"), block)
    return [part.replace("\0", ".").strip() for part in SENTENCE_END.split(masked) if part.strip()]


def check(path: Path, text: str) -> list[Finding]:
    """Everything in a page's text that breaks a rule, in the order of its lines."""
    findings = []
    for number, line in prose_lines(text):
        if len(URL.sub("", line)) > MAX_COLUMNS:
            findings.append(Finding(path, number, f"{len(line)} columns", line[:60] + " ..."))
    for number, block in blocks(text):
        for sentence in sentences(plain(block)):
            num_words = sum(any(c.isalnum() for c in word) for word in sentence.split())
            if num_words > MAX_WORDS:
                findings.append(Finding(path, number, f"{num_words} words", sentence))
            if ";" in sentence:
                findings.append(Finding(path, number, "semicolon", sentence))
            for pattern, better in BANNED.items():
                if found := re.search(pattern, sentence, re.IGNORECASE):
                    findings.append(Finding(path, number, f"'{found.group()}' ({better})", sentence))
    return sorted(findings, key=lambda finding: finding.line)


def main(argv: Sequence[str] | None = None) -> int:
    accept_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=user_path, help="Markdown files (default: all pages)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if anything is found")
    arguments = parser.parse_args(argv)
    findings = [f for page in arguments.pages or pages() for f in check(page, page.read_text(encoding="utf-8"))]
    for finding in findings:
        print(finding)
    print(f"{len(findings)} findings")
    return 1 if arguments.check and findings else 0


if __name__ == "__main__":
    sys.exit(main())
