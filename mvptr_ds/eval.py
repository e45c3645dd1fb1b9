"""Evaluates a trained model on held-out shards: `python mvptr_ds/eval.py RUN [section.key=value ...]`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # see train.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from mvptr_ds.assembly import NO_MASKING, build_samples
from mvptr_ds.checkpointing import CheckpointError, find_model
from mvptr_ds.config import STAGES, override_config
from mvptr_ds.data.schema import DataError
from mvptr_ds.data.shards import ensure_index
from mvptr_ds.evaluation.encode import encode_split
from mvptr_ds.evaluation.grounding import ground_phrases
from mvptr_ds.evaluation.pictures import draw_curves, draw_grounding, read_metrics
from mvptr_ds.evaluation.retrieval import recalls, rerank
from mvptr_ds.model_folder import load_model_folder

logger = logging.getLogger("mvptr_ds.eval")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Writes report.json, curves.png and pictures.png. The configuration is that of the run; "
        "data.held_out=FOLDER evaluates on other shards, eval.rerank_top_k=128 re-ranks more candidates.",
    )
    parser.add_argument("run", type=Path, help="run folder, stage folder, checkpoint or model folder")
    parser.add_argument("--out", type=Path, help="where to write (default: the folder given as RUN)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the configuration")
    return parser.parse_intermixed_args(argv)  # overrides may stand before and behind options


def evaluate(run: Path, overrides: list[str], out: Path) -> dict[str, Any]:
    """Evaluates, writes report and pictures into `out`, returns the report."""
    started = time.perf_counter()
    path = find_model(run)
    model, vocabs, config = load_model_folder(path)
    config = override_config(config, overrides)
    if config.data.held_out is None:
        raise DataError("data.held_out is not set: give data.held_out=FOLDER of shards to evaluate on")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # type: ignore[arg-type]  # transformers' wrapper of nn.Module.to hides its types
    index = ensure_index(config.data.held_out)
    samples = build_samples(config, vocabs, index, NO_MASKING, predict_phrases=False, tag_noise=False)
    logger.info("model %s on %d captions of %d images", path, len(index), index.num_records)
    split = encode_split(model, index, samples, config.eval.batch_size, device)
    t2i, i2t = rerank(model, split, config.eval.rerank_top_k, 4 * config.eval.batch_size, device)
    reranked = {k: v for k, v in recalls(t2i, split.image_of_C).items() if k.startswith("t2i")}
    reranked |= {k: v for k, v in recalls(i2t, split.image_of_C).items() if k.startswith("i2t")}
    found = ground_phrases(split, index, vocabs.phrases)
    out.mkdir(parents=True, exist_ok=True)
    draw_grounding(index, found, config.eval.num_pictures, out / "pictures.png")
    stage_dirs = [run / stage for stage in STAGES if (run / stage / "metrics.jsonl").is_file()]
    if stage_dirs:
        draw_curves(stage_dirs, out / "curves.png")
    report = {
        "model": str(path),
        "num_scenes": index.num_records,
        "num_captions": len(index),
        "retrieval": recalls(split.sim_CI, split.image_of_C),
        "rerank": reranked,
        "wall_s": {stage.name: round(read_metrics(stage / "metrics.jsonl")[-1]["wall_s"], 1) for stage in stage_dirs}
        | {"evaluation": round(time.perf_counter() - started, 1)},
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def table(report: dict[str, Any]) -> str:
    """The report as lines for a person."""
    chance = 1.0 / report["num_scenes"]
    lines = [f"held-out scenes: {report['num_scenes']} (chance of R@1: {100 * chance:.1f} %)", ""]
    lines.append(f"{'':22}{'text -> image':^24}{'image -> text':^24}")
    lines.append(f"{'':22}" + "".join(f"{f'R@{k}':>8}" for k in (1, 5, 10)) * 2)
    for name, key in (("global states", "retrieval"), ("after re-ranking", "rerank")):
        values = [report[key][f"{way}_r{k}"] for way in ("t2i", "i2t") for k in (1, 5, 10)]
        lines.append(f"{name:22}" + "".join(f"{100 * v:8.1f}" for v in values))
    lines += ["", "wall time: " + ", ".join(f"{k} {v:.0f} s" for k, v in report["wall_s"].items())]
    return "\n".join(lines)


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mvptr_ds").setLevel(logging.INFO)
    arguments = parse_arguments()
    out = arguments.out or arguments.run
    try:
        report = evaluate(arguments.run, arguments.overrides, out)
    except (DataError, CheckpointError, ValueError) as error:
        logger.debug("where it was raised", exc_info=True)
        logger.error("error: %s", error)
        return 2
    sys.stdout.write(table(report) + f"\nwritten: {out / 'report.json'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
