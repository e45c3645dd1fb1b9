"""The use of a trained model: `mvptr_ds.load`, and the classes that transformers knows it by."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoProcessor

from mvptr_ds.inference.answers import Answer, FoundRegion
from mvptr_ds.inference.loading import load
from mvptr_ds.inference.pictures import Picture
from mvptr_ds.inference.trained import Grounding, TrainedModel
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.modeling_mvptr import MvptrModel, MvptrOutput
from mvptr_ds.model.processing_mvptr import MvptrProcessor

AutoConfig.register(MvptrConfig.model_type, MvptrConfig, exist_ok=True)
AutoModel.register(MvptrConfig, MvptrModel, exist_ok=True)
AutoProcessor.register(MvptrConfig, MvptrProcessor, exist_ok=True)

__all__ = [
    "Answer", "FoundRegion", "Grounding", "MvptrConfig", "MvptrModel", "MvptrOutput", "MvptrProcessor", "Picture",
    "TrainedModel", "load",
]  # fmt: skip
