"""The runs of a comparison: each task fine-tuned from each start, with the overrides of its configuration."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mvptr_ds.checkpoints.hand_over import find_model
from mvptr_ds.config import Config, load_config
from mvptr_ds.demo.tasks import Task, build_task_shards
from mvptr_ds.errors import CheckpointError, DataError
from mvptr_ds.tasks import TASKS
from mvptr_ds.tasks.downstream import Downstream

STAGE2_ALONE = "stage2_alone"
ARMS = ("scratch", STAGE2_ALONE, "pretrained", "text_alone")
SCRATCH_FACTOR = 2.0  # of the learning rate: fresh weights have further to go
LEARNING_RATE = 5e-4
TAG_WITHHOLD_PROB = 0.3


@dataclass(frozen=True)
class Job:
    """One run of training, and its evaluation.

    Attributes:
        folder: of the run.
        overrides: of the configuration file `config`.
        after: the run that must be done before, whose model this one starts from.
        evaluates: whether a report is made of it.
        prepare: builds the shards that it reads, if they are missing.
    """

    task: str
    arm: str
    seed: int
    folder: Path
    config: str
    overrides: tuple[str, ...]
    after: Path | None = None
    evaluates: bool = True
    prepare: Callable[[], None] | None = None


@dataclass(frozen=True)
class Plan:
    """What all runs of a comparison share."""

    demo: Path
    out: Path
    steps: int
    scenes: int
    held_out_scenes: int
    batch_size: int
    overrides: tuple[str, ...]  # of every run, after its own
    config: Config  # of the demo run

    @classmethod
    def of(cls, demo: Path, out: Path, overrides: Sequence[str] = (), **sizes: int) -> Plan:
        """Reads the demo run.

        Args:
            sizes: `steps`, `scenes`, `held_out_scenes`, `batch_size`.

        Raises:
            CheckpointError: it holds no trained model.
            DataError: it was not trained on demo shards.
        """
        try:
            config = load_config(find_model(demo) / "mvptr.yaml")
        except CheckpointError as error:
            remedy = "train the demo first (make demo, or mvptr demo), or name it with --demo"
            raise CheckpointError(f"{error}; {remedy}") from error
        if config.data.demo_source is None:
            raise DataError(f"{demo} was not trained on demo shards: data.demo_source is null in its configuration")
        return cls(demo=demo, out=out, overrides=tuple(overrides), config=config, **sizes)

    @property
    def work(self) -> Path:
        """The folder of the runs: each source of demo shards has its own."""
        return self.out / str(self.config.data.demo_source)

    @property
    def shards(self) -> Path:
        """The folder of the demo's shards."""
        return Path(str(self.config.data.train)).parent


def jobs_of(plan: Plan, tasks: Sequence[Task], seeds: Sequence[int], arms: Sequence[str] = ARMS) -> list[Job]:
    """Returns every run; the one that others start from, which takes longest, comes first."""
    alone = _stage2_alone(plan)
    first = [alone] if STAGE2_ALONE in arms else []
    return [*first, *(_job(plan, task, arm, seed, alone) for seed in seeds for task in tasks for arm in arms)]


def _stage2_alone(plan: Plan) -> Job:
    """Returns the pre-training of stage 2 alone, of as many steps as both stages."""
    config = plan.config
    num_steps = config.stage1.max_steps + config.stage2.max_steps
    folder = plan.work / "pretraining" / STAGE2_ALONE
    overrides = [
        *_quiet(folder, config.run.seed),
        "run.stages=[2]",
        "run.init_from=null",
        f"stage2.max_steps={num_steps}",
        "data.num_workers=1",  # all of the comparison waits for this run
    ]
    return Job("pretraining", STAGE2_ALONE, config.run.seed, folder, _file(plan), tuple(overrides), evaluates=False)


def _file(plan: Plan) -> str:
    return str(find_model(plan.demo) / "mvptr.yaml")


def _job(plan: Plan, task: Task, arm: str, seed: int, alone: Job) -> Job:
    folder = plan.work / task / arm / f"seed-{seed}"
    starts = {"scratch": "null", STAGE2_ALONE: str(alone.folder)}
    start = starts.get(arm, str(plan.demo))
    rate = LEARNING_RATE * (SCRATCH_FACTOR if arm == "scratch" else 1.0)
    shards, demo = plan.work / "shards" / task, plan.shards
    overrides = [
        *_quiet(folder, seed),
        f"run.stages=[{task}]",
        f"run.init_from={start}",
        f"{task}.max_steps={plan.steps}",
        f"{task}.learning_rate={rate}",
        f"train.batch_size={plan.batch_size}",
        "data.demo_source=null",
        f"data.train={shards / 'train'}",
        f"data.sidecars=[{demo / 'train'}]",
        f"data.held_out={shards / 'held_out'}",
        f"data.held_out_sidecars=[{demo / 'held_out'}]",
        f"data.tag_withhold_prob={TAG_WITHHOLD_PROB}",
        "eval.withhold_tags=true",
        f"eval.controls=[{'permuted_pictures' if arm == 'pretrained' else ''}]",
        "eval.num_pictures=0",
        *([f"vqa.answers={shards / 'answers.json'}"] if task == "vqa" else []),
        *([f"data.permute_pictures={_other_pictures(task)}"] if arm == "text_alone" else []),
        *plan.overrides,
    ]
    after = alone.folder if arm == STAGE2_ALONE else None
    num_held_out = min(plan.held_out_scenes, plan.config.data.demo_held_out_scenes)
    sizes = plan.scenes, plan.config.run.seed, num_held_out
    prepare = functools.partial(build_task_shards, shards, demo, task, *sizes)
    return Job(task, arm, seed, folder, _file(plan), tuple(overrides), after, prepare=prepare)


def _other_pictures(name: str) -> str:
    task = TASKS[name]
    return task.other_pictures if isinstance(task, Downstream) else "picture"


def _quiet(folder: Path, seed: int) -> list[str]:
    """Returns what every run of a comparison has: one checkpoint at its end, and no looks in between."""
    return [
        f"run.dir={folder}",
        f"run.seed={seed}",
        "train.checkpoint_every_steps=0",
        "train.evaluate_every_steps=0",
        "train.preflight=false",
        "train.report_to=[]",
        "data.num_workers=0",
    ]
