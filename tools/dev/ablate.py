#!/usr/bin/env python3
"""Trains one configuration with parts switched off one by one, on several seeds, and prints one table.

python tools/dev/ablate.py --out runs/ablation --seeds 0 1 2 --arms full stage2_alone
python tools/dev/ablate.py --out runs/ablation                    # every other arm, on one seed
python tools/dev/ablate.py --out runs/ablation --table            # the table of what is there
python tools/dev/ablate.py --out runs/tuned --config demo_ve --seeds 0 1 2     # the arms of fine-tuning, by kind
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

if __name__ == "__main__":
    from mvptr_ds.user_io.signals import end_on_interrupt

    end_on_interrupt()

from mvptr_ds.config import Config, load_config
from mvptr_ds.demo.build import build_demo_shards
from mvptr_ds.ds_config import load_ds_config
from mvptr_ds.errors import USER_ERRORS
from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import read_text, user_path
from mvptr_ds.user_io.yaml_nodes import parse_yaml, plain

ARMS_FILE = Path(__file__).with_name("ablations.yaml")
TUNING_ARMS_FILE = Path(__file__).with_name("tuning_ablations.yaml")
EPILOG = """Each run is OUT/ARM/seed-N: trained through the deepspeed launcher, then evaluated. An interrupted call goes
on when it is typed again; runs that are done are kept, and one made with other arguments is refused. The table,
OUT/table.md, holds everything that OUT has: means over the seeds, with their standard deviation."""
Report = Mapping[str, Any]


def _ground(report: Report, states: str, part: str) -> float | None:
    accuracy: float | None = report["without_tags"]["grounding"][states][part]["accuracy"]
    return accuracy


# Columns of the table of pre-training: everything but MCR with all tags withheld from the held-out scenes.
COLUMNS: dict[str, Callable[[Report], float | None]] = {
    "R@1": lambda r: r["without_tags"]["retrieval"]["t2i_r1"],
    "re-ranked": lambda r: r["without_tags"]["rerank"]["t2i_r1"],
    "R@1, tags given": lambda r: r["retrieval"]["t2i_r1"],
    "noun, uni": lambda r: _ground(r, "uni", "noun"),
    "noun, cross": lambda r: _ground(r, "cross", "noun"),
    "attribute, uni": lambda r: _ground(r, "uni", "attribute_among_one_noun"),
    "attribute, cross": lambda r: _ground(r, "cross", "attribute_among_one_noun"),
    "tag MCR": lambda r: r["mcr"]["accuracy"],
    "phrase MCR": lambda r: r["mcr"]["phrases"]["accuracy"],
}


def columns_of(reports: Iterable[Report]) -> dict[str, Callable[[Report], float | None]]:
    """Returns the columns of a table: of a downstream task its score and that of each kind, else those of COLUMNS."""
    reports = list(reports)
    if not any("task" in report for report in reports):
        return COLUMNS
    kinds = dict.fromkeys(kind for report in reports for kind in report.get("by_kind") or {})
    return {"score": lambda r: r.get("score"), **{kind: partial(_score_of, kind) for kind in kinds}}


def _score_of(kind: str, report: Report) -> float | None:
    score: float | None = (report.get("by_kind") or {}).get(kind, {}).get("score")
    return score


class AblationError(RuntimeError):
    """A run failed, or was made with other arguments."""


@dataclass(frozen=True)
class Arm:
    name: str
    shows: str
    stages: tuple[str, ...]
    overrides: tuple[str, ...]


def load_arms(path: Path = ARMS_FILE) -> dict[str, Arm]:
    """Returns the arms by name, in the order of the file."""
    tree = plain(parse_yaml(read_text(path), str(path)))
    return {
        name: Arm(name, arm["shows"], tuple(map(str, arm.get("stages", (1, 2)))), tuple(arm.get("overrides", ())))
        for name, arm in tree.items()
    }


def arms_file(config: Config) -> Path:
    """Returns the file of the arms that a configuration has: those of fine-tuning where it trains a task."""
    return ARMS_FILE if config.finetuning(config.stage_names[0]) is None else TUNING_ARMS_FILE


def arm_overrides(arm: Arm, config: Config) -> list[str]:
    """Returns the arm's overrides of `config`; without stage 1, stage 2 takes the steps of both.

    Where the configuration fine-tunes a task, its stages stay, and TASK in an override is that task.
    """
    task = config.stage_names[0]
    if config.finetuning(task) is not None:
        return [override.replace("TASK", task) for override in arm.overrides]
    stages = [f"run.stages=[{','.join(arm.stages)}]"]
    if "1" not in arm.stages:
        stages.append("run.init_from=null")
        stages.append(f"stage2.max_steps={config.stage1.max_steps + config.stage2.max_steps}")
    return [*stages, *arm.overrides]


def prepare_data(config: Config, out: Path, processes: int) -> list[str]:
    """Builds demo shards below `out` from seed 0, the same for every run. Returns overrides.

    The data of a task are where its configuration says, beside the shards of the pre-trained run.
    """
    if config.data.demo_source is None or config.finetuning(config.stage_names[0]) is not None:
        return []
    shards = out / "shards"
    scenes = config.data.demo_train_scenes, config.data.demo_held_out_scenes
    build_demo_shards(shards, config.data.demo_source, *scenes, seed=0, num_processes=processes)
    files = {"train": "train", "held_out": "held_out", "word_vocab": "word_vocab.txt"}
    overrides = [f"data.{key}={shards / name}" for key, name in files.items()]
    return [*overrides, f"data.phrase_vocab={shards / 'phrase_vocab.json'}", "data.demo_source=null"]


def run_arm(folder: Path, ranks: int, config_name: str, json_path: Path, overrides: Sequence[str]) -> None:
    """Trains and evaluates into `folder`, or goes on with it, unless its report is there.

    Raises:
        AblationError: the folder was made with other arguments, or a command failed.
    """
    engine = load_ds_config(json_path)
    arguments = {"config": config_name, "ranks": ranks, "deepspeed": engine, "overrides": list(overrides)}
    marker = folder / "ablation.json"
    if marker.is_file() and (before := json.loads(marker.read_text(encoding="utf-8"))) != arguments:
        raise AblationError(f"{folder} was made with {before}, now asked for {arguments}; remove it or change --out")
    if (folder / "report.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(arguments, indent=1) + "\n", encoding="utf-8")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), f"--num_gpus={ranks}", f"--master_port={port}"]
    entry = [str(REPO / "mvptr_ds/train.py"), "--deepspeed", str(json_path), "--config", config_name]
    _call([*launcher, *entry, f"run.dir={folder}", *overrides], folder / "train.log")
    _call([sys.executable, str(REPO / "mvptr_ds/eval.py"), str(folder)], folder / "eval.log")


def _call(command: list[str], log: Path) -> None:
    """Runs the command in a process group of its own, which gets a SIGTERM when this process is stopped."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=REPO, start_new_session=True)
    try:
        status = process.wait()
    except BaseException:  # Ctrl-C or SIGTERM: a launcher that is ended alone leaves its ranks behind
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    if status != 0:
        raise AblationError(f"exit status {status} of {' '.join(command)}; its output is in {log}")


