"""Makes one plan: a configuration, a DeepSpeed JSON and a cluster give bytes, time, GPU-hours and loader cores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mvptr_ds import builders
from mvptr_ds.batch_size import micro_batch_size
from mvptr_ds.builders import SampleNeeds
from mvptr_ds.config import Config
from mvptr_ds.data.phrases import PhraseVocab, Vocabs
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.ds_config import fill_ds_config, precision_of
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.monitoring.flops import StepFlops, last_layer_rows
from mvptr_ds.monitoring.timing import vendor_tflops
from mvptr_ds.objectives.lengths import Lengths
from mvptr_ds.objectives.module import TaskModule
from mvptr_ds.optim.optimizer import parameter_groups
from mvptr_ds.planning.cost import (
    Assumptions,
    EngineCost,
    Gpu,
    MicroBatchCost,
    compute_time,
    contrast_bytes,
    step_time,
    traffic,
)
from mvptr_ds.planning.lengths import times
from mvptr_ds.planning.memory import FLOAT32, Zero, activation_bytes, largest_state_bytes
from mvptr_ds.tasks import TASKS
from mvptr_ds.tasks.downstream import Downstream, frozen_parts

GIB, MIB = 2**30, 2**20
PUBLISHED_ROWS, PUBLISHED_PHRASES = 86_051, 73_599
PUBLISHED_ANSWERS = 3_129
MODELLED, CALIBRATED, MEASURED = "modelled", "calibrated", "measured"


@dataclass(frozen=True)
class Cluster:
    gpu: Gpu
    num_nodes: int
    gpus_per_node: int

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def gb_per_s(self) -> float:
        """Returns the speed of the slowest link that a ring over all GPUs crosses."""
        return self.gpu.node_gb_per_s if self.num_nodes == 1 else self.gpu.network_gb_per_s


@dataclass(frozen=True)
class Pace:
    """Says how fast a GPU computes.

    Attributes:
        cost: micro-batch and precision -> what the model of a step says.
        calibration: precision, micro-batch, ranks, accumulation steps -> factor of a measurement over the model, and
            what the times of the plan then are: `modelled`, `calibrated` or `measured`.
    """

    cost: Callable[[int, str], MicroBatchCost]
    calibration: Callable[[str, int, int, int], tuple[float, str]] = lambda *_: (1.0, MODELLED)


def task_without_memory(config: Config, stage: str, vocab: tuple[int, int] | None = None) -> TaskModule:
    """Builds the task of a stage with its true shapes, on torch's meta device.

    Args:
        vocab: rows of the embedding table and phrases, where there is no phrase vocabulary.

    A list of answers that is not there has the published length.
    """
    words = WordPiece(config.data.word_vocab)
    if vocab is None and config.data.phrase_vocab:
        phrases = PhraseVocab.load(config.data.phrase_vocab, words)
    else:
        phrases = PhraseVocab.empty(words)
    model_config = builders.model_config(config, Vocabs(words, phrases))
    if vocab is not None:
        model_config.num_rows, model_config.num_phrases = vocab
    with torch.device("meta"):
        module = _built(config, stage, Mvptr(model_config))
    if module.objectives is None:
        raise ValueError(f"the planner does not know what {stage} costs: its module names no objectives")
    module.freeze_untrained()
    return module


def lacks_answers(config: Config, stage: str) -> bool:
    """Returns whether a stage needs a list of answers that is not there yet."""
    path = config.vqa.answers
    return stage == "vqa" and (path is None or not Path(path).is_file())


def _built(config: Config, stage: str, model: Mvptr) -> TaskModule:
    task = TASKS[stage]
    if not lacks_answers(config, stage):
        return task.build(config, model, seed=0)
    settings = {"head": config.vqa.head, "answers": [str(number) for number in range(PUBLISHED_ANSWERS)]}
    module = task.build_from(settings, config, model)
    module.frozen = frozen_parts(config, stage, module.trained_parts())
    return module


def needs_of(config: Config, stage: str) -> SampleNeeds:
    """Returns what a stage wants of its samples, without the labels that it learns from."""
    task = TASKS[stage]
    return task.evaluation_needs(config) if isinstance(task, Downstream) else task.sample_needs(config)


def groups_of(
    task: TaskModule, weight_decay: float, factors: Mapping[str, float] | None = None
) -> tuple[list[list[int]], int]:
    """Returns the number of elements of each trained parameter by optimiser group, and of all others together.

    Args:
        factors: of the learning rate by part, each of which has groups of its own (`Task.learning_rate_factors`).
    """
    everything = dict(task.named_weights())
    trained = [(name, parameter) for name, parameter in everything.items() if parameter.requires_grad]
    of_parts = parameter_groups(trained, weight_decay, task.factors(factors or {}))
    groups = [[p.numel() for p in group["params"]] for group in of_parts]
    return groups, sum(p.numel() for p in everything.values()) - sum(map(sum, groups))


def make_plan(
    config: Config,
    stage: str,
    task: TaskModule,
    ds_content: dict[str, Any],
    cluster: Cluster,
    mean: Lengths,
    assumed: Assumptions,
    num_samples: float,
    pace: Pace,
) -> dict[str, Any]:
    """Returns the whole plan as one flat JSON object, whose quantities end in their unit.

    Args:
        mean: mean lengths of one sample.
        num_samples: number of samples that the stage sees, for any batch.
        pace: what a micro-batch costs on the GPU.

    Raises:
        ValueError: the batch cannot be shared by the GPUs, or the JSON does not fit the configuration.
    """
    gpu, num = cluster.gpu, cluster.num_gpus
    filled = fill_ds_config(ds_content, config.train, config.optim, num, bf16_supported=gpu.bf16, fp16_supported=True)
    precision = precision_of(filled)
    element_bytes = FLOAT32 if precision == "float32" else 2
    dtype = torch.float32 if precision == "float32" else torch.float16
    assert task.objectives is not None
    flops = StepFlops(task, num)
    zero, model = Zero.of(filled), flops.model
    micro, accumulation = micro_batch_size(config.train, num), config.train.accumulation_steps
    lengths, objectives = times(mean, micro), task.objectives

    micro_flop = flops.of_lengths(lengths)
    flop = micro_flop * accumulation
    groups, frozen = groups_of(task, config.optim.weight_decay, TASKS[stage].learning_rate_factors(config))
    trained = sum(map(sum, groups))
    states = largest_state_bytes(groups, frozen, element_bytes, zero, num)
    calls, checkpointing = objectives.num_cross_calls(), config.model.activation_checkpointing
    last, groundings = last_layer_rows(lengths, objectives), objectives.num_groundings()
    kept = activation_bytes(
        lengths, model, objectives.computed_parts(), calls, last, element_bytes, checkpointing, groundings
    )
    scores_bytes = config.task.scores_mib * MIB
    contrast = contrast_bytes(model.hidden_size, lengths.samples, num, scores_bytes) if objectives.scopes() else 0.0
    inputs = lengths.regions * model.region_feature_dim * FLOAT32
    backward = states.parameters + states.optimizer + states.all_gradients + states.buckets + kept + contrast + inputs
    peak = max(backward, states.total + states.step)

    sent = traffic(trained, model.hidden_size, element_bytes, zero, num, accumulation, lengths, objectives)
    tflops = vendor_tflops(gpu.name, dtype)
    assert tflops is not None, gpu.name
    engine = EngineCost.of(trained, sum(map(len, groups)), num, accumulation)
    factor, how = pace.calibration(precision, micro, num, accumulation)
    computing = compute_time(
        pace.cost(micro, precision).scaled_to(micro_flop), engine, accumulation, gpu, assumed, factor
    )
    took = step_time(computing.total_s, sent, cluster.gb_per_s, zero.overlap_comm, assumed)
    samples_per_s = micro * accumulation / took.total_s
    return {
        "gpus": num, "nodes": cluster.num_nodes, "gpu": gpu.name, "precision": precision, "zero_stage": zero.stage,
        "stage": stage, "batch_size": config.train.batch_size, "micro_batch": micro,
        "trained_parameters": trained, "frozen_parameters": frozen,
        "parameters_gib": states.parameters / GIB, "gradients_gib": states.all_gradients / GIB,
        "optimizer_gib": states.optimizer / GIB, "optimizer_on_host_gib": states.on_host / GIB,
        "buckets_gib": states.buckets / GIB, "activations_gib": kept / GIB, "contrast_gib": contrast / GIB,
        "batch_gib": inputs / GIB, "overhead_gib": assumed.overhead_gib,
        "total_gib": peak / GIB + assumed.overhead_gib, "gpu_memory_gib": gpu.memory_gib,
        "fits": peak / GIB + assumed.overhead_gib <= gpu.memory_gib,
        "sent_gradients_gb": sent.gradients / 1e9, "sent_parameters_gb": sent.parameters / 1e9,
        "sent_contrast_gb": sent.contrast / 1e9, "sent_states_gb": sent.exchanged / 1e9, "sent_gb": sent.total / 1e9,
        "tflop_per_step": flop / 1e12, "time_is": how, "calibration": factor,
        "device_s": computing.device_s, "host_s": computing.host_s, "compute_s": took.compute_s,
        "exposed_communication_s": took.exposed_s,
        "step_s": took.total_s, "mfu_frac": flop / 1e12 / tflops / took.total_s,
        "samples_per_s": samples_per_s * num, "loader_cores_per_gpu": samples_per_s / assumed.loader_samples_per_core_s,
        "num_samples": num_samples, "gpu_hours": num_samples / samples_per_s / 3600,
    }  # fmt: skip


ROWS: Sequence[tuple[str, str, str]] = (  # key, what the table calls it, format
    ("batch_size", "samples a step", "d"),
    ("micro_batch", "micro-batch of a GPU", "d"),
    ("", "memory of the fullest GPU, GiB", ""),
    ("parameters_gib", "parameters", ".2f"),
    ("gradients_gib", "gradients", ".2f"),
    ("optimizer_gib", "optimiser", ".2f"),
    ("buckets_gib", "gradient buckets", ".2f"),
    ("activations_gib", "activations", ".2f"),
    ("contrast_gib", "contrast", ".2f"),
    ("batch_gib", "batch", ".2f"),
    ("overhead_gib", "overhead (assumed)", ".2f"),
    ("total_gib", "in all", ".1f"),
    ("", "sent by a GPU in a step, GB", ""),
    ("sent_gradients_gb", "gradients", ".2f"),
    ("sent_parameters_gb", "parameters", ".2f"),
    ("sent_contrast_gb", "global states", ".3f"),
    ("sent_states_gb", "other samples' states", ".3f"),
    ("", "speed", ""),
    ("tflop_per_step", "TFLOP a GPU and step", ".2f"),
    ("time_is", "times are", "s"),
    ("device_s", "kernels by the model, s", ".3f"),
    ("host_s", "host by the model, s", ".3f"),
    ("compute_s", "computing, s", ".3f"),
    ("exposed_communication_s", "communication not hidden, s", ".3f"),
    ("step_s", "a step, s", ".3f"),
    ("mfu_frac", "MFU", ".0%"),
    ("samples_per_s", "samples/s, all GPUs", ",.0f"),
    ("loader_cores_per_gpu", "loader cores a GPU", ".1f"),
    ("gpu_hours", "GPU-hours of the stage", ",.1f"),
)


def table(plans: Sequence[dict[str, Any]], mean: Lengths, assumed: Assumptions) -> str:
    """Returns the plans side by side, and the assumptions that they rest on."""
    first = plans[0]
    rows = [("GPUs", [str(p["gpus"]) for p in plans])]
    for key, label, how in ROWS:
        rows.append((label, [format(p[key], how) for p in plans] if key else []))
    width = max(len(label) for label, _ in rows) + 2
    column = 2 + max(8, *(len(cell) for _, cells in rows for cell in cells))
    lines = [
        f"{first['stage']}, {first['trained_parameters'] / 1e6:.1f} M trained parameters, {first['precision']}, ZeRO "
        f"stage {first['zero_stage']}, {first['gpu']} ({first['gpu_memory_gib']:.0f} GiB)",
        *(f"{label:{width}}" + "".join(f"{cell:>{column}}" for cell in cells) for label, cells in rows),
    ]
    if not all(p["fits"] for p in plans):
        too_small = ", ".join(str(p["gpus"]) for p in plans if not p["fits"])
        lines.append(f"DOES NOT FIT on {too_small} GPUs: a smaller micro-batch, activation checkpointing, or more GPUs")
    said = {name: round(value, 1) for name, value in asdict(mean).items() if not name.endswith("pairs")}
    lines += ["", "assumed, not measured: " + ", ".join(f"{k} {v}" for k, v in asdict(assumed).items())]
    lines += ["a sample, on average: " + ", ".join(f"{k} {v}" for k, v in said.items() if k != "samples")]
    return "\n".join(lines)
