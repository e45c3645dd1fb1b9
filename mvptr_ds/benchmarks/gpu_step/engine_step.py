"""Counts what DeepSpeed adds to a step: its hooks in the backward pass, and the step of the optimiser.

The package's real Engine runs on one CPU rank, with all layers of the model but few numbers in each. DeepSpeed's
operations depend on the number of parameters and groups, not on their sizes; the gradient buckets shrink with the
model. An operation is DeepSpeed's if its innermost caller of interest is deepspeed, or this package's code around the
optimiser. The accelerator says that it is asynchronous, as CUDA is, so that DeepSpeed waits where it would wait there.

What differs from CUDA: collectives of one rank are gloo's and none of them is counted, and torch's fused AdamW counts
as one operation a group.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mvptr_ds.benchmarks.gpu_step.fake_cuda import SIZE_DEPENDS_ON_VALUES, is_view
from mvptr_ds.benchmarks.gpu_step.operation_costs import FREE
from mvptr_ds.benchmarks.gpu_step.step import build_module, draw_batch_for
from mvptr_ds.config import Config
from mvptr_ds.distributed import collectives
from mvptr_ds.ds_config import fill_ds_config
from mvptr_ds.engine import Engine
from mvptr_ds.objectives.module import TaskModule
from mvptr_ds.planning.plan import task_without_memory
from mvptr_ds.tasks import TASKS

NUM_SAMPLES, WARM_UP = 2, 2  # samples of a micro-batch; steps before DeepSpeed's timers begin
SMALL_HEAD = 8  # numbers of an attention head of the small model, which keep every parameter's size a multiple of 8
BUCKET_UNIT = 1024  # a bucket's size is a multiple of 2 times the ranks
SMALL_ROWS, SMALL_PHRASES = 31_000, 64
PACKAGE, DEEPSPEED = Path(__file__).resolve().parents[2], Path(deepspeed.__file__).resolve().parent
OURS = (str(PACKAGE / "optim"), str(PACKAGE / "engine.py"))
AUTOGRAD = str(Path(torch.__file__).resolve().parent / "autograd" / "graph.py")  # below it autograd runs nodes
READS_VALUES = {"_local_scalar_dense", "equal", *SIZE_DEPENDS_ON_VALUES}


@dataclass
class EngineCounts:
    """What DeepSpeed does in a micro-batch that ends a step.

    Attributes:
        hooks: operations while the backward pass runs.
        step: operations behind it, the optimiser's among them.
        waits: for the device, by line.
        lines: operations by line of DeepSpeed or of this package.
        num_tensors: parameters that are trained.
    """

    hooks: int = 0
    step: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    lines: Counter[str] = field(default_factory=Counter)
    num_tensors: int = 0

    @property
    def operations(self) -> int:
        return self.hooks + self.step


class _Count(TorchDispatchMode):
    """Counts operations whose caller is the engine."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.in_step = EngineCounts(), False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, made = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        line = engine_line()
        if line is None or func.namespace not in ("aten", "prims"):
            return made
        if name in READS_VALUES or (name == "_to_copy" and _goes_to_host(kwargs)):
            self.counts.waits[line] += 1
        some = any(isinstance(leaf, Tensor) and leaf.numel() for leaf in tree_leaves((args, made)))
        if name not in FREE and name != "_local_scalar_dense" and not is_view(func) and some:
            self.counts.lines[line] += 1
            if self.in_step:
                self.counts.step += 1
            else:
                self.counts.hooks += 1
        return made

    def synchronised(self, *_: Any) -> None:
        """Counts a wait that DeepSpeed asks its accelerator for."""
        line = engine_line()
        if line is not None:
            self.counts.waits[line] += 1


def _goes_to_host(kwargs: dict[str, Any] | None) -> bool:
    device = (kwargs or {}).get("device")
    return device is not None and torch.device(device).type == "cpu"


