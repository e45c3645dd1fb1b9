"""Concept-aware vision-language pre-training (MVPTR) on WebDataset shards and DeepSpeed.

Two commands use this package: `deepspeed mvptr_ds/train.py` trains and `python mvptr_ds/eval.py` evaluates. Installed,
it has these and the tools under one name, `mvptr`. Data flows one way, from `data` (shards to batches) through `tasks`
(model and objectives of a stage) to `trainer` and `engine`. README.md names the ten files to read first.

In Python, `mvptr_ds.load` loads a trained model (docs/use.md). Nothing is imported before it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvptr_ds.inference import (
        Grounding,
        MvptrConfig,
        MvptrModel,
        MvptrOutput,
        MvptrProcessor,
        Picture,
        TrainedModel,
        load,
    )

__version__ = "0.1.0"  # its one home: setup.py reads it here
__all__ = ["Grounding", "MvptrConfig", "MvptrModel", "MvptrOutput", "MvptrProcessor", "Picture", "TrainedModel", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mvptr_ds import inference

    return getattr(inference, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
