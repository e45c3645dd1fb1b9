"""Evaluates a trained model on held-out shards: `python mvptr_ds/eval.py RUN [section.key=value ...]`."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    if not __package__:  # see train.py
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from mvptr_ds.user_io.signals import end_on_interrupt

    end_on_interrupt()

import torch

from mvptr_ds.benchmarks.results import RETRIEVAL, result, retrieval_metrics, write_result
from mvptr_ds.checkpoints.hand_over import find_model
from mvptr_ds.checkpoints.model_folder import head_settings, load_model_folder, load_weights
from mvptr_ds.checkpoints.state import read_state
from mvptr_ds.config import STAGES, Config, override_config
from mvptr_ds.data.phrases import Vocabs
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.errors import USER_ERRORS, DataError, exit_code
from mvptr_ds.evaluation.answer_pictures import AnswerItem, draw_answers
from mvptr_ds.evaluation.curves import draw_curves, draw_scores, read_metrics, wall_s
from mvptr_ds.evaluation.pictures import draw_grounding
from mvptr_ds.evaluation.report import evaluate_split, flatten_scores
from mvptr_ds.evaluation.table import table
from mvptr_ds.monitoring.trackers import open_trackers
from mvptr_ds.objectives.module import TaskModule
from mvptr_ds.shard_folders import open_held_out, sources_of
from mvptr_ds.tasks import TASKS, Task
from mvptr_ds.tasks.downstream import Downstream, flat_scores
from mvptr_ds.tasks.pair_module import PairModule
from mvptr_ds.tasks.report import examine, task_table
from mvptr_ds.tasks.submission import check_complete, read_question_ids
from mvptr_ds.user_io.atomic import partial_path, replacing
from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path

logger = logging.getLogger("mvptr_ds.eval")
PREDICTIONS = "predictions.json"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Writes report.json, pictures.png, curves.png and, if the run was evaluated at intervals, scores.png. "
        "The trackers of the run (train.report_to) get scores and pictures, too. The configuration is that of the run; "
        "data.held_out=FOLDER evaluates on other shards, eval.rerank_top_k=128 re-ranks more candidates.",
    )
    parser.add_argument("run", type=user_path, help="run folder, stage folder, checkpoint or model folder")
    parser.add_argument("--out", type=user_path, help="where to write (default: the folder given as RUN)")
    parser.add_argument(
        "--clip-benchmark",
        type=user_path,
        metavar="FILE",
        help="also write recall at 1, 5, 10 by the global states in the JSON of CLIP_benchmark",
    )
    parser.add_argument(
        "--questions",
        type=user_path,
        action="append",
        default=[],
        metavar="FILE",
        help="an official question file of VQA, once for each: predictions.json is written only if each is answered",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the configuration")
    return parser.parse_intermixed_args(argv)  # overrides may stand before and behind options


def evaluate(
    run: Path,
    overrides: list[str],
    out: Path,
    clip_benchmark: Path | None = None,
    questions: Sequence[Path] = (),
) -> dict[str, Any]:
    """Evaluates, writes report and pictures into `out`, returns the report.

    Args:
        clip_benchmark: the file for the scores of retrieval in the JSON of CLIP_benchmark.
        questions: of VQA, which the predictions must answer to be written.

    Raises:
        ValueError: the report could not be written, or an argument is for other models, found before the evaluation.
        DataError: a file or a sample cannot be read, or questions have no answer.
        OSError: it cannot be written after all; it then goes to standard output.
    """
    path = find_model(run)
    # whatever may fail comes before the evaluation, as far as it can
    stage_dirs = [run / stage for stage in STAGES if (run / stage / "metrics.jsonl").is_file()]
    seconds = {stage.name: wall_s(read_metrics(stage / "metrics.jsonl")) for stage in stage_dirs}
    _check_writable(out / "report.json", "name another folder with --out")
    task = TASKS.get(head_settings(path).get("task", ""))
    if clip_benchmark is not None:
        if task is not None:
            raise ValueError(
                f"{run} is a model of {task.name}, which has no scores of retrieval: leave --clip-benchmark out"
            )
        _check_writable(clip_benchmark, "name another file with --clip-benchmark")
    if questions and (task is None or task.name != "vqa"):
        trained = "pre-training or retrieval" if task is None else task.name
        raise ValueError(f"{run} is a model of {trained}, which answers no questions of VQA: leave --questions out")
    check = _check_of(questions)
    model, vocabs, config = load_model_folder(path)
    config = override_config(config, overrides)
    if isinstance(task, Downstream):
        task.check_evaluation(config)
    model.set_execution(config.model.execution)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # type: ignore[arg-type]  # transformers' wrapper of nn.Module.to hides its types
    index = open_held_out(config.data, out / "joins")
    logger.info("model %s on %d captions of %d images", path, len(index), index.num_records)
    if task is not None:
        module = task.build_from(head_settings(path), config, model)
        load_weights(module, path)
        return _evaluate_task(task, module.to(device), vocabs, config, index, path, out, check)
    evaluation = evaluate_split(model, vocabs, config, index, device, config.run.seed)
    report = {"model": str(path), **evaluation.report}
    report["wall_s"] = {k: round(v, 1) for k, v in seconds.items() if v is not None} | report["wall_s"]
    _write_report(out / "report.json", json.dumps(report, indent=1) + "\n")
    if clip_benchmark is not None:
        scores = retrieval_metrics(report["retrieval"])
        write_result(clip_benchmark, result(str(config.data.held_out), str(run), RETRIEVAL, scores))
    # only now: no picture can cost the report
    drawn = [
        *_draw(out / "pictures.png", partial(draw_grounding, index, evaluation.grounded, config.eval.num_pictures)),
        *_draw(out / "curves.png", partial(draw_curves, stage_dirs)),
        *_draw(out / "scores.png", partial(draw_scores, stage_dirs)),
    ]
    _track(path, config, flatten_scores(evaluation.report), drawn)
    return report


def _evaluate_task(
    task: Task,
    module: TaskModule,
    vocabs: Vocabs,
    config: Config,
    index: SampleIndex,
    path: Path,
    out: Path,
    check: Callable[[list[dict[str, Any]]], None],
) -> dict[str, Any]:
    """Evaluates a fine-tuned model: writes its report, its predictions in the public format, and a few pictures.

    Args:
        check: raises DataError where the predictions are not to be written.
    """
    if not isinstance(task, Downstream):  # a task of one's own, which has scores alone
        scores = task.evaluate(module, vocabs, config, index, module.model.device)
        report: dict[str, Any] = {"model": str(path), "task": task.name, "scores": scores}
        _write_report(out / "report.json", json.dumps(report, indent=1) + "\n")
        _track(path, config, scores, [])
        return report
    assert isinstance(module, PairModule)
    found = examine(task, module, vocabs, config, index, _open_training(config, out))
    report = {"model": str(path), "held_out": str(config.data.held_out), **found.report}
    _write_report(out / "report.json", json.dumps(report, indent=1) + "\n")
    written = [prediction.written for prediction in found.predictions]
    (out / PREDICTIONS).unlink(missing_ok=True)  # of an earlier evaluation, where these are refused
    check(written)
    _write_report(out / PREDICTIONS, json.dumps(written) + "\n")
    shown = [
        AnswerItem(number, answer=p.answer, known=task.known_answer(p.labels), score=p.score, box=p.written.get("box"))
        for number, p in enumerate(found.predictions)
    ]
    drawn = _draw(out / "answers.png", partial(_draw_answers, index, shown, config.eval.num_pictures))
    _track(path, config, flat_scores(task.name, found.predictions), drawn)
    return report


def _check_of(questions: Sequence[Path]) -> Callable[[list[dict[str, Any]]], None]:
    """Returns what refuses predictions that do not answer these files, which are read now; without any, nothing."""
    if not questions:
        return lambda written: None
    names = ", ".join(path.name for path in questions)
    return partial(check_complete, wanted=read_question_ids(questions), names=names)


def _draw_answers(index: SampleIndex, shown: Sequence[AnswerItem], num_pictures: int, path: Path) -> bool:
    if num_pictures:
        draw_answers(path, index, shown, num_pictures)
    return num_pictures > 0


def _open_training(config: Config, out: Path) -> list[SampleIndex]:
    """Opens what was trained on, whose texts show what can be guessed; nothing where a part is not there any more."""
    try:
        folders = [
            replace(config.data, held_out=source.shards, held_out_sidecars=source.sidecars)
            for source in sources_of(config.data).values()
        ]
        return [open_held_out(data, out / "joins") for data in folders]
    except DataError as error:
        logger.warning("the report says nothing of guesses from texts: the training split cannot be opened: %s", error)
        return []


def _check_writable(path: Path, remedy: str) -> None:
    """Makes the folder of a file; raises ValueError with the remedy where the file could not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        partial = partial_path(path)
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): {remedy}") from error


