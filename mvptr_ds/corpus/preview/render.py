"""Fills the page's templates, which no text of a record can break out of.

Jinja2 escapes every value that a template writes, and `readable` spells out what a reader cannot see in it. Only what
another template made (`Markup`) is written as it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).resolve().parent / "templates"

# what a reader cannot see, or what reorders or cuts the text around it; the zero-width joiners stay, for emoji and
# scripts need them
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff"
    "\ufff0-\ufffb\ufffe\uffff\ud800-\udfff]"
)


def readable(text: str) -> str:
    """Returns the text with every control, direction, other hidden character or half surrogate pair spelled out."""
    return _HIDDEN.sub(lambda match: f"⟨U+{ord(match.group()):04X}⟩", text)


def shortened(text: str, max_len: int) -> str:
    """Returns at most `max_len` characters, the last an ellipsis where some are missing."""
    return text if len(text) <= max_len else text[: max_len - 1] + "…"


def _written(value: Any) -> Any:
    """Returns what a template writes for a value: texts are readable, numbers have at most two decimals."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return readable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


# `finalize` is applied to every value before it is escaped, so that no template can forget it as it could a filter
ENVIRONMENT = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    finalize=_written,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters["shortened"] = shortened


def render(template: str, **values: Any) -> Markup:
    """Returns the template of this name, filled with the values."""
    return Markup(ENVIRONMENT.get_template(template).render(values))
