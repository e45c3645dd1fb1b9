"""The DeepSpeed engine of a stage: optimiser, ZeRO and precision around its task.

Beside `collectives` and the files `optim/zero_*.py` nothing else imports deepspeed: what 0.19.8 needs help with stands
here and there.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from mvptr_ds import ds_config
from mvptr_ds.checkpoints import model_folder
from mvptr_ds.config import OptimConfig
from mvptr_ds.data.collate import Batch
from mvptr_ds.distributed import collectives
from mvptr_ds.guards import LossScale
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.objectives.module import TaskModule, TaskOutput
from mvptr_ds.objectives.packed_batch import PackedBatch
from mvptr_ds.optim.device_flags import DeviceFlags
from mvptr_ds.optim.lamb import Lamb
from mvptr_ds.optim.optimizer import build_optimizer, parameter_groups, set_learning_rate
from mvptr_ds.optim.zero_flat_gradients import flatten_gradients_of_one_rank
from mvptr_ds.optim.zero_grad_norm import patch_zero_grad_norm
from mvptr_ds.optim.zero_step import skip_flag, step_without_waiting

UNIVERSAL = {"checkpoint": {"load_universal": True}}  # what the JSON of an engine that loads such a checkpoint says


class Engine:
    """A task that is trained: `forward` and `backward` of each micro-batch, each followed by `step`.

    All ranks build it and call its methods together.

    Args:
        task: parameters that ask for no gradient stay as they are.
        filled: the DeepSpeed JSON without any `"auto"`.
        factors: of the learning rate, by part (`TaskModule.factors`); the others have 1.
    """

    def __init__(
        self,
        task: TaskModule,
        filled: dict[str, Any],
        optim: OptimConfig,
        learning_rate: float,
        device: torch.device,
        factors: Mapping[str, float] | None = None,
    ) -> None:
        self.task, self.model, self.device = task, task.model, device
        self.zero_stage = ds_config.zero_stage_of(filled)
        task.cap_logit_scale()
        self._untrained = self._copy_untrained()
        trained = [(name, p) for name, p in task.named_weights() if p.requires_grad]
        self.num_trained = sum(p.numel() for _, p in trained)  # before stage 3 cuts them
        groups = parameter_groups(trained, optim.weight_decay, task.factors(factors or {}))
        self._optimizer = build_optimizer(groups, optim, learning_rate, ds_config.optimizer_device(filled, device))
        self._deepspeed, *_ = deepspeed.initialize(model=task, optimizer=self._optimizer, config=filled)
        flatten_gradients_of_one_rank(self._deepspeed.optimizer)
        patch_zero_grad_norm(self._deepspeed.optimizer)
        self._skips_on_device = step_without_waiting(self._deepspeed.optimizer)
        self._skipped = DeviceFlags()
        if isinstance(self._optimizer, Lamb):
            self._optimizer.follow_zero(self._sum_over_ranks)
        if self.zero_stage == 3:
            for parameter in self.task.parameters_used_at_large():
                deepspeed.zero.register_external_parameter(task, parameter)

    def forward(self, batch: Batch | PackedBatch, step: int, accumulation: int) -> TaskOutput:
        """Computes the task's losses of a micro-batch, in the engine's precision."""
        output: TaskOutput = self._deepspeed(batch, step, accumulation)
        return output

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch."""
        self._deepspeed.backward(loss)

    def step(self) -> None:
        """Updates the weights, after the last micro-batch of a step; after the others it only counts."""
        updates = self._deepspeed.is_gradient_accumulation_boundary()
        self._deepspeed.step()
        if updates:
            self._skipped.note(self._skip_flag())
            self._cap_logit_scale()  # weights that were left as they are lie below the cap already

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets the learning rate of the next update, which each group multiplies by its factor."""
        set_learning_rate(self._deepspeed.optimizer.param_groups, learning_rate)

    def was_step_applied(self) -> bool:
        """Returns False, on all ranks alike, where the last gradient was not finite: the weights are as before.

        Waits for the device; `updates_applied` need not.
        """
        return not self._skipped.newest()

    def updates_applied(self, newest: bool) -> list[bool]:
        """Returns what `was_step_applied` tells of each step that no call has returned so far, oldest first.

        Args:
            newest: tell of the last step, too, for which the host waits where the device decides; else the next call
                tells of it.
        """
        applied = [not skipped for skipped in self._skipped.take(newest or not self._skips_on_device)]
        if self._skips_on_device:  # DeepSpeed's own count, which it could not keep
            self._deepspeed.skipped_steps += applied.count(False)
        return applied

    def grad_norm(self) -> float:
        """Returns the gradient norm of the last step, before clipping."""
        norm = self._deepspeed.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def loss_scale(self) -> LossScale | None:
        """Returns the loss scale of fp16; None in other precisions."""
        scaler = getattr(self._deepspeed.optimizer, "loss_scaler", None)  # of ZeRO; fixed at 1 but for fp16
        return LossScale(scaler.cur_scale, scaler.min_scale) if scaler is not None and scaler.dynamic else None

    def logit_scale(self) -> float:
        """Returns the scale of the contrastive logits: one over their temperature."""
        with deepspeed.zero.GatheredParameters([self.model.logit_scale]):  # of stage 3; for the others it does nothing
            return float(self.task.scale().detach())

    def weights(self) -> dict[str, Tensor]:
        """Returns the whole model on rank 0's host, and a task's head, float32 where they are trained.

        The engine keeps its float32 weights in parts; on the other ranks it is empty.
        """
        weights = dict(self._untrained)
        for name, parameter in self.task.named_weights():
            if parameter.requires_grad:
                whole = deepspeed.utils.safe_get_full_fp32_param(parameter)
                if collectives.is_main():
                    weights[name] = (parameter if whole is None else whole).detach().cpu().clone()
        return weights

    def whole_module(self, build: Callable[[Mvptr], TaskModule]) -> TaskModule:
        """Returns the module as rank 0 can run it alone: with stage 3, which gathers partitions from all ranks, a copy.

        Args:
            build: makes such a module over another model.
        """
        weights = self.weights() if self.zero_stage == 3 else None
        if weights is None or not collectives.is_main():
            return self.task
        copied = model_folder.copy_of(self.model, weights, self.device)
        with torch.random.fork_rng(devices=[]):  # a head is drawn on the host; the run goes on with its own numbers
            module = build(copied)
        module.load_head(weights)
        return module.to(self.device).eval()

    def save(self, path: Path) -> None:
        """Writes the files of all ranks below `path`.

        Raises:
            OSError, RuntimeError: on a rank whose own could not be written, when all collectives are done.
        """
        # raised inside, an error would leave the others in a barrier; the second is private (the script that each
        # checkpoint gets): constraints.txt pins the version
        writes = ((self._deepspeed.checkpoint_engine, "save"), (self._deepspeed, "_copy_recovery_script"))
        with _errors_held_back(*writes) as errors:
            self._deepspeed.save_checkpoint(str(path.parent), tag=path.name, save_latest=False)
        if errors:
            raise errors[0]

    def load(self, path: Path, universal_steps: int | None) -> None:
        """Puts back weights and optimiser; the optimiser's settings stay those of the configuration.

        Args:
            universal_steps: None for what `save` wrote on as many ranks; of a universal checkpoint (reshard.py), for
                which the engine was built with UNIVERSAL, the number of updates that it holds.
        """
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        clip_norm = getattr(self._deepspeed.optimizer, "clip_grad", None)
        self._deepspeed.load_checkpoint(str(path.parent), tag=path.name)
        if clip_norm is not None:  # ZeRO 1 and 2 bring the checkpoint's
            self._deepspeed.optimizer.clip_grad = clip_norm
        for group, ours in zip(self._optimizer.param_groups, settings, strict=True):
            group.update({name: value for name, value in ours.items() if name != "step"})
        if universal_steps is not None:
            self._mend_optimizer(universal_steps)
        self._cap_logit_scale()

    def destroy(self) -> None:
        """Frees model and optimiser, where nobody else refers to them; the engine is of no use any more."""
        self._deepspeed.destroy()
        if self.zero_stage == 3:
            _forget_modules()
        del self._deepspeed, self._optimizer, self.task, self.model, self._untrained
        for _ in range(2):  # they refer to each other in circles; what autograd still held goes with the second
            gc.collect()

    def _cap_logit_scale(self) -> None:
        """`TaskModule.cap_logit_scale` for the float32 weights and for those that are computed with.

        Each rank caps what it holds of them, without a collective: the result is the same on all.
        """
        parameter = self.model.logit_scale
        if parameter.requires_grad:
            _cap_float32(parameter, self.zero_stage, self.task.max_log_scale)
            self.task.cap_logit_scale()

    def _skip_flag(self) -> Tensor:
        """Returns whether the step was skipped: one element, on the device where the device decides it."""
        if self._skips_on_device:
            return skip_flag(self._deepspeed.optimizer)
        return torch.tensor(not self._deepspeed.was_step_applied())

    def _sum_over_ranks(self, small: Tensor) -> Tensor:
        """Sums on the engine's device, since an optimiser may step on the host."""
        return collectives.all_reduce_sum(small.to(self.device)).to(small.device)

    def _copy_untrained(self) -> dict[str, Tensor]:
        """Keeps on rank 0 what is not trained as it is, before DeepSpeed rounds or partitions it."""
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        state = self.model.state_dict() if collectives.is_main() else {}
        return {name: tensor.detach().clone() for name, tensor in state.items() if name not in trained}

    def _mend_optimizer(self, num_steps: int) -> None:
        """What deepspeed 0.19.8 gets wrong when it reads a universal checkpoint.

        Stage 3 gives one step count to all groups, which each of them then raises; the other stages leave the count on
        the host, where CUDA's fused AdamW does not take it.
        """
        for group in self._optimizer.param_groups:
            if "step" in group:  # apex counts the steps of a group
                group["step"] = num_steps
        for parameter, state in self._optimizer.state.items():
            if "step" in state:
                state["step"] = state["step"].to(parameter.device, copy=True)


