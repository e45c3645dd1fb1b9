"""Compares the downstream tasks with recorded numbers of the published code's fine-tuning classes.

A folder holds config.json, weights.safetensors and heads.safetensors (under the reference's names), inputs.safetensors,
expected.TASK.safetensors and expected.json (results in float64 and float32), retrieval_protocol.json,
vqa_accuracy.json and layouts.json. Each case runs through the project's own module of its task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mvptr_ds.data.collate import Batch
from mvptr_ds.model.encoder import Execution
from mvptr_ds.objectives.module import TaskModule
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.parity import layouts, protocols, trajectories
from mvptr_ds.parity.comparison import SHORT, TOLERANCE, Comparison
from mvptr_ds.parity.finetuned_cases import Case, Recorded
from mvptr_ds.parity.finetuned_outputs import (
    STATES,
    gradients,
    masks_of,
    pair_tensors,
    recorded_draws,
    retrieval_losses,
    retrieval_tensors,
)
from mvptr_ds.tasks.pair_module import PairModule

_WORDS = "bert.embeddings.word_embeddings.weight"
_ROWS, _ROWS_GRAD = "word_embeddings.rows", "word_embeddings.rows_grad"
_OF_GRADIENTS = {torch.float64: (1e-9, 0.0), torch.float32: (1e-6, 1e-5)}  # absolute, and share of the gradient


def holds(folder: Path) -> bool:
    """Returns whether the recorded numbers in a folder are those of the downstream tasks."""
    return (folder / "heads.safetensors").is_file()


def check_folder(comparison: Comparison, folder: Path, execution: Execution = "packed") -> None:
    """Compares all cases in both dtypes, and then optimiser, boxes, protocols and layouts.

    Raises:
        OSError, ValueError, KeyError: the folder is not of this form.
    """
    recorded = Recorded.read(folder)
    check_cases(comparison, folder, recorded, recorded.cases(), execution)
    trajectories.check(comparison, recorded, execution)
    protocols.check_boxes(comparison, recorded)
    protocols.check_retrieval(comparison, folder / "retrieval_protocol.json")
    protocols.check_accuracy(comparison, folder / "vqa_accuracy.json")
    layouts.check(comparison, folder / "layouts.json")


def check_cases(
    comparison: Comparison, folder: Path, recorded: Recorded, cases: Sequence[Case], execution: Execution = "packed"
) -> None:
    """Compares some cases in both dtypes, and finds tensors that are of no case at all in their files."""
    known = tuple(f"{case.name}." for case in recorded.cases())
    for file in dict.fromkeys(case.inputs for case in cases):
        expected = load_file(folder / f"expected.{file}.safetensors")
        for case in (case for case in cases if case.inputs == file):
            own = {n.removeprefix(f"{case.name}."): t for n, t in expected.items() if n.startswith(f"{case.name}.")}
            for dtype in (torch.float64, torch.float32):
                _CaseInDtype(comparison, recorded, case, dtype, execution).check(own)
        for name in (name for name in expected if not name.startswith(known)):
            comparison.add(name, expected[name], None)


class _CaseInDtype:
    """One case in one dtype. In float32 the results of both dtypes are compared, in float64 those of float64."""

    def __init__(
        self, comparison: Comparison, recorded: Recorded, case: Case, dtype: torch.dtype, execution: Execution
    ) -> None:
        self.comparison, self.recorded, self.case, self.dtype = comparison, recorded, case, dtype
        self.module, self.batch = recorded.module(case, dtype, execution), recorded.batch(case, dtype)
        self.prefix = f"{SHORT[dtype]} {case.name}"

    def check(self, expected: Mapping[str, Tensor]) -> None:
        """Compares with all that was recorded of the case."""
        tensors = _results(self.module, self.batch, self.recorded, self.case)
        grads = gradients(self.module, self.case.task)
        self._losses(tensors, expected)
        plain = {n: t for n, t in expected.items() if not n.startswith(("grad.", "float32."))}
        self._tensors(self.prefix, plain, {n: t for n, t in tensors.items() if n not in STATES or n in plain})
        self._gradients(self.prefix, expected, grads)
        self._norms(grads)
        if self.dtype == torch.float32:
            narrow = {n.removeprefix("float32."): t for n, t in expected.items() if n.startswith("float32.")}
            plain = {n: t for n, t in narrow.items() if not n.startswith("grad.")}
            prefix = f"{self.prefix} float32"
            self._tensors(prefix, plain, {n: t for n, t in tensors.items() if n in plain})
            self._gradients(prefix, narrow, grads)

    def _losses(self, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        which = (torch.float64, torch.float32).index(self.dtype)
        recorded_in = expected.get("loss", tensors["loss"]).dtype  # of mode 2 the loss was float32 in either case
        tolerance = max(TOLERANCE[recorded_in], TOLERANCE[self.dtype])
        for name, values in self.recorded.scalars["losses"][self.case.name].items():
            found = tensors[name].item() if name in tensors else None
            self.comparison.number(f"{self.prefix} recorded {name}", values[which], found, tolerance)

    def _tensors(self, prefix: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
        self.comparison.tensors(prefix, expected, found, TOLERANCE[self.dtype], masks_of(self.module, self.batch))

    def _gradients(self, prefix: str, expected: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> None:
        absolute, relative = _OF_GRADIENTS[self.dtype]
        for name in sorted(n for n in expected if n.startswith("grad.") and n != f"grad.{_ROWS}"):
            found = grads.get(name.removeprefix("grad."))
            if name == f"grad.{_ROWS_GRAD}":
                found = grads[_WORDS][expected[f"grad.{_ROWS}"]]
            self.comparison.add(f"{prefix} {name}", expected[name], found, absolute, relative=relative)

    def _norms(self, grads: Mapping[str, Tensor]) -> None:
        absolute, relative = _OF_GRADIENTS[self.dtype]
        norms: Mapping[str, float | None] = self.recorded.scalars["grad_norms"].get(self.case.name, {})
        for name, norm in norms.items():  # None: a parameter that the loss does not reach
            line, found = f"{self.prefix} gradient norm {name}", grads.get(name)
            if norm is None:
                self.comparison.absent(line, found)
            else:
                given = torch.tensor(norm, dtype=torch.float64)
                self.comparison.add(line, given, None if found is None else found.norm(), absolute, relative=relative)
        for name in (name for name in grads if norms and name not in norms):
            self.comparison.missing(f"{self.prefix} gradient norm {name}")


def _results(module: TaskModule, batch: Batch, recorded: Recorded, case: Case) -> dict[str, Tensor]:
    """Returns the losses and tensors of a case by the published names, and leaves the gradients in the module."""
    if isinstance(module, PretrainingLosses):
        dice_index_B = torch.tensor(recorded.scalars["random"][case.name]["dice_index"])
        draws = recorded_draws(module, dice_index_B)
        losses = retrieval_losses(module, batch, draws)
        losses["loss"].backward()
        with torch.no_grad():
            return losses | retrieval_tensors(module, batch, draws, dice_index_B)
    assert isinstance(module, PairModule)
    loss = module(batch, 0).loss
    loss.backward()
    with torch.no_grad():
        return {"loss": loss, **pair_tensors(module, batch)}
