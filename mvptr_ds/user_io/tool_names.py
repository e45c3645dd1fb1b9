"""Names of the tools as they can be typed here, for messages: files of a checkout, or parts of the command `mvptr`."""

from __future__ import annotations

from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / "tools"  # of a checkout; an installed package has none beside it
FILES = {
    "phrases": "extract_phrases.py",
    "shards": "build_shards.py",
    "validate": "validate_shards.py",
    "vocab": "build_vocab.py",
}


def tool(name: str) -> str:
    """Returns what to call a tool in a sentence: tools/validate_shards.py, or mvptr validate."""
    return f"tools/{FILES[name]}" if (TOOLS / FILES[name]).is_file() else f"mvptr {name}"


def command(name: str) -> str:
    """Returns how a command line of a tool begins: python tools/validate_shards.py, or mvptr validate."""
    return f"python {tool(name)}" if (TOOLS / FILES[name]).is_file() else tool(name)