def engine_line() -> str | None:
    """Returns the innermost line of the engine's code that runs; None where a task or autograd runs inside it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file == AUTOGRAD:
            return None
        if file.startswith((str(DEEPSPEED), *OURS)):
            return f"{'/'.join(Path(file).parts[-2:])}:{frame.f_lineno}"
        if file.startswith(str(PACKAGE)) and "gpu_step" not in file:
            return None
        frame = frame.f_back
    return None


class _Stream:
    """A stream or event of an accelerator that has none; only `synchronize` stops the host."""

    def __init__(self, count: _Count) -> None:
        self.synchronize = count.synchronised

    def __getattr__(self, name: str) -> Any:  # wait_stream, wait_event, record: order on the device
        return lambda *_, **__: None


@contextmanager
def _asynchronous(count: _Count) -> Iterator[None]:
    """While inside, DeepSpeed takes its CPU accelerator for one that works apart from the host."""
    accelerator = type(deepspeed.accelerator.get_accelerator())
    stream = _Stream(count)
    with (
        patch.multiple(
            accelerator,
            is_synchronized_device=lambda self: False,
            resolves_data_dependency=lambda self: False,
            synchronize=lambda self, *_: count.synchronised(),
            current_stream=lambda self, *_: stream,
            default_stream=lambda self, *_: stream,
            stream=lambda self, _: nullcontext(),
            Stream=property(lambda self: lambda *_, **__: stream),
            Event=property(lambda self: lambda *_, **__: stream),
        ),
        patch.object(Tensor, "record_stream", lambda *_: None),
    ):
        yield


def count_engine(config: Config, stage: str, ds_content: dict[str, Any]) -> EngineCounts:
    """Trains a small model of the same layers for some steps and counts the engine's part of the last one.

    Args:
        ds_content: the DeepSpeed JSON as written. It is filled for a device that computes bf16.

    Raises:
        ValueError: the JSON does not fit the configuration.
    """
    device = collectives.init()
    small, module = _small_module(config, stage)
    filled = fill_ds_config(ds_content, small.train, small.optim, 1, bf16_supported=True, fp16_supported=False)
    _shrink_buckets(filled, config, stage, module)
    count = _Count()
    with _asynchronous(count):
        task = TASKS[stage]
        factors = {part: float(factor) for part, factor in task.learning_rate_factors(small).items() if factor != 1}
        engine = Engine(module, filled, small.optim, small.stage(stage).learning_rate, device, factors)
        batch = draw_batch_for(small, stage, module, NUM_SAMPLES)
        for step in range(WARM_UP):
            _train_step(engine, batch, step, count)
        count.counts = EngineCounts(num_tensors=sum(p.requires_grad for _, p in module.named_weights()))
        with count:
            _train_step(engine, batch, WARM_UP, count)
        counts, count.counts = count.counts, EngineCounts()  # to end it waits as well, but no step does
        engine.destroy()
    return counts


def _train_step(engine: Engine, batch: Any, step: int, count: _Count) -> None:
    count.in_step = False
    loss = engine.forward(batch, step, 0).loss
    engine.backward(loss)
    count.in_step = True
    engine.step()


def _small_module(config: Config, stage: str) -> tuple[Config, TaskModule]:
    """Returns the module of a stage with small layers, drawn on the host, and the configuration that it was made by."""
    width = SMALL_HEAD * config.model.num_attention_heads
    model = replace(
        config.model, hidden_size=width, intermediate_size=2 * width, dropout=0.0, attention_dropout=0.0, compile="off"
    )
    visual = replace(config.visual, feature_dim=SMALL_HEAD) if config.visual.source == "features" else config.visual
    train = replace(config.train, batch_size=NUM_SAMPLES, accumulation_steps=1)
    small = replace(config, model=model, visual=visual, train=train)
    module = task_without_memory(small, stage, (SMALL_ROWS, SMALL_PHRASES)).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (*module.parameters(), *module.buffers()):
            if parameter.dtype.is_floating_point:
                parameter.normal_(std=0.02, generator=generator)
    module.model.set_phrase_rows(SMALL_ROWS - SMALL_PHRASES + torch.arange(SMALL_PHRASES))
    return small, module.train()


def _shrink_buckets(filled: dict[str, Any], config: Config, stage: str, module: TaskModule) -> None:
    """Lets the buckets of the small model hold the same share of its gradients as those of the real one."""
    real = build_module(config, stage)
    trained = [sum(p.numel() for _, p in m.named_weights() if p.requires_grad) for m in (module, real)]
    zero = filled["zero_optimization"]
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        zero[key] = BUCKET_UNIT * max(1, round(zero.get(key, 5e8) * trained[0] / trained[1] / BUCKET_UNIT))
