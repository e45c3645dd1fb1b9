"""Retrieval on parts of a split: which captions and images belong to each, and the mean over them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvptr_ds.errors import DataError
from mvptr_ds.evaluation import folds
from mvptr_ds.evaluation.encode import EncodedSplit
from mvptr_ds.evaluation.folds import folds_of, score_folds
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr

IMAGE_OF_C = [0, 0, 1, 2, 2, 2, 3, 4]  # five images


def encoded(text_CD: Tensor, image_ID: Tensor) -> EncodedSplit:
    num_captions, num_images = len(text_CD), len(image_ID)
    return EncodedSplit(
        text_CTD=torch.arange(float(num_captions * 4)).view(num_captions, 1, 4),
        text_mask_CT=torch.ones(num_captions, 1, dtype=torch.bool),
        phrase_mask_CT=torch.zeros(num_captions, 1, dtype=torch.bool),
        text_global_CD=text_CD,
        regions_IRD=torch.arange(float(num_images * 4)).view(num_images, 1, 4),
        region_mask_IR=torch.ones(num_images, 1, dtype=torch.bool),
        image_global_ID=image_ID,
        image_of_C=torch.tensor(IMAGE_OF_C),
    )


def random_split() -> EncodedSplit:
    generator = torch.Generator().manual_seed(0)
    text_CD = F.normalize(torch.randn(len(IMAGE_OF_C), 4, generator=generator), dim=-1)
    return encoded(text_CD, F.normalize(torch.randn(5, 4, generator=generator), dim=-1))


def test_a_fold_has_its_images_and_their_captions_and_a_rest_is_left_out() -> None:
    split = random_split()
    first, second = folds_of(split, 2)
    assert first.image_of_C.tolist() == [0, 0, 1] and second.image_of_C.tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(second.sim_CI, split.sim_CI[3:7, 2:4])
    assert torch.equal(second.text_CTD, split.text_CTD[3:7]) and torch.equal(second.regions_IRD, split.regions_IRD[2:4])


def test_more_images_than_there_are() -> None:
    with pytest.raises(DataError, match=r"eval\.fold_images is 6, but the split has 5 images: lower it"):
        next(folds_of(random_split(), 6))


def test_the_mean_over_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    # image 0 is found by its first caption alone; the captions of images 2 and 3 name each other's
    towards = [0, 1, 1, 3, 3, 3, 2, 4]
    split = encoded(F.one_hot(torch.tensor(towards), 5).float(), torch.eye(5))
    monkeypatch.setattr(folds, "reranked_recalls", lambda model, fold, *_: {"t2i_r1": float(len(fold.text_CTD))})
    sizes = {"hidden_size": 4, "num_attention_heads": 1, "intermediate_size": 4}
    model = Mvptr(MvptrConfig(num_words=8, num_rows=8, **sizes))
    found = score_folds(model, split, 2, 2, 8, torch.device("cpu"))
    assert (found["num_folds"], found["num_images"]) == (2, 2)
    assert found["retrieval"]["t2i_r1"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["retrieval"]["t2i_r5"] == 1.0
    assert found["rerank"] == {"t2i_r1": 3.5}
