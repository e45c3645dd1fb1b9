"""Estimates a run before it starts: memory of a GPU, bytes sent, time of a step, GPU-hours, loader cores."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path

EPILOG = """\
  %(prog)s --config base --gpu A100 --nodes 1,4,16,128 --micro-batch 64
  %(prog)s --config large --deepspeed z3 --gpu H100 --nodes 2 train.batch_size=1024
  %(prog)s --config base --stage vqa --gpus-per-node 1 --micro-batch 64
  %(prog)s --config base --gpu H200 --gpus-per-node 1 --micro-batch 256 --measured bench.json
  %(prog)s --config base --measure 2000 data.train=shards/train data.phrase_vocab=shards/phrase_vocab.json

Prints a table and every assumption by name; the last line is the same as JSON. The bytes of weights, gradients and
optimiser are computed and agree with measurements. The time of a step is that of its kernels by a model of the GPU,
or of the host where that is slower: `modelled`. With --measured it is `calibrated` by the nearest step of a bench, or
`measured` where that is the very step (docs/planning.md).
Exit status: 0 done, 1 an error (one line on stderr), 2 wrong usage."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    accept_any_text()
    parser = _parser()
    args = parser.parse_intermixed_args(argv)
    try:
        nodes = [int(text) for text in args.nodes.split(",")]
    except ValueError:
        parser.error(f"--nodes is {args.nodes!r}, must be numbers such as 1 or 1,4,16")
    for name, value in (("--nodes", min(nodes)), ("--gpus-per-node", args.gpus_per_node), ("--measure", args.measure)):
        if value is not None and value < 1:
            parser.error(f"{name} is {value}, must be at least 1")
    # torch and transformers take seconds to import, which --help and wrong usage need not wait for
    from mvptr_ds.errors import USER_ERRORS

    try:
        _plan(args, nodes)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _plan(args: argparse.Namespace, nodes: list[int]) -> None:
    from mvptr_ds.benchmarks.gpu_step.pace import PaceOfGpu
    from mvptr_ds.config import load_config
    from mvptr_ds.ds_config import load_ds_config
    from mvptr_ds.planning.cost import GPUS, Assumptions
    from mvptr_ds.planning.lengths import Ranges, drawn, measured
    from mvptr_ds.planning.measured import read_measured
    from mvptr_ds.planning.plan import (
        PUBLISHED_ANSWERS,
        PUBLISHED_PHRASES,
        PUBLISHED_ROWS,
        Cluster,
        lacks_answers,
        make_plan,
        needs_of,
        table,
        task_without_memory,
    )

    if args.gpu not in GPUS:
        raise ValueError(f"--gpu is {args.gpu!r}; choose from {', '.join(GPUS)}")
    config, content = load_config(args.config, args.overrides), load_ds_config(args.deepspeed)
    stage = args.stage or config.stage_names[-1]
    has_vocab = config.data.phrase_vocab is not None and Path(config.data.phrase_vocab).is_file()
    task = task_without_memory(config, stage, None if has_vocab else (PUBLISHED_ROWS, PUBLISHED_PHRASES))
    num_samples = config.stage(stage).max_steps * config.train.batch_size
    given = {f.name: getattr(args, f.name) for f in fields(Assumptions) if getattr(args, f.name) is not None}
    assumed = Assumptions(**given)
    if args.measure:
        mean, per_core_s = measured(config, stage, args.measure)
        assumed = replace(assumed, loader_samples_per_core_s=round(per_core_s))
    else:
        with_images = config.visual.source == "image"
        needs = needs_of(config, stage)
        mean = drawn(Ranges(), config.data, needs.masking, with_images, needs.tags_in_text)
    timed = read_measured(args.measured) if args.measured else []
    pace = PaceOfGpu(config, stage, GPUS[args.gpu], assumed, timed).pace()
    plans = []
    for num_nodes in nodes:
        cluster = Cluster(GPUS[args.gpu], num_nodes, args.gpus_per_node)
        sized = config
        if args.micro_batch:
            batch_size = args.micro_batch * cluster.num_gpus * config.train.accumulation_steps
            sized = replace(config, train=replace(config.train, batch_size=batch_size))
        plans.append(make_plan(sized, stage, task, content, cluster, mean, assumed, num_samples, pace))
    print(table(plans, mean, assumed))
    if not has_vocab:
        print(f"no phrase vocabulary here: planned with the published one's {PUBLISHED_PHRASES:,} phrases")
    if lacks_answers(config, stage):
        print(f"no list of answers here: planned with the published one's {PUBLISHED_ANSWERS:,} answers")
    if args.measure:
        print(f"lengths and loader_samples_per_core_s: measured on the first {args.measure} samples of data.train")
    if timed:
        print(f"calibrated with {args.measured}: {'; '.join(map(str, timed))}")
    else:
        print("time, MFU and GPU-hours: modelled from counted operations, timed on no GPU")
    lengths = "measured" if args.measure else asdict(Ranges())
    print(json.dumps({"assumed": asdict(assumed), "lengths": lengths, "mean": asdict(mean), "plans": plans}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", default="base", help="YAML file or a packaged name (default: base)")
    add(
        "--deepspeed",
        default="z2",
        metavar="JSON",
        help="DeepSpeed JSON or the name of a packaged one (default: z2)",
    )
    add("--stage", metavar="STAGE", help="default: the last of run.stages")
    add("--gpu", default="A100", help="V100, A100, H100, H200, L40S, A10, 'RTX 4090' (default: A100)")
    add("--nodes", default="1", metavar="N[,N...]", help="one plan for each number of nodes (default: 1)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    add("--micro-batch", type=int, metavar="N", help="samples a GPU and forward pass; default: from train.batch_size")
    add(
        "--measure", type=int, metavar="N", help="measure lengths and loader speed on the first N samples of data.train"
    )
    add("--measured", type=user_path, metavar="FILE", help="output of bench_gpu.py to calibrate times with")
    assumed = parser.add_argument_group("assumptions, each with a default that docs/planning.md explains")
    for name, meaning in (
        ("product-efficiency", "share of the vendor's peak that a large matrix product reaches"),
        ("bandwidth-efficiency", "share of the memory's speed that torch's kernels reach"),
        ("host-us", "microseconds that Python needs to dispatch an operation"),
        ("overlap", "share of the backward pass that may hide the gradients' communication"),
        ("link-efficiency", "share of the links' speed that collectives reach"),
        ("loader-samples-per-core-s", "samples that one loader core prepares in a second"),
        ("overhead-gib", "CUDA's context, NCCL's buffers, fragmentation"),
    ):
        assumed.add_argument(f"--{name}", type=float, metavar="X", help=meaning)
    add("overrides", nargs="*", metavar="section.key=value", help="overrides of the configuration")
    return parser
