"""Loads a trained model from wherever it is: a run, a checkpoint, a model folder, an exported one, the hub."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from mvptr_ds.checkpoints.hand_over import find_model
from mvptr_ds.checkpoints.model_folder import head_settings, load_head, load_model_folder
from mvptr_ds.config import Config
from mvptr_ds.data.schema import Phrase
from mvptr_ds.errors import CheckpointError, DataError
from mvptr_ds.inference.answers import FineTuned
from mvptr_ds.inference.pictures import Picture
from mvptr_ds.inference.samples import FindRegions
from mvptr_ds.inference.trained import TrainedModel
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.tasks import TASKS
from mvptr_ds.tasks.downstream import Downstream
from mvptr_ds.tasks.pair_module import PairModule

_NEEDED = ("config.json", "vocab.txt", "phrase_vocab.json", "mvptr.yaml")


def load(
    source: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    detector: str | None = None,
    revision: str | None = None,
) -> TrainedModel:
    """Loads a trained model for use.

    Args:
        source: a run folder, a stage folder, a checkpoint, a model folder, an exported folder, or a name on the hub.
        device: default: the first GPU, or the CPU where there is none.
        dtype: of the weights; `torch.bfloat16` halves their memory on a GPU.
        detector: folder or hub name of the object detector that finds regions where none are given. A model that
            reads features needs the one that made its sidecars; `TrainedModel.extractors` names it.
        revision: of a name on the hub.

    Raises:
        CheckpointError: there is no such model, or it is damaged or of another kind.
        DataError: its vocabularies cannot be read, or the detector cannot be loaded.
    """
    folder = find_model(_folder(source, revision))
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} holds no model of mvptr_ds: {', '.join(missing)} are missing")
    model, vocabs, config = load_model_folder(folder)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    trained = TrainedModel(model, vocabs, config, parse, finetuned=_finetuned(folder, model, config))
    if detector is not None:
        wants_features = config.visual.source == "features"
        trained.samples.find_regions = _regions_of(detector, chosen, wants_features, config.data.max_regions)
    return trained.to(chosen, dtype)


def _finetuned(folder: Path, model: Mvptr, config: Config) -> FineTuned | None:
    """Returns the downstream task of a model folder, with its head; None where it is of another kind."""
    settings = head_settings(folder)
    task = TASKS.get(settings.get("task", ""))
    if not isinstance(task, Downstream):
        return None
    module = task.build_from(settings, config, model)
    assert isinstance(module, PairModule)
    load_head(module, folder)
    module.eval()
    return FineTuned(task, module)


def _folder(source: str | Path, revision: str | None) -> Path:
    """Returns the folder of a source; a name on the hub is downloaded."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    name = str(source)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name} is no folder; give a run, a checkpoint, a model folder, or a name on the hub")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.txt", "*.yaml", "*.safetensors"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # all of the hub's errors are one of the two
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name} is neither a folder here nor a model of the hub ({reason})") from error


@functools.lru_cache(maxsize=1)
def _parser():  # type: ignore[no-untyped-def]
    from mvptr_ds.corpus.concepts.parser import PhraseParser  # its models take a second to load

    return PhraseParser()


def parse(texts: Sequence[str]) -> list[list[Phrase]]:
    """Returns the phrases of texts by the parser that the package brings."""
    found: list[list[Phrase]] = _parser().parse(texts)
    return found


def _regions_of(name: str, device: torch.device, wants_features: bool, max_regions: int) -> FindRegions:
    """Returns what finds the regions of a picture by an object detector."""
    from mvptr_ds.corpus.regions.detection import RegionChoice, choose_regions
    from mvptr_ds.corpus.regions.detector import Detector, DetectorSource, choose_device
    from mvptr_ds.corpus.regions.detector import find_model as find_detector

    folder, _ = find_detector(name)
    kind, precision = choose_device(device.type, "auto")
    found = Detector(DetectorSource(str(folder), kind, precision, states=wants_features))
    choice = RegionChoice(max_regions=max_regions, at_least_one=wants_features)

    def find(image: Image.Image) -> Picture:
        (detections,) = found.detect([image], [image.size])
        if detections is None:
            raise DataError(f"the detector {name} gives numbers that are not finite for this picture")
        regions, queries = choose_regions(detections, *image.size, choice)
        features = detections.states_QD[queries] if wants_features and detections.states_QD is not None else None
        boxes = [region.box for region in regions]
        return Picture(image, boxes or None, [region.tag for region in regions], features)

    return find
