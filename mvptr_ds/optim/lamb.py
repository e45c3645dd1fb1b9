"""LAMB for ordinary parameters, and for the flat partitions that DeepSpeed's ZeRO 1 and 2 put in their place.

Legend: U the model's tensors of more than one dimension, over all groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """What a stepped tensor holds of one of the model's tensors."""

    number: int  # among the U tensors
    start: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self.length == tensor.numel() else tensor.narrow(0, self.start, self.length)


class Lamb(torch.optim.Optimizer):
    """Adam's direction with decoupled decay, scaled by `|weights| / |direction|` of each tensor.

        direction = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * weights
        weights  -= lr * |weights| / |direction| * direction

    The ratio is 1 where either norm is 0, and for tensors of one dimension: biases, norms and the logit scale, the
    group that does not decay either (`optim.parameter_groups`). State and settings are named as in `torch.optim.AdamW`.

    ZeRO gives each rank one flat float32 part of every group, whose borders cut through tensors. After
    `follow_zero` the squared norms of the pieces are summed over the ranks: 2 U float64 numbers a step.

    Source: You et al. 2020 (arXiv 1904.00962), algorithm 2, with phi the identity.
    Differs: NVIDIA's and DeepSpeed's fused kernels clip the gradient themselves, which is the engine's task here.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]] | Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._tensors: list[list[Any]] = [list(group["params"]) for group in self.param_groups]
        self._pieces: dict[Tensor, list[Piece]] = {}  # by flat part; not in it: those without such tensors
        self._num_tensors = 0
        self._sum_over_ranks: Callable[[Tensor], Tensor] | None = None

    def follow_zero(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Looks up what its flat parts are made of, once DeepSpeed has put them in the place of the parameters.

        Reads `_hp_mapping`, which DeepSpeed hangs on each parameter of which this rank steps something (private;
        constraints.txt pins the version).

        Args:
            sum_over_ranks: sums a small tensor over the ranks that share the parameters; all of them step together.
        """
        number = 0
        for group, tensors in zip(self.param_groups, self._tensors, strict=True):
            (flat,) = group["params"]
            for tensor in (tensor for tensor in tensors if tensor.ndim > 1):
                pieces = self._pieces.setdefault(flat, [])
                if tensor._hp_mapping is not None:
                    address = tensor._hp_mapping.get_hp_fragment_address()
                    pieces.append(Piece(number, address.start, address.numel))
                number += 1
        self._num_tensors, self._sum_over_ranks = number, sum_over_ranks

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        steps = []
        for group in self.param_groups:
            stepped = [p for p in group["params"] if p.grad is not None]
            if stepped:
                steps.append((group["lr"], stepped, self._directions(group, stepped)))
        self._scale([p for _, stepped, _ in steps for p in stepped], [d for _, _, made in steps for d in made])
        for lr, stepped, directions in steps:
            torch._foreach_add_(stepped, directions, alpha=-lr)
        return loss

    def _directions(self, group: dict[str, Any], stepped: list[Tensor]) -> list[Tensor]:
        """Before the ratio; moves the moments."""
        for p in stepped:
            if not self.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        states, (beta1, beta2) = [self.state[p] for p in stepped], group["betas"]
        # moments, as in Adam: m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
        counts, means, squares = ([state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq"))
        gradients = [p.grad for p in stepped if p.grad is not None]
        torch._foreach_add_(counts, 1)
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        # bias corrections, in float64: 1 - 0.999 has lost four of float32's seven digits
        taken = torch.stack(counts).double()
        corrections1, corrections2 = ((1 - beta**taken).unbind() for beta in (beta1, beta2))
        # m / c1 / (sqrt(v / c2) + eps), written as m * 1 / ((sqrt(v / c2) + eps) * c1)
        directions = torch._foreach_div(squares, corrections2)
        torch._foreach_sqrt_(directions)
        torch._foreach_add_(directions, group["eps"])
        torch._foreach_mul_(directions, corrections1)
        torch._foreach_reciprocal_(directions)  # in place, so that one copy of the weights' size is all it takes
        torch._foreach_mul_(directions, means)
        if group["weight_decay"]:
            torch._foreach_add_(directions, stepped, alpha=group["weight_decay"])
        return list(directions)

    def _scale(self, stepped: list[Tensor], directions: list[Tensor]) -> None:
        """Multiplies each tensor's direction by its ratio, in place."""
        pairs = list(zip(stepped, directions, strict=True))
        if self._sum_over_ranks is None:
            held = [(n, p, d) for n, (p, d) in enumerate(pair for pair in pairs if pair[0].ndim > 1)]
            num = len(held)
        else:
            num = self._num_tensors if any(p in self._pieces for p in stepped) else 0
            held = [(q.number, q.of(p), q.of(d)) for p, d in pairs for q in self._pieces.get(p, [])]
        if num:  # the same on all ranks, some of which may hold nothing
            ratios = self._ratios(held, num, directions[0].device)
            if held:
                torch._foreach_mul_([d for _, _, d in held], [ratios[n] for n, _, _ in held])

    def _ratios(self, held: list[tuple[int, Tensor, Tensor]], num: int, device: torch.device) -> tuple[Tensor, ...]:
        """Returns the ratios of all U tensors, float64.

        Args:
            held: what this rank holds of some of them: number, weights and direction.
        """
        # in float64: float32's own sum on a CPU is 2e-3 off for 30 M numbers
        tensors = [w for _, w, _ in held] + [d for _, _, d in held]
        norms = torch._foreach_norm(tensors, 2, dtype=torch.float64) if held else []
        rows: list[dict[int, Tensor]] = [{}, {}]
        for (n, _, _), of_weights, of_direction in zip(held, norms[: len(held)], norms[len(held) :], strict=True):
            rows[0][n], rows[1][n] = of_weights, of_direction
        # one row of |weights|^2 and one of |direction|^2 over all U tensors, 0 where this rank holds nothing: pieces
        # of one tensor lie on several ranks, and only the squares of their norms add up
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        squares_2U = torch.stack([row.get(n, nothing) for row in rows for n in range(num)]).view(2, num).square()
        if self._sum_over_ranks is not None:
            squares_2U = self._sum_over_ranks(squares_2U)
        weights_U, directions_U = squares_2U.sqrt()
        moves_U = (weights_U > 0) & (directions_U > 0)
        return torch.where(moves_U, weights_U / directions_U, torch.ones_like(weights_U)).unbind()
