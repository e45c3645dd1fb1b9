"""Computes the features of the dependency parser: combinations of atoms of a state.

A feature is not kept by name: the atoms of a template are hashed into a row of the weights. Source: in the manner of
Zhang and Nivre (ACL 2011).

Legend: B states, A atoms, T templates.
"""

from __future__ import annotations

import numpy as np

# s0 s1 s2: top of the stack; b0 .. b3: front of the buffer; bn: the noun that comes next behind b0.
# w t: its word and tag; l r: its outermost dependent on the left or right, c: label, t: tag, w: word; n: their number.
# d01 dsb: distances b0 - s0 and s0 - s1; s0et: tag of the word behind s0; p0t: tag of the word before b0
ATOMS: tuple[str, ...] = (
    *("s0w", "s1w", "s2w", "b0w", "b1w", "b2w", "bnw"),
    *("s0t", "s1t", "s2t", "b0t", "b1t", "b2t", "bnt", "b3t"),
    *("s0lc", "s0rc", "s1lc", "s1rc", "b0lc"),
    *("s0lt", "s0rt", "s1rt", "b0lt"),
    *("s0rw", "s1rw"),
    *("s0nl", "s0nr", "s1nr", "b0nl"),
    *("d01", "dsb"),
    *("s0et", "p0t"),
)
_SINGLE = "s0w|s0t|s0w s0t|s1w|s1t|s1w s1t|b0w|b0t|b0w b0t|b1w|b1t|b1w b1t|b2w b2t|b2t|s2t|s2w"
_TOP_AND_FRONT = "s0w s0t b0w b0t|s0w s0t b0w|s0w b0w b0t|s0w s0t b0t|s0t b0w b0t|s0w b0w|s0t b0t|b0t b1t"
_TOP_TWO = "s1w s0w|s1t s0t|s1t s0w|s1w s0t|s1w s1t s0w s0t|s1w b0w|s1t b0t|s1t b0w|s1w b0t"
_TAGS = (
    "s0t b0t b1t|s1t s0t b0t|s2t s1t s0t|s0t s0lt b0t|s0t s0rt b0t|s0t b0t b0lt|s1t s1rt s0t|b0t b1t b2t|"
    "s0w d01|s0t d01|b0w d01|b0t d01|s0t b0t d01|s1t s0t dsb"
)
_DEPENDENTS = (
    "s0w s0nl|s0t s0nl|s0w s0nr|s0t s0nr|s1t s1nr|b0t b0nl|"
    "s0t s0lc|s0w s0lc|s0t s0rc|s0w s0rc|s1t s1rc|s1w s1rc|b0t b0lc|s0t s0lc s0rc|s1t s1rc b0t|s1t s0t s1rc"
)
_ATTACHMENT = (  # of prepositions above all: "riding" "wave" "on" "surfboard"
    "s1w s0w b0w|s1t s0t b0w|s1t s0t b0w b1t|s1w s0t b0w|s1t s0w b0w|"
    "s0w b0w bnw|s1w b0w bnw|s1w s0w b0w bnw|b0w bnw|s0w bnw|"
    "s0t b0w bnt|s0t b0t bnt|s2t s1t s0t b0t|s2w s1t s0t b0w|s0w b0t b1t|s0w b0t b1w|s0t b0w b1w|"
    "s0w s0rw b0w|s0t s0rw b0w|s1w s0w s0rw|s1t s0w s0rw|s0w s0rw|s1w s1rc s0w|s1t s1rw b0w"
)
_WIDE = "s0t s0et b0t|s0t s0et|p0t s0t b0t|s0t b0t b1t b2t|b0t b1t b2t b3t|s1t s0t s0rc b0t|s1t s0t b0t b1t"
_CLAUSES = "s1t s1lc b0t|s1t s1lc s1rc|b0w b1w|s1w s0t b0t|s2t s1t b0t|s1t b0t b1t|s1t b0w b1t|s2w s0t b0w"
TEMPLATES = [
    template.split()
    for group in (_SINGLE, _TOP_AND_FRONT, _TOP_TWO, _TAGS, _DEPENDENTS, _ATTACHMENT, _WIDE, _CLAUSES)
    for template in group.split("|")
]


def make_multipliers(seed: int) -> np.ndarray:
    """Returns uint64 [T, A]: an odd random number where the template has the atom, else 0."""
    rng = np.random.default_rng(seed)
    used_TA = np.array([[atom in template for atom in ATOMS] for template in TEMPLATES])
    random_TA = rng.integers(0, 2**63, size=used_TA.shape, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return np.where(used_TA, random_TA, np.uint64(0))


def feature_rows(atoms_BA: np.ndarray, multipliers_TA: np.ndarray, num_rows: int) -> np.ndarray:
    """Returns int64 [B, T]: rows of the weights, the same for equal atoms; `num_rows` is a power of two."""
    num_templates = len(multipliers_TA)
    salt_T = np.arange(1, num_templates + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed_BT = atoms_BA.astype(np.uint64) @ multipliers_TA.T + salt_T
    mixed_BT ^= mixed_BT >> np.uint64(29)
    mixed_BT *= np.uint64(0xBF58476D1CE4E5B9)
    return (mixed_BT >> np.uint64(64 - (num_rows.bit_length() - 1))).astype(np.int64)
