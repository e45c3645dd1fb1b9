"""One line a tensor with its largest difference, and whether all were well."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # absolute; the reference's own dtypes differ by under 2e-6
SHORT = {torch.float64: "fp64", torch.float32: "fp32"}


class Comparison:
    """Says a line a tensor and counts those that differ.

    A missing, extra, wrongly shaped or NaN tensor fails, and so does a difference above the tolerance.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.failed = 0
        self.lines = 0

    def add(
        self,
        name: str,
        expected: Tensor,
        found: Tensor | None,
        tolerance: float = 0.0,
        mask: Tensor | None = None,
        relative: float = 0.0,
    ) -> None:
        """Compares a tensor.

        Args:
            found: None: it was not computed.
            tolerance: largest absolute difference.
            mask: bool, leading dimensions of the tensor; nothing is compared where it is False.
            relative: share of an expected number by which it may differ beyond that.
        """
        if found is None:
            self._line(name, float("nan"), "not computed here: an extra tensor")
            return
        if found.shape != expected.shape:
            self._line(name, float("nan"), f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
            return
        expected, found = expected.detach().cpu().double(), found.detach().cpu().double()
        if mask is not None:
            expected, found = expected[mask], found[mask]
        difference = (expected - found).abs()
        within = bool((difference <= tolerance + relative * expected.abs()).all())  # NaN is not
        bound = f"{tolerance:g}" + (f" + {relative:g} of it" if relative else "")
        self._line(name, float(difference.max()) if expected.numel() else 0.0, None if within else f"above {bound}")

    def number(self, name: str, expected: float, found: float | None, tolerance: float = 0.0) -> None:
        """Compares a number."""
        tensor = None if found is None else torch.tensor(found, dtype=torch.float64)
        self.add(name, torch.tensor(expected, dtype=torch.float64), tensor, tolerance)

    def text(self, name: str, expected: str, found: str) -> None:
        """Compares two texts."""
        same = expected == found
        self._line(name, 0.0 if same else float("nan"), None if same else f"{found!r}, expected {expected!r}")

    def missing(self, name: str) -> None:
        """Fails for a tensor that was computed and that the folder lacks."""
        self._line(name, float("nan"), "missing in the folder")

    def absent(self, name: str, found: Tensor | None) -> None:
        """Compares a gradient that is not to be there."""
        self._line(name, 0.0, None if found is None else "there is one, expected none")

    def tensors(
        self,
        prefix: str,
        expected: Mapping[str, Tensor],
        found: Mapping[str, Tensor],
        tolerance: float,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Compares all tensors of either side; those of whole numbers must be equal."""
        for name in sorted(expected.keys() | found.keys()):
            if name not in expected:
                self.missing(f"{prefix} {name}")
                continue
            bound = max(tolerance, TOLERANCE.get(expected[name].dtype, 0.0))
            bound = bound if expected[name].is_floating_point() else 0.0
            self.add(f"{prefix} {name}", expected[name], found.get(name), bound, (masks or {}).get(name))

    def _line(self, name: str, difference: float, problem: str | None) -> None:
        self.lines += 1
        self.failed += problem is not None
        verdict = "FAIL" if problem else "ok"
        self.say(f"{verdict:4}  {name:70} {difference:9.2e}  {problem or ''}".rstrip())
