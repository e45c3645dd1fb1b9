"""Each score against counting by hand, on random states and a tiny random model.

Legend: C captions, I images, T text slots, P phrases, R regions, D hidden, G tag slots.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mvptr_ds.data.collate import IGNORE
from mvptr_ds.data.features import SampleBuilder, SampleOptions
from mvptr_ds.data.loader import eval_batches
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.schema import Caption, Phrase, Record, Region
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.index_builder import ensure_index
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.evaluation.encode import EncodedSplit, SplitInput, encode_images, permute_regions, without_tags
from mvptr_ds.evaluation.grounding import (
    SIZES,
    AskedPhrase,
    list_phrases,
    score_grounding,
    similarities,
    size_bounds,
)
from mvptr_ds.evaluation.matching import cross_with_own, hardest_images, score_matching
from mvptr_ds.evaluation.recovery import recover_concepts
from mvptr_ds.evaluation.retrieval import chance_recalls, recalls, score_pairs
from mvptr_ds.model.packed import Packed
from tests.support.pack import pack
from tests.support.tiny_models import NUM_WORDS, REGIONS, tiny_model

CPU = torch.device("cpu")
INF = float("inf")
ANY = Phrase(("dog",), ((0, 1),))


def split_input(captions: list[int], seed: int = 0) -> SplitInput:
    """Random states; several captions an image, texts of 3 to 6 slots, 1 to 4 regions."""
    generator = torch.Generator().manual_seed(seed)
    image_of_C = torch.arange(len(captions)).repeat_interleave(torch.tensor(captions))
    num_captions, num_images = len(image_of_C), len(captions)
    lengths_C, regions_I = torch.arange(num_captions) % 4 + 3, torch.arange(num_images) % 4 + 1
    region_mask_IR = torch.arange(4) < regions_I[:, None]
    return SplitInput(
        text_CTD=torch.randn(num_captions, 6, 16, generator=generator),
        text_mask_CT=torch.arange(6) < lengths_C[:, None],
        phrase_mask_CT=torch.arange(6) == lengths_C[:, None] - 2,
        text_global_CD=F.normalize(torch.randn(num_captions, 16, generator=generator), dim=-1),
        image_of_C=image_of_C,
        embedded_IRD=torch.randn(num_images, 4, 16, generator=generator) * region_mask_IR[..., None],
        region_mask_IR=region_mask_IR,
        tag_ids_IG=torch.randint(5, NUM_WORDS, (num_images, 4), generator=generator),
        tag_mask_IG=torch.ones(num_images, 4, dtype=torch.bool),
    )


def split_of(captions: list[int]) -> EncodedSplit:
    return encode_images(tiny_model().eval(), split_input(captions), 3, CPU)


def asked_of(split: EncodedSplit) -> list[AskedPhrase]:
    slots = split.phrase_mask_CT.int().argmax(1).tolist()
    return [AskedPhrase(c, slot, ANY, (), 0.0) for c, slot in enumerate(slots) if c != 1]  # caption 1 has no phrase


# --- grounding

numbers = st.frozensets(st.integers(0, 4), max_size=4).map(lambda found: tuple(sorted(found)))
similarity = st.integers(-3, 3).map(float) | st.just(math.nan)
similarities_R = st.lists(similarity, min_size=1, max_size=5)
asked_phrase = st.tuples(st.integers(1, 2), numbers, numbers, st.integers(0, 5), similarities_R)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(asked_phrase, max_size=12))
def test_grounding_against_counting_by_hand(
    rows: list[tuple[int, tuple[int, ...], tuple[int, ...], int, list[float]]],
) -> None:
    """Ties, NaN, boxes that the model does not see, phrases without ground truth, nothing to ask."""
    asked = [
        AskedPhrase(i, 1, Phrase(("dog", "red")[:words], (), named), noun, area / 10)
        for i, (words, named, noun, area, _) in enumerate(rows)
    ]
    width = max((len(sims) for *_, sims in rows), default=3)
    sim_PR = torch.tensor([sims + [-INF] * (width - len(sims)) for *_, sims in rows]).view(len(rows), width)
    found = score_grounding(sim_PR, asked)

    bounds = size_bounds(asked)
    counted: dict[str, list[tuple[bool, float]]] = {}
    for words, named, noun, area, sims in rows:
        if not named:
            continue
        size = SIZES[sum(area / 10 > b for b in bounds)]
        every = set(range(len(sims)))
        for kind in ("all", "noun" if words == 1 else "attribute", size):
            counted.setdefault(kind, []).append(pick(sims, set(named) & every, every))
        among = set(noun) & every
        right = set(named) & among
        if words == 2 and right and among - right:
            counted.setdefault("choice", []).append(pick(sims, right, among))
    parts = {"all": found, "choice": found["attribute_among_one_noun"], **found["by_size"]}
    for kind in ("all", "noun", "attribute", "choice", *SIZES):
        part, hits = parts.get(kind, found.get(kind)), counted.get(kind, [])
        assert part["n"] == len(hits)
        if hits:
            assert part["accuracy"] == pytest.approx(np.mean([h for h, _ in hits]))
            assert part["chance"] == pytest.approx(np.mean([c for _, c in hits]))
        else:
            assert part["accuracy"] is None


def pick(sims: list[float], named: set[int], among: set[int]) -> tuple[bool, float]:
    """Whether some named one beats every other, and the share of the named."""
    others = [sims[r] for r in among - named]
    broken = any(math.isnan(sims[r]) for r in among)
    right = bool(named) and not broken and max(sims[r] for r in named) > max(others, default=-INF)
    return right, len(named) / len(among)


def test_a_constant_similarity_earns_nothing_and_a_random_one_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    asked = [AskedPhrase(i, 1, Phrase(("dog",), (), (i % 5,)), (), i / 2000) for i in range(2000)]
    assert score_grounding(torch.zeros(2000, 5), asked)["accuracy"] == 0.0
    found = score_grounding(torch.randn(2000, 5, generator=generator), asked)
    assert found["chance"] == pytest.approx(0.2)
    assert found["accuracy"] == pytest.approx(0.2, abs=0.03)  # a standard error of 0.9 points
    assert [found["by_size"][size]["n"] for size in SIZES] == [667, 666, 667]


def test_similarities_are_cosines_with_the_regions_of_the_own_image() -> None:
    split = split_of([2, 1, 3])
    asked = asked_of(split)
    sim_PR = similarities(split, asked)
    for row_R, phrase in zip(sim_PR, asked, strict=True):
        image = int(split.image_of_C[phrase.caption])
        for region in range(4):
            wanted = F.cosine_similarity(
                split.text_CTD[phrase.caption, phrase.slot], split.regions_IRD[image, region], dim=0
            )
            real = bool(split.region_mask_IR[image, region])
            assert float(row_R[region]) == pytest.approx(float(wanted) if real else -INF, abs=1e-5)
    assert similarities(split, []).shape == (0, 4)


# --- what a split asks


def shards(folder: Path, num_scenes: int = 4) -> Index:
    """Two captions a record: phrases with and without truth, out of the vocabulary, a relation; and none at all."""
    items = []
    for i in range(num_scenes):
        phrases = (
            Phrase(("unheard",), ((2, 5),), (0,)),
            Phrase(("dog",), ((2, 5),), (0, 2)),
            Phrase(("dog", "near", "cat"), ((2, 5),), (0,)),
            Phrase(("dog", "red"), ((2, 5),), (2,)),
            Phrase(("cat",), ((12, 15),)),
        )
        regions = (Region((0, 0, 5, 10), "dog"), Region((0, 0, 1, 1), "cat"), Region((0, 0, 10, 10), "dog"))
        captions = (Caption("A dog and a cat.", phrases), Caption("A quiet street."))
        npy = io.BytesIO()
        np.save(npy, np.random.default_rng(i).standard_normal((3, 5)).astype(np.float16))
        items.append((f"k{i}", Record(f"k{i}", 20, 10, captions, regions), {"npy": npy.getvalue()}))
    write_shards(folder, items, 10)
    return ensure_index(str(folder))


def test_which_phrases_are_asked(tmp_path: Path) -> None:
    index, words = shards(tmp_path, 1), WordPiece()
    vocab = PhraseVocab.build({("dog",): 3, ("dog", "near", "cat"): 2, ("dog", "red"): 2, ("cat",): 1}, words, 1)
    split = split_of([2])
    split.phrase_mask_CT = torch.tensor([[False, True, True, True, True, False], [False] * 6])
    asked, num_without_slot = list_phrases(split, index, vocab)
    assert [(a.caption, a.slot, a.phrase.tuple, a.same_noun, a.area_frac) for a in asked] == [
        (0, 1, ("dog",), (0, 2), 0.5),  # slot 2 is the relation's
        (0, 3, ("dog", "red"), (0, 2), 0.5),
        (0, 4, ("cat",), (1,), 0.0),
    ]
    assert num_without_slot == 1
    split.phrase_mask_CT[0, 2:] = False  # the others did not fit
    asked, num_without_slot = list_phrases(split, index, vocab)
    assert ([a.phrase.tuple for a in asked], num_without_slot) == ([("dog",)], 2)


# --- matching


@torch.inference_mode()
def test_the_pass_over_own_pairs_serves_matching_and_grounding() -> None:
    split, model = split_of([2, 1, 3, 1]), tiny_model().eval()
    asked = asked_of(split)
    match_C, sim_PR = cross_with_own(model, split, asked, 3, CPU)
    alone = score_pairs(model, split, torch.arange(7), split.image_of_C, 1, CPU)
    torch.testing.assert_close(match_C, alone, rtol=0, atol=1e-6)  # float32 of another padding
    for row_R, phrase in zip(sim_PR, asked, strict=True):
        c, image = phrase.caption, int(split.image_of_C[phrase.caption])
        text = pack(split.text_CTD[[c]], split.text_mask_CT[[c]])
        text, regions = model.encode_cross(text, pack(split.regions_IRD[[image]], split.region_mask_IR[[image]]))
        wanted_R = torch.full((split.regions_IRD.shape[1],), -INF)
        wanted_R[: len(regions.rows)] = F.cosine_similarity(text.rows[phrase.slot][None], regions.rows, dim=-1)
        torch.testing.assert_close(row_R, wanted_R, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_matching_on_own_and_hardest_other_images() -> None:
    split, model = split_of([2, 1, 3, 1]), tiny_model().eval()
    captions, images = hardest_images(split)
    for caption, image in zip(captions.tolist(), images.tolist(), strict=True):
        sims = split.sim_CI[caption].tolist()
        assert image == max((i for i in range(4) if i != split.image_of_C[caption]), key=lambda i: sims[i])
    assert captions.tolist() == list(range(7))
    match_C, _ = cross_with_own(model, split, [], 4, CPU)
    other = score_pairs(model, split, captions, images, 4, CPU)
    model.itm_head.bias[0] -= torch.cat([match_C, other]).logit().median()  # some right, some wrong
    match_C, _ = cross_with_own(model, split, [], 4, CPU)
    other = score_pairs(model, split, captions, images, 4, CPU)
    own_right, other_right = int((match_C > 0.5).sum()), int((other < 0.5).sum())
    found = score_matching(model, split, match_C, 4, CPU)
    assert found["n"] == 14
    assert 0 < own_right + other_right < 14
    assert found["accuracy"] == pytest.approx((own_right + other_right) / 14)
    assert (found["match"], found["mismatch"]) == (pytest.approx(own_right / 7), pytest.approx(other_right / 7))


@torch.inference_mode()
def test_matching_by_an_undecided_or_broken_model_and_of_one_image() -> None:
    split, model = split_of([1, 2]), tiny_model().eval()
    model.itm_head.weight.zero_()
    assert score_matching(model, split, torch.full((3,), 0.5), 4, CPU)["accuracy"] == 0.0
    model.itm_head.bias.fill_(math.nan)
    assert score_matching(model, split, torch.full((3,), math.nan), 4, CPU)["accuracy"] == 0.0
    only = split_of([3])
    assert score_matching(model, only, torch.tensor([0.9, 0.9, 0.1]), 4, CPU) == {
        "accuracy": pytest.approx(2 / 3), "match": pytest.approx(2 / 3), "mismatch": None, "n": 3,
    }  # fmt: skip


# --- retrieval by chance, tags withheld, regions permuted


@pytest.mark.parametrize("captions", [[1, 1, 1, 1], [1, 3, 2, 1, 5, 1, 1, 1, 4, 1, 1, 1]])
def test_chance_of_retrieval_is_what_random_scores_earn(captions: list[int]) -> None:
    image_of_C = torch.arange(len(captions)).repeat_interleave(torch.tensor(captions))
    generator = torch.Generator().manual_seed(0)
    shape = len(image_of_C), len(captions)
    drawn = [recalls(torch.rand(shape, generator=generator), image_of_C) for _ in range(1000)]
    for name, value in chance_recalls(image_of_C, len(captions)).items():
        assert value == pytest.approx(np.mean([d[name] for d in drawn]), abs=0.02)  # a standard error below 0.6 points


def test_permuted_regions_are_the_same_ones_elsewhere() -> None:
    split = split_input([1] * 40)
    permuted = permute_regions(split, 0)
    before_ND, after_ND = split.embedded_IRD[split.region_mask_IR], permuted.embedded_IRD[split.region_mask_IR]
    assert sorted(before_ND.tolist()) == sorted(after_ND.tolist())
    assert not permuted.embedded_IRD[~split.region_mask_IR].any()
    image_of_N = torch.arange(40).repeat_interleave(split.region_mask_IR.sum(1))
    came_from_N = (after_ND[:, None] == before_ND[None]).all(-1).int().argmax(1)
    assert (image_of_N[came_from_N] == image_of_N).float().mean() < 0.15
    assert torch.equal(permute_regions(split, 0).embedded_IRD, permuted.embedded_IRD)
    assert not torch.equal(permute_regions(split, 1).embedded_IRD, permuted.embedded_IRD)


def test_withheld_tags_leave_what_training_sees() -> None:
    split, words = split_input([1, 2]), WordPiece()
    options = SampleOptions(tag_withhold_prob=1.0, max_regions=REGIONS)
    builder = SampleBuilder(words, PhraseVocab.empty(words), options)
    record = Record("k", 9, 9, (Caption("A dog."),), (Region((0, 0, 5, 5), "dog"),))
    ids_G, _ = builder._tags(record, np.random.default_rng(0))
    bare = without_tags(split, words.cls_id, words.sep_id)
    assert [row.tolist() for row in bare.tag_ids_IG] == [ids_G.tolist()] * 2
    assert bare.tag_mask_IG.all()
    assert bare.text_CTD is split.text_CTD


# --- MCR


@torch.inference_mode()
def test_mcr_against_one_sample_at_a_time(tmp_path: Path) -> None:
    """Every asked slot is [MASK], each image counts once for the tags and each caption for the phrases."""
    index = shards(tmp_path / "shards", 30)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*specials, "a", "dog", "cat", "and", ".", "quiet", "street", *(f"w{i}" for i in range(NUM_WORDS - 12))]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    words = WordPiece(tmp_path / "vocab.txt")
    known = [("dog", "red"), ("dog", "near", "cat"), ("cat", "big"), ("a", "b"), ("c", "d"), ("e", "f")]
    vocab = PhraseVocab.build({phrase: 9 - i for i, phrase in enumerate(known)}, words, 1)
    options = SampleOptions(tag_prob=0.5, phrase_prob=0.5, predict_phrases=True, max_text_slots=16)
    builder = SampleBuilder(words, vocab, options)
    model = tiny_model().eval()
    for name, parameter in model.named_parameters():  # larger weights: answers that differ from slot to slot
        if name.endswith("weight") and parameter.ndim == 2:
            parameter.mul_(20)
    seen: dict[str, list[tuple[int, int]]] = {"tags": [], "phrases": []}
    embedded = []
    for number in range(len(index)):
        batch = next(iter(eval_batches(index, builder, 1, [number])))
        picked = batch.phrase_labels_BT != IGNORE
        ids = batch.text_ids_BT.masked_fill(picked, words.mask_id)
        states = model.encode_text(pack(ids, batch.text_mask_BT)).padded()[picked]
        answers = model.phrase_logits(states).argmax(-1).tolist()
        seen["phrases"] += zip(answers, batch.phrase_labels_BT[picked].tolist(), strict=True)
        if number % 2:
            continue
        assert batch.region_features_BRF is not None
        regions = model.embed_regions(pack(batch.region_features_BRF), None, pack(batch.region_geometry_BR6))
        embedded.append(regions.rows)
        picked = batch.tag_labels_BG != IGNORE
        ids = batch.tag_ids_BG.masked_fill(picked, words.mask_id)
        states = model.encode_visual(pack(ids, batch.tag_mask_BG), regions)[0].padded()[picked]
        answers = model.tag_logits(states).argmax(-1).tolist()
        seen["tags"] += zip(answers, batch.tag_labels_BG[picked].tolist(), strict=True)
    split = split_input([2] * 30)
    split.embedded_IRD, split.region_mask_IR = torch.stack(embedded), torch.ones(30, 3, dtype=torch.bool)
    found = recover_concepts(model, split, index, builder, 7, CPU)  # batches part the captions of an image
    for part, pairs in ((found, seen["tags"]), (found["phrases"], seen["phrases"])):
        answers = [label for _, label in pairs]
        assert part["n"] == len(pairs) > 15
        assert part["majority"] == pytest.approx(max(answers.count(a) for a in answers) / len(answers))
        assert part["accuracy"] == pytest.approx(np.mean([a == b for a, b in pairs]))
    assert found == recover_concepts(model, split, index, builder, 64, CPU)


class Copies:
    """Answers every slot with what stands there."""

    dtype = torch.float32
    config = SimpleNamespace(num_phrases=1)

    def encode_visual(self, ids: Packed, regions: Packed) -> tuple[Packed, None]:
        return ids.like(ids.rows[:, None]), None

    def encode_text(self, ids: Packed) -> Packed:
        return ids.like(ids.rows[:, None])

    def tag_logits(self, states_N1: Tensor) -> Tensor:
        return F.one_hot(states_N1[:, 0], 40_000)

    phrase_logits = tag_logits


def test_copying_earns_nothing_in_mcr(tmp_path: Path) -> None:
    """Training leaves a tenth of the picked slots as they are; they must not be asked for unmasked."""
    index, words = shards(tmp_path, 60), WordPiece()
    options = SampleOptions(tag_prob=0.5, phrase_prob=0.5, predict_phrases=True)
    builder = SampleBuilder(words, PhraseVocab.build({("dog",): 2, ("cat",): 1}, words, 1), options)
    found = recover_concepts(Copies(), split_input([2] * 60), index, builder, 16, CPU)  # type: ignore[arg-type]
    assert found["n"] > 40
    assert found["accuracy"] == found["phrases"]["accuracy"] == 0.0
