"""Checks that look at the configuration alone: lists without a meaning, and keys that contradict each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mvptr_ds.config import Config
from mvptr_ds.monitoring.timing import ProfileWindow
from mvptr_ds.preflight.rank_checks import ERROR, OK, WARNING, Finding


def examine(config: Config) -> Iterator[Finding]:
    """Yields findings on the two lists of which not every content has a meaning; then on what keys say together."""
    lists: list[Callable[[], Any]] = [
        lambda: ProfileWindow(config.train.profile_steps, Path(config.run.dir)),
        lambda: config.stage_names,
    ]
    wrong = False
    for look in lists:
        try:
            look()
        except ValueError as error:
            wrong = True
            yield Finding("configuration", ERROR, str(error))
    if wrong:
        return
    yield Finding("configuration", OK, f"{' then '.join(config.stage_names)} in {config.run.dir}")
    for stage in config.stage_names:
        section = config.stage(stage)
        if section.warmup_steps is not None and section.warmup_steps > section.max_steps:
            text = f"{stage}.warmup_steps is {section.warmup_steps}, but {stage}.max_steps only {section.max_steps}"
            remedy = f"the learning rate never reaches {section.learning_rate:g}: lower {stage}.warmup_steps"
            yield Finding("configuration", WARNING, text, remedy)
        yield from _patience(config, stage)
        traced = config.train.profile_steps
        if traced and traced[0] >= section.max_steps:
            text = f"train.profile_steps is {traced}, but {stage}.max_steps only {section.max_steps}"
            yield Finding("configuration", WARNING, text, f"nothing of {stage} is traced: choose earlier steps")


def _patience(config: Config, stage: str) -> Iterator[Finding]:
    section = config.finetuning(stage)
    if section is None or not section.patience:
        return
    reasons = {
        "data.held_out is null": config.data.held_out is None,
        "train.evaluate_every_steps is 0": config.train.evaluate_every_steps == 0,
    }
    never = [reason for reason, holds in reasons.items() if holds]
    if never:
        text = f"{stage}.patience is {section.patience}, but nothing is evaluated ({' and '.join(never)})"
        remedy = f"set data.held_out and train.evaluate_every_steps, or {stage}.patience=0 to run all steps"
        yield Finding("configuration", ERROR, text, remedy)
