"""A trained model behind the interface that CLIP_benchmark calls: `--model_type mvptr --pretrained RUN`.

CLIP_benchmark gives pixels and texts alone. So the regions are the cells of a grid without tags, and the parser of
this package finds the phrases.

Source: clip_benchmark/models/__init__.py and clip_benchmark/metrics/, version 1.6.2.

Legend: B pictures or texts, D hidden, H W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mvptr_ds.benchmarks.results import MODEL
from mvptr_ds.errors import DataError
from mvptr_ds.inference.loading import load
from mvptr_ds.inference.pictures import rgb_of
from mvptr_ds.inference.trained import TrainedModel


class Square:
    """The transform: a PIL image becomes the square of pixels that the model reads, uint8 [3, H, W]."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    def __call__(self, image: Image.Image) -> Tensor:
        size = self.image_size, self.image_size
        square = rgb_of(image).resize(size, Image.Resampling.BICUBIC)  # as `Picture` does
        return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(*size, 3).permute(2, 0, 1)


class Texts(list[str]):
    """The tokenizer's result: the texts themselves, since the model needs them to find phrases."""

    def to(self, device: str | torch.device) -> Texts:
        """Returns itself: texts are on no device."""
        return self


def tokenizer(texts: str | Sequence[str]) -> Texts:
    """Returns texts as `encode_text` takes them."""
    return Texts([texts] if isinstance(texts, str) else texts)


class BenchmarkModel(nn.Module):
    """A trained model with the methods that CLIP_benchmark calls. It is in evaluation mode."""

    def __init__(self, trained: TrainedModel) -> None:
        super().__init__()
        self.model = trained.model
        self.trained = trained

    def encode_image(self, images_B3HW: Tensor) -> Tensor:
        """Returns the global states of pictures from the transform, float32 [B, D] on the model's device."""
        return self._outside(self.trained.embed_image(images_B3HW))

    def encode_text(self, texts: Texts) -> Tensor:
        """Returns the global states of texts, float32 [B, D] on the model's device."""
        return self._outside(self.trained.embed_text(texts))

    def _outside(self, states_BD: Tensor) -> Tensor:
        """Returns a copy that is no tensor of inference mode: CLIP_benchmark divides in place."""
        return states_BD.clone().to(self.trained.device)


def load_mvptr(
    model_name: str = MODEL,
    pretrained: str = "",
    cache_dir: str | None = None,
    device: str | torch.device = "cpu",
) -> tuple[BenchmarkModel, Square, Any]:
    """Returns model, transform and tokenizer, as each loader of CLIP_benchmark does.

    Args:
        model_name: not used: the folder says what the model is.
        pretrained: a run, a checkpoint, a model folder, an exported one, or a name on the hub.
        cache_dir: not used: models of the hub are kept where huggingface_hub keeps them.

    Raises:
        CheckpointError: there is no such model.
        DataError: it reads region features, which pixels do not give.
    """
    trained = load(pretrained, device=device)
    if trained.config.visual.source != "image":
        raise DataError(f"{pretrained} reads region features, and CLIP_benchmark gives pixels alone")
    return BenchmarkModel(trained).eval(), Square(trained.config.visual.image_size), tokenizer


def register(models: Any) -> None:
    """Adds the loader to the module `clip_benchmark.models`, under the name `mvptr`."""
    models.TYPE2FUNC[MODEL] = load_mvptr
    if MODEL not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL)  # its command line holds the same list
