"""HTML that text from shards cannot break out of: what is not `Html` already is escaped when it enters an element."""

from __future__ import annotations

import html
import re

# what a reader cannot see, or what reorders or cuts the text around it; the zero-width joiners stay, for emoji and
# scripts need them
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff"
    "\ufff0-\ufffb\ufffe\uffff\ud800-\udfff]"
)


class Html(str):
    """Markup that is safe as it stands."""

    __slots__ = ()


def readable(text: str) -> str:
    """The text with every control, direction and other hidden character, and half surrogate pairs, spelled out."""
    return _HIDDEN.sub(lambda match: f"⟨U+{ord(match.group()):04X}⟩", text)


def escaped(text: str) -> Html:
    """Text for the content of an element or for a quoted attribute; Html stays as it is."""
    return text if isinstance(text, Html) else Html(html.escape(readable(text), quote=True))


def joined(*parts: str) -> Html:
    """The parts one behind the other, escaped."""
    return Html("".join(escaped(part) for part in parts))


def element(name: str, *children: str, **attributes: str | float | None) -> Html:
    """`<name attributes>children</name>`.

    In an attribute's name `_` stands for `-`, a last one is dropped (`class_`); an attribute that is None is left out.
    """
    given = "".join(
        f' {key.removesuffix("_").replace("_", "-")}="{escaped(_written(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>{joined(*children)}</{name}>")


def _written(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def shortened(text: str, max_len: int) -> str:
    """At most `max_len` characters, the last an ellipsis where some are missing."""
    return text if len(text) <= max_len else text[: max_len - 1] + "…"
