"""The training loop of every stage, on a DeepSpeed engine."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch

from mvptr_ds import assembly, checkpointing, ds_config, model_folder, parallel
from mvptr_ds.config import Config
from mvptr_ds.data.collate import Batch
from mvptr_ds.data.loader import ShardDataset, make_loader
from mvptr_ds.data.plan import Plan
from mvptr_ds.data.schema import DataError
from mvptr_ds.data.shards import Index
from mvptr_ds.metrics import Meters, MetricsLog
from mvptr_ds.optim import build_optimizer, learning_rate_at, parameter_groups
from mvptr_ds.task import Task

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


class Trainer:
    """One stage of a run: built, resumed where it stopped, trained to its last step.

    Args:
        ds_content: the DeepSpeed JSON as written, with its `"auto"`.
        init_from: model folder whose weights the stage starts from, unless it resumes.
    """

    def __init__(
        self, config: Config, stage: str, ds_content: dict[str, Any], device: torch.device, init_from: Path | None
    ) -> None:
        self.started_s = time.perf_counter()
        self.config, self.device = config, device
        self.stage = config.stage(stage)
        self.dir = Path(config.run.dir) / stage
        self.step, self.num_skipped_in_row = 0, 0
        self.vocabs = assembly.build_vocabs(config.data)
        bf16, fp16 = ds_config.precision_supported()
        filled = ds_config.fill_ds_config(
            ds_content, config.train, config.optim, parallel.num_ranks(), bf16_supported=bf16, fp16_supported=fp16
        )
        self._build_data(predict_phrases=stage == "stage1" and self.stage.weights.mcr_phrases > 0)
        self._build_engine(stage, filled, init_from)
        self._resume()
        self.meters = Meters(device)
        self.log = MetricsLog(self.dir / "metrics.jsonl", self.step)
        if parallel.is_main():
            (self.dir / "ds_config.json").write_text(json.dumps(filled, indent=1) + "\n", encoding="utf-8")

    def _build_data(self, predict_phrases: bool) -> None:
        data, seed = self.config.data, self.config.run.seed
        index = Index.open(data.train)
        samples = assembly.build_samples(
            self.config, self.vocabs, index, self.stage.masking, predict_phrases, tag_noise=True
        )
        self.plan = Plan(len(index), self.config.train.batch_size, seed, data.block_samples, data.window_blocks)
        self.dataset = ShardDataset(index, self.plan, samples)

    def _build_engine(self, stage: str, filled: dict[str, Any], init_from: Path | None) -> None:
        config = self.config
        model = assembly.build_model(config, self.vocabs)
        if init_from is not None:
            model_folder.init_from_folder(model, self.vocabs, init_from)
            logger.info("%s starts from %s", stage, init_from)
        self.model = model
        self.task = Task(
            model,
            stage,
            self.stage.weights,
            config.task,
            max_text_slots=config.data.max_text_slots,
            max_regions=config.data.max_regions,
            max_steps=self.stage.max_steps,
            seed=config.run.seed,
        )
        trained = set(model.parameters_of(self.task.trained_parts()))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        groups = parameter_groups(
            ((n, p) for n, p in model.named_parameters() if p.requires_grad), config.optim.weight_decay
        )
        optimizer = build_optimizer(groups, config.optim, self.stage.learning_rate)
        self.engine, *_ = deepspeed.initialize(model=self.task, optimizer=optimizer, config=filled)
        torch.manual_seed(config.run.seed + 1_000_003 * (1 + parallel.rank()))  # dropout differs between ranks
        num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info(
            "%s: %.1f M parameters trained on %d ranks (%s), %d samples a step, %d samples in %s",
            stage, num_trained / 1e6, parallel.num_ranks(), self._precision(filled), config.train.batch_size,
            self.plan.num_samples, config.data.train,
        )  # fmt: skip

    @staticmethod
    def _precision(filled: dict[str, Any]) -> str:
        return next((name for name in ("bf16", "fp16") if filled[name].get("enabled")), "float32")

    def train(self) -> None:
        """Trains to `max_steps`; the last step is always saved."""
        batches = iter(self._loader()) if self.step < self.stage.max_steps else iter(())
        while self.step < self.stage.max_steps:
            self._set_learning_rate()
            for accumulation in range(self.config.train.accumulation_steps):
                output = self.engine(self._next_batch(batches), self.step, accumulation)
                self.engine.backward(output.loss)
                self.engine.step()
                self.meters.add_parts(output.parts)
            self.step += 1
            self._count_skipped()
            if self.step % self.config.train.log_every_steps == 0 or self.step == self.stage.max_steps:
                self._report()
            if self.step % self.config.train.checkpoint_every_steps == 0 or self.step == self.stage.max_steps:
                self.save()

    def _loader(self) -> Any:
        data = self.config.data
        self.last_report = (self.step, time.perf_counter())
        return make_loader(
            self.dataset,
            self.plan,
            self.step,
            self.stage.max_steps,
            parallel.rank(),
            parallel.num_ranks(),
            self.config.train.accumulation_steps,
            num_workers=data.num_workers,
            prefetch_batches=data.prefetch_batches,
            pin_memory=self.device.type == "cuda",
        )

    def _next_batch(self, batches: Iterator[Batch]) -> Batch:
        started = time.perf_counter()
        try:
            batch = next(batches)
        except DataError as error:
            if not parallel.is_main():  # what ends a run is printed by rank 0, which hears nothing of this
                logger.error("error of rank %d: %s", parallel.rank(), error)
            raise
        self.meters.add_batch(batch, time.perf_counter() - started)
        return batch.to(self.device, non_blocking=True)

    def _set_learning_rate(self) -> None:
        self.learning_rate = learning_rate_at(self.step, self.stage)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.learning_rate

    def _count_skipped(self) -> None:
        """The engine skips a step whose gradient is not finite, on all ranks alike."""
        self.num_skipped_in_row = 0 if self.engine.was_step_applied() else self.num_skipped_in_row + 1
        if self.num_skipped_in_row:
            logger.warning("step %d skipped: its gradient is not finite", self.step)
        if self.num_skipped_in_row >= self.config.train.max_skipped_in_row:
            raise TrainingError(
                f"{self.num_skipped_in_row} steps in a row had a gradient that is not finite (the last is "
                f"{self.step}); lower the learning rate, lengthen warmup_steps, or use bf16 in place of fp16"
            )

    def _report(self) -> None:
        now = time.perf_counter()
        step, since = self.last_report
        norm = self.engine.get_global_grad_norm()
        values = self.meters.report() | {
            "learning_rate": self.learning_rate,
            "grad_norm": float(norm) if norm is not None else float("nan"),
            "scale": float(self.task.scale().detach()),
            "wall_s": now - self.started_s,
            "seconds_per_step": (now - since) / max(1, self.step - step),
        }
        self.last_report = (self.step, now)
        self.log.write(self.step, self.stage.max_steps, values)

    def save(self) -> Path:
        """A checkpoint of this step; all ranks call it."""
        batch_size, data = self.config.train.batch_size, self.dataset.index.fingerprint
        return checkpointing.save(
            self.dir / "checkpoints",
            self.step,
            {"stage": self.dir.name, "batch_size": batch_size, "data": data},
            lambda path: self.engine.save_checkpoint(str(path.parent), tag=path.name, save_latest=False),
            lambda path: model_folder.save_model_folder(path, self.model, self.vocabs, self.config),
            self.config.train.keep_checkpoints,
        )

    def _resume(self) -> None:
        if self.config.train.resume not in ("auto", "never"):
            raise ValueError(f"train.resume is {self.config.train.resume!r}; choose from auto, never")
        path = checkpointing.newest_good(self.dir / "checkpoints") if self.config.train.resume == "auto" else None
        if path is None:
            return
        state = checkpointing.read_state(path)
        for name, here in (("num_ranks", parallel.num_ranks()), ("batch_size", self.config.train.batch_size)):
            if state[name] != here:
                raise checkpointing.CheckpointError(
                    f"{path} was written with {name} {state[name]}, this run has {here}: start it with {state[name]}, "
                    f"or elsewhere with run.init_from={self.dir}"
                )
        if state["data"] != self.dataset.index.fingerprint:
            raise checkpointing.CheckpointError(
                f"{path} was trained on other shards than {self.config.data.train} holds now: bring them back, "
                f"or start elsewhere with run.dir=... run.init_from={self.dir}"
            )
        self.engine.load_checkpoint(str(path), tag="engine")
        checkpointing.restore_rng(path)
        self.step = state["step"]
        logger.info("%s goes on from step %d (%s)", self.dir.name, self.step, path)

    def close(self) -> None:
        """Frees the engine, so that the next stage has the memory."""
        self.engine.destroy()
        del self.engine, self.task, self.model
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
