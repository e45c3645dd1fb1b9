"""Which part of the model an operation belongs to: in the forward pass by what runs, in the backward pass by the node.

Encoders, heads and embeddings are modules, which tell by hooks that they run. Everything else is told by the innermost
function of the package that PLACES names. In the backward pass autograd runs nodes, each of which was made by a forward
operation: both bear one sequence number.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from mvptr_ds.model.mvptr import Mvptr

PACKAGE = Path(__file__).resolve().parents[2]
OWN = str(Path(__file__).resolve().parent)
REST = "losses, packing, rest"
GROUNDING = "grounding scores (WPG)"
NEGATIVES = "negatives"
BATCH = "batch to the device"
EMBEDDINGS, TEXT, VISUAL, CROSS, HEADS = "embeddings", "text encoder", "visual encoder", "cross encoder", "heads"
PARTS = (BATCH, EMBEDDINGS, TEXT, VISUAL, CROSS, HEADS, GROUNDING, NEGATIVES, REST)

MODULES = {
    "embeddings": EMBEDDINGS,
    "region_embedding": EMBEDDINGS,
    "text_encoder": TEXT,
    "visual_encoder": VISUAL,
    "cross_encoder": CROSS,
    "token_head": HEADS,
    "tag_head": HEADS,
    "phrase_head": HEADS,
    "pooler": HEADS,
    "itm_head": HEADS,
}
PLACES: dict[str, dict[str | None, str]] = {  # file -> functions (None: all of them) -> part
    "objectives/losses.py": {"phrase_region_score": GROUNDING},
    "objectives/packed_batch.py": {None: BATCH},
    "objectives/candidates.py": {"negatives": NEGATIVES},
    "objectives/gather_rows.py": {None: NEGATIVES},
    "objectives/pairs.py": {None: NEGATIVES},
    "model/embeddings.py": {None: EMBEDDINGS},
    "model/mvptr.py": {"look_up": EMBEDDINGS},
}


class PartTracker:
    """Knows the part that runs at this moment."""

    def __init__(self) -> None:
        self.of_node: dict[int, str] = {}
        self.running: list[str] = []

    @contextmanager
    def following(self, model: Mvptr, head: nn.Module | None = None) -> Iterator[None]:
        """While inside, the modules of a model, and a task's head, tell when they run."""
        named = [(getattr(model, name), part) for name, part in MODULES.items() if hasattr(model, name)]
        if head is not None:
            named.append((head, HEADS))
        handles = []
        for module, part in named:
            handles.append(module.register_forward_pre_hook(lambda *_, part=part: self.running.append(part)))
            handles.append(module.register_forward_hook(self._end, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _end(self, *_: Any) -> None:
        self.running.pop()

    def now(self) -> tuple[str, str]:
        """Returns the part, and the line of the package that runs (`autograd` where none does)."""
        line, of_function = _from_frames()
        node = torch._C._current_autograd_node()
        if node is None:
            part = self.running[-1] if self.running else of_function or REST
            # a node is made just before its operation is dispatched: the number was drawn last
            self.of_node.setdefault(torch.autograd._get_sequence_nr() - 1, part)
            return part, line
        return self.of_node.get(node._sequence_nr(), REST), line  # a node that only adds up was made by no operation


def _from_frames() -> tuple[str, str | None]:
    """Returns the innermost line of the package, and the part of the innermost function that PLACES names."""
    line, part = "autograd", None
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and part is None:
        name = frame.f_code.co_filename
        if name.startswith(str(PACKAGE)) and not name.startswith(OWN):
            file = Path(name).relative_to(PACKAGE).as_posix()
            if line == "autograd":
                line = f"{file}:{frame.f_lineno}"
            functions = PLACES.get(file, {})
            part = functions.get(frame.f_code.co_name, functions.get(None))
        frame = frame.f_back
    return line, part
