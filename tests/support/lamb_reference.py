"""LAMB as the paper writes it down, one tensor after the other, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor

BETA1, BETA2, EPS, DECAY = 0.9, 0.98, 1e-6, 0.1


class Reference:
    """Keeps its weights in float64."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.weights = [tensor.detach().double().clone() for tensor in tensors]
        self.m = [torch.zeros_like(w) for w in self.weights]
        self.v = [torch.zeros_like(w) for w in self.weights]
        self.t = 0

    def step(self, gradients: list[Tensor], learning_rate: float) -> None:
        self.t += 1
        for i, gradient in enumerate(gradients):
            w, g = self.weights[i], gradient.double()
            self.m[i] = BETA1 * self.m[i] + (1 - BETA1) * g
            self.v[i] = BETA2 * self.v[i] + (1 - BETA2) * g * g
            m_hat, v_hat = self.m[i] / (1 - BETA1**self.t), self.v[i] / (1 - BETA2**self.t)
            update, ratio = m_hat / (v_hat.sqrt() + EPS), 1.0
            if w.ndim > 1:
                update = update + DECAY * w
                norms = float(w.norm()), float(update.norm())
                ratio = norms[0] / norms[1] if min(norms) > 0 else 1.0
            self.weights[i] = w - learning_rate * ratio * update


def clipped(gradients: list[Tensor], clip_norm: float) -> list[Tensor]:
    norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
    return [g.double() * min(1.0, clip_norm / (float(norm) + 1e-6)) for g in gradients]
