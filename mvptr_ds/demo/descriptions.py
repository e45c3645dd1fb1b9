"""Items of retrieval on demo scenes: the captions that the scenes have."""

from __future__ import annotations

from collections.abc import Sequence

from mvptr_ds.data.shards.sidecars import without_region_references
from mvptr_ds.demo.items import Item
from mvptr_ds.demo.plan import Concept
from mvptr_ds.demo.scene import Scene


def make_descriptions(scenes: Sequence[Scene], known: frozenset[Concept], seed: int) -> list[Item]:
    """Returns the captions of all scenes; nothing is drawn."""
    captions = [(number, caption) for number, scene in enumerate(scenes) for caption in scene.record.captions]
    return [
        Item(number, "caption", caption.text, without_region_references(caption).phrases, {})
        for number, caption in captions
    ]
