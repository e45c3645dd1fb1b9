"""Runs any object detector of transformers; `detection` decides which of its detections become regions.

Legend: B pictures, Q queries of the detector, D size of a query's state.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from mvptr_ds.corpus.regions.detection import Detections, tag_of
from mvptr_ds.data.schema import Extractor
from mvptr_ds.errors import DataError

_CONFIG_FILES = ("config.json", "preprocessor_config.json")
_WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")  # the first kind that is there is what is loaded


def find_model(name: str, revision: str | None = None) -> tuple[Path, Extractor]:
    """Returns the folder of a detector (a local one, or a hub model after its download), and what sidecars call it.

    The version is the first 12 hex digits of a SHA-256 over the configuration, the processor's configuration and the
    weights, so other weights under the same name are another version. A local folder never asks the network.

    Raises:
        DataError: there is no such folder or hub model, or it holds no configuration or no weights.
    """
    folder = Path(name)
    is_local = folder.is_dir()
    if not is_local:
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise DataError(f"there is no folder {name!r}; give a folder with config.json and weights, or a hub name")
        folder = _download(name, revision)
    elif revision is not None:
        raise DataError(f"{name!r} is a folder, which has no revision {revision!r}; leave --revision out")
    try:
        model_type = json.loads((folder / _CONFIG_FILES[0]).read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} holds no config.json of a transformers model: {error!r}") from error
    weights = next((found for pattern in _WEIGHT_FILES if (found := sorted(folder.glob(pattern)))), None)
    if weights is None:
        raise DataError(f"{folder} holds no weights, neither {' nor '.join(_WEIGHT_FILES)}")
    digest = hashlib.sha256()
    for path in (*(folder / file for file in _CONFIG_FILES if (folder / file).is_file()), *weights):
        digest.update(path.name.encode() + b"\0" + path.stat().st_size.to_bytes(8, "little"))
        with open(path, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return folder, Extractor(f"{folder.resolve().name} ({model_type})" if is_local else name, digest.hexdigest()[:12])


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", _WEIGHT_FILES[0]]))
        if not any(folder.glob(_WEIGHT_FILES[0])):
            snapshot_download(name, revision=revision, allow_patterns=["*.json", _WEIGHT_FILES[1]])
    except (OSError, ValueError) as error:  # all of the hub's errors are one of the two
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{name!r} is neither a folder nor a model that can be had from the hub ({reason}); check the name, or "
            "download it elsewhere and give the folder"
        ) from error
    return folder


def choose_device(device: str, precision: str) -> tuple[str, str]:
    """Returns device and precision; "auto" is cuda if there is one, and bfloat16 on GPUs that compute it.

    Raises:
        DataError: cuda is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("--device is cuda, but torch sees no GPU here; use --device cpu or auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        computes = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if computes else "float32"
    return device, precision


class DetectorSource(NamedTuple):
    """Everything that a process needs to load the detector."""

    folder: str
    device: str = "cpu"
    precision: str = "float32"
    states: bool = False  # region features are wanted
    num_threads: int = 0  # of torch; 0 leaves them as they are


class Detector:
    """A detector with its processor, in evaluation mode.

    In bfloat16 the body runs under autocast, and the heads that compute classes and boxes in float32: of 640 pixels,
    bfloat16 tells apart only every second one.

    Raises:
        DataError: transformers cannot load the folder as an object detector, or the weights do not fill the model.
    """

    def __init__(self, source: DetectorSource) -> None:
        from safetensors import SafetensorError
        from transformers import AutoImageProcessor, AutoModelForObjectDetection
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        if source.num_threads:
            torch.set_num_threads(source.num_threads)
        self.source = source
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._processor = AutoImageProcessor.from_pretrained(source.folder, **options)
            model, loading = AutoModelForObjectDetection.from_pretrained(
                source.folder, dtype=torch.float32, output_loading_info=True, **options
            )
        except (
            *(OSError, ValueError, ImportError, KeyError, RuntimeError),  # configuration, libraries, shapes
            *(SafetensorError, UnpicklingError, EOFError),  # weights
        ) as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"{source.folder} cannot be loaded as an object detector: {reason}") from error
        # transformers only warns, and would go on with random numbers in their place
        missing = sorted(loading["missing_keys"])
        if missing:
            raise DataError(
                f"the weights in {source.folder} lack {len(missing)} tensors of the model, e.g. {missing[0]}"
            )
        self.model_type = str(model.config.model_type)
        self._tags = {number: tag_of(str(name)) for number, name in model.config.id2label.items()}
        self._num_detection_tokens = getattr(model.config, "num_detection_tokens", None)
        self._takes_mask = "pixel_mask" in inspect.signature(model.forward).parameters
        self._dtype = getattr(torch, source.precision)
        self._model = model.to(source.device).eval()
        if self._dtype != torch.float32:
            for name, module in self._model.named_modules():
                if isinstance(module, torch.nn.Linear) and ("bbox" in name or "class" in name):
                    _run_in_float32(module, source.device)

    @property
    def has_tag_names(self) -> bool:
        """Returns whether the model names its classes."""
        return any(self._tags.values())

    def check(self) -> None:
        """Runs it once on a grey picture.

        Raises:
            DataError: it is no detector with queries, or region features are wanted and it gives no state a query.
        """
        self.detect([Image.new("RGB", (64, 48), (128, 128, 128))], [(64, 48)])

    @torch.inference_mode()
    def detect(self, pictures: Sequence[Image.Image], sizes: Sequence[tuple[int, int]]) -> list[Detections | None]:
        """Returns the detections of RGB images in pixels of `sizes` (width, height); None where one is not finite.

        Models with a pixel mask get the images padded to one size. Others would take the padding for a part of the
        image, so they get images of one size together.

        Raises:
            DataError: as `check` does.
        """
        if self._takes_mask:
            return self._run(self._processor(images=list(pictures), return_tensors="pt"), sizes)
        alone = [self._processor(images=[picture], return_tensors="pt") for picture in pictures]
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for number, inputs in enumerate(alone):
            by_shape.setdefault(tuple(inputs["pixel_values"].shape), []).append(number)
        found: list[Detections | None] = [None] * len(pictures)
        for numbers in by_shape.values():
            pixels = torch.cat([alone[number]["pixel_values"] for number in numbers])
            together = self._run({"pixel_values": pixels}, [sizes[number] for number in numbers])
            for number, detections in zip(numbers, together, strict=True):
                found[number] = detections
        return found

    def _run(self, inputs: Mapping[str, torch.Tensor], sizes: Sequence[tuple[int, int]]) -> list[Detections | None]:
        device = self.source.device
        wanted = {name: inputs[name].to(device) for name in ("pixel_values", "pixel_mask") if name in inputs}
        with torch.autocast(device, dtype=self._dtype, enabled=self._dtype != torch.float32):
            outputs = self._model(**wanted)
        logits, boxes = getattr(outputs, "logits", None), getattr(outputs, "pred_boxes", None)
        if logits is None or boxes is None or boxes.ndim != 3 or boxes.shape[:2] != logits.shape[:2]:
            raise DataError(
                f"a model of type {self.model_type!r} gives no logits and boxes a query; take one like DETR"
            )
        logits, boxes = logits.float().cpu(), boxes.float().cpu()
        states = self._states(outputs, boxes.shape[1]) if self.source.states else None
        # what a score is differs between models, and their processors know it, but do not say which query it is of:
        # boxes at (number of the query, number of the query) tell
        numbers_BQ = torch.arange(boxes.shape[1], dtype=torch.float32).expand(boxes.shape[:2])
        codes_BQ4 = torch.stack([numbers_BQ, numbers_BQ, *[torch.zeros_like(numbers_BQ)] * 2], dim=-1)
        scored = self._processor.post_process_object_detection(
            SimpleNamespace(logits=logits, pred_boxes=codes_BQ4), threshold=-1.0
        )
        found: list[Detections | None] = []
        for number, (width, height) in enumerate(sizes):
            parts = [logits[number], boxes[number], *([] if states is None else [states[number]])]
            if not all(bool(torch.isfinite(part).all()) for part in parts):
                found.append(None)
                continue
            state_QD = None if states is None else states[number].numpy()
            found.append(self._of_picture(scored[number], boxes[number].numpy(), state_QD, width, height))
        return found

    def _of_picture(
        self,
        scored: Mapping[str, torch.Tensor],
        boxes_Q4: np.ndarray,
        states_QD: np.ndarray | None,
        width: int,
        height: int,
    ) -> Detections:
        order = torch.argsort(scored["scores"], descending=True, stable=True)
        queries, first = np.unique(scored["boxes"][order, 0].round().long().numpy(), return_index=True)
        best = order[torch.from_numpy(first)]
        centre, side = boxes_Q4[queries, :2], boxes_Q4[queries, 2:]
        corners = np.concatenate([centre - side / 2, centre + side / 2], axis=1)
        return Detections(
            boxes_Q4=corners * np.array([width, height, width, height], dtype=np.float32),
            scores_Q=scored["scores"][best].numpy(),
            tags=tuple(self._tags.get(label) for label in scored["labels"][best].tolist()),
            states_QD=None if states_QD is None else states_QD[queries],
        )

    def _states(self, outputs: Any, num_queries: int) -> torch.Tensor:
        states = getattr(outputs, "last_hidden_state", None)
        if states is not None and states.ndim == 3 and num_queries == self._num_detection_tokens:
            states = states[:, -num_queries:]  # YOLOS: behind [CLS] and the patches
        if states is None or states.ndim != 3 or states.shape[1] != num_queries:
            raise DataError(
                f"--features needs a detector with one decoder state a query (DETR, RT-DETR, YOLOS and their like); a "
                f"model of type {self.model_type!r} gives none; leave --features out"
            )
        return states.float().cpu()


def _run_in_float32(module: torch.nn.Module, device: str) -> None:
    forward = module.forward

    def run(inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, enabled=False):
            return forward(inputs.float())

    module.forward = run


@functools.lru_cache(maxsize=1)
def load_detector(source: DetectorSource) -> Detector:
    """Returns the detector of this process."""
    return Detector(source)
