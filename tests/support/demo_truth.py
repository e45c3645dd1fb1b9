"""What is true of a demo scene: texts are parsed again and answered from plans and boxes, by rules of their own."""

from __future__ import annotations

from mvptr_ds.demo.captions import SceneObject
from mvptr_ds.demo.items import Item
from mvptr_ds.demo.scene import Scene

WAYS = ("left of", "right of", "above", "below")


def things(scene: Scene, words: str) -> list[SceneObject]:
    """Things that "thing", "dog" or "brown dog" may mean."""
    *attributes, noun = words.split()
    return [
        o
        for o in scene.objects
        if noun in ("thing", o.plan.noun) and all(a in (o.plan.attribute, o.plan.size) for a in attributes)
    ]


def lies(first: SceneObject, way: str, second: SceneObject) -> bool:
    """By the middles of the boxes, without any threshold."""
    axis = 0 if way in ("left of", "right of") else 1
    middles = [o.box[axis] + o.box[axis + 2] for o in (first, second)]
    return middles[0] < middles[1] if way in ("left of", "above") else middles[0] > middles[1]


def split_at_way(text: str) -> tuple[str, str, str]:
    way = next(way for way in WAYS if f" {way} the " in text)
    first, second = text.split(f" {way} the ")
    return first, way, second


def those_that_lie(scene: Scene, words: str, way: str, landmark: str) -> list[SceneObject]:
    (mark,) = things(scene, landmark)
    return [o for o in things(scene, words) if o is not mark and lies(o, way, mark)]


def true_answer(item: Item, scene: Scene) -> str:
    text = item.text.removesuffix("?")
    if text == "How many things are there":
        return str(len(scene.objects))
    if text.startswith("How many "):
        return str(len(things(scene, text.removeprefix("How many ").removesuffix(" things are there"))))
    if text.startswith("Is there "):
        return "yes" if things(scene, text.split(maxsplit=3)[3]) else "no"
    if text.startswith("Is the "):
        words, way, landmark = split_at_way(text.removeprefix("Is the "))
        ((first,), (second,)) = things(scene, words), things(scene, landmark)
        return "yes" if lies(first, way, second) else "no"
    if text.startswith("Where is the "):
        ((first,), (second,)) = (
            things(scene, words) for words in text.removeprefix("Where is the ").split(" from the ")
        )
        dx, dy = (abs(first.box[a] + first.box[a + 2] - second.box[a] - second.box[a + 2]) for a in (0, 1))
        (way,) = [way for way in (WAYS[:2] if dx > dy else WAYS[2:]) if lies(first, way, second)]
        return way
    if text.startswith("What is "):
        _, way, landmark = split_at_way(text)
        ways = {o.plan.noun for o in those_that_lie_clearly(scene, "thing", way, landmark)}
        (noun,) = ways
        return noun
    if text.startswith("What colour is the thing "):
        _, way, landmark = split_at_way(text)
        (thing,) = those_that_lie_clearly(scene, "thing", way, landmark)
        return thing.plan.attribute
    (thing,) = things(scene, text.removeprefix("What colour is the "))
    return thing.plan.attribute


def those_that_lie_clearly(scene: Scene, words: str, way: str, landmark: str) -> list[SceneObject]:
    """Those that lie further along the way than across it."""
    (mark,) = things(scene, landmark)
    found = []
    for o in those_that_lie(scene, words, way, landmark):
        dx, dy = (abs(o.box[a] + o.box[a + 2] - mark.box[a] - mark.box[a + 2]) for a in (0, 1))
        if (dx > dy) == (way in ("left of", "right of")):
            found.append(o)
    return found


def true_label(item: Item, scene: Scene) -> str:
    said, _, rest = item.text.removeprefix("The ").removesuffix(".").partition(" is ")
    if item.kind == "attribute":
        shown = things(scene, said)
        assert len(shown) <= 1
        return "neutral" if not shown else "entailment" if things(scene, f"{rest} {said}") else "contradiction"
    way = next(way for way in WAYS if rest.startswith(way))
    first, second = things(scene, said), things(scene, rest.removeprefix(f"{way} the "))
    if not first or not second:
        return "neutral"
    ((one,), (other,)) = first, second
    return "entailment" if lies(one, way, other) else "contradiction"


def meant(item: Item, scene: Scene) -> list[SceneObject]:
    text = item.text.removeprefix("the ")
    if " on the " in text:
        noun, side = text.split(" on the ")
        ordered = sorted(things(scene, noun), key=lambda o: o.box[0] + o.box[2])
        return [ordered[0 if side == "left" else -1]]
    if " the " in text:
        return those_that_lie_clearly(scene, *split_at_way(text))
    return things(scene, text)
