"""Recalls against counting by hand; re-ranking against scoring every pair by itself; grounding.

Legend: C captions, I images, T text slots, R regions, D hidden.
"""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.schema import Caption, Phrase, Record, Region
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.index_builder import ensure_index
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.evaluation.encode import EncodedSplit
from mvptr_ds.evaluation.grounding import ground, list_phrases, similarities
from mvptr_ds.evaluation.pictures import draw_grounding
from mvptr_ds.evaluation.retrieval import RANKS, recalls, rerank, score_pairs
from tests.support.tiny_models import tiny_model

CPU = torch.device("cpu")


def counted(scores: list[list[float]], image_of: list[int]) -> dict[str, float]:
    """COCO's protocol; what ties with the right candidate stands before it."""
    num_images = len(scores[0])
    text_ranks = [
        sum(scores[c][i] >= scores[c][own] for i in range(num_images) if i != own) for c, own in enumerate(image_of)
    ]
    image_ranks = []
    for i in range(num_images):
        column = [row[i] for row in scores]
        best = max(column[c] for c, own in enumerate(image_of) if own == i)
        image_ranks.append(sum(column[c] >= best for c, own in enumerate(image_of) if own != i))
    out = {f"t2i_r{k}": sum(r < k for r in text_ranks) / len(text_ranks) for k in RANKS}
    return out | {f"i2t_r{k}": sum(r < k for r in image_ranks) / len(image_ranks) for k in RANKS}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 4), min_size=1, max_size=15), st.integers(1, 30))
