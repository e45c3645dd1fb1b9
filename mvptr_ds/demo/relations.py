"""Tells how two things of a demo scene lie to each other, where nobody would dispute it."""

from __future__ import annotations

from mvptr_ds.demo.captions import Box

WAYS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MIN_DISTANCE_PX = 12  # between the centres
MIN_RATIO = 2  # of the distance along one axis to that along the other


def clear_relation(first: Box, second: Box) -> str | None:
    """Returns the one of WAYS in which the first box lies to the second; None where it could be disputed.

    The centres are far apart along one axis, and at most half as far along the other. y grows downwards.
    """
    dx = (first[0] + first[2] - second[0] - second[2]) / 2
    dy = (first[1] + first[3] - second[1] - second[3]) / 2
    if abs(dx) > max(MIN_DISTANCE_PX, MIN_RATIO * abs(dy)):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > max(MIN_DISTANCE_PX, MIN_RATIO * abs(dx)):
        return "above" if dy < 0 else "below"
    return None
