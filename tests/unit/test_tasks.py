"""What every task must do, and what a task with a head of its own may: fresh weights, named and kept apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from mvptr_ds.builders import SampleNeeds
from mvptr_ds.checkpoints.model_folder import head_settings, init_from_folder, load_weights, save_model_folder
from mvptr_ds.config import STAGES, Config, load_config
from mvptr_ds.config_stages import StageConfig
from mvptr_ds.data.collate import Batch, collate
from mvptr_ds.data.phrases import PhraseVocab, Vocabs
from mvptr_ds.data.schema import Record, Region
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import CheckpointError
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.objectives.losses import LossSum
from mvptr_ds.objectives.module import TaskModule, TaskOutput
from mvptr_ds.objectives.packed_batch import PackedBatch
from mvptr_ds.objectives.passes import PairPass
from mvptr_ds.streams import stage_seed
from mvptr_ds.tasks import TASKS, Task
from tests.support.tiny_models import sample, tiny_model, whole_batch

SETTINGS = {"task": "colours", "classes": ["red", "green", "blue"]}
ROWS = {"visual": frozenset({"regions"}), "matched": frozenset({"first"})}


class Colours(TaskModule):
    """Three colours on slot 0 of the cross encoder."""

    def __init__(self, model: Mvptr, settings: Mapping[str, Any] = SETTINGS) -> None:
        super().__init__(model, head=nn.Linear(model.config.hidden_size, 3), head_settings=settings)

    def trained_parts(self) -> list[str]:
        return ["embeddings", "text", "visual", "regions", "cross"]

    def forward(self, batch: Batch, step: int, accumulation: int = 0) -> TaskOutput:
        assert self.head is not None
        outputs = PairPass(self.model, PackedBatch.of(batch, self.model.device), ROWS)
        logits_BC = self.head(outputs.matched.text.firsts())
        colours_B = torch.tensor([labels["colour"] for labels in batch.labels])
        loss_B = F.cross_entropy(logits_BC, colours_B, reduction="none")
        return self.normalised({"colours": LossSum.of(loss_B)}, {"colours": 2.0})


def coloured(num: int = 4) -> Batch:
    return collate([dataclasses.replace(sample(i, i), labels={"colour": i % 3}) for i in range(num)])


def test_each_stage_of_the_configuration_is_a_task_and_no_other() -> None:
    assert set(TASKS) == set(STAGES) and all(task.name == name for name, task in TASKS.items())
    sections = {f.name for f in dataclasses.fields(Config) if isinstance(getattr(Config(), f.name), StageConfig)}
    assert set(STAGES) == sections


@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_what_it_says(name: str, tmp_path: Path) -> None:
    answers = tmp_path / "answers.json"
    answers.write_text('["dog", "puppy"]', encoding="utf-8")
    task, config = TASKS[name], load_config(None, [f"vqa.answers={answers}"])
    needs, batch = task.sample_needs(config), whole_batch()
    assert isinstance(needs, SampleNeeds)
    module = task.build(config, tiny_model(), seed=0)
    module.freeze_untrained()
    labels = dict(needs.labels)
    if needs.read_labels is not None:
        boxes = [Region((float(8 * n), 8.0, 64.0, 48.0), "dog") for n in range(4)]
        labels = needs.read_labels(labels, Record("1", 128, 128, (), tuple(boxes)))
    module(dataclasses.replace(batch, labels=(labels,) * len(batch)), 0).loss.backward()
    for weight, parameter in module.named_weights():
        assert (parameter.grad is not None) == parameter.requires_grad, weight
    assert task.follows is None or task.follows in TASKS


def test_seeds_come_from_names() -> None:
    assert [stage_seed(name, 5) for name in ("stage1", "stage2", "joint")] == [
        15,
        16,
        17,
    ]  # as older runs have
    others = {stage_seed(name, seed) for name in ("vqa", "entailment") for seed in range(50)}
    assert len(others) == 100 and min(others) > 2**32  # far from those of pre-training with any usual seed
    assert max(others) < 2**56 and stage_seed("vqa", 0) == stage_seed("vqa", 0)


def test_a_head_is_trained_and_normalised_like_any_loss() -> None:
    module = Colours(tiny_model())
    module.freeze_untrained()
    output = module(coloured(), 0)
    assert float(output.parts["colours"].count) == 4
    assert output.loss.item() == pytest.approx(2 * float(output.parts["colours"].sum) / 4, rel=1e-6)
    output.loss.backward()
    assert [n for n, p in module.named_weights() if n.startswith("head.") and p.grad is None] == []
    frozen = {n for n, p in module.named_weights() if not p.requires_grad}
    assert "pooler.dense.weight" in frozen and not any(n.startswith(("head.", "cross_encoder")) for n in frozen)


def test_the_narrower_part_gives_a_weight_its_factor() -> None:
    module = Colours(tiny_model())
    for parts in ({"pooler": 2.0, "itm": 3.0, "head": 10.0}, {"head": 10.0, "itm": 3.0, "pooler": 2.0}):
        factors = module.factors(parts)
        assert factors == {
            "pooler.dense.weight": 2.0, "pooler.dense.bias": 2.0, "itm_head.weight": 3.0, "itm_head.bias": 3.0,
            "head.weight": 10.0, "head.bias": 10.0,
        }  # fmt: skip
    assert module.factors({"itm": 3.0})["pooler.dense.weight"] == 3.0 and module.factors({}) == {}


def test_a_head_starts_fresh_where_the_task_says_so_and_is_kept_beside_the_model(tmp_path: Path) -> None:
    words = WordPiece()
    vocabs = Vocabs(words, PhraseVocab.empty(words))
    sizes = {"num_words": len(words), "num_rows": vocabs.phrases.num_rows, "num_phrases": 0}
    trained, config = tiny_plain(**sizes), Config()
    save_model_folder(tmp_path / "trained", trained, trained.state_dict(), vocabs, config)
    assert not (tmp_path / "trained/head.safetensors").exists()

    torch.manual_seed(1)
    module = Colours(tiny_plain(**sizes))
    with pytest.raises(CheckpointError, match=r"does not fit .*\n  - 2 weights only here, the first head\.weight"):
        init_from_folder(module, vocabs, tmp_path / "trained")
    fresh = init_from_folder(module, vocabs, tmp_path / "trained", fresh=("head.",))
    assert fresh == ["head.weight", "head.bias"]

    weights = {name: parameter.detach().clone() for name, parameter in module.named_weights()}
    weights |= {n: t for n, t in module.model.state_dict().items() if n not in weights}
    save_model_folder(tmp_path / "tuned", module.model, weights, vocabs, config, module.head_settings)
    assert head_settings(tmp_path / "tuned") == SETTINGS and head_settings(tmp_path / "trained") == {}
    assert set(load_file(tmp_path / "tuned/head.safetensors")) == {"weight", "bias"}
    other = Colours(tiny_plain(**sizes))
    assert init_from_folder(other, vocabs, tmp_path / "tuned", fresh=("head.",)) == []
    assert torch.equal(other.head.weight, module.head.weight)  # type: ignore[union-attr]
    again = Colours(tiny_plain(**sizes))
    load_weights(again, tmp_path / "tuned")
    assert torch.equal(again.head.bias, module.head.bias)  # type: ignore[union-attr]

    # of the same shape, but its rows mean something else
    another = Colours(tiny_plain(**sizes), SETTINGS | {"classes": ["blue", "green", "red"]})
    wanted = r"other settings:\n  - classes: \['red', 'green', 'blue'\] there, "
    with pytest.raises(CheckpointError, match=wanted):
        load_weights(another, tmp_path / "tuned")
    with pytest.raises(CheckpointError, match=wanted):
        init_from_folder(another, vocabs, tmp_path / "tuned", fresh=("head.",))
    many = Colours(tiny_plain(**sizes), SETTINGS | {"classes": [str(n) for n in range(3_000)]})
    with pytest.raises(CheckpointError, match=wanted) as error:
        load_weights(many, tmp_path / "tuned")
    assert len(str(error.value)) < 1_000
    stranger = Colours(tiny_plain(**sizes), {"task": "sizes"})
    assert init_from_folder(stranger, vocabs, tmp_path / "tuned", fresh=("head.",)) == ["head.weight", "head.bias"]
    with pytest.raises(CheckpointError, match="asks for weight, bias: resume it with the objectives it had"):
        load_weights(stranger, tmp_path / "tuned")


def tiny_plain(**sizes: int) -> Mvptr:
    """A tiny model without phrases, over a whole vocabulary."""
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, "max_positions": 16}
    layers = dict.fromkeys(("num_text_layers", "num_visual_layers", "num_cross_layers"), 1)
    return Mvptr(MvptrConfig(**sizes, **shape, **layers, region_feature_dim=5))


def test_a_task_is_no_task_without_its_methods() -> None:
    class Half(Task):
        name = "half"

    with pytest.raises(TypeError, match="abstract"):
        Half()  # type: ignore[abstract]
