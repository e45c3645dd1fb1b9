"""Reads the label of a pair of picture and statement: a class by its name, or a number where its order is known."""

from __future__ import annotations

from typing import Any

from mvptr_ds.corpus.sources.rows import whole
from mvptr_ds.data.task_labels import ENTAILMENT_CLASSES
from mvptr_ds.errors import DataError

_NO_AGREEMENT = ("-", "-1", "")


def parse_label_order(text: str) -> tuple[str, ...]:
    """Parses `entailment,neutral,contradiction`, the classes that the numbers 0, 1 and 2 mean.

    Raises:
        ValueError: these are not the three classes, each once.
    """
    names = tuple(name.strip().lower() for name in text.split(","))
    if sorted(names) != sorted(ENTAILMENT_CLASSES):
        raise ValueError(f"{text!r} is not an order of {', '.join(ENTAILMENT_CLASSES)}, each once, with commas between")
    return names


def entailment_label(value: Any, order: tuple[str, ...] | None) -> str | None:
    """Returns the class that a label names; None where the annotators did not agree (`-`, -1, nothing).

    Args:
        value: as the file has it.
        order: the classes that 0, 1 and 2 mean; None: not known.

    Raises:
        DataError: it is a number and the order is not known. Copies of SNLI-VE count both from contradiction and from
            entailment, and a wrong guess would train the opposite.
        ValueError: it is no label.
    """
    value = whole(value)
    if value is None or str(value).strip() in _NO_AGREEMENT:
        return None
    text = str(value).strip().lower()
    if text in ENTAILMENT_CLASSES:
        return text
    if isinstance(value, bool) or text not in ("0", "1", "2"):
        raise ValueError(f"label is {value!r:.80}, expected {', '.join(ENTAILMENT_CLASSES)} or -")
    if order is None:
        raise DataError(
            f"label is the number {text}, and files count the classes in several orders; say which with --label-order, "
            "such as entailment,neutral,contradiction (SNLI's copies) or contradiction,neutral,entailment"
        )
    return order[int(text)]
