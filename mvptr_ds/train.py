"""Pre-trains MVPTR: `deepspeed mvptr_ds/train.py --deepspeed JSON [--config YAML] [section.key=value ...]`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    if not __package__:  # a script's own folder comes first on the path, where our modules could shadow others
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from mvptr_ds.user_io.signals import end_on_interrupt

    end_on_interrupt()

import torch

from mvptr_ds.batch_size import fit_batch_to_ranks
from mvptr_ds.checkpoints.adopt import adopt, keep_vocabularies, model_to_adopt
from mvptr_ds.checkpoints.hand_over import finished_model, first_model, newest_state, set_aside, stage_before
from mvptr_ds.checkpoints.run_lock import only_start
from mvptr_ds.config import Config, load_config, save_config
from mvptr_ds.distributed import collectives
from mvptr_ds.distributed.rendezvous import deadline
from mvptr_ds.ds_config import load_ds_config
from mvptr_ds.errors import USER_ERRORS, exit_code
from mvptr_ds.guards import Watchdog, collectives_timeout_s
from mvptr_ds.preflight import checks
from mvptr_ds.shard_folders import prepare_shards
from mvptr_ds.stopping import EXIT_STOPPED, StopSignal
from mvptr_ds.tasks import TASKS
from mvptr_ds.trainer import Trainer
from mvptr_ds.user_io.terminal import accept_any_text

logger = logging.getLogger("mvptr_ds.train")
OTHERS_WAIT_S = 10.0


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: deepspeed --num_gpus 2 mvptr_ds/train.py --deepspeed ds_configs/z2.json --config demo_stamps "
        "run.dir=runs/mine stage2.max_steps=500. Installed: mvptr train --ranks 2 --deepspeed z2 --config ... "
        "docs/configuration.md lists every key with its meaning. "
        "Exit codes: 0 done; 2 the message says what is wrong; 75 saved and stopped by SIGTERM, SIGUSR1 or "
        "Ctrl-C, start it again to go on; 1 anything else, which may pass by itself; 130 a second Ctrl-C.",
    )
    parser.add_argument("--config", help="YAML file, or the name of a packaged one: demo (default), base, large ...")
    parser.add_argument(
        "--deepspeed", default="z2", metavar="JSON", help="file, or the name of a packaged one: z2 (default), z1 ..."
    )
    parser.add_argument("--local_rank", type=int, help="set by the launcher; ignored (the environment tells)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the configuration")
    return parser.parse_intermixed_args(argv)  # overrides may stand before and behind options


def run(arguments: argparse.Namespace, stop: StopSignal) -> int:
    """Trains every stage of `run.stages`, one after the other. Returns the exit code."""
    config = load_config(arguments.config or "demo", arguments.overrides)
    ds_content = load_ds_config(arguments.deepspeed)
    hang_s, start_s = config.train.hang_timeout_s, config.train.start_timeout_s
    looks = config.train.preflight or config.train.preflight_only
    connect_s = checks.CONNECT_LIMIT_S if looks else 0.0
    device = collectives.init(collectives_timeout_s(hang_s, start_s), start_s, connect_s)
    if arguments.config is None:
        logger.info("no --config given: this is the demo configuration (%s)", " then ".join(config.stage_names))
    only = nullcontext(lambda: None) if config.train.preflight_only else only_start(Path(config.run.dir))
    with only as check_alone:
        return _run(config, arguments.overrides, ds_content, device, stop, check_alone)


def _run(
    config: Config,
    overrides: Sequence[str],
    ds_content: dict[str, Any],
    device: torch.device,
    stop: StopSignal,
    check_alone: Callable[[], None],
) -> int:
    """`run` in a folder where no other start trains."""
    looks = config.train.preflight or config.train.preflight_only
    limit_s = checks.LIMIT_S if looks else 0.0
    with deadline(limit_s, f"looking for a checkpoint in {config.run.dir}"):
        resumes = config.train.resume == "auto"
        saved = newest_state(Path(config.run.dir), config.stage_names) if resumes else None
    source = model_to_adopt(config, TASKS[config.stage_names[0]].follows)
    if source is not None:
        config = adopt(config, overrides, source)
    split = saved.batch_split if saved is not None else None
    config = replace(config, train=fit_batch_to_ranks(config.train, split, collectives.num_ranks()))
    if looks:
        only = config.train.preflight_only
        checks.conclude(checks.examine(config, ds_content, device, prepare=not only), show_all=only)
        if only:
            return 0
    else:
        prepare_shards(config.data, config.run.seed, collectives.num_ranks())
    if source is not None:
        config = keep_vocabularies(config, source)
    collectives.run_on_rank_zero(lambda: save_config(config, Path(config.run.dir) / "config.yaml"))
    return _train_stages(config, ds_content, device, stop, check_alone)


def _train_stages(
    config: Config, ds_content: dict[str, Any], device: torch.device, stop: StopSignal, check_alone: Callable[[], None]
) -> int:
    """Trains each stage from the one that it follows in this run, or from where `run.init_from` says."""
    hang_s, start_s = config.train.hang_timeout_s, config.train.start_timeout_s
    tasks = [TASKS[name] for name in config.stage_names]
    before = {task.name: stage_before(config, task.name, task.follows) for task in tasks}
    starts = {task.name: first_model(config, task.follows, task.name) for task in tasks if before[task.name] is None}
    if config.train.resume == "never":
        set_aside(Path(config.run.dir), config.stage_names, [path for path in starts.values() if path is not None])
    finished: dict[str | None, Path] = {}
    for task in tasks:
        init_from = starts[task.name] if before[task.name] is None else finished[before[task.name]]
        stop.start()
        stacks = Path(config.run.dir) / task.name / f"stacks-rank{collectives.rank()}.txt"
        with Watchdog(stacks, hang_s, start_s) as guard:
            alive, starting = guard.alive, guard.starting
            trainer = Trainer(config, task, ds_content, device, init_from, stop, alive, starting, check_alone)
            done = trainer.train()
            trainer.close()
            if not done:
                collectives.barrier()  # the first rank that ends makes the launcher end the others
                return EXIT_STOPPED
            finished[task.name] = finished_model(trainer.dir, trainer.step)
    return 0


def main(argv: list[str] | None = None) -> int:
    accept_any_text()
    arguments = parse_arguments(argv)
    collectives.take_place_from_slurm(os.environ)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mvptr_ds").setLevel(logging.INFO if collectives.launched_as_main() else logging.WARNING)
    with StopSignal() as stop:
        try:
            code = run(arguments, stop)
        except USER_ERRORS as error:
            logger.debug("where it was raised", exc_info=True)
            stop.note_only()  # of a launcher that ends the others: they end with the same code
            _say(error, stop)
            code = exit_code(error)
        # not after any other error: with NCCL it would wait for ranks that may never come, before the error is printed
        collectives.shut_down()
        return code


def _say(error: Exception, stop: StopSignal) -> None:
    """One message, though most errors are raised on every rank: the others wait until the launcher ends them."""
    if collectives.launched_as_main():
        logger.error("error: %s", error)
    elif not stop.wait(OTHERS_WAIT_S):  # rank 0 has not failed, or nobody looks after the ranks
        logger.error("error of rank %s: %s", os.environ["RANK"], error)


if __name__ == "__main__":
    sys.exit(main())
