"""The errors that users make: one message with values and remedy, exit code 2, and a section in docs/errors.md."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import re
import resource
import shutil
import socket
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from mvptr_ds import train
from mvptr_ds.checkpoints.run_lock import RunLock
from mvptr_ds.config import load_config
from mvptr_ds.data.schema import Caption, Extractor, Record
from mvptr_ds.data.shards.sidecars import sidecar_json
from mvptr_ds.data.shards.tar_writer import write_tar
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.data.sharing import CollateAndSend
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.demo.build import build_demo_shards
from mvptr_ds.distributed import collectives
from mvptr_ds.ds_config import load_ds_config
from mvptr_ds.engine import Engine
from mvptr_ds.guards import LossScale, SkippedSteps
from mvptr_ds.monitoring.bad_samples import BadSamples
from mvptr_ds.stopping import StopSignal
from mvptr_ds.tasks import TASKS
from mvptr_ds.trainer import Trainer
from tests.conftest import REPO
from tests.support.published_states import published_checkpoint
from tests.support.tools import run_tool

DOCS = REPO / "docs" / "errors.md"
TINY = (
    "model.hidden_size=16", "model.intermediate_size=16", "model.num_attention_heads=2", "model.num_text_layers=1",
    "model.num_visual_layers=1", "model.num_cross_layers=1", "visual.image_size=32", "data.demo_source=null",
    "run.stages=[1]", "train.batch_size=8", "train.round_batch_size=false", "stage1.max_steps=4",
)  # fmt: skip


@dataclass
class Place:
    """What a case may spoil: its own shards, a checkpoint at step 2 in run/, a DeepSpeed JSON, and the arguments."""

    dir: Path
    patch: pytest.MonkeyPatch
    arguments: list[str] = field(default_factory=list)
    at_end: list[socket.socket] = field(default_factory=list)  # held until then
    imports: list[str] = field(default_factory=list)  # arguments of import_model.py, where that is what fails

    @property
    def shards(self) -> Path:
        return self.dir / "shards"

    @property
    def tar(self) -> Path:
        return self.shards / "train" / "shard-000000.tar"

    def without_index(self) -> None:
        for name in ("manifest.json", "index.npy"):
            (self.shards / "train" / name).unlink()

    def deepspeed(self, **changes: Any) -> None:
        content = json.loads((REPO / "ds_configs/z2.json").read_text(encoding="utf-8")) | changes
        (self.dir / "ds.json").write_text(json.dumps(content), encoding="utf-8")
        self.arguments += ["--deepspeed", str(self.dir / "ds.json")]

    def checkpoint(self, **changes: Any) -> None:
        """Written by the trainer itself, but for the engine's files; then `state.json` is changed."""
        config = load_config("demo", arguments_for(self))
        content = load_ds_config(REPO / "ds_configs/z2.json")
        trainer = Trainer(config, TASKS["stage1"], content, torch.device("cpu"), None, StopSignal())
        trainer.step = 2
        trainer.save()
        path = self.dir / "run/stage1/checkpoints/step-00000002"
        state = json.loads((path / "state.json").read_text(encoding="utf-8")) | changes
        (path / "state.json").write_text(json.dumps(state), encoding="utf-8")
        sums = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
        sums["state.json"] = hashlib.sha256((path / "state.json").read_bytes()).hexdigest()
        (path / "checksums.json").write_text(json.dumps(sums), encoding="utf-8")


def arguments_for(place: Place) -> list[str]:
    names = {"word_vocab": "word_vocab.txt", "phrase_vocab": "phrase_vocab.json"}
    paths = {key: place.shards / names.get(key, key) for key in ("train", "held_out", *names)}
    return [*TINY, *(f"data.{key}={path}" for key, path in paths.items()), f"run.dir={place.dir / 'run'}"]


CASES: dict[str, Callable[[Place], Any]] = {}


def case(function: Callable[[Place], Any]) -> Callable[[Place], Any]:
    CASES[function.__name__.replace("_", "-")] = function
    return function


def overrides(name: str, *arguments: str) -> None:
    CASES[name] = lambda place: place.arguments.extend(arguments)


