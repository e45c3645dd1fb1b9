"""Turns texts, phrases, pictures, boxes and tags into the padded tensors of `MvptrModel`. `AutoProcessor` loads it.

Legend: B pairs, L token slots, P phrases, G tag slots, R regions, F feature size, H W image size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils.hub import PushToHubMixin, cached_file

from .vision import IMAGE_MEAN, IMAGE_STD

TOKENIZER, PHRASES, SETTINGS = "tokenizer.json", "phrase_vocab.json", "processor_config.json"
PhraseTuple = tuple[str, ...]


class MvptrProcessor(PushToHubMixin):
    """The inputs of `MvptrModel` from what people have: texts, phrases, pictures, boxes, tags, features.

    Args:
        tokenizer: wordpieces with [CLS] and [SEP] around them.
        phrases: the phrase vocabulary: tuples of words, such as `("dog", "brown")`, by their number.
        image_size: pixels of the square that pictures are resized to, by bicubic interpolation.
        max_tokens, max_text_slots, max_tag_slots, max_regions: what training cut its samples to.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        phrases: Sequence[PhraseTuple] = (),
        image_size: int = 224,
        max_tokens: int = 33,
        max_text_slots: int = 40,
        max_tag_slots: int = 20,
        max_regions: int = 50,
    ) -> None:
        self.tokenizer = tokenizer
        self.phrases = [tuple(words) for words in phrases]
        self.image_size = image_size
        self.max_tokens, self.max_text_slots = max_tokens, max_text_slots
        self.max_tag_slots, self.max_regions = max_tag_slots, max_regions
        self._number_of = {words: number for number, words in enumerate(self.phrases)}

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """Does nothing: `save_pretrained` always writes the `auto_map`. AutoProcessor calls it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> MvptrProcessor:
        """Reads the processor of an exported folder or hub model. Raises OSError where a file is missing."""
        known = ("cache_dir", "force_download", "token", "revision", "local_files_only", "subfolder")
        options = {name: kwargs[name] for name in known if kwargs.get(name) is not None}

        def read(name: str) -> str:
            found = cached_file(pretrained_model_name_or_path, name, **options)
            assert found is not None
            return Path(found).read_text(encoding="utf-8")

        settings = json.loads(read(SETTINGS))
        phrases = [tuple(phrase["tuple"]) for phrase in json.loads(read(PHRASES))["phrases"]]
        sizes = {name: settings[name] for name in _SIZES}
        return cls(Tokenizer.from_str(read(TOKENIZER)), phrases, **sizes)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes tokenizer, settings and phrases; a phrase_vocab.json that is there belongs to the model and stays."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(folder / TOKENIZER))
        if not (folder / PHRASES).exists():
            phrases = {"phrases": [{"tuple": words} for words in self.phrases]}
            (folder / PHRASES).write_text(json.dumps(phrases, ensure_ascii=False) + "\n", encoding="utf-8")
        auto_map = {"AutoProcessor": f"{Path(__file__).stem}.{type(self).__name__}"}
        settings = {"processor_class": type(self).__name__, "auto_map": auto_map}
        settings |= {name: getattr(self, name) for name in _SIZES}
        # what transformers' own image processors read: they resize by other kernels, so that pixels differ a little
        pictures = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": self.image_size, "width": self.image_size},
            "resample": int(Image.Resampling.BICUBIC),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(IMAGE_MEAN),
            "image_std": list(IMAGE_STD),
            "do_convert_rgb": True,
        }
        for name, content in ((SETTINGS, settings), ("preprocessor_config.json", pictures)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        phrases: Sequence[Sequence[PhraseTuple]] | None = None,
        boxes: Sequence[Any] | None = None,
        tags: Sequence[Sequence[str]] | None = None,
        region_features: Sequence[Any] | None = None,
    ) -> BatchFeature:
        """Returns the tensors of a batch.

        Args:
            text: one text, or several.
            images: one PIL image, or several. Alpha is drawn on white.
            phrases: of each text, the tuples that it says. Those that the vocabulary lacks are left out. The package
                mvptr_ds finds them in a text: `mvptr_ds.corpus.concepts.parser.PhraseParser`.
            boxes: of each image, [R, 4] x1 y1 x2 y2 in pixels. With features and no images: as shares of 0 to 1.
            tags: of each image, the object tags of its boxes.
            region_features: of each image, [R, F], for models that read features.

        Raises:
            ValueError: lists that belong together differ in length.
        """
        out: dict[str, Tensor] = {}
        if text is not None:
            out |= self._texts([text] if isinstance(text, str) else list(text), phrases)
        pictures = None
        if images is not None:
            pictures = [images] if isinstance(images, Image.Image) else list(images)
            out["pixel_values"] = torch.stack([self._pixels(picture) for picture in pictures])
        if boxes is not None:
            out |= self._boxes(boxes, pictures)
        if region_features is not None:
            features = [
                torch.as_tensor(np.asarray(f), dtype=torch.float32)[: self.max_regions] for f in region_features
            ]
            out["region_features"] = _padded(features)
        if tags is not None:
            out |= self._tags(tags)
        return BatchFeature(out)

    def _texts(self, texts: list[str], phrases: Sequence[Sequence[PhraseTuple]] | None) -> dict[str, Tensor]:
        if phrases is not None and len(phrases) != len(texts):
            raise ValueError(f"{len(texts)} texts, and phrases of {len(phrases)}: give those of each text")
        ids, numbers = [], []
        most = min(self.max_tokens, self.max_text_slots - 2)
        for place, encoding in enumerate(self.tokenizer.encode_batch(texts)):
            first, *pieces, last = encoding.ids
            ids.append(torch.tensor([first, *pieces[:most], last]))
            said = () if phrases is None else phrases[place]
            known = [self._number_of[tuple(words)] for words in said if tuple(words) in self._number_of]
            room = max(0, self.max_text_slots - 2 - min(len(pieces), self.max_tokens))
            numbers.append(torch.tensor(known[:room], dtype=torch.int64))
        out = {"input_ids": _padded(ids), "attention_mask": _mask(ids)}
        if phrases is not None:
            out["phrase_ids"] = _padded(numbers, fill=-1)
        return out

    def _pixels(self, picture: Image.Image) -> Tensor:
        """Returns the normalised pixels, float32 [3, H, W]."""
        if picture.has_transparency_data:
            rgba = picture.convert("RGBA")
            picture = Image.new("RGB", rgba.size, "white")
            picture.paste(rgba, mask=rgba)
        square = picture.convert("RGB").resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        pixels_3HW = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255.0
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        return (pixels_3HW - mean) / std

    def _boxes(self, boxes: Sequence[Any], pictures: list[Image.Image] | None) -> dict[str, Tensor]:
        if pictures is not None and len(pictures) != len(boxes):
            raise ValueError(f"{len(pictures)} images, and boxes of {len(boxes)}: give those of each image")
        shares = []
        for number, of_image in enumerate(boxes):
            corners_R4 = np.asarray(of_image, dtype=np.float64).reshape(-1, 4)[: self.max_regions]
            if pictures is not None:
                width, height = pictures[number].size
                corners_R4 = corners_R4 / np.array([width, height, width, height])
            shares.append(torch.from_numpy(np.clip(corners_R4, 0.0, 1.0)).float())
        return {"boxes": _padded(shares), "region_mask": _mask(shares)}

    def _tags(self, tags: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        """Lays out `[CLS] wordpieces of the tags [SEP]`, without tags that equal another."""
        ids = []
        for of_image in tags:
            distinct = list(dict.fromkeys(tag for tag in of_image if tag))
            encoded = self.tokenizer.encode_batch(distinct) if distinct else []
            pieces = list(dict.fromkeys(tuple(encoding.ids[1:-1]) for encoding in encoded))
            first, last = self.tokenizer.encode("").ids
            flat = [piece for of_tag in pieces for piece in of_tag]
            ids.append(torch.tensor([first, *flat[: self.max_tag_slots - 2], last]))
        return {"tag_ids": _padded(ids), "tag_attention_mask": _mask(ids)}


_SIZES = ("image_size", "max_tokens", "max_text_slots", "max_tag_slots", "max_regions")


def _padded(rows: Sequence[Tensor], fill: float = 0) -> Tensor:
    out: Tensor = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)
    return out


def _mask(rows: Sequence[Tensor]) -> Tensor:
    return _padded([torch.ones(len(row), dtype=torch.bool) for row in rows])