def test_recalls_with_several_captions_an_image_and_ties(seed: int, captions: list[int], levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image_of = torch.arange(len(captions)).repeat_interleave(torch.tensor(captions))
    scores = torch.randint(0, levels, (len(image_of), len(captions)), generator=generator).float()
    assert recalls(scores, image_of) == pytest.approx(counted(scores.tolist(), image_of.tolist()), abs=1e-6)


def test_perfect_constant_and_broken_scores() -> None:
    image_of = torch.arange(20).repeat_interleave(2)
    perfect = F.one_hot(image_of, 20).float()
    assert set(recalls(perfect, image_of).values()) == {1.0}
    assert set(recalls(torch.zeros(40, 20), image_of).values()) == {0.0}
    assert set(recalls(torch.full((40, 20), float("nan")), image_of).values()) == {0.0}  # a broken model earns nothing
    one_broken = perfect.clone()
    one_broken[0, 0] = float("nan")
    assert recalls(one_broken, image_of)["t2i_r10"] == pytest.approx(39 / 40)


def split_of(captions: list[int], seed: int = 0) -> EncodedSplit:
    generator = torch.Generator().manual_seed(seed)
    image_of = torch.arange(len(captions)).repeat_interleave(torch.tensor(captions))
    num_text, num_images = len(image_of), len(captions)
    lengths, regions = torch.arange(num_text) % 4 + 3, torch.arange(num_images) % 3 + 1
    text_mask = torch.arange(6)[None, :] < lengths[:, None]
    phrase_mask = torch.arange(6)[None, :] == lengths[:, None] - 2
    return EncodedSplit(
        text_CTD=torch.randn(num_text, 6, 16, generator=generator),
        text_mask_CT=text_mask,
        phrase_mask_CT=phrase_mask,
        text_global_CD=F.normalize(torch.randn(num_text, 16, generator=generator), dim=-1),
        regions_IRD=torch.randn(num_images, 3, 16, generator=generator),
        region_mask_IR=torch.arange(3)[None, :] < regions[:, None],
        image_global_ID=F.normalize(torch.randn(num_images, 16, generator=generator), dim=-1),
        image_of_C=image_of,
    )


@pytest.mark.parametrize("shift", [0.0, -20.0])  # so that a match of the best is less than a cosine of the others
@torch.inference_mode()
def test_reranking_orders_the_best_by_the_itm_head_and_leaves_the_others_behind(shift: float) -> None:
    split, model, top_k = split_of([1, 2, 3, 1, 2, 2, 1, 1]), tiny_model().eval(), 3
    model.itm_head.weight.mul_(50)  # far from 0.5, so that orders differ
    model.itm_head.bias[0] += shift
    sim = split.sim_CI
    t2i, i2t = rerank(model, split, top_k, 5, CPU)
    every = torch.cartesian_prod(torch.arange(sim.shape[0]), torch.arange(sim.shape[1]))
    match = score_pairs(model, split, every[:, 0], every[:, 1], 7, CPU).view_as(sim)
    for c in range(sim.shape[0]):
        best = sorted(range(sim.shape[1]), key=lambda i: -float(sim[c, i]))
        wanted = sorted(best[:top_k], key=lambda i: -float(match[c, i])) + best[top_k:]
        assert t2i[c].argsort(descending=True).tolist() == wanted
    for i in range(sim.shape[1]):
        best = sorted(range(sim.shape[0]), key=lambda c: -float(sim[c, i]))
        wanted = sorted(best[:top_k], key=lambda c: -float(match[c, i])) + best[top_k:]
        assert i2t[:, i].argsort(descending=True).tolist() == wanted


@torch.inference_mode()
def test_scores_of_pairs_do_not_depend_on_their_batch_and_class_0_is_a_match() -> None:
    split, model = split_of([2, 1, 2]), tiny_model().eval()
    captions, images = torch.tensor([0, 4, 2, 1]), torch.tensor([2, 0, 1, 1])
    together = score_pairs(model, split, captions, images, 10, CPU)
    alone = [score_pairs(model, split, captions[i : i + 1], images[i : i + 1], 1, CPU) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)  # float32 of another padding
    model.itm_head.bias.copy_(torch.tensor([8.0, -8.0]))
    assert (score_pairs(model, split, captions, images, 10, CPU) > 0.99).all()


def test_more_candidates_than_there_are_reranks_all() -> None:
    split, model = split_of([3, 3, 3]), tiny_model().eval()
    t2i, i2t = rerank(model, split, 100, 4, CPU)
    assert (t2i >= 2.0).all() and (i2t >= 2.0).all()  # nine captions for each image, though there are three images


def shards(folder: Path, with_regions: bool) -> Index:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "JPEG")
    regions = (Region((0, 0, 20, 20), "dog"), Region((10, 5, 40, 30), "cat")) if with_regions else ()
    truth = (1,) if with_regions else ()
    caption = Caption("A cat.", (Phrase(("unheard",), ((0, 1),)), Phrase(("cat",), ((2, 5),), truth)))
    items = [(f"k{i}", Record(f"k{i}", 40, 30, (caption,), regions), {"jpg": buffer.getvalue()}) for i in range(2)]
    write_shards(folder, items, 10)
    return ensure_index(str(folder))


@pytest.mark.parametrize("with_regions", [True, False])
def test_grounding_finds_the_most_similar_region(tmp_path: Path, with_regions: bool) -> None:
    """Also on images without boxes, whose regions are a grid that no record names: the evaluation must not stop."""
    index, words = shards(tmp_path / "shards", with_regions), WordPiece()
    phrases = PhraseVocab.build({("cat",): 3}, words, 1)
    split = split_of([1, 1])
    split.regions_IRD[:, :2] = -split.text_CTD[:, :1]
    for caption in range(2):
        slot = int(split.phrase_mask_CT[caption].nonzero())
        split.region_mask_IR[caption] = torch.tensor([True, True, False])
        split.regions_IRD[caption, 1] = split.text_CTD[caption, slot] * 3
        split.regions_IRD[caption, 2] = split.text_CTD[caption, slot]  # padding, though as similar
    asked, _ = list_phrases(split, index, phrases)
    found = ground(similarities(split, asked), asked)
    if with_regions:
        assert [(g.caption, g.phrase.tuple, g.region, g.right) for g in found] == [
            (0, ("cat",), 1, True),
            (1, ("cat",), 1, True),
        ]
    draw_grounding(index, found, 4, tmp_path / "pictures.png")
    assert (tmp_path / "pictures.png").read_bytes().startswith(b"\x89PNG")
