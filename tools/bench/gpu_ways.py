"""The ways of computing a training step that bench_gpu.py compares, each with an engine of its own.

Ours goes through this package's engine as training does, batches packed ahead and copied on a stream of their own. What
the published code computes goes through DeepSpeed as it is, with the same JSON and the same optimiser.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from bench_models import TEXT_SLOTS, Reference, fixed_slots
from torch import Tensor, nn

from mvptr_ds import builders
from mvptr_ds.benchmarks.gpu_step.step import PACKAGED, config_of, draw_batch_for
from mvptr_ds.config import Config
from mvptr_ds.data.collate import Batch
from mvptr_ds.data.on_device import BatchesOnDevice
from mvptr_ds.data.phrases import PhraseVocab, Vocabs
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.ds_config import DTYPES, fill_ds_config, load_ds_config
from mvptr_ds.engine import Engine
from mvptr_ds.model import kernels
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.monitoring.flops import StepFlops
from mvptr_ds.objectives.hard_negatives import RandomDraws
from mvptr_ds.objectives.losses import LossSum
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.optim.optimizer import build_optimizer, parameter_groups
from mvptr_ds.planning.plan import PUBLISHED_PHRASES, PUBLISHED_ROWS
from mvptr_ds.tasks import TASKS

PACKED, FLASH, PADDED, SDPA, PUBLISHED = "packed", "flash", "padded", "sdpa", "published"
OURS = (PACKED, FLASH, PADDED)
WAYS = {
    PACKED: "ours, as training takes it",
    FLASH: "ours, with flash_attn and torch's other kernels",
    PADDED: "ours, padded to the longest of the batch",
    SDPA: "transformers' layers with SDPA at the published fixed slots (joint alone)",
    PUBLISHED: "what the published code computes: eager attention, fixed slots (joint alone)",
}
NUM_BATCHES = 4  # different ones, which take turns
LATE = 10**6  # number of a step at which every schedule is over


@dataclass(frozen=True)
class Setting:
    """What is computed: equal for every way but for `way` and `precision`."""

    way: str
    precision: str  # a key of DTYPES
    stage: str
    samples: int
    config: str | None
    overrides: tuple[str, ...]
    deepspeed: str

    def loaded(self) -> Config:
        """Returns the configuration, with the micro-batch as the batch of the one rank."""
        config = config_of(self.stage, self.config, self.overrides)
        return replace(config, train=replace(config.train, batch_size=self.samples, accumulation_steps=1))


class Way(ABC):
    """A model with its engine, and batches to step with.

    Attributes:
        flop: of the package's own count, for each of the batches that take turns.
    """

    def __init__(self, setting: Setting, module: PretrainingLosses, device: torch.device) -> None:
        self.setting, self.config, self.device = setting, setting.loaded(), device
        flops = StepFlops(module, num_ranks=1)
        draw = [
            draw_batch_for(self.config, setting.stage, module, setting.samples, seed) for seed in range(NUM_BATCHES)
        ]
        self.batches, self.flop = draw, [flops.of(batch) for batch in draw]
        self.number = LATE
        content = copy.deepcopy(load_ds_config(setting.deepspeed))
        for name in ("bf16", "fp16"):
            content[name] = {**content.get(name, {}), "enabled": setting.precision == name}
        train, optim = self.config.train, self.config.optim
        self.filled = fill_ds_config(content, train, optim, 1, bf16_supported=True, fp16_supported=True)
        self.learning_rate = self.config.stage(setting.stage).learning_rate

    @abstractmethod
    def step(self) -> None:
        """Computes one step of training: forward, backward, update."""


def build_module(config: Config, stage: str) -> PretrainingLosses:
    """Returns the module of a stage on the host, with vocabularies of the published sizes; always the same weights."""
    words = WordPiece(config.data.word_vocab)
    model_config = builders.model_config(config, Vocabs(words, PhraseVocab.empty(words)))
    model_config.num_rows, model_config.num_phrases = PUBLISHED_ROWS, PUBLISHED_PHRASES
    torch.manual_seed(0)
    model = Mvptr(model_config)
    num_free = PUBLISHED_ROWS - model_config.num_words
    model.set_phrase_rows(model_config.num_words + torch.arange(PUBLISHED_PHRASES) % num_free)
    settings = config.model
    model.set_execution(settings.execution, settings.activation_checkpointing, settings.compile == "encoders")
    module = TASKS[stage].build(config, model, seed=0)
    assert isinstance(module, PretrainingLosses), stage
    module.freeze_untrained()
    return module


def packaged(stage: str) -> str:
    """Returns the name of the configuration that comes with the package for a stage."""
    return PACKAGED[stage]


def unavailable(way: str, stage: str) -> str:
    """Returns why a way cannot be taken for a stage; empty where it can."""
    if way in (SDPA, PUBLISHED) and stage != "joint":
        return "the reference computes the published sum of losses, `joint`, alone"
    if way == FLASH:
        return _flash_lacks()
    return ""


def _flash_lacks() -> str:
    return kernels.flash_attn_lacks(kernels.FLASH_ATTN.rpartition(".")[2])


def losses(setting: Setting, samples: int, precision: str, device: torch.device) -> dict[str, float]:
    """Returns the mean of every loss of a batch without dropout, from the weights that training starts with."""
    config = setting.loaded()
    module, dtype = build_module(config, setting.stage), DTYPES[precision]
    batch = draw_batch_for(config, setting.stage, module, samples)
    draws = RandomDraws.keyed(0, LATE, 0, samples, TEXT_SLOTS)
    sums: dict[str, LossSum]
    with torch.no_grad():
        if setting.way in OURS:
            _choose_kernels(setting.way, module)
            sums = module.eval().to(device, dtype).sums(batch, draws, LATE)
        else:
            reference = Reference(module.model, _attention(setting.way)).eval().to(device, dtype)
            sums = reference.sums(fixed_slots(batch).to(device), draws)
    return {name: (part.sum / part.count.clamp(min=1)).item() for name, part in sums.items()}


def build(setting: Setting, device: torch.device) -> Way:
    """Returns a way that is ready to step."""
    module = build_module(setting.loaded(), setting.stage)
    return _Ours(setting, module, device) if setting.way in OURS else _Theirs(setting, module, device)


def _attention(way: str) -> str:
    return "sdpa" if way == SDPA else "eager"


def _choose_kernels(way: str, module: PretrainingLosses) -> None:
    """Makes the module compute in a way; `flash` for this whole process."""
    if way == PADDED:
        module.model.set_execution("padded", module.model.cross_encoder.activation_checkpointing)
    if way == FLASH:
        by_torch = kernels.Choice("fused kernels", kernels.TORCH, "left out by bench_gpu")
        by_flash = kernels.Choice("attention", kernels.FLASH_ATTN, "asked for by bench_gpu")
        patch.multiple(kernels, fused=lambda *_: by_torch, attention=lambda *_: by_flash).start()


class _Ours(Way):
    """This package, as training runs it."""

    def __init__(self, setting: Setting, module: PretrainingLosses, device: torch.device) -> None:
        super().__init__(setting, module, device)
        _choose_kernels(setting.way, module)
        self.module = module.train()
        plan = module.batch_plan()
        ready = [plan(batch) for batch in self.batches]
        self.ready = [batch.pin_memory() for batch in ready] if device.type == "cuda" else ready
        self.engine = Engine(module, self.filled, self.config.optim, self.learning_rate, device)
        self.fed = self._feed()

    def _feed(self) -> Iterator[tuple[Any, Any]]:
        batches = (self.ready[number % NUM_BATCHES] for number in count())

        def read_of(batch: Any, number: int) -> Any:
            self.module.complete(batch.packed, LATE + number, 0)
            return batch.packed

        return BatchesOnDevice(batches, self.device, read_of)

    def step(self) -> None:
        _, packed = next(self.fed)
        loss = self.engine.forward(packed, self.number, 0).loss
        self.engine.backward(loss)
        self.engine.step()
        self.number += 1


class _Loss(nn.Module):
    """The reference as DeepSpeed wants a module: its forward pass is the loss."""

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        self.reference = reference

    def forward(self, batch: Batch, draws: RandomDraws) -> Tensor:
        parts = self.reference.sums(batch, draws).values()
        return torch.stack([part.sum / part.count.clamp(min=1.0) for part in parts]).sum()


class _Theirs(Way):
    """What the published code computes, or transformers' layers of today at the same slots."""

    def __init__(self, setting: Setting, module: PretrainingLosses, device: torch.device) -> None:
        super().__init__(setting, module, device)
        batches = [fixed_slots(batch) for batch in self.batches]
        self.fed = [batch.pin_memory() for batch in batches] if device.type == "cuda" else batches
        net = _Loss(Reference(module.model, _attention(setting.way)))
        groups = parameter_groups(list(net.named_parameters()), self.config.optim.weight_decay, {})
        optimizer = build_optimizer(groups, self.config.optim, self.learning_rate, device)
        self.engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=self.filled)
        self.engine.train()
        draws = (RandomDraws.keyed(0, LATE + n, 0, setting.samples, TEXT_SLOTS) for n in range(NUM_BATCHES))
        self.draws = [RandomDraws(**{k: drawn.to(device) for k, drawn in vars(some).items()}) for some in draws]

    def step(self) -> None:
        which = self.number % NUM_BATCHES
        batch = self.fed[which].to(self.device, non_blocking=True)
        loss = self.engine(batch, self.draws[which])
        self.engine.backward(loss)
        self.engine.step()
        self.number += 1


def start(device: str) -> torch.device:
    """Joins a process group of one rank; returns the device of the steps.

    Raises:
        RuntimeError: a GPU is asked for, and there is none.
    """
    from mvptr_ds.distributed import collectives

    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    found = collectives.init()
    if found.type != device:
        raise RuntimeError(f"no GPU that torch {torch.__version__} can use; --device cpu tries the tool without one")
    return found