def read_reports(out: Path, arms: Mapping[str, Arm]) -> dict[str, list[Report]]:
    """Returns the reports of every arm that has some, in the order of the arms."""
    found = {name: sorted((out / name).glob("seed-*/report.json")) for name in arms}
    return {name: [json.loads(p.read_text(encoding="utf-8")) for p in paths] for name, paths in found.items() if paths}


def table(reports: Mapping[str, Sequence[Report]], arms: Mapping[str, Arm]) -> str:
    """Markdown; shares in percent, `mean ±standard deviation` where there are several seeds."""
    columns = columns_of(report for of_arm in reports.values() for report in of_arm)
    lines = ["| arm | seeds | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) + 1)]
    for name, of_arm in reports.items():
        cells = [_cell([value(report) for report in of_arm]) for value in columns.values()]
        lines.append(f"| {name} | {len(of_arm)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {name}: {arms[name].shows}" for name in reports)]) + "\n"


def _cell(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.1f}"
    return f"{mean} ±{statistics.stdev(known):.1f}" if len(known) > 1 else mean


def parse_arguments() -> argparse.Namespace:
    described = "\n".join(
        f"\narms of {what}:\n" + "\n".join(f"  {arm.name:16}{arm.shows}" for arm in load_arms(path).values())
        for what, path in (("pre-training", ARMS_FILE), ("fine-tuning", TUNING_ARMS_FILE))
    )
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"{EPILOG}\n{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help="folder of the runs and the table")
    parser.add_argument("--config", default="ablation_stamps", help="what the arms start from (%(default)s)")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="default: all that the configuration has")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="run.seed of the runs (0)")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="ranks of a run (%(default)s)")
    parser.add_argument(
        "--deepspeed", type=user_path, default=REPO / "ds_configs/z2.json", metavar="JSON", help="of all runs (z2.json)"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="overrides for every arm")
    parser.add_argument("--table", action="store_true", help="train nothing, print the table of what is there")
    return parser.parse_args()


def main() -> int:
    accept_any_text()
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    out = arguments.out.resolve()
    try:
        config = load_config(arguments.config, arguments.set)
        arms = load_arms(arms_file(config))
        unknown = [name for name in arguments.arms or () if name not in arms]
        if unknown:
            raise AblationError(f"--arms {', '.join(unknown)} is unknown; choose from {', '.join(arms)}")
        if not arguments.table:
            common = [*prepare_data(config, out, arguments.ranks), *arguments.set]
            runs = [(arms[name], seed) for seed in arguments.seeds for name in arguments.arms or arms]
            for number, (arm, seed) in enumerate(runs, start=1):
                logging.info("run %d of %d: %s, seed %d", number, len(runs), arm.name, seed)
                overrides = [*common, *arm_overrides(arm, config), f"run.seed={seed}"]
                folder = out / arm.name / f"seed-{seed}"
                run_arm(folder, arguments.ranks, arguments.config, arguments.deepspeed.resolve(), overrides)
        reports = read_reports(out, arms)
        if not reports:
            raise AblationError(f"{out} holds no report; leave --table out to train")
    except (AblationError, *USER_ERRORS) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    text = table(reports, arms)
    (out / "table.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
