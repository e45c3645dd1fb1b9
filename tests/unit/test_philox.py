"""The random numbers of dropout against Philox written down once more, and against its published answers."""

from __future__ import annotations

import pytest
import torch

from mvptr_ds.model.triton_kernels import philox

WORD = 0xFFFFFFFF


def philox_of_integers(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32 with 10 rounds, on Python's integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ k, right & WORD, (left >> 32) ^ d ^ m, left & WORD
        k, m = (k + 0x9E3779B9) & WORD, (m + 0xBB67AE85) & WORD
    return [a, b, c, d]


# counter, key, answer: the known answers that Random123, the authors' library, ships for philox4x32 with 10 rounds
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def seed_of(key: list[int]) -> torch.Tensor:
    seed = key[0] | key[1] << 32
    return torch.tensor([seed - (seed >> 63 << 64)])  # the same bits in an int64


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_the_published_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    assert philox_of_integers(counter, key) == answer
    found = philox.philox(seed_of(key), tuple(torch.tensor([word]) for word in counter))
    assert [int(word) for word in found] == answer


def kept(seed: int, p: float, column: int, row: int, call: int, place: int) -> bool:
    """Whether one element is kept, as philox.py's docstring says."""
    words = philox_of_integers([column // 8, row, call, place], [seed & WORD, seed >> 32])
    number = words[column % 8 // 2] >> 16 * (column % 2) & 0xFFFF
    return number >= round(p * 65536)


def test_rows_are_kept_as_the_docstring_says() -> None:
    found_ND = philox.keep_rows(torch.tensor([2**40 + 5]), 7, 3, 21, 0.5)
    assert found_ND.tolist() == [[kept(2**40 + 5, 0.5, column, row, 7, 0) for column in range(21)] for row in range(3)]


def test_probabilities_are_kept_as_the_docstring_says() -> None:
    found_BHLL = philox.keep_attention(torch.tensor([9]), 4, 2, 3, 10, 0.5)
    wanted = [
        [[[kept(9, 0.5, j, 128 * seq + i, 4, 1 + head) for j in range(10)] for i in range(10)] for head in range(3)]
        for seq in range(2)
    ]
    assert found_BHLL.tolist() == wanted


def test_the_share_that_is_dropped_and_what_makes_up_for_it() -> None:
    for p in (0.1, 0.5):
        keep_ND = philox.keep_rows(torch.tensor([3]), 0, 500, 768, p)
        share = float(keep_ND.double().mean())
        assert share == pytest.approx(1 - p, abs=5 * (p * (1 - p) / keep_ND.numel()) ** 0.5)
        assert philox.keep_scale(p) == pytest.approx(1 / (1 - p), rel=1e-4)
    assert philox.keep_scale(0.5) == 2.0 and philox.keep_scale(0.0) == 1.0


@pytest.mark.parametrize(("seed", "call"), [(4, 0), (3, 1), (3 + 2**32, 0)])
def test_another_seed_or_call_drops_others(seed: int, call: int) -> None:
    """Of two independent masks at 0.5 one half agrees; neighbours in seed and call must not be shifted copies."""
    first, other = (philox.keep_rows(torch.tensor([s]), c, 300, 64, 0.5) for s, c in ((3, 0), (seed, call)))
    for shift in range(3):
        agreeing = float((first[: 300 - shift] == other[shift:]).double().mean())
        assert agreeing == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("p", [-0.1, 1.0, 0.999999])
def test_a_share_that_leaves_nothing_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="expected at least 0 and less than 1"):
        philox.drop_threshold(p)
