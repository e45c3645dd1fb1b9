"""What the engine trains: the model, a task's own head if it has one, and the losses of a batch over both."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mvptr_ds.data.collate import Batch
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.distributed import collectives
from mvptr_ds.model.mvptr import PARTS, Mvptr
from mvptr_ds.objectives.batch_plan import BatchPlan
from mvptr_ds.objectives.losses import LossSum
from mvptr_ds.objectives.packed_batch import PackedBatch
from mvptr_ds.objectives.table import Chosen

HEAD_PART = "head"  # what the configuration calls a task's own weights, beside the parts of the model
HEAD = f"{HEAD_PART}."  # prefix of their names


class TaskOutput(NamedTuple):  # a tuple: ZeRO-3 hooks the tensors of tuples, lists and dicts alone
    """`loss` is what the engine differentiates; `parts` are this rank's detached sums and counts, for the meters."""

    loss: Tensor
    parts: dict[str, LossSum]


class TaskModule(nn.Module, ABC):
    """A model with the losses of one task; `tasks.Task.build` makes it.

    Args:
        head: weights that the task adds to the model; all of them are trained.
        head_settings: what gives the head's rows their meaning: the task's name, and for example its classes. They
            stand in the model folder's task.json, and a head that was trained with other settings is refused.
        max_scale: cap of exp(logit_scale).

    Attributes:
        objectives: what is computed, for counts of work; None: nothing is counted.
        num_cross_layers: layers of the cross encoder that run; None: all.
        frozen: parts of `trained_parts` that are not to be trained.
    """

    objectives: Chosen | None = None
    num_cross_layers: int | None = None

    def __init__(
        self,
        model: Mvptr,
        head: nn.Module | None = None,
        head_settings: Mapping[str, Any] | None = None,
        max_scale: float = 100.0,
    ) -> None:
        super().__init__()
        self.model, self.head, self.max_scale = model, head, max_scale
        self.head_settings = dict(head_settings or {})
        self.frozen: frozenset[str] = frozenset()

    @abstractmethod
    def trained_parts(self) -> list[str]:
        """Returns the parts of the model (`Mvptr.parameters_of`) that the losses reach; the engine gets no others."""

    @abstractmethod
    def forward(self, batch: Batch | PackedBatch, step: int, accumulation: int = 0) -> TaskOutput:
        """Computes the losses of one micro-batch, through `normalised`.

        Args:
            batch: on the host; or what `batch_plan` made of it and `complete` filled, on the device of the model.
        """

    def batch_plan(self) -> BatchPlan | None:
        """Returns what packs batches for `forward`, where loader processes shall do it; None: `forward` does."""
        return None

    def complete(self, packed: PackedBatch, step: int, accumulation: int) -> None:  # most tasks choose nothing
        """Writes what a step adds to a packed batch on the host, before it is copied to the device."""

    def normalised(self, parts: Mapping[str, LossSum], weights: Mapping[str, float]) -> TaskOutput:
        """Returns the weighted sum of the losses, each divided by the count of all ranks.

        The sum is multiplied by the number of ranks, because the engine averages gradients over them.

        Args:
            parts: sums and counts of this rank's samples, by name.
            weights: of each.
        """
        counts = collectives.all_reduce_sum(torch.stack([part.count for part in parts.values()]))
        terms = [
            weights[name] * part.sum / count.clamp(min=1.0)
            for (name, part), count in zip(parts.items(), counts, strict=True)
        ]
        loss = collectives.num_ranks() * torch.stack(terms).sum()
        return TaskOutput(loss, {name: part.detach() for name, part in parts.items()})

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields all parameters: those of the model by their names there, those of the head behind `head.`."""
        yield from self.model.named_parameters()
        if self.head is not None:
            yield from ((HEAD + name, parameter) for name, parameter in self.head.named_parameters())

    def parameters_used_at_large(self) -> list[nn.Parameter]:
        """Returns the parameters read outside their own module's forward pass, of which ZeRO-3 has to be told."""
        held = [] if self.head is None else [m for m in self.head.modules() if isinstance(m, nn.ParameterDict)]
        return [*self.model.parameters_used_at_large(), *(p for module in held for p in module.parameters())]

    def load_head(self, weights: Mapping[str, Tensor]) -> None:
        """Gives the head its weights of `named_weights`, if there is one."""
        if self.head is not None:
            self.head.load_state_dict({n.removeprefix(HEAD): w for n, w in weights.items() if n.startswith(HEAD)})

    def begin_head(self, words: WordPiece) -> None:  # most heads start as they were drawn
        """Gives a head that no trained weights were found for its first values, from the model's own weights."""

    def parts_in_training(self) -> list[str]:
        """Returns `trained_parts` without those that are frozen."""
        return [part for part in self.trained_parts() if part not in self.frozen]

    def reaches(self, name: str) -> bool:
        """Returns whether the losses reach a parameter of the parts in training; most reach all of them."""
        return True

    def freeze_untrained(self) -> None:
        """Lets the parameters in training and those of the head ask for a gradient, and no others."""
        trained = set(filter(self.reaches, self.model.parameters_of(self.parts_in_training())))
        for name, parameter in self.named_weights():
            parameter.requires_grad_(name in trained or name.startswith(HEAD))

    def factors(self, by_part: Mapping[str, float]) -> dict[str, float]:
        """Returns the factor of the learning rate of each weight of `named_weights` that a part with a factor holds.

        Args:
            by_part: factors by part of the model (see PARTS), and of the task's own weights by `head`. Where two of
                them hold a weight, the narrower one counts: `pooler` before `itm`.
        """
        prefixes = {part: (HEAD,) if part == HEAD_PART else PARTS[part] for part in by_part}
        narrowest_last = sorted(by_part, key=lambda part: len(prefixes[part]), reverse=True)
        return {
            name: by_part[part] for part in narrowest_last for name, _ in self.named_weights()
            if name.startswith(prefixes[part])
        }  # fmt: skip

    def scale(self) -> Tensor:
        """Returns the factor of the contrastive logits, capped; one element, float32 (float64 for a float64 model).

        The cap leaves the gradient alone, which would else be zero above it: the parameter could never come back.
        """
        log_scale: Tensor = self.model.logit_scale
        log_scale = log_scale if log_scale.dtype == torch.float64 else log_scale.float()
        above = (log_scale.detach() - self.max_log_scale).clamp(min=0)  # also where half precision rounds the cap up
        return (log_scale - above).exp()

    @property
    def max_log_scale(self) -> float:
        """The cap of the parameter `logit_scale`: the largest float32 that is not above ln(max_scale)."""
        exact = math.log(self.max_scale)
        nearest = np.float32(exact)
        return float(nearest if float(nearest) <= exact else np.nextafter(nearest, np.float32(-np.inf)))

    @torch.no_grad()
    def cap_logit_scale(self) -> None:
        """Takes the parameter back to the cap where a step has carried it above, as CLIP does."""
        self.model.logit_scale.clamp_(max=self.max_log_scale)
