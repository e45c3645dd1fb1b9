"""The training loop of every stage, on a DeepSpeed engine."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch

from mvptr_ds import assembly, checkpointing, ds_config, elastic, model_folder, parallel
from mvptr_ds.config import STAGES, Config
from mvptr_ds.data.collate import Batch
from mvptr_ds.data.loader import make_loader
from mvptr_ds.data.mixture import differences
from mvptr_ds.data.schema import DataError
from mvptr_ds.flops import StepFlops
from mvptr_ds.metrics import Meters, MetricsLog
from mvptr_ds.optim import build_optimizer, learning_rate_at, parameter_groups
from mvptr_ds.safeguards import BadSamples, LossScale, SkippedSteps, StopSignal, agree
from mvptr_ds.task import Task
from mvptr_ds.timing import ProfileWindow, device_peak
from mvptr_ds.versions import versions

logger = logging.getLogger(__name__)


class Trainer:
    """One stage of a run: built, resumed where it stopped, trained to its last step.

    Args:
        ds_content: the DeepSpeed JSON as written, with its `"auto"`.
        init_from: model folder whose weights the stage starts from, unless it resumes.
        stop: what tells of a signal.
        alive: called before each step.
        starting: called while lengths are measured or a checkpoint is converted.
    """

    def __init__(
        self,
        config: Config,
        stage: str,
        ds_content: dict[str, Any],
        device: torch.device,
        init_from: Path | None,
        stop: StopSignal,
        alive: Callable[[], None] = lambda: None,
        starting: Callable[[], None] = lambda: None,
    ) -> None:
        self.alive, self.starting = alive, starting
        self.started_s = time.perf_counter()
        self.config, self.device = config, device
        self.stage = config.stage(stage)
        self.dir = Path(config.run.dir) / stage
        self.step, self.saved_step = 0, 0
        self.profile = ProfileWindow(config.train.profile_steps, self.dir / "profile")
        self.skipped = SkippedSteps(config.train.max_skipped_in_row)
        self.bad_samples = BadSamples(config.data.max_bad_fraction)
        self.stop = stop
        self.vocabs = assembly.build_vocabs(config.data)
        bf16, fp16 = ds_config.precision_supported()
        filled = ds_config.fill_ds_config(
            ds_content, config.train, config.optim, parallel.num_ranks(), bf16_supported=bf16, fp16_supported=fp16
        )
        self.zero_stage = int(filled.get("zero_optimization", {}).get("stage", 0))
        self.precision = ds_config.precision_of(filled)
        self.optimizer_device = ds_config.optimizer_device(filled, device)
        self._build_data()
        self._build_task(stage, init_from)
        checkpoint = self._checkpoint()
        if checkpoint is None:
            self._build_engine(filled)
        else:
            self._resume(checkpoint, filled)
        self.meters = self._build_meters()
        self.log = MetricsLog(self.dir, self.step, config.wandb, asdict(config))
        content = json.dumps(filled, indent=1) + "\n"
        assembly.on_main(lambda: (self.dir / "ds_config.json").write_text(content, encoding="utf-8"))

    def _build_data(self) -> None:
        data = self.config.data
        joins = Path(self.config.run.dir) / "joins"
        evaluates = data.held_out is not None and self.config.train.evaluate_every_steps > 0
        self.held_out = assembly.open_held_out(data, joins) if evaluates else None
        self.dataset = assembly.build_dataset(self.config, self.vocabs, self.dir.name, self.seed, joins)
        self.batches = assembly.build_batches(self.config, self.dataset, self.seed, joins, self.starting)

    def _build_task(self, stage: str, init_from: Path | None) -> None:
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
            max_steps=self.stage.max_steps,
            seed=self.seed,
            per_sample=bool(self.dataset.names),
        )
        trained = set(model.parameters_of(self.task.trained_parts()))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        self._hold_untrained()

    def _hold_untrained(self) -> None:
        """Keeps on rank 0 what is not trained as it is, before the engine rounds or partitions it."""
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        state = self.model.state_dict() if parallel.is_main() else {}
        self.untrained = {name: tensor.detach().clone() for name, tensor in state.items() if name not in trained}

    def _build_engine(self, filled: dict[str, Any]) -> None:
        config, parameters = self.config, [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        num_trained = sum(p.numel() for _, p in parameters)  # before stage 3 cuts them
        groups = parameter_groups(parameters, config.optim.weight_decay)
        self.optimizer = build_optimizer(groups, config.optim, self.stage.learning_rate, self.optimizer_device)
        self.engine, *_ = deepspeed.initialize(model=self.task, optimizer=self.optimizer, config=filled)
        self._catch_write_errors()
        if self.zero_stage == 3:
            for parameter in self.model.parameters_used_at_large():
                deepspeed.zero.register_external_parameter(self.task, parameter)
        torch.manual_seed(self.seed + 1_000_003 * (1 + parallel.rank()))  # dropout differs between ranks
        for line in assembly.kernel_report(config, self.device, self._dtype, self.optimizer_device):
            logger.info("%s", line)
        logger.info(
            "%s: %.1f M parameters trained on %d ranks (%s), %d samples a step, %d samples in %s",
            self.dir.name, num_trained / 1e6, parallel.num_ranks(), self.precision, config.train.batch_size,
            self.dataset.num_samples, config.data.train or ", ".join(config.data.sources),
        )  # fmt: skip

    def _build_meters(self) -> Meters:
        peak = device_peak(self.device, self._dtype)
        logger.info("MFU is a share of %.3g TFLOPS: %s", peak.tflops, peak.source)
        meters = Meters(self.device, self.dataset.names, StepFlops(self.task, parallel.num_ranks()), peak)
        parallel.time_collectives(lambda: meters.clock("communication"))
        return meters

    @property
    def _dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision, torch.float32)

    @property
    def seed(self) -> int:
        """Of everything random in this stage; stages of one run differ."""
        return self.config.run.seed * len(STAGES) + STAGES.index(self.dir.name)

    def train(self) -> bool:
        """Trains to `max_steps`, or to the step at which a signal asks to stop; both are saved. True at the end."""
        with self.profile:
            batches = iter(self._loader())
            while self.step < self.stage.max_steps:
                self.alive()
                self.profile.begin(self.step)
                micro_batches, problem = self._read(batches)
                if self._must_stop(problem):
                    return False
                self._train_step(micro_batches)
                self.step += 1
                self.profile.end(self.step)
                self.skipped.count(self.step, self.engine.was_step_applied(), self._loss_scale())
                if self._due(self.config.train.log_every_steps):
                    self._report()
                if self._due(self.config.train.checkpoint_every_steps) or self.step == self.stage.max_steps:
                    self.save()
                if self._due(self.config.train.evaluate_every_steps):
                    self._evaluate()
        return True

    def _must_stop(self, problem: str | None) -> bool:
        """Whether any rank got a signal: the step is then saved, and all of them stop.

        Raises:
            DataError: on all ranks, where one of them had a problem with its data.
        """
        stop, failed = agree([self.stop.received is not None, problem is not None], self.device)
        if failed:
            raise DataError(next(p for p in parallel.gather_objects(problem) if p is not None))
        if stop:
            if self.saved_step != self.step:
                self.save()
            logger.info(
                "%s stopped at step %d, as asked (%s)", self.dir.name, self.step, self.stop.received or "another rank"
            )
        return stop

    def _train_step(self, micro_batches: list[Batch]) -> None:
        self._set_learning_rate()
        for accumulation, batch in enumerate(micro_batches):
            with self.meters.clock("forward"):
                output = self.engine(batch.to(self.device, non_blocking=True), self.step, accumulation)
            with self.meters.clock("backward"):
                self.engine.backward(output.loss)
            with self.meters.clock("step"):
                self.engine.step()
            self.meters.add_parts(output.parts, batch.source_B)

    def _loss_scale(self) -> LossScale | None:
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)  # of ZeRO; fixed at 1 but for fp16
        return LossScale(scaler.cur_scale, scaler.min_scale) if scaler is not None and scaler.dynamic else None

    def _due(self, every_steps: int) -> bool:
        return every_steps > 0 and (self.step % every_steps == 0 or self.step == self.stage.max_steps)

    def _loader(self) -> Any:
        data = self.config.data
        self.last_report = (self.step, time.perf_counter())
        return make_loader(
            self.dataset,
            self.batches,
            self.step,
            self.stage.max_steps,
            parallel.rank(),
            parallel.num_ranks(),
            self.config.train.accumulation_steps,
            num_workers=data.num_workers,
            prefetch_batches=data.prefetch_batches,
            pin_memory=self.device.type == "cuda",
        )

    def _read(self, batches: Iterator[Batch]) -> tuple[list[Batch], str | None]:
        """The micro-batches of a step, still on the host, or what is wrong with the data."""
        read = []
        for _ in range(self.config.train.accumulation_steps):
            started = time.perf_counter()
            try:
                read.append(next(batches))
            except DataError as error:  # of a loader process: its own message is the end of a printed traceback
                return [], str(error).rpartition("DataError: ")[2].strip()
            self.meters.add_batch(read[-1], time.perf_counter() - started)
        return read, None

    def _set_learning_rate(self) -> None:
        self.learning_rate = learning_rate_at(self.step, self.stage)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.learning_rate

    def _report(self) -> None:
        now = time.perf_counter()
        step, since = self.last_report
        norm, loss_scale = self.engine.get_global_grad_norm(), self._loss_scale()
        values = self.meters.report() | {
            "learning_rate": self.learning_rate,
            "grad_norm": float(norm) if norm is not None else float("nan"),
            "scale": self._scale(),
            "skipped_steps": self.skipped.total,
            "loss_scale": loss_scale.value if loss_scale is not None else 1.0,
            "wall_s": now - self.started_s,
            "seconds_per_step": (now - since) / max(1, self.step - step),
        }
        epochs = self.dataset.epochs_before(self.step * self.config.train.batch_size)
        values |= {f"source/{name}/epochs": number for name, number in epochs.items()}
        self.last_report = (self.step, now)
        self.log.write(self.step, self.stage.max_steps, values)
        self.bad_samples.count(int(values["data/bad_samples"]), int(values["data/samples"]))

    def _scale(self) -> float:
        with deepspeed.zero.GatheredParameters([self.model.logit_scale]):  # of stage 3; for the others it does nothing
            return float(self.task.scale().detach())

    def _evaluate(self) -> None:
        """Rank 0 evaluates on the held-out shards; the others wait in the next step's first collective."""
        if self.held_out is None:
            return
        model, weights = self.model, self._weights() if self.zero_stage == 3 else None
        if not parallel.is_main():
            return
        from mvptr_ds.evaluation.report import evaluate_model, flatten_scores

        if weights is not None:  # the engine's model gathers its partitions in collectives of all ranks
            model = model_folder.copy_of(self.model, weights, self.device)
        report = evaluate_model(model, self.vocabs, self.config, self.held_out, self.device)
        self.log.write_scores(self.step, flatten_scores(report))
        self.task.train()

    def save(self) -> None:
        """A checkpoint of this step; all ranks call it. One that cannot be written is reported, no more."""
        state = {
            "stage": self.dir.name,
            "batch_size": self.config.train.batch_size,
            "bucket_batches": self.config.data.bucket_batches,
            "accumulation_steps": self.config.train.accumulation_steps,
            "zero_stage": self.zero_stage,
            "precision": self.precision,
            "samples_seen": self.step * self.config.train.batch_size,
            "data": self.dataset.fingerprint,
            "trained_parts": self.task.trained_parts(),
            "skipped_steps": self.skipped.total,
            "samples": {"read": self.bad_samples.read, "bad": self.bad_samples.bad},
            "wandb_id": self.log.wandb_id,
            "versions": versions(),
        }
        weights = self._weights()
        path = checkpointing.save(
            self.dir / "checkpoints",
            self.step,
            state,
            self._write_engine,
            lambda path: model_folder.save_model_folder(path, self.model, weights, self.vocabs, self.config),
            self.config.train.keep_checkpoints,
            self.config.train.keep_every_steps,
        )
        if path is not None:
            self.saved_step = self.step

    def _weights(self) -> dict[str, torch.Tensor]:
        """The whole model on rank 0's host, what is trained in float32 whatever the engine computes in.

        All ranks call it, since the engine keeps its float32 weights in parts; on the others it is empty.
        """
        weights = dict(self.untrained)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                whole = deepspeed.utils.safe_get_full_fp32_param(parameter)
                if parallel.is_main():
                    weights[name] = (parameter if whole is None else whole).detach().cpu().clone()
        return weights

    def _catch_write_errors(self) -> None:
        """Holds back errors of the engine's own writes: raised inside, one would leave the others in a barrier.

        The second of them is private (the script that each checkpoint gets); constraints.txt pins the version.
        """
        self.write_errors: list[Exception] = []

        def holding_back(write: Callable[..., Any]) -> Callable[..., Any]:
            def held_back(*args: Any, **kwargs: Any) -> Any:
                try:
                    return write(*args, **kwargs)
                except (OSError, RuntimeError) as error:
                    self.write_errors.append(error)
                    return False

            return held_back

        for owner, name in ((self.engine.checkpoint_engine, "save"), (self.engine, "_copy_recovery_script")):
            setattr(owner, name, holding_back(getattr(owner, name)))

    def _write_engine(self, path: Path) -> None:
        self.write_errors.clear()
        self.engine.save_checkpoint(str(path.parent), tag=path.name, save_latest=False)
        if self.write_errors:
            raise self.write_errors[0]

    def _checkpoint(self) -> Path | None:
        """What to go on from, None for a fresh start.

        Raises:
            CheckpointError: it does not fit this run; found before the engine is built, which takes a while.
        """
        checkpointing.check_resume(self.config.train.resume)
        path = checkpointing.newest_good(self.dir / "checkpoints") if self.config.train.resume == "auto" else None
        if path is None:
            return None
        state = checkpointing.read_state(path)
        state.setdefault("bucket_batches", 0)
        for name, here in (
            ("batch_size", self.config.train.batch_size),
            ("bucket_batches", self.config.data.bucket_batches),
            ("precision", self.precision),
        ):
            if state.get(name, here) != here:
                raise checkpointing.CheckpointError(
                    f"{path} was written with {name} {state[name]}, this run has {here}: start it with {state[name]}, "
                    f"or elsewhere with run.init_from={self.dir}"
                )
        elastic.must_convert(path, state, parallel.num_ranks(), self.zero_stage)
        if state["data"] != self.dataset.fingerprint:
            what = f"other shards than {self.config.data.train} holds now: bring them back"
            if self.config.data.sources or not isinstance(state["data"], str):
                changes = "\n  - ".join(differences(state["data"], self.dataset.fingerprint))
                what = f"another mixture:\n  - {changes}\n  bring data.sources back"
            raise checkpointing.CheckpointError(
                f"{path} was trained on {what}, or start elsewhere with run.dir=... run.init_from={self.dir}"
            )
        problems = model_folder.differences(self.model, self.vocabs, path / "model")
        if state["trained_parts"] != self.task.trained_parts():
            problems.append(f"trained: {state['trained_parts']} there, {self.task.trained_parts()} here")
        if problems:
            raise checkpointing.CheckpointError(
                f"{path} does not fit this configuration:\n  - "
                + "\n  - ".join(problems)
                + "\n  use that of the run (config.yaml beside it), another run.dir, or train.resume=never"
            )
        return path

    def _resume(self, path: Path, filled: dict[str, Any]) -> None:
        """Builds the engine as it was at a checkpoint."""
        state, num_ranks = checkpointing.read_state(path), parallel.num_ranks()
        model_folder.load_weights(self.model, path / "model")  # what is not trained is in no file of the engine's
        self._hold_untrained()
        source, converted = path / "engine", elastic.must_convert(path, state, num_ranks, self.zero_stage)
        if converted:
            source = elastic.convert(path, self.dir / elastic.FOLDER, self.starting) / "engine"
            filled = filled | {"checkpoint": {"load_universal": True}}
        self._build_engine(filled)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.engine.load_checkpoint(str(source.parent), tag=source.name)
        if converted:
            self._mend_optimizer(settings, state["step"] - state["skipped_steps"])
        self.step = self.saved_step = state["step"]
        if state["num_ranks"] == num_ranks:
            checkpointing.restore_rng(path)
        else:
            checkpointing.seed_rng(self.seed, self.step)
        parallel.barrier()
        assembly.on_main(lambda: shutil.rmtree(self.dir / elastic.FOLDER, ignore_errors=True))
        self.skipped.total = state["skipped_steps"]
        self.bad_samples.count(state["samples"]["bad"], state["samples"]["read"])
        logger.info("%s goes on from step %d (%s)", self.dir.name, self.step, path)

    def _mend_optimizer(self, settings: list[dict[str, Any]], num_steps: int) -> None:
        """What deepspeed 0.19.8 gets wrong when it reads a universal checkpoint.

        Stage 3 gives every group the first one's weight decay, and one step count to all, which each of them then
        raises; the other stages leave the count on the host, where CUDA's fused AdamW does not take it.
        """
        for group, ours in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(ours)
            if "step" in group:  # apex counts the steps of a group
                group["step"] = num_steps
        for parameter, state in self.optimizer.state.items():
            if "step" in state:
                state["step"] = state["step"].to(parameter.device, copy=True)

    def close(self) -> None:
        """Frees the engine, so that the next stage has the memory."""
        self.log.close()
        parallel.time_collectives()
        self.engine.destroy()
        del self.engine, self.optimizer, self.task, self.model
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