@torch.no_grad()
def _cap_float32(parameter: Any, zero_stage: int, cap: float) -> None:
    """Caps what this rank holds of a parameter beside what the model shows: the float32 weights first of all."""
    if zero_stage == 3:
        held = deepspeed.utils.safe_get_local_fp32_param(parameter)
        deepspeed.utils.safe_set_local_fp32_param(parameter, held.clamp(max=cap))
        parameter.ds_tensor.data.clamp_(max=cap)  # what the model's is gathered from
    elif parameter._hp_mapping is not None:  # else all of it lies on other ranks
        parameter._hp_mapping.get_hp_fragment().clamp_(max=cap)


def _forget_modules() -> None:
    """Empties the two places where stage 3 of deepspeed 0.19.8 keeps modules, and so all tensors, for good.

    Both are private: constraints.txt pins the version, and a test counts what is left.
    """
    zero = deepspeed.runtime.zero
    zero.parameter_offload.FWD_MODULE_STACK.clear()
    coordinator = zero.partitioned_param_coordinator.PartitionedParameterCoordinator
    cached = coordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()  # a cache by coordinator and module


@contextmanager
def _errors_held_back(*writes: tuple[Any, str]) -> Iterator[list[Exception]]:
    """While inside, these methods, each as (owner, name), raise no error of a write; the list gets it."""
    errors: list[Exception] = []

    def holding_back(write: Callable[..., Any]) -> Callable[..., Any]:
        def held_back(*args: Any, **kwargs: Any) -> Any:
            try:
                return write(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                errors.append(error)
                return False

        return held_back

    for owner, name in writes:
        setattr(owner, name, holding_back(getattr(owner, name)))
    try:
        yield errors
    finally:
        for owner, name in writes:
            delattr(owner, name)  # that of its class again
