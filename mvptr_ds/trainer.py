"""The training loop of every stage."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mvptr_ds import builders, ds_config, shard_folders
from mvptr_ds.checkpoints import model_folder, reshard
from mvptr_ds.checkpoints.checkpoint import CheckpointWriter
from mvptr_ds.checkpoints.resume import find_checkpoint
from mvptr_ds.checkpoints.rng import begin_rng, restore_rng, seed_rng
from mvptr_ds.checkpoints.state import CheckpointState, SampleCounts, read_state
from mvptr_ds.config import Config
from mvptr_ds.data.collate import Batch
from mvptr_ds.data.loader import make_loader
from mvptr_ds.data.on_device import BatchesOnDevice
from mvptr_ds.distributed import collectives
from mvptr_ds.engine import UNIVERSAL, Engine
from mvptr_ds.errors import DataError
from mvptr_ds.guards import SkippedSteps, any_rank
from mvptr_ds.held_out import HeldOut
from mvptr_ds.monitoring.bad_samples import BadSamples
from mvptr_ds.monitoring.meters import Meters
from mvptr_ds.monitoring.metrics import MetricsLog
from mvptr_ds.monitoring.timing import ProfileWindow, device_peak
from mvptr_ds.monitoring.versions import versions
from mvptr_ds.objectives.batch_plan import BatchPlan, ReadyBatch
from mvptr_ds.objectives.module import HEAD
from mvptr_ds.objectives.packed_batch import PackedBatch
from mvptr_ds.optim.optimizer import PARAMETER_ORDER, learning_rate_at
from mvptr_ds.stopping import StopSignal
from mvptr_ds.streams import stage_seed
from mvptr_ds.tasks import Task

logger = logging.getLogger(__name__)
MicroBatch = tuple[Batch, Batch | PackedBatch]  # on the host, for meters; and what the model reads


class Trainer:
    """One stage of a run: built, resumed where it stopped, trained to its last step.

    Args:
        task: what the stage trains.
        ds_content: the DeepSpeed JSON as written, with its `"auto"`.
        init_from: model folder whose weights the stage starts from, unless it resumes.
        stop: what tells of a signal.
        alive: called before each step.
        starting: called while lengths are measured or a checkpoint is converted.
        check_alone: raises where another start has taken the run folder; called by rank 0 before a checkpoint.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        ds_content: dict[str, Any],
        device: torch.device,
        init_from: Path | None,
        stop: StopSignal,
        alive: Callable[[], None] = lambda: None,
        starting: Callable[[], None] = lambda: None,
        check_alone: Callable[[], None] = lambda: None,
    ) -> None:
        self.alive, self.starting, self.check_alone = alive, starting, check_alone
        self.started_s = time.perf_counter()
        self.config, self.device, self.task = config, device, task
        self.stage = config.stage(task.name)
        self.dir = Path(config.run.dir) / task.name
        self.seed = stage_seed(task.name, config.run.seed)  # of all chance in this stage
        self.step, self.saved_step = 0, 0
        self.known_step = 0  # up to which it is known whether the weights were updated
        self.resumed_from: Path | None = None
        self.profile = ProfileWindow(config.train.profile_steps, self.dir / "profile")
        self.skipped = SkippedSteps(config.train.max_skipped_in_row)
        self.bad_samples = BadSamples(config.data.max_bad_fraction, Path(config.run.dir))
        self.stop = stop
        self.vocabs = builders.build_vocabs(config.data)
        filled = builders.filled_ds_config(config, ds_content)
        self.precision, self.zero_stage = ds_config.precision_of(filled), ds_config.zero_stage_of(filled)
        self._build_data()
        self._build_module()
        self.factors = {part: float(f) for part, f in task.learning_rate_factors(config).items() if f != 1}
        self._start_engine(filled, init_from)
        self.held_out = HeldOut(config, task, self.vocabs, self.held_out_index, device, self.dir, self.step)
        self.meters = self._build_meters()
        self.log = MetricsLog(self.dir, self.step, config)
        content = json.dumps(filled, indent=1) + "\n"
        collectives.run_on_rank_zero(lambda: (self.dir / "ds_config.json").write_text(content, encoding="utf-8"))

    def train(self) -> bool:
        """Trains to the stage's end, or to the step at which a signal asks to stop; both are saved. True at the end.

        Raises:
            CheckpointError, StorageError: either could not be saved.
        """
        train = self.config.train
        self.stop.note_only()
        if self.resumed_from is not None:
            self._say_what_is_left(self.resumed_from)
        if self.held_out.evaluations.lacks(self.step) and self._due(train.evaluate_every_steps):
            self.starting()
            self._evaluate()  # an earlier start was ended between the checkpoint of this step and its score
        if self._has_ended():
            return True
        self.last_report = (self.step, time.perf_counter())
        with self.profile:
            batches = self._batches()
            while not self._has_ended():
                self.alive()
                self.profile.begin(self.step)
                micro_batches, problem = self._next_micro_batches(batches)
                if self._must_stop(problem):
                    return False
                self._train_step(micro_batches)
                self.step += 1
                self.profile.end(self.step)
                self._count_skipped(newest=False)
                if self._due(train.log_every_steps):
                    self._report()
                ends = self.step == self.stage.max_steps
                if ends or self._due(train.checkpoint_every_steps):
                    self.save(must=ends)
                if self._due(train.evaluate_every_steps):
                    self._evaluate()
        return True

    def _train_step(self, micro_batches: list[MicroBatch]) -> None:
        """One update of the weights, from the gradients of all micro-batches."""
        self.learning_rate = learning_rate_at(self.step, self.stage)
        self.engine.set_learning_rate(self.learning_rate)
        for accumulation, (batch, read) in enumerate(micro_batches):
            with self.meters.clock("forward"):
                output = self.engine.forward(read, self.step, accumulation)
            with self.meters.clock("backward"):
                self.engine.backward(output.loss)
            with self.meters.clock("step"):
                self.engine.step()
            self.meters.add_parts(output.parts, batch.source_B)

    def _next_micro_batches(self, batches: Iterator[MicroBatch]) -> tuple[list[MicroBatch], DataError | None]:
        """The micro-batches of a step, or what is wrong with the data."""
        micro_batches: list[MicroBatch] = []
        for _ in range(self.config.train.accumulation_steps):
            started_s = time.perf_counter()
            try:
                micro_batches.append(next(batches))
            except DataError as error:  # of a loader process: its own message is the end of a printed traceback
                return [], type(error)(str(error).rpartition(f"{type(error).__name__}: ")[2].strip())
            batch = micro_batches[-1][0]
            self.meters.add_batch(batch, time.perf_counter() - started_s)
            self.bad_samples.note(batch.bad)
        return micro_batches, None

    def _must_stop(self, problem: DataError | None) -> bool:
        """Whether any rank got a signal: the step is then saved, and all of them stop.

        Raises:
            DataError: on all ranks, where one of them had a problem with its data.
        """
        stop, failed = any_rank([self.stop.received is not None, problem is not None], self.device)
        if failed or stop:
            self._write_bad_samples()
        if failed:
            raise next(p for p in collectives.gather_objects(problem) if p is not None)
        if stop:
            if self.saved_step != self.step:
                self.save(must=True)
            logger.info(
                "%s stopped at step %d, as asked (%s)", self.dir.name, self.step, self.stop.received or "another rank"
            )
        return stop

    def _count_skipped(self, newest: bool) -> None:
        """Counts the steps that were left out; the newest one only if asked for, since that waits for the device.

        Raises:
            TrainingError: too many of them in a row.
        """
        for applied in self.engine.updates_applied(newest):
            self.known_step += 1
            self.skipped.count(self.known_step, applied, self.engine.loss_scale())

    def _due(self, every_steps: int) -> bool:
        return every_steps > 0 and (self.step % every_steps == 0 or self.step == self.stage.max_steps)

    def _report(self) -> None:
        """Logs what the steps since the last report came to."""
        self._count_skipped(newest=True)
        now_s = time.perf_counter()
        step, since_s = self.last_report
        loss_scale = self.engine.loss_scale()
        values = self.meters.report() | {
            "learning_rate": self.learning_rate,
            "grad_norm": self.engine.grad_norm(),
            "scale": self.engine.logit_scale(),
            "skipped_steps": self.skipped.total,
            "loss_scale": loss_scale.value if loss_scale is not None else 1.0,
            "wall_s": now_s - self.started_s,
            "seconds_per_step": (now_s - since_s) / max(1, self.step - step),
        }
        epochs = self.dataset.epochs_before(self.step * self.config.train.batch_size)
        values |= {f"source/{name}/epochs": number for name, number in epochs.items()}
        self.last_report = (self.step, now_s)
        self.log.write(self.step, self.stage.max_steps, values)
        if values["data/bad_samples"]:  # of all ranks
            self._write_bad_samples()
        self.bad_samples.count(int(values["data/bad_samples"]), int(values["data/samples"]))
        self.bad_samples.check(self.save)

    def _write_bad_samples(self) -> None:
        self.bad_samples.write(stage=self.dir.name, step=self.step)

    def _evaluate(self) -> None:
        if self.held_out.index is None:
            return
        module = self.engine.whole_module(lambda model: self.task.build(self.config, model, self.seed))
        try:
            self.held_out.evaluate(
                module, self.step, self.log, self.stop,
                lambda must: self.step if self.saved_step == self.step else self.save(must),
            )  # fmt: skip
        finally:
            self.module.train()

    def _has_ended(self) -> bool:
        return self.step >= self.stage.max_steps or self.held_out.evaluations.stopped_at is not None

    def save(self, must: bool = False) -> int:
        """Saves a checkpoint of this step; all ranks call it. One that cannot be written is reported, no more.

        Returns:
            The step of the newest checkpoint, 0 where there is none.

        Raises:
            CheckpointError, StorageError: it cannot be written and `must`, since the run ends with it.
            TrainingError: the last steps were left out, too many in a row.
        """
        self._count_skipped(newest=True)
        collectives.of_main(self.check_alone)
        train, weights = self.config.train, self.engine.weights()
        keep = train.keep_checkpoints, train.keep_every_steps
        writer = CheckpointWriter(self.dir / "checkpoints", *keep, self.held_out.best_step)
        state = self._state(self.log.wandb_id)
        model, settings = self.module.model, self.module.head_settings

        def write_model(path: Path) -> None:
            model_folder.save_model_folder(path, model, weights, self.vocabs, self.config, settings)

        if writer.save(state, self.engine.save, write_model, must) is not None:
            self.saved_step = self.step
        return self.saved_step

    def close(self) -> None:
        """Frees the engine, so that the next stage has the memory."""
        self.log.close()
        collectives.time_collectives()
        del self.module
        self.engine.destroy()
        del self.engine
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ---- before the first step, in this order

    def _build_data(self) -> None:
        data = self.config.data
        joins = Path(self.config.run.dir) / "joins"
        evaluates = data.held_out is not None and self.config.train.evaluate_every_steps > 0
        self.held_out_index = shard_folders.open_held_out(data, joins) if evaluates else None
        self.dataset = builders.build_dataset(
            self.config, self.vocabs, self.task.name, self.task.sample_needs(self.config), self.seed, joins
        )
        self.batches = builders.build_batches(self.config, self.dataset, self.seed, joins, self.starting)

    def _build_module(self) -> None:
        model = builders.build_model(self.config, self.vocabs)
        extractors = {name for source in self.dataset.sources for name in source.index.region_extractors()}
        model.config.region_extractors = sorted(extractors)  # whoever uses the model wants the same boxes
        self.module = self.task.build(self.config, model, self.seed, per_sample=bool(self.dataset.names))
        self.module.freeze_untrained()

    def _start_engine(self, filled: dict[str, Any], init_from: Path | None) -> None:
        """Builds the engine as it was at the newest checkpoint; without one, with the weights of another model."""
        checkpoint = find_checkpoint(self.dir, self._state(), self.config, self.module.model, self.vocabs)
        if checkpoint is not None:
            self._resume(checkpoint, filled)
            return
        if init_from is not None:
            fresh = model_folder.init_from_folder(self.module, self.vocabs, init_from, self.task.fresh_weights)
            logger.info("%s starts from %s", self.dir.name, init_from)
            if fresh:
                logger.info("%s starts with fresh weights for %s", self.dir.name, ", ".join(fresh))
        if init_from is None or any(name.startswith(HEAD) for name in fresh):
            self.module.begin_head(self.vocabs.words)
        self._build_engine(filled)

    def _state(self, wandb_id: str | None = None) -> CheckpointState:
        """The state at this step, which a checkpoint holds and a resume compares with a saved one."""
        train = self.config.train
        return CheckpointState(
            step=self.step,
            num_ranks=collectives.num_ranks(),
            stage=self.dir.name,
            batch_size=train.batch_size,
            bucket_batches=self.config.data.bucket_batches,
            zero_stage=self.zero_stage,
            precision=self.precision,
            data=self.dataset.fingerprint,
            trained_parts=self.module.parts_in_training(),
            learning_rate_factors=self.factors,
            optimizer=self.config.optim.name,
            parameter_order=PARAMETER_ORDER,
            accumulation_steps=train.accumulation_steps,
            samples_seen=self.step * train.batch_size,
            skipped_steps=self.skipped.total,
            samples=SampleCounts(read=self.bad_samples.read, bad=self.bad_samples.bad),
            wandb_id=wandb_id,
            versions=versions(),
        )

    def _build_engine(self, filled: dict[str, Any]) -> None:
        config = self.config
        self.engine = Engine(self.module, filled, config.optim, self.stage.learning_rate, self.device, self.factors)
        begin_rng(self.seed)
        steps_on = ds_config.optimizer_device(filled, self.device)
        for line in builders.kernel_report(config, self.device, ds_config.DTYPES[self.precision], steps_on):
            logger.info("%s", line)
        num_millions = self.engine.num_trained / 1e6
        logger.info(
            "%s: %.*f M parameters trained on %d ranks (%s), %d samples a step, %d samples in %s",
            self.dir.name, 1 if num_millions >= 0.1 else 4, num_millions, collectives.num_ranks(), self.precision,
            config.train.batch_size, self.dataset.num_samples, config.data.train or ", ".join(config.data.sources),
        )  # fmt: skip

    def _resume(self, path: Path, filled: dict[str, Any]) -> None:
        """Builds the engine as it was at a checkpoint."""
        saved, num_ranks = read_state(path), collectives.num_ranks()
        model_folder.load_weights(self.module, path / "model")  # what is not trained is in no file of the engine's
        if reshard.needs_conversion(path, saved, num_ranks, self.zero_stage):
            universal = reshard.convert(path, self.dir / reshard.FOLDER, self.starting)
            self._build_engine(filled | UNIVERSAL)
            self.engine.load(universal / "engine", universal_steps=saved.step - saved.skipped_steps)
        else:
            self._build_engine(filled)
            self.engine.load(path / "engine", universal_steps=None)
        before, now = saved.optimizer, self.config.optim.name
        if before != now:
            logger.info("optim.name=%s instead of %s goes on with its moments; mind learning_rate", now, before)
        self.step = self.saved_step = self.known_step = saved.step
        if saved.num_ranks == num_ranks:
            restore_rng(path)
        else:
            seed_rng(self.seed, self.step)
        collectives.barrier()
        collectives.run_on_rank_zero(lambda: shutil.rmtree(self.dir / reshard.FOLDER, ignore_errors=True))
        self.skipped.total = saved.skipped_steps
        self.bad_samples.count(saved.samples.bad, saved.samples.read)
        self.bad_samples.check(lambda: self.saved_step)
        self.resumed_from = path

    def _say_what_is_left(self, path: Path) -> None:
        name, asked, ended = self.dir.name, self.stage.max_steps, self.held_out.evaluations.why_stopped()
        if ended is not None:
            logger.info("%s is finished: %s", name, ended)
        elif self.step < asked:
            logger.info("%s goes on from step %d (%s)", name, self.step, path)
        else:
            logger.info("%s is finished: %s.max_steps=%d, and %s has done %d", name, name, asked, path, self.step)

    def _build_meters(self) -> Meters:
        flops = self.task.step_flops(self.module, collectives.num_ranks())
        peak = device_peak(self.device, ds_config.DTYPES[self.precision])
        meters = Meters(self.device, self.dataset.names, flops, peak)
        collectives.time_collectives(lambda: meters.clock("communication"))
        return meters

    def _batches(self) -> Iterator[MicroBatch]:
        """The micro-batches from this step to the last one."""
        plan = self.module.batch_plan()
        loaded = iter(self._loader(plan))
        if plan is None:  # the task packs them itself
            return ((batch, batch) for batch in loaded)
        first, accumulation_steps = self.step, self.config.train.accumulation_steps

        def read_of(ready: ReadyBatch, number: int) -> PackedBatch:
            step, accumulation = divmod(number, accumulation_steps)
            self.module.complete(ready.packed, first + step, accumulation)
            return ready.packed

        pairs = BatchesOnDevice(loaded, self.device, read_of)
        return ((ready.batch, read) for ready, read in pairs)

    def _loader(self, plan: BatchPlan | None) -> Any:
        data = self.config.data
        return make_loader(
            self.dataset,
            self.batches,
            self.step,
            self.stage.max_steps,
            collectives.rank(),
            collectives.num_ranks(),
            self.config.train.accumulation_steps,
            num_workers=data.num_workers,
            prefetch_batches=data.prefetch_batches,
            pin_memory=self.device.type == "cuda",
            pack=plan,
        )
