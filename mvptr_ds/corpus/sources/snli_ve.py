"""Reads SNLI-VE: `snli_ve_{train,dev,test}.jsonl`, a statement about a picture of Flickr30k in each line.

{"Flickr30K_ID": "4705552913", "sentence2": "A dog sleeps.", "gold_label": "neutral", "pairID": "4705552913.jpg#2r1n"}
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mvptr_ds.corpus.resumable_jobs import Summary
from mvptr_ds.corpus.sources.entailment_labels import entailment_label
from mvptr_ds.corpus.sources.rows import UNREADABLE, Row, whole
from mvptr_ds.corpus.sources.tables import iter_objects
from mvptr_ds.errors import DataError

NO_LABEL = "row: no label, for the annotators did not agree"
_SPLIT = re.compile(r"(?:^|[^a-z])(train|dev|val|test)(?![a-z])")
_IMAGE = ("Flickr30K_ID", "Flickr30kID", "Flikr30kID")  # as copies spell it
_STATEMENT = ("sentence2", "hypothesis")
_LABEL = ("gold_label", "label")


def read_snli_ve(source: Path, label_order: tuple[str, ...] | None, summary: Summary) -> Iterator[Row]:
    """Yields a row for each statement, with its class and the id of its pair as labels; the file's name says the split.

    Raises:
        DataError: the name says no split, the first object lacks a field, or a label is a number without `label_order`.
    """
    found = _SPLIT.search(source.name.lower())
    if found is None:
        raise DataError(f"the name of {source} has none of train, dev, val and test, which says the split; rename it")
    names: dict[str, str] = {}
    for where, entry in iter_objects(source, summary):
        names = names or _names_in(source, entry)
        try:
            label = entailment_label(entry[names["label"]], label_order)
            if label is None:
                summary.drop(NO_LABEL, where)
                continue
            image, text, pair = (entry[names["image"]], entry[names["statement"]], entry[names["pair"]])
            if not isinstance(text, str) or not isinstance(pair, (str, int)):
                raise TypeError(f"statement is {text!r:.80}, pair {pair!r:.80}; expected texts")
            name = _picture(image)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            summary.drop(UNREADABLE, f"{where}: {error!r}")
            continue
        yield Row(name, (text,), name, split=found[1], labels=({"label": label, "pair_id": str(pair)},))


def _picture(value: Any) -> str:
    """Returns the file of a picture of Flickr30k by its number, which is its name."""
    value = whole(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)) or not str(value).strip():
        raise TypeError(f"id of the picture is {value!r:.80}, expected a number or a name")
    name = str(value).strip()
    return name if name.lower().endswith(".jpg") else f"{name}.jpg"


def _names_in(source: Path, entry: dict[str, Any]) -> dict[str, str]:
    """Returns the fields of a copy by what they hold."""
    wanted = {"image": _IMAGE, "statement": _STATEMENT, "label": _LABEL, "pair": ("pairID", "pair_id")}
    found = {what: next((name for name in names if name in entry), "") for what, names in wanted.items()}
    if missing := [wanted[what][0] for what, name in found.items() if not name]:
        raise DataError(f"{source} has no field {missing}, only {list(entry)[:30]}; give SNLI-VE's JSON lines")
    return found