overrides("unknown-key", "train.batchsize=8")
overrides("wrong-value", "train.batch_size=many")
overrides("bad-override", "train.batch_size")
overrides("not-yaml", "run.stages=[1")
overrides("no-config", "--config", "nowhere.yaml")
overrides("no-deepspeed-json", "--deepspeed", "nowhere.json")
overrides("unknown-stage", "run.stages=[3]")
overrides("objective-of-another-stage", "stage1.weights.vsc=1")
overrides("scope-value", "task.vsc.scope=all")
overrides("resume-value", "train.resume=always")
overrides("profile-steps", "train.profile_steps=[100]")
overrides("unknown-optimiser", "optim.name=adam")
overrides("wandb-mode", "wandb.mode=live")
overrides("slots-beyond-positions", "data.max_text_slots=100")
overrides("no-phrase-vocabulary", "data.phrase_vocab=null")
overrides("phrase-vocabulary-missing", "data.phrase_vocab=nowhere.json")
overrides("phrase-vocabulary-of-other-words", "data.word_vocab=null")
overrides("word-vocabulary-missing", "data.word_vocab=nowhere.txt")
overrides("no-shards", "data.train=nowhere")
overrides("no-storage", "data.train='pipe:cat shards.tar'")
overrides("url-without-index", "data.train=memory://nowhere")
overrides("read-options", "data.read_retries=-1")
overrides("init-from-nothing", "run.init_from=nowhere")
overrides("no-backbone", "visual.backbone_config=null")
overrides("train-and-sources", "data.sources.coco.shards=coco")
overrides("nothing-to-train-on", "data.train=null")
overrides("demo-without-train", "data.train=null", "data.sources.coco.shards=coco", "data.demo_source=shapes")
overrides("source-without-shards", "data.train=null", "data.sources.coco.weight=3")
overrides("bucket-batches-value", "data.bucket_batches=-1")
overrides("source-name", "data.train=null", "data.sources={co co: {shards: coco}}")
overrides("source-weight", "data.train=null", "data.sources.coco={shards: coco, weight: 0}")
overrides("unknown-demo-source", "data.demo_source=photos")
overrides("missing-partners-value", "data.missing_partners=skip")
overrides("key-of-another-section", "data.batch_size=8")
overrides("several-wrong-values", "data.num_workers=-1", "optim.learning_rate=1e-4", "optim.beta2=1.5")
overrides("no-such-user", "run.dir=~nobody-here/runs")
overrides("demo-task-without-pictures", "data.demo_source=shapes", "data.demo_task=vqa")
overrides("demo-behind-a-url", "data.train=memory://shards", "data.demo_source=shapes")


@case
def key_given_twice(place: Place) -> None:
    (place.dir / "mine.yaml").write_text("extends: demo\ndata: {}\ntrain: {}\ndata: {}\n", encoding="utf-8")
    place.arguments += ["--config", str(place.dir / "mine.yaml")]


@case
def config_not_utf_8(place: Place) -> None:
    (place.dir / "mine.yaml").write_bytes("run: {dir: runs/ä}".encode("latin-1"))
    place.arguments += ["--config", str(place.dir / "mine.yaml")]


@case
def extends_several(place: Place) -> None:
    (place.dir / "mine.yaml").write_text("extends: [base, demo]", encoding="utf-8")
    place.arguments += ["--config", str(place.dir / "mine.yaml")]


@case
def key_twice_in_the_deepspeed_json(place: Place) -> None:
    place.deepspeed()
    path = place.dir / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 1},\n' + path.read_text(encoding="utf-8")[1:], encoding="utf-8")


@case
def batch_not_divisible(place: Place) -> None:
    """Three ranks; what needs the others is left out."""
    place.arguments.append("train.preflight=false")
    place.patch.setattr("mvptr_ds.distributed.collectives.num_ranks", lambda: 3)
    place.patch.setattr("mvptr_ds.distributed.collectives.broadcast_object", lambda value: value)
    place.patch.setattr("mvptr_ds.train.prepare_shards", lambda *_: None)
    place.patch.setattr("mvptr_ds.distributed.collectives.run_on_rank_zero", lambda function: function())


@case
def batch_of_a_run_not_divisible(place: Place) -> None:
    place.checkpoint()
    batch_not_divisible(place)


@case
def log_every_steps(place: Place) -> None:
    place.arguments.append("train.log_every_steps=0")