def _write_report(path: Path, content: str) -> None:
    """Replaces the report as a whole; one that cannot be written (no space left) goes to standard output."""
    try:
        with replacing(path) as partial:
            partial.write_text(content, encoding="utf-8")
    except OSError:
        sys.stdout.write(content)
        raise


def _draw(path: Path, draw: Callable[[Path], object]) -> list[Path]:
    """Returns the path, or nothing where there was nothing to draw or it failed."""
    try:
        return [path] if draw(path) is not False and path.is_file() else []
    except Exception as error:  # matplotlib raises whatever its numbers come to
        logger.debug("where it was raised", exc_info=True)
        logger.warning("%s was not drawn: %s: %s", path.name, type(error).__name__, error)
        return []


def _track(model: Path, config: Config, scores: Mapping[str, float], pictures: Sequence[Path]) -> None:
    """Hands scores and pictures to the trackers of the stage that the model is a checkpoint of; a copy has none."""
    checkpoint = model.absolute().parent
    if checkpoint.parent.name != "checkpoints":
        return
    try:
        step = read_state(checkpoint).step
    except USER_ERRORS as error:  # the report is written already
        logger.warning("nothing goes to the trackers: %s", error)
        return
    trackers = open_trackers(checkpoint.parents[1], config, None)
    trackers.log(step, scores)
    for path in pictures:
        trackers.log_picture(step, f"eval/{path.stem}", path)
    trackers.close()


def main(argv: list[str] | None = None) -> int:
    accept_any_text()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mvptr_ds").setLevel(logging.INFO)
    arguments = parse_arguments(argv)
    out = arguments.out or arguments.run
    try:
        report = evaluate(arguments.run, arguments.overrides, out, arguments.clip_benchmark, arguments.questions)
    except USER_ERRORS as error:
        logger.debug("where it was raised", exc_info=True)
        logger.error("error: %s", error)
        return exit_code(error)
    if "scores" in report:
        text = "\n".join(f"{name} {100 * score:.1f} %" for name, score in report["scores"].items())
    else:
        text = task_table(report) if "task" in report else table(report)
    also = f", and {PREDICTIONS} beside it" if isinstance(TASKS.get(report.get("task", "")), Downstream) else ""
    sys.stdout.write(text + f"\nwritten: {out / 'report.json'}{also}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
