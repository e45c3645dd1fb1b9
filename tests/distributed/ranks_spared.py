"""Run by one rank: the engine against DeepSpeed's own reduction and its own step; writes FOLDER/found.json.

Also counts what the engine adds to the operations of the task itself, and how often it waits.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from mvptr_ds import engine as engine_module
from mvptr_ds.distributed import collectives
from mvptr_ds.ds_config import fill_ds_config, load_ds_config
from mvptr_ds.engine import Engine
from tests.conftest import REPO
from tests.distributed.steps import OPTIM, TRAIN, batch_of, build_task

RATE, NUM_STEPS, CUT, SPOILT = 1e-2, 4, 2, 1
BF16 = {"bf16": {"enabled": True}}
LAMB = dataclasses.replace(OPTIM, name="lamb")
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "z1 bf16": ("z1", BF16, OPTIM),
    "z2": ("z2", {}, OPTIM),
    "z2 bf16 lamb": ("z2", BF16, LAMB),
}
# not counted: what launches no kernel
VIEWS = {
    "view", "_unsafe_view", "reshape", "as_strided", "expand", "permute", "transpose", "t", "slice", "select", "split",
    "split_with_sizes", "unbind", "unsqueeze", "squeeze", "detach", "alias", "diagonal", "unfold", "narrow", "view_as",
    "_reshape_alias", "lift_fresh", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
}  # fmt: skip
WAIT = "_local_scalar_dense"  # what `item` and `bool` of a tensor call
Weights = dict[str, torch.Tensor]


def filled_for(json_name: str, changes: dict[str, Any], optim: Any) -> dict[str, Any]:
    content = {"fp16": {}, "bf16": {}} | load_ds_config(REPO / f"ds_configs/{json_name}.json") | changes
    return fill_ds_config(content, TRAIN, optim, 1, bf16_supported=False, fp16_supported=False)


def build(case: str) -> Engine:
    json_name, changes, optim = CASES[case]
    return Engine(build_task("stage2"), filled_for(json_name, changes, optim), optim, RATE, torch.device("cpu"))


@contextmanager
def without(name: str, instead: Any = None) -> Iterator[None]:
    """While inside, engines are built without what the module of the engine calls `name`."""
    kept = getattr(engine_module, name)
    setattr(engine_module, name, lambda optimizer: instead)
    try:
        yield
    finally:
        setattr(engine_module, name, kept)


def step(engine: Engine, number: int, spoilt: bool = False) -> None:
    for accumulation in range(TRAIN.accumulation_steps):
        output = engine.forward(batch_of("stage2", number, accumulation, 0, 1), number, accumulation)
        engine.backward(output.loss * (float("nan") if spoilt and accumulation == 0 else 1.0))
        engine.step()


def state_of(engine: Engine) -> list[torch.Tensor]:
    """The optimiser's: moments and counts of updates."""
    states = engine._deepspeed.optimizer.optimizer.state.values()
    return [value.clone() for state in states for _, value in sorted(state.items())]


def trained(case: str, spoilt: int = -1) -> dict[str, Any]:
    """Weights and norms of some steps."""
    engine = build(case)
    norms, left_alone = [], True
    for number in range(NUM_STEPS):
        before = engine.weights(), state_of(engine)
        step(engine, number, number == spoilt)
        norms.append(engine.grad_norm())
        if number == spoilt:
            weights, state = engine.weights(), state_of(engine)
            left_alone = same(before[0], weights) and all(map(torch.equal, before[1], state))
    hooks = len(engine._deepspeed.optimizer._grad_acc_hooks)
    out = {"weights": engine.weights(), "norms": norms, "hooks": hooks, "left_alone": left_alone}
    told = [engine.updates_applied(newest=False), engine.updates_applied(newest=True)]
    out |= {"applied": told[0] + told[1], "late": len(told[1]), "counted": engine._deepspeed.skipped_steps}
    engine.destroy()
    return out


def resumed(case: str, folder: Path) -> Weights:
    """Of an engine that is saved in the middle, and loaded by another one."""
    engine = build(case)
    for number in range(CUT):
        step(engine, number)
    engine.save(folder / case / "engine")
    engine.destroy()
    engine = build(case)
    engine.load(folder / case / "engine", universal_steps=None)
    for number in range(CUT, NUM_STEPS):
        step(engine, number)
    weights = engine.weights()
    engine.destroy()
    return weights


def same(one: Weights, two: Weights) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def furthest(one: Weights, two: Weights) -> float:
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def compared(case: str, folder: Path) -> dict[str, Any]:
    """Flat gradients against DeepSpeed's buckets, then the step that waits for nothing against DeepSpeed's own."""
    ours, spoilt = trained(case), trained(case, SPOILT)
    with without("flatten_gradients_of_one_rank"):
        hooked = trained(case)
        with without("step_without_waiting", False):
            waiting, waiting_spoilt = trained(case), trained(case, SPOILT)
    told = ("norms", "applied", "counted", "left_alone", "late")
    return {
        "hooks": [ours["hooks"], hooked["hooks"]],
        "as hooked": same(ours["weights"], hooked["weights"]) and ours["norms"] == hooked["norms"],
        "resumes": same(ours["weights"], resumed(case, folder)),
        "from waiting": furthest(ours["weights"], waiting["weights"]),
        "from waiting, spoilt": furthest(spoilt["weights"], waiting_spoilt["weights"]),
        "spoilt moved": furthest(spoilt["weights"], ours["weights"]),
        "norms": [ours["norms"], waiting["norms"]],
        "spoilt": {name: spoilt[name] for name in told},
        "waiting, spoilt": {name: waiting_spoilt[name] for name in told},
    }


class Count(TorchDispatchMode):
    """Counts operations that would launch a kernel, and those that would make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operations += name not in VIEWS
        self.waits += name == WAIT
        return func(*args, **(kwargs or {}))


def counted(case: str) -> dict[str, int]:
    """What a step of the engine adds to the task's own forward and backward passes."""
    engine, device_waits = build(case), []
    task = build_task("stage2").to(next(engine.task.parameters()).dtype)
    batches = [batch_of("stage2", 0, accumulation, 0, 1) for accumulation in range(TRAIN.accumulation_steps)]
    for number in range(3):  # the timers of DeepSpeed begin with the third step
        step(engine, number)
    accelerator = get_accelerator()
    synchronize, accelerator.synchronize = accelerator.synchronize, lambda *_: device_waits.append(1)
    with Count() as with_engine:
        for accumulation, batch in enumerate(batches):
            engine.backward(engine.forward(batch, 3, accumulation).loss)
            engine.step()
    accelerator.synchronize = synchronize
    with Count() as alone:
        for accumulation, batch in enumerate(batches):
            task(batch, 3, accumulation).loss.backward()
    out = {
        "tensors": sum(p.requires_grad for p in engine.task.parameters()),
        "operations": with_engine.operations - alone.operations,
        "waits": with_engine.waits - alone.waits,
        "synchronised": len(device_waits),
    }
    engine.destroy()
    return out


def main() -> None:
    folder = Path(sys.argv[1])
    collectives.init()
    found = {case: compared(case, folder) for case in CASES}
    counts = {case: counted(case) for case in ("z1 bf16", "z2")}
    (folder / "found.json").write_text(json.dumps({"cases": found, "counts": counts}), encoding="utf-8")
    collectives.shut_down()


if __name__ == "__main__":
    main()