@case
def execution_value(place: Place) -> None:
    place.arguments.append("model.execution=ragged")


@case
def manifest_of_other_tars(place: Place) -> None:
    place.tar.write_bytes(place.tar.read_bytes() + bytes(512))


@case
def shard_missing(place: Place) -> None:
    place.tar.unlink()


@case
def index_of_another_manifest(place: Place) -> None:
    path = place.shards / "train" / "index.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


@case
def shard_cut(place: Place) -> None:
    place.without_index()
    place.tar.write_bytes(place.tar.read_bytes()[:5000])


@case
def shards_below_the_folder(place: Place) -> None:
    place.arguments.append(f"data.train={place.shards}")


@case
def tars_of_img2dataset(place: Place) -> None:
    (place.dir / "raw").mkdir()
    with tarfile.open(place.dir / "raw/00000.tar", "w") as tar:
        for extension in ("jpg", "json", "txt"):
            content = json.dumps({"caption": "a dog", "url": "x"}).encode() if extension == "json" else b"a dog"
            info = tarfile.TarInfo(f"000000000.{extension}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    place.arguments.append(f"data.train={place.dir / 'raw'}")


@case
def index_cannot_be_written(place: Place) -> None:
    """Root may write everywhere; tests/unit/test_shards.py has a folder that may not be written."""
    place.without_index()

    def write(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    place.patch.setattr("mvptr_ds.data.shards.index_builder._write_index", write)


@case
def schema_of_shards(place: Place) -> None:
    place.without_index()
    place.tar.write_bytes(place.tar.read_bytes().replace(b'{"schema":1', b'{"schema":2'))


def sidecar(place: Place, *entries: tuple[str, str]) -> None:
    """A sidecar of (key, version) without regions."""
    (place.dir / "sidecar").mkdir()
    items = [(key, {"json": sidecar_json(Extractor("detr", version), regions=())}) for key, version in entries]
    write_tar(place.dir / "sidecar" / "shard-000000.tar", items)
    place.arguments.append(f"data.sidecars=[{place.dir / 'sidecar'}]")


@case
def sidecar_of_other_keys(place: Place) -> None:
    sidecar(place, ("391895", "1"))


@case
def sidecars_without_a_common_record(place: Place) -> None:
    sidecar(place, ("train-000000", "1"))
    shutil.move(place.dir / "sidecar", place.dir / "first")
    sidecar(place, ("train-000001", "1"))
    place.arguments[-1] = f"data.sidecars=[{place.dir / 'first'},{place.dir / 'sidecar'}]"


@case
def sidecar_without_regions(place: Place) -> None:
    write_shards(place.dir / "text", [("train-000000", Record("a", 9, 9, (Caption("a red circle"),)), {})], 1)
    sidecar(place, ("train-000000", "1"))
    place.arguments.append(f"data.train={place.dir / 'text'}")


@case
def mixed_extractors(place: Place) -> None:
    sidecar(place, ("train-000000", "1"), ("train-000001", "2"))


@case
def held_out_of_another_extractor(place: Place) -> None:
    sidecar(place, ("train-000000", "1"))
    place.arguments.append("data.held_out_sidecars=[]")


@case
def tars_beside_the_index(place: Place) -> None:
    shutil.copy(place.tar, place.tar.with_name("more.tar"))


@case
def sidecar_as_shards(place: Place) -> None:
    sidecar(place, ("train-000000", "1"))
    place.arguments[-1:] = [f"data.train={place.dir / 'sidecar'}"]


@case
def shards_as_sidecar(place: Place) -> None:
    write_shards(place.dir / "text", [("a", Record("a", 0, 0, (Caption("a red circle"),)), {})], 1)
    place.arguments.append(f"data.sidecars=[{place.dir / 'text'}]")


@case
def text_only_in_stage_2(place: Place) -> None:
    write_shards(place.dir / "text", [("a", Record("a", 0, 0, (Caption("a red circle"),)), {})], 1)
    place.arguments += [f"data.train={place.dir / 'text'}", "run.stages=[2]", "run.init_from=null"]


def mixture(place: Place, **weights: float | None) -> None:
    """`pairs` is the training split; `text` has one record without a picture."""
    write_shards(place.dir / "text", [("a", Record("a", 0, 0, (Caption("dog"),)), {})], 9)
    folders = {"pairs": place.shards / "train", "text": place.dir / "text"}
    place.arguments.append("data.train=null")
    for name, weight in weights.items():
        section = f"{{shards: {folders[name]}, weight: {'null' if weight is None else weight}}}"
        place.arguments.append(f"data.sources.{name}={section}")


@case
def weights_of_some_sources(place: Place) -> None:
    mixture(place, pairs=3, text=None)


@case
def mixture_block_too_short(place: Place) -> None:
    mixture(place, pairs=9, text=1)
    place.arguments.append("data.mixture_block_samples=8")


@case
def mixture_block_too_long(place: Place) -> None:
    mixture(place, pairs=3e7, text=1)


@case
def text_only_source_in_stage_2(place: Place) -> None:
    mixture(place, pairs=3, text=1)
    place.arguments += ["run.stages=[2]", "run.init_from=null"]


@case
def checkpoint_of_another_mixture(place: Place) -> None:
    place.checkpoint()
    mixture(place, pairs=3, text=1)


@case
def text_only_held_out(place: Place) -> None:
    write_shards(place.dir / "text", [("a", Record("a", 0, 0, (Caption("a red circle"),)), {})], 1)
    place.arguments += [f"data.held_out={place.dir / 'text'}", "train.evaluate_every_steps=2"]


@case
def schema_of_index(place: Place) -> None:
    path = place.shards / "train" / "manifest.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"schema": 1', '"schema": 2'), encoding="utf-8")


@case
def deepspeed_json_disagrees(place: Place) -> None:
    place.deepspeed(train_batch_size=64, optimizer={"type": "AdamW"})


@case
def lamb_with_zero_3(place: Place) -> None:
    place.arguments.append("optim.name=lamb")
    place.deepspeed(zero_optimization={"stage": 3})


@case
def zero_stage_0(place: Place) -> None:
    place.deepspeed(zero_optimization={"stage": 0})


@case
def checkpoint_of_zero_stage_0(place: Place) -> None:
    place.checkpoint(zero_stage=0)


@case
def steps_unchecked(place: Place) -> None:
    place.deepspeed(zero_optimization={"stage": 1, "compute_grad_norm": False})


@case
def round_robin_gradients(place: Place) -> None:
    place.deepspeed(zero_optimization={"stage": 2, "round_robin_gradients": True})


@case
def fp16_without_gpu(place: Place) -> None:
    place.patch.setattr("mvptr_ds.ds_config.precision_supported", lambda: (False, False))
    place.deepspeed(fp16={"enabled": True}, bf16={"enabled": False})


@case
def bf16_on_an_old_gpu(place: Place) -> None:
    place.patch.setattr("mvptr_ds.ds_config.precision_supported", lambda: (False, True))
    place.patch.setattr("torch.cuda.is_available", lambda: True)
    place.patch.setattr("torch.cuda.get_device_name", lambda: "Tesla V100-SXM2-32GB")
    place.deepspeed(bf16={"enabled": True})


@case
def run_folder_cannot_be_written(place: Place) -> None:
    (place.dir / "file").write_text("", encoding="utf-8")
    place.arguments.append(f"run.dir={place.dir / 'file' / 'run'}")


@case
def demo_folder_taken(place: Place) -> None:
    (place.shards / "demo.json").unlink()
    place.arguments.append("data.demo_source=shapes")


@case
def demo_task_of_too_many_scenes(place: Place) -> None:
    pictures = f"data.sidecars=[{place.shards / 'train'}]"
    scenes = ("data.demo_train_scenes=48", "data.demo_held_out_scenes=4")
    place.arguments += ["data.demo_source=shapes", "data.demo_task=vqa", pictures, *scenes]


@case
def demo_of_other_arguments(place: Place) -> None:
    place.arguments += ["data.demo_source=shapes", "data.demo_train_scenes=64", "data.demo_held_out_scenes=4"]


@case
def checkpoint_of_another_zero_stage(place: Place) -> None:
    place.checkpoint(zero_stage=3)


@case
def checkpoint_of_another_precision(place: Place) -> None:
    place.checkpoint(precision="bf16")


@case
def checkpoint_of_another_batch(place: Place) -> None:
    place.checkpoint()
    place.arguments.append("train.batch_size=16")


@case
def checkpoint_of_other_factors(place: Place) -> None:
    place.checkpoint(learning_rate_factors={"head": 10.0})


@case
def checkpoint_of_other_buckets(place: Place) -> None:
    place.checkpoint()
    place.arguments.append("data.bucket_batches=4")


@case
def checkpoint_of_other_shards(place: Place) -> None:
    place.checkpoint(data="0" * 64)


@case
def checkpoint_of_another_model(place: Place) -> None:
    place.checkpoint()
    place.arguments += ["model.hidden_size=32", "model.tie_word_heads=false"]


@case
def checkpoint_of_other_objectives(place: Place) -> None:
    place.checkpoint()
    place.arguments.append("stage1.weights.mcr_phrases=0")


@case
def checkpoint_of_another_order(place: Place) -> None:
    place.checkpoint()
    place.arguments += ["run.seed=1", "data.window_blocks=16", "data.max_regions=9"]  # a cap, but no buckets


@case
def checkpoint_of_other_caps_of_buckets(place: Place) -> None:
    place.patch.setattr(sys.modules[__name__], "TINY", (*TINY, "data.bucket_batches=1"))
    place.checkpoint()
    place.arguments += ["data.max_regions=9"]


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


@case
def no_good_checkpoint(place: Place) -> None:
    place.checkpoint()
    damage(place.dir / "run/stage1/checkpoints/step-00000002/model/model.safetensors")


@case
def init_from_a_damaged_checkpoint(place: Place) -> None:
    no_good_checkpoint(place)
    path = place.dir / "run/stage1/checkpoints/step-00000002"
    place.arguments += [f"run.init_from={path}", f"run.dir={place.dir / 'new'}"]


@case
def begins_anew_from_itself(place: Place) -> None:
    place.checkpoint()
    place.arguments += [f"run.init_from={place.dir / 'run'}", "train.resume=never"]


@case
def last_save_failed(place: Place) -> None:
    def fail(_: Engine, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    place.patch.setattr(Engine, "save", fail)
    place.patch.setattr(Trainer, "train", lambda trainer: trainer.save(must=True))


@case
def run_folder_taken(place: Place) -> None:
    place.patch.setattr("mvptr_ds.checkpoints.run_lock.WAIT_S", 0.0)
    lock = RunLock(place.dir / "run")
    lock.take()
    lock._released.set()  # its thread has nothing to renew when the test is over


overrides("max-steps-value", "stage1.max_steps=0")
overrides("stage-2-without-stage-1", "run.stages=[2]")
overrides("several-errors", "train.profile_steps=[100]", "run.stages=[2]")


@case
def stage_2_before_stage_1_is_done(place: Place) -> None:
    place.checkpoint()
    place.arguments.append("run.stages=[2]")


@case
def init_from_another_model(place: Place) -> None:
    place.checkpoint()
    place.arguments += [f"run.init_from={place.dir / 'run'}", f"run.dir={place.dir / 'new'}"]
    place.arguments += ["model.hidden_size=32", "data.phrase_vocab=null", "stage1.weights.mcr_phrases=0"]


overrides("fine-tuning-without-a-start", "run.stages=[entailment]", "train.preflight=false")


@case
def patience_without_evaluation(place: Place) -> None:
    place.checkpoint()
    place.arguments += ["run.stages=[retrieval]", "retrieval.patience=3", f"run.init_from={place.dir / 'run'}"]


@case
def sizes_of_another_model(place: Place) -> None:
    place.checkpoint()
    place.arguments += ["run.stages=[entailment]", f"run.init_from={place.dir / 'run'}", "model.hidden_size=32"]


@case
def features_that_are_not_there(place: Place) -> None:
    place.arguments += ["visual.source=features", "visual.feature_dim=16"]


@case
def nothing_to_learn(place: Place) -> None:
    place.arguments += ["stage1.weights={mlm: 1, mcr_tags: 1, mcr_regions: 0, mcr_phrases: 0}"]
    place.arguments += ["stage1.masking.word_prob=0", "data.tag_withhold_prob=1"]


@case
def samples_that_cannot_be_used(place: Place) -> None:
    """Reads a sample, which training does later, in a loader process."""
    place.arguments += ["visual.source=features", "visual.feature_dim=16", "train.preflight=false"]
    place.patch.setattr(Trainer, "_build_engine", lambda trainer, _: trainer.dataset[0])


@case
def too_many_bad_samples(place: Place) -> None:
    def build_engine(*_: object) -> None:
        bad_samples = BadSamples(0.01, Path("run"))
        bad_samples.count(31, 3000)
        bad_samples.check(lambda: 47)

    place.patch.setattr(Trainer, "_build_engine", build_engine)


@case
def no_shared_memory(place: Place) -> None:
    """A limit on the size of files, which the memory of a batch is one of."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def collate_in_little(trainer: Trainer, _: Any) -> None:
        sample = trainer.dataset[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            CollateAndSend(num_ready=4)([sample])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    place.patch.setattr(Trainer, "_build_engine", collate_in_little)


INIT = collectives.init


def environment(place: Place, **values: str) -> None:
    """Of a rank that a launcher has started; it must be looked at before anything of torch's."""
    place.patch.setattr(collectives, "init", INIT)
    for name, value in values.items():
        place.patch.setenv(name, value)


RANK_0 = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


@case
def world_size_without_rank(place: Place) -> None:
    environment(place, WORLD_SIZE="4")


@case
def rank_without_address(place: Place) -> None:
    environment(place, RANK="0", LOCAL_RANK="0", WORLD_SIZE="4")


@case
def place_value(place: Place) -> None:
    environment(place, **RANK_0 | {"RANK": "4"})
    place.patch.setattr(collectives, "launched_as_main", lambda: True)


@case
def address_unknown(place: Place) -> None:
    environment(place, **RANK_0 | {"MASTER_ADDR": "nowhere.invalid"})
    error = socket.gaierror(socket.EAI_NONAME, "Name or service not known")  # whatever the name server here says
    place.patch.setattr(socket, "getaddrinfo", Mock(side_effect=error))


@case
def port_taken(place: Place) -> None:
    taken = socket.create_server(("", 0))
    place.at_end.append(taken)
    environment(place, **RANK_0 | {"MASTER_PORT": str(taken.getsockname()[1])})


@case
def not_finite(place: Place) -> None:
    def skip(*_: object) -> None:
        skipped = SkippedSteps(max_in_row=2)
        for step in (7, 8):
            skipped.count(step, applied=False)

    place.patch.setattr(Trainer, "_build_engine", skip)


@case
def loss_scale_at_its_minimum(place: Place) -> None:
    def skip(*_: object) -> None:
        SkippedSteps(max_in_row=2).count(7, applied=False, loss_scale=LossScale(1.0, 1.0))

    place.patch.setattr(Trainer, "_build_engine", skip)


@pytest.fixture(scope="module")
def demo_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "shards"
    build_demo_shards(folder, "shapes", 48, 4, seed=0, num_processes=1)
    return folder


def published(place: Place, task: str) -> dict[str, torch.Tensor]:
    """Lets import_model.py read a published checkpoint, and returns its weights, which the case may still write."""
    folder = place.dir / "published"
    folder.mkdir()
    words = WordPiece(place.shards / "word_vocab.txt")
    state, config_json = published_checkpoint(task, len(words), len(words) + 2)
    (folder / "config.json").write_text(json.dumps(config_json), encoding="utf-8")
    shutil.copyfile(words.source, folder / "vocab.txt")
    torch.save(state, folder / "pytorch_model.bin")
    place.imports += [str(folder), "--task", task, "--out", str(place.dir / "imported")]
    return state


@case
def checkpoint_without_weights(place: Place) -> None:
    published(place, "entailment")
    (place.dir / "published/pytorch_model.bin").unlink()


@case
def checkpoint_of_more_than_weights(place: Place) -> None:
    state = published(place, "entailment")
    torch.save({"model": state, "step": 9}, place.dir / "published/pytorch_model.bin")


@case
def checkpoint_of_other_tensors(place: Place) -> None:
    state = published(place, "entailment")
    state["global_head.weight"] = state.pop("bert.txt_proj")
    torch.save(state, place.dir / "published/pytorch_model.bin")


@case
def checkpoint_of_other_words(place: Place) -> None:
    published(place, "entailment")
    (place.dir / "published/vocab.txt").unlink()


@case
def checkpoint_of_another_phrase_list(place: Place) -> None:
    published(place, "entailment")
    num_words = len(WordPiece(place.shards / "word_vocab.txt"))
    phrases = {str(num_words + number): [f"a{number}", "b"] for number in range(3)}
    (place.dir / "list.json").write_text(json.dumps(phrases), encoding="utf-8")
    place.imports += ["--id2phrase", str(place.dir / "list.json")]


@case
def checkpoint_without_answers(place: Place) -> None:
    published(place, "vqa")


@case
def checkpoint_of_other_answers(place: Place) -> None:
    published(place, "vqa")
    (place.dir / "answers.json").write_text('["yes", "no"]', encoding="utf-8")
    place.imports += ["--answers", str(place.dir / "answers.json")]


@case
def score_that_was_not_published(place: Place) -> None:
    published(place, "referring")
    place.imports.append("referring.score=product")


def message_of(name: str, place: Place, caplog: pytest.LogCaptureFixture) -> str:
    """What `train.py` prints for a case, on its only rank; it must end with 2 before anything is trained."""
    place.patch.setattr(collectives, "init", lambda *_: torch.device("cpu"))
    place.patch.setattr("mvptr_ds.engine.deepspeed.initialize", lambda **_: (SimpleNamespace(optimizer=None),))
    place.patch.setattr(Engine, "save", lambda _, path: path.mkdir())
    place.patch.setattr(Trainer, "_resume", lambda *_: pytest.fail("the checkpoint was taken"))
    place.patch.setattr(Trainer, "train", lambda *_: pytest.fail("it would have trained"))
    CASES[name](place)
    if place.imports:
        done = run_tool("import_model.py", *place.imports)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and not (place.dir / "imported").exists()
        return done.stderr.removeprefix("error: ")
    argv = ["train.py", "--config", "demo", *arguments_for(place), *place.arguments]
    place.patch.setattr(sys, "argv", argv)
    caplog.clear()
    with caplog.at_level(logging.ERROR):
        assert train.main() == 2
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1 and errors[0].exc_info is None
    message = errors[0].getMessage()
    assert message.startswith("error: ") and "Traceback" not in message
    return message.removeprefix("error: ")


def sections() -> dict[str, tuple[str, str, str]]:
    """id -> message, cause and remedy of every error in the page; "" for what a section lacks."""
    found: dict[str, tuple[str, str, str]] = {}
    for section in re.split(r"^(?=##)", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE):
        heading = re.match(r"### `([a-z0-9-]+)`\n", section)
        if heading is None:
            continue
        name = heading.group(1)
        assert name not in found, f"{name} has two sections"
        message = re.search(r"^```text\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        labelled = r"^- \*\*%s\.\*\* (.*?)(?=^- |\Z)"
        cause, remedy = (
            re.search(labelled % label, section, re.MULTILINE | re.DOTALL) for label in ("Cause", "What to do")
        )
        parts = [" ".join(part.group(1).split()) if part else "" for part in (message, cause, remedy)]
        found[name] = (parts[0], parts[1], parts[2])
    return found


@pytest.mark.parametrize("name", CASES)
def test_an_error_says_what_the_docs_say(
    name: str,
    demo_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The message in the docs is shortened at each `…`; its parts must be printed, in their order."""
    shutil.copytree(demo_shards, tmp_path / "shards")
    message = " ".join(message_of(name, Place(tmp_path, monkeypatch), caplog).split())
    shown = sections()[name][0]
    parts = [re.escape(part.strip()) for part in shown.split("…")]
    assert re.fullmatch(".*".join(parts), message), f"printed: {message}\nin {DOCS.name}: {shown}"


def test_every_section_has_a_test_and_the_reverse() -> None:
    assert sorted(sections()) == sorted(CASES)
    assert [name for name, parts in sections().items() if not all(parts)] == []


def test_ranks_that_fail_alike_leave_the_message_to_rank_0(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "train.batchsize=8"])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(StopSignal, "wait", lambda *_: True)  # ended by the launcher, because rank 0 has failed
    assert train.main() == 2 and caplog.text == ""
    monkeypatch.setattr(StopSignal, "wait", lambda *_: False)  # rank 0 lives: this one is alone with its error
    assert train.main() == 2 and "error of rank 1: unknown configuration key" in caplog.text
