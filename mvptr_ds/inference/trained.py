"""A trained model and what it can be asked: embeddings, similarity, matching, grounding, masked words, ranking.

Texts and pictures are laid out as an evaluation lays out those of shards, so that both give the same states.

Legend: N texts or pictures, T text slots, R regions, D hidden, W words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvptr_ds.config import Config
from mvptr_ds.data.caption_phrases import phrases_with_slots
from mvptr_ds.data.collate import Sample, collate
from mvptr_ds.data.phrases import PhraseTuple, Vocabs
from mvptr_ds.data.shards.index_format import UNNAMED_EXTRACTOR
from mvptr_ds.errors import DataError
from mvptr_ds.evaluation.grounding import cosines
from mvptr_ds.inference.answers import Answers, Box, FineTuned
from mvptr_ds.inference.pairs import as_texts, pairs_of
from mvptr_ds.inference.pictures import Picture, Seen, as_list
from mvptr_ds.inference.samples import MASK, FindPhrases, FindRegions, SampleMaker
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.model.packed import Packed
from mvptr_ds.objectives.packed_batch import PackedBatch


@dataclass(frozen=True)
class Grounding:
    """A phrase of a text, and where a picture shows it.

    Attributes:
        phrase: its words as lemmas: (noun), (noun, attribute), or (subject, relation, object).
        spans: the characters of the text that say it, half open.
        box: of the region that is most similar, x1 y1 x2 y2 in pixels.
        score: its cosine, within -1 to 1.
        scores: the cosine of every region, in the order of `boxes`.
        boxes: of all regions.
    """

    phrase: PhraseTuple
    spans: tuple[tuple[int, int], ...]
    box: Box
    score: float
    scores: list[float]
    boxes: list[Box]


class Ranked(NamedTuple):
    """A picture's place in a ranking: its number, its cosine, and its ITM probability where it was re-ranked."""

    picture: int
    similarity: float
    match: float | None


