"""Pre-trains MVPTR: `deepspeed mvptr_ds/train.py --deepspeed JSON [--config YAML] [section.key=value ...]`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first on the path, where our modules could shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mvptr_ds import parallel
from mvptr_ds.assembly import prepare_shards
from mvptr_ds.checkpointing import CheckpointError, find_model
from mvptr_ds.config import load_config, save_config
from mvptr_ds.data.schema import DataError
from mvptr_ds.ds_config import load_ds_config
from mvptr_ds.trainer import Trainer

logger = logging.getLogger("mvptr_ds.train")
REPO = Path(__file__).resolve().parents[1]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: deepspeed --num_gpus 2 mvptr_ds/train.py --deepspeed ds_configs/z2.json --config demo_stamps "
        "run.dir=runs/mine stage2.max_steps=500. Every key stands in mvptr_ds/config.py with its meaning.",
    )
    parser.add_argument("--config", help="YAML file, or the name of a packaged one: demo (default), base, large ...")
    parser.add_argument("--deepspeed", default=str(REPO / "ds_configs/z2.json"), metavar="JSON", help="DeepSpeed JSON")
    parser.add_argument("--local_rank", type=int, help="set by the launcher; ignored (the environment tells)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the configuration")
    return parser.parse_intermixed_args(argv)  # overrides may stand before and behind options


def run(arguments: argparse.Namespace) -> None:
    """Every stage of `run.stages`, one after the other, each from the one before it."""
    config = load_config(arguments.config or "demo", arguments.overrides)
    ds_content = load_ds_config(arguments.deepspeed)
    device = parallel.init()
    if arguments.config is None:
        logger.info("no --config given: this is the demo configuration (%s)", " then ".join(config.stage_names))
    prepare_shards(config.data, config.run.seed, parallel.num_ranks())
    run_dir = Path(config.run.dir)
    if parallel.is_main():
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.yaml")
    init_from = find_model(Path(config.run.init_from)) if config.run.init_from else None
    for stage in config.stage_names:
        trainer = Trainer(config, stage, ds_content, device, init_from)
        trainer.train()
        init_from = find_model(trainer.dir)
        trainer.close()


def main() -> int:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mvptr_ds").setLevel(logging.INFO if parallel.launched_as_main() else logging.WARNING)
    try:
        run(arguments)
    except (DataError, CheckpointError, ValueError) as error:
        logger.debug("where it was raised", exc_info=True)
        if parallel.launched_as_main():
            logger.error("error: %s", error)
        return 2
    finally:
        parallel.shut_down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
