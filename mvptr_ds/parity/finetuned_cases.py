"""The recorded cases of the downstream tasks, and the project's own modules and batches for each.

Legend: B samples, R regions, A answers.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mvptr_ds.config import ItmConfig, TaskConfig
from mvptr_ds.config_stages import ReferringConfig, VqaConfig, WeightsConfig
from mvptr_ds.data.collate import Batch
from mvptr_ds.data.schema import Record
from mvptr_ds.data.task_labels import ENTAILMENT_CLASSES
from mvptr_ds.model.convert_finetuned import from_finetuned
from mvptr_ds.model.encoder import Execution
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.objectives.module import TaskModule
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.parity.recorded_batch import make_batch
from mvptr_ds.tasks import vqa
from mvptr_ds.tasks.entailment import EntailmentModule
from mvptr_ds.tasks.entailment import read_labels as entailment_labels
from mvptr_ds.tasks.referring import ReferringModule
from mvptr_ds.tasks.retrieval import STAGE
from mvptr_ds.tasks.vqa import VqaModule

_SCORES = {1: "cosine", 2: "dot", 3: "region"}  # of the published modes


@dataclass(frozen=True)
class Case:
    """One recorded run of a published class.

    Attributes:
        name: prefix of its tensors.
        task: ours.
        inputs: prefix of its keyword arguments, and the task in the names of files.
        heads: prefixes of the task's own tensors.
        without: tensors among them that the case has not.
        section: what differs from the defaults of the task's section.
    """

    name: str
    task: str
    inputs: str
    heads: str
    without: tuple[str, ...] = ()
    section: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recorded:
    """What a folder holds."""

    config_json: dict[str, Any]
    weights: dict[str, Tensor]
    heads: dict[str, Tensor]
    inputs: dict[str, Tensor]
    scalars: dict[str, Any]
    cut_tag_slots: int
    phrase_layer: int

    @classmethod
    def read(cls, folder: Path) -> Recorded:
        """Reads a folder. Raises OSError, ValueError or KeyError where it is none."""
        weights, heads, inputs = (load_file(folder / f"{n}.safetensors") for n in ("weights", "heads", "inputs"))
        settings, scalars = (json.loads((folder / n).read_text("utf-8")) for n in ("config.json", "expected.json"))
        cut, layer = settings["vqa_published_tag_slots_cut"], settings["re_phrase_layer"]
        return cls(settings["reference_config"], weights, heads, inputs, scalars, cut, layer)

    def cases(self) -> list[Case]:
        """Returns all cases, in the order of the recorded losses."""
        published = {"tags_in_text": True}
        found = [
            Case("retrieval", "retrieval", "retrieval", "retrieval"),
            Case("retrieval_plain", "retrieval", "retrieval", "retrieval", ("bert.LayerNorm.",)),
            Case("vqa", "vqa", "vqa", "vqa", section=published),
            Case("vqa_published", "vqa", "vqa", "vqa", section=published | {"crossing_tags_from": self.cut_tag_slots}),
            Case("vqa_linear", "vqa", "vqa", "vqa_linear", section=published | {"head": "linear"}),
            Case("ve", "entailment", "ve", "ve"),
        ]
        for mode, score in _SCORES.items():
            for layers in (None, self.phrase_layer + 1):
                name = f"re_mod{mode}" + ("" if layers is None else f"_layer{self.phrase_layer}")
                found.append(Case(name, "referring", "re", "re", section={"score": score, "cross_layers": layers}))
        return found

    def state(self, case: Case) -> dict[str, Tensor]:
        """Returns the case's checkpoint under the published names; of the shared weights, the class's own."""
        prefix = f"{case.heads}."
        own = {n.removeprefix(prefix): t for n, t in self.heads.items() if n.startswith(prefix)}
        own = {name: tensor for name, tensor in own.items() if not name.startswith(case.without or "\0")}
        return {**self.weights, **own}

    def module(self, case: Case, dtype: torch.dtype, execution: Execution) -> TaskModule:
        """Returns the project's module with the case's weights, in evaluation mode."""
        found = from_finetuned(self.state(case), self.config_json, case.task)
        model = Mvptr(found.config)
        model.load_state_dict(found.model, strict=False)
        model.set_execution(execution)
        module = _module(case, model, self._num_answers())
        if module.head is not None:
            module.head.load_state_dict(found.head)
        module.eval().to(dtype)
        module.freeze_untrained()
        return module

    def batch(self, case: Case, dtype: torch.dtype) -> Batch:
        """Returns the case's inputs with the labels that its module reads."""
        prefix = f"{case.inputs}."
        inputs = {n.removeprefix(prefix): t for n, t in self.inputs.items() if n.startswith(prefix)}
        feature_dim = int(self.config_json["img_feature_dim"]) - 6
        batch = make_batch(inputs, feature_dim, dtype)
        if case.task == "retrieval":
            return batch
        labels = tuple(_labels(case, row) for row in inputs["labels"])
        return dataclasses.replace(batch, labels=labels)

    def _num_answers(self) -> int:
        return len(self.heads["vqa.cls.predictions.bias"])


def answer_name(number: int) -> str:
    """Returns the text that stands for an answer, of which only numbers were recorded."""
    return f"answer {number}"


def _module(case: Case, model: Mvptr, num_answers: int) -> TaskModule:
    if case.task == "vqa":
        return VqaModule(model, VqaConfig(**case.section), [answer_name(n) for n in range(num_answers)], seed=0)
    if case.task == "entailment":
        return EntailmentModule(model, seed=0)
    if case.task == "referring":
        return ReferringModule(model, ReferringConfig(**case.section), seed=0)
    return PretrainingLosses(
        model,
        STAGE,
        WeightsConfig(vsc=1.0, itm=1.0),
        TaskConfig(itm=ItmConfig(negatives="hardest")),
        max_text_slots=model.config.max_positions,
        max_steps=1,
        seed=0,
    )


def _labels(case: Case, row: Tensor) -> dict[str, Any]:
    """Returns what the task makes of a sample's recorded labels."""
    nothing = Record("0", 0, 0, ())
    if case.task == "vqa":
        index_of = {answer_name(number): number for number in range(len(row))}
        answers = {answer_name(n): score for n, score in enumerate(row.tolist()) if score}
        return vqa.read_labels(index_of, {"answers": answers}, nothing)
    if case.task == "entailment":
        return entailment_labels({"label": ENTAILMENT_CLASSES[int(row)]}, nothing)
    overlaps_R = row[row >= 0].double().numpy()  # padding is -1
    return {"overlaps": overlaps_R, "boxes": torch.zeros(len(overlaps_R), 4).numpy(), "id": None, "kind": None}
