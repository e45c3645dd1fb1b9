"""Counts the forward and backward pass of any stage or task at its true sizes, in seconds and without their memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from mvptr_ds.benchmarks.gpu_step.drawn_batch import draw_batch
from mvptr_ds.benchmarks.gpu_step.fake_cuda import FakeCuda
from mvptr_ds.benchmarks.gpu_step.own_kernels import register_own_kernels
from mvptr_ds.benchmarks.gpu_step.recording import BACKWARD, Recording
from mvptr_ds.benchmarks.gpu_step.roofline import H200, Roofline
from mvptr_ds.benchmarks.gpu_step.torch_on_cuda import CUDA
from mvptr_ds.builders import SampleNeeds
from mvptr_ds.config import Config, load_config
from mvptr_ds.data.collate import Batch
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.monitoring.flops import StepFlops
from mvptr_ds.objectives.lengths import Lengths
from mvptr_ds.objectives.module import TaskModule
from mvptr_ds.planning.plan import (
    PUBLISHED_ANSWERS,
    PUBLISHED_PHRASES,
    PUBLISHED_ROWS,
    lacks_answers,
    task_without_memory,
)
from mvptr_ds.tasks import TASKS
from mvptr_ds.tasks.vqa import read_labels

PACKAGED = {  # the configuration that comes with the package for each
    "stage1": "base",
    "stage2": "base",
    "joint": "joint",
    "retrieval": "retrieval_coco",
    "vqa": "vqa",
    "entailment": "snli_ve",
    "referring": "refcoco_plus",
}


@dataclass(frozen=True)
class StepCounts:
    """What a forward and backward pass executes, and what the package's own formulas say of the same batch.

    Attributes:
        flops: of forward and backward, as training reports them (monitoring/flops.py).
        product_flops: the same without attention, to compare with the products that were counted.
        lengths: sums over the samples.
        num_trained: numbers in the parameters that are trained.
        num_tensors: parameters that are trained.
    """

    recording: Recording
    flops: float
    product_flops: float
    lengths: Lengths
    num_trained: int
    num_tensors: int


def config_of(stage: str, path: str | None = None, overrides: tuple[str, ...] = ()) -> Config:
    """Returns a configuration: a file's or a packaged one's, by default the packaged one for the stage.

    Raises:
        ValueError: an unknown stage, or as `load_config`.
    """
    if stage not in PACKAGED:
        raise ValueError(f"stage is {stage!r}; choose from {', '.join(PACKAGED)}")
    return load_config(path or PACKAGED[stage], overrides)


def build_module(config: Config, stage: str) -> TaskModule:
    """Returns the module of a stage, on meta; vocabularies that are not there have the published sizes."""
    has_vocab = config.data.phrase_vocab is not None and Path(config.data.phrase_vocab).is_file()
    module = task_without_memory(config, stage, None if has_vocab else (PUBLISHED_ROWS, PUBLISHED_PHRASES))
    model = config.model
    module.model.set_execution(model.execution, model.activation_checkpointing)
    return module.train()


def needs_of(config: Config, stage: str) -> SampleNeeds:
    """Returns what a stage wants of its samples, with made-up answers where there is no list of them."""
    if not lacks_answers(config, stage):
        return TASKS[stage].sample_needs(config)
    index_of = {str(number): number for number in range(PUBLISHED_ANSWERS)}
    return SampleNeeds(read_labels=partial(read_labels, index_of), tags_in_text=config.vqa.tags_in_text)


def draw_batch_for(config: Config, stage: str, module: TaskModule, num: int, seed: int = 0) -> Batch:
    """Returns a batch of `num` samples for a stage, on the host; the same for a seed."""
    num_answers = len(getattr(module, "answers", ()))
    model: MvptrConfig = module.model.config  # type: ignore[assignment]  # transformers annotates its base class
    return draw_batch(num, config, model, needs_of(config, stage), num_answers, seed)


def count_step(
    config: Config,
    stage: str,
    num: int,
    dtype: torch.dtype = torch.bfloat16,
    fail_on_wait: bool = False,
    roofline: Roofline = H200,
) -> StepCounts:
    """Executes forward and backward pass of a late step of a stage as on CUDA, on one rank, and counts.

    Args:
        num: samples of the micro-batch.
        dtype: what the engine computes in.
        fail_on_wait: whether a wait for the device is an error.
        roofline: of the GPU whose seconds are modelled.

    Raises:
        RuntimeError: with `fail_on_wait`, where the host waits.
        ValueError: the configuration does not fit the stage.
    """
    register_own_kernels()
    module = build_module(config, stage).to(dtype)
    batch = draw_batch_for(config, stage, module, num)
    plan = module.batch_plan()
    assert plan is not None, "the loader's processes pack the batches of every task of the package"
    step_flops = StepFlops(module, num_ranks=1)
    lengths = Lengths.of(batch)
    step = config.stage(stage).max_steps - 1  # schedules are over: negatives are the hardest
    with FakeCuda(roofline=roofline) as device:
        device.put_weights(module)
        _number_phrases(module)
        ready = plan(batch).pin_memory()  # as the loader's processes make it
        module.complete(ready.packed, step, 0)
        device.recording.clear()
        device.fail_on_wait = fail_on_wait
        with device.parts.following(module.model, module.head):
            loss = module(ready.packed.to(CUDA), step).loss
            device.phase = BACKWARD
            loss.backward()
    trained = [parameter for _, parameter in module.named_weights() if parameter.requires_grad]
    return StepCounts(
        recording=device.recording,
        flops=step_flops.of_lengths(lengths),
        product_flops=step_flops.of_lengths(replace(lengths, text_pairs=0, visual_pairs=0, cross_pairs=0)),
        lengths=lengths,
        num_trained=sum(parameter.numel() for parameter in trained),
        num_tensors=len(trained),
    )


def _number_phrases(module: TaskModule) -> None:
    """Gives the phrase head rows behind those of the words."""
    config = module.model.config
    if config.num_phrases:
        num_free = max(1, config.num_rows - config.num_words)
        rows_P = config.num_rows - num_free + torch.arange(config.num_phrases) % num_free
        module.model.set_phrase_rows(rows_P.clamp(max=config.num_rows - 1))