class TrainedModel(Answers):
    """A trained model; `mvptr_ds.load` makes it. What it answers after fine-tuning for a task stands in `Answers`.

    Pictures are PIL images, paths, bytes of a file, arrays [H, W, 3], tensors [3, H, W], or a `Picture` with its
    regions. One may stand alone, several in a list. Texts are strings. Tensors come back in float32 on the CPU.

    Args:
        find_phrases: finds the phrases of texts for which none are given.
        find_regions: finds the regions of a picture for which none are given. None: the cells of a grid.
        finetuned: the task that the model was fine-tuned for, with its head; None: it has none.
    """

    batch_size = 64

    def __init__(
        self,
        model: Mvptr,
        vocabs: Vocabs,
        config: Config,
        find_phrases: FindPhrases,
        find_regions: FindRegions | None = None,
        finetuned: FineTuned | None = None,
    ) -> None:
        self.model, self.vocabs, self.config, self.finetuned = model, vocabs, config, finetuned
        tags_in_text = finetuned is not None and finetuned.task.evaluation_needs(config).tags_in_text
        self.samples = SampleMaker(vocabs, config, find_phrases, find_regions, tags_in_text)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.device

    @property
    def extractors(self) -> list[str]:
        """What made the regions that it was trained on, each a name and a version; empty where none were named."""
        return [name for name in self.model.config.region_extractors if name != UNNAMED_EXTRACTOR]

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> TrainedModel:
        """Moves the model to a device, or to another precision such as `torch.bfloat16`, and returns itself."""
        whole = self.model if self.finetuned is None else self.finetuned.module  # with the head
        whole.to(device=device, dtype=dtype)  # type: ignore[call-arg]  # transformers hides the types of nn.Module.to
        return self

    # --- each modality by itself

    @torch.inference_mode()
    def embed_text(self, texts: str | Sequence[str], phrases: Sequence[Sequence[PhraseTuple]] | None = None) -> Tensor:
        """Returns the global states of texts, of length 1, float32 [N, D].

        Args:
            phrases: of each text, the phrases that it says, such as `("car", "red")`. Default: the parser finds them.

        Raises:
            DataError: a text is empty or no text.
        """
        parts = self._text_states(as_texts(texts), phrases)
        return torch.cat([self.model.text_global(states).float().cpu() for states in parts])

    @torch.inference_mode()
    def embed_image(self, pictures: Any) -> Tensor:
        """Returns the global states of pictures, of length 1, float32 [N, D].

        Raises:
            DataError: a picture cannot be read, or its regions do not fit it; the message numbers it.
        """
        return torch.cat([states.globals_ND for states in self._picture_states(as_list(pictures))])

    def similarity(self, pictures: Any, texts: str | Sequence[str]) -> Tensor:
        """Returns the cosines of all pictures with all texts, float32 [pictures, texts]. Raises as the two above."""
        return self.embed_image(pictures) @ self.embed_text(texts).T

    @torch.inference_mode()
    def classify(
        self, pictures: Any, names: Sequence[str], templates: Sequence[str] = ("a picture of a {}.",)
    ) -> Tensor:
        """Returns the probability of each class for each picture, float32 [pictures, classes]: zero-shot.

        Args:
            templates: texts in which `{}` stands for the name. The mean of their global states stands for the class.
        """
        texts = [template.format(name) for name in names for template in templates]
        class_states_CD = self.embed_text(texts).unflatten(0, (len(names), len(templates))).mean(1)
        class_states_CD = torch.nn.functional.normalize(class_states_CD, dim=-1)
        logits = self.embed_image(pictures) @ class_states_CD.T * self.model.logit_scale.exp().float().cpu()
        return logits.softmax(-1)

    # --- pairs, by the cross encoder

    @torch.inference_mode()
    def match(self, pictures: Any, texts: str | Sequence[str]) -> Tensor:
        """Returns the ITM probability that each text describes the picture of the same number, float32 [N].

        One picture may go with several texts, and one text with several pictures.
        """
        seen, wanted = as_list(pictures), as_texts(texts)
        pairs = pairs_of(len(wanted), len(seen))
        return self._match(self._text_states(wanted), self._picture_states(seen), pairs)

    @torch.inference_mode()
    def rank(self, pictures: Any, texts: str | Sequence[str], rerank: int = 32) -> list[list[Ranked]]:
        """Returns for each text all pictures, the best first.

        Args:
            rerank: the best by cosine so many are ordered again by their ITM probability. 0: none.
        """
        seen, wanted = as_list(pictures), as_texts(texts)
        text_states, picture_states = self._text_states(wanted), self._picture_states(seen)
        text_ND = torch.cat([self.model.text_global(states).float().cpu() for states in text_states])
        similarity = text_ND @ torch.cat([states.globals_ND for states in picture_states]).T
        best = similarity.topk(min(rerank, len(seen)), dim=1).indices.tolist() if rerank else [[]] * len(wanted)
        pairs = [(text, picture) for text, chosen in enumerate(best) for picture in chosen]
        match = dict(zip(pairs, self._match(text_states, picture_states, pairs).tolist(), strict=True)) if pairs else {}
        out = []
        for text, row in enumerate(similarity.tolist()):
            ranked = [Ranked(picture, cosine, match.get((text, picture))) for picture, cosine in enumerate(row)]
            ranked.sort(key=lambda r: (r.match is not None, r.match or 0.0, r.similarity), reverse=True)
            out.append(ranked)
        return out

    @torch.inference_mode()
    def ground(
        self,
        picture: Any,
        text: str,
        phrases: Sequence[PhraseTuple] | None = None,
        states: str = "uni",
    ) -> list[Grounding]:
        """Returns the phrases of a text, each with the region of the picture that is most similar to it.

        Args:
            states: `uni`, of the two encoders by themselves, or `cross`, behind the cross encoder.

        Raises:
            DataError: no phrase of the text is in the vocabulary, or the picture cannot be read.
        """
        if states not in ("uni", "cross"):
            raise ValueError(f"states is {states!r}, expected 'uni' or 'cross'")
        (caption,) = self.samples.captions(as_texts(text), None if phrases is None else [phrases])
        chosen = phrases_with_slots(caption, self.vocabs.phrases, len(caption.phrases))
        found = [phrase for phrase, slot in zip(caption.phrases, chosen.slots, strict=True) if slot is not None]
        if not found:
            said = ", ".join(" ".join(phrase.tuple) for phrase in caption.phrases) or "none was found"
            raise DataError(f"no phrase of {text!r} is in the vocabulary ({said}): name others by phrases=[('dog',)]")
        (given,) = as_list(picture)
        seen, sample = self.samples.see(given, 0, 1), self.samples.of_text(caption)
        text_states = self._encode_text([sample])
        _, regions = self._encode_pictures([seen])
        if states == "cross":
            text_states, regions = self.model.encode_cross(text_states, regions)
        phrases_PD = text_states.rows[torch.from_numpy(sample.phrase_mask_T).to(self.device)]
        regions_PRD = regions.rows.expand(len(phrases_PD), -1, -1)
        is_region_PR = torch.ones(regions_PRD.shape[:2], dtype=torch.bool, device=self.device)
        boxes, out = self.samples.boxes_of(seen), []
        # phrases beyond the slots of a text have no state
        for phrase, scores in zip(found, cosines(phrases_PD, regions_PRD, is_region_PR).tolist(), strict=False):
            best = max(range(len(scores)), key=scores.__getitem__)
            out.append(Grounding(phrase.tuple, phrase.spans, boxes[best], scores[best], scores, boxes))
        return out

    @torch.inference_mode()
    def fill(self, picture: Any, text: str, top_k: int = 5) -> list[list[tuple[str, float]]]:
        """Returns for each `[MASK]` of a text the likeliest wordpieces with their probabilities, given the picture.

        Raises:
            DataError: the text holds no `[MASK]`, or holds it beyond the slots of a text.
        """
        if MASK not in text:
            raise DataError(f"{text!r} holds no {MASK}; put it in the place of a word")
        (caption,) = self.samples.captions([text], None)
        sample = self.samples.of_text(caption)
        masked = sample.text_ids_T == self.vocabs.words.mask_id
        if masked.sum() < text.count(MASK):
            raise DataError(f"a {MASK} stands beyond the {self.config.data.max_tokens} wordpieces that a text may have")
        (states,) = self._picture_states(as_list(picture))
        cross_text, _ = self.model.encode_cross(self._encode_text([sample]), states.regions)
        logits = self.model.token_logits(cross_text.rows[torch.from_numpy(masked).to(self.device)]).float()
        best = logits.softmax(-1).topk(top_k, dim=-1)
        words = self.vocabs.words.tokens
        return [
            [(words[word], chance) for word, chance in zip(*row, strict=True)]
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    # --- states, a batch at a time

    def _parts(self, items: Sequence[Any]) -> Iterator[list[Any]]:
        for start in range(0, len(items), self.batch_size):
            yield list(items[start : start + self.batch_size])

    def _encode_text(self, samples: list[Sample]) -> Packed:
        return self.model.encode_text(PackedBatch.of(collate(samples), self.device).text_ids)

    def _text_states(self, texts: list[str], phrases: Sequence[Sequence[PhraseTuple]] | None = None) -> list[Packed]:
        captions = self.samples.captions(texts, phrases)
        return [self._encode_text([self.samples.of_text(one) for one in part]) for part in self._parts(captions)]

    def _encode_pictures(self, seen: list[Seen]) -> tuple[Packed, Packed]:
        """Returns the states of tags and of regions."""
        packed = PackedBatch.of(collate([self.samples.of_picture(one) for one in seen]), self.device)
        regions = self.model.embed_regions(packed.features, packed.images_B3HW, packed.geometry)
        return self.model.encode_visual(packed.tag_ids, regions)

    def _picture_states(self, pictures: list[Picture]) -> list[_PictureStates]:
        if not pictures:
            raise DataError("there is no picture")
        out = []
        for part in self._parts(list(enumerate(pictures))):
            seen = [self.samples.see(picture, number, len(pictures)) for number, picture in part]
            tags, regions = self._encode_pictures(seen)
            out.append(_PictureStates(self.model.visual_global(tags).float().cpu(), regions))
        return out

    def _match(self, texts: list[Packed], pictures: list[_PictureStates], pairs: list[tuple[int, int]]) -> Tensor:
        """Returns the ITM probability of pairs (number of the text, number of the picture), float32 [pairs]."""
        out = []
        for part in self._parts(pairs):
            text = _gather(texts, [first for first, _ in part], self.batch_size)
            regions = _gather([states.regions for states in pictures], [second for _, second in part], self.batch_size)
            cross_text, _ = self.model.encode_cross(text, regions)
            logits_B2 = self.model.itm_logits(self.model.pool(cross_text)).double()
            out.append((logits_B2[:, 0] - logits_B2[:, 1]).sigmoid().float().cpu())
        return torch.cat(out)


class _PictureStates(NamedTuple):
    globals_ND: Tensor  # float32, on the CPU
    regions: Packed


def _gather(parts: list[Packed], wanted: list[int], size: int) -> Packed:
    """Returns sequences by their numbers over all parts, each of which holds `size` of them."""
    chosen = [parts[number // size].take([number % size]) for number in wanted]
    return Packed(torch.cat([one.rows for one in chosen]), tuple(one.lengths[0] for one in chosen))
