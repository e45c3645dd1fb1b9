"""The heads and losses of the downstream tasks, against values worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvptr_ds.config import Config, load_config
from mvptr_ds.config_stages import ReferringConfig, VqaConfig
from mvptr_ds.data.schema import Record, Region
from mvptr_ds.data.task_labels import ENTAILMENT_CLASSES
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import DataError
from mvptr_ds.model.heads import RowHead
from mvptr_ds.model.packed import Packed
from mvptr_ds.tasks import TASKS, vqa
from mvptr_ds.tasks.boxes import box_of_best_region, box_of_weighted_regions, overlaps
from mvptr_ds.tasks.downstream import frozen_parts, without_regions
from mvptr_ds.tasks.entailment import EntailmentModule
from mvptr_ds.tasks.entailment import read_labels as read_statement
from mvptr_ds.tasks.referring import ReferringModule, any_positive
from mvptr_ds.tasks.referring import read_labels as read_expression
from mvptr_ds.tasks.vqa import VqaModule, load_answers
from tests.support.tiny_models import tiny_model, whole_batch

NO_RECORD = Record("1", 8, 8, ())


def with_boxes(*boxes: tuple[float, float, float, float]) -> Record:
    return Record("7", 100, 100, (), tuple(Region(box, "dog") for box in boxes))


# --- boxes


def test_overlaps() -> None:
    boxes = np.array([[0.0, 0, 10, 10], [20, 20, 30, 30], [5, 5, 5, 9]])
    others = np.array([[5.0, 0, 15, 10], [0, 0, 10, 10], [10, 10, 20, 20]])
    found = overlaps(boxes, others)
    assert found[0].tolist() == pytest.approx([50 / 150, 1.0, 0.0])
    assert found[1].tolist() == [0.0, 0.0, 0.0]
    assert found[2].tolist() == [0.0, 0.0, 0.0]  # a box without an area


def test_a_detectors_box_for_a_region() -> None:
    overlaps_RM = np.array([[0.6, 0.1], [0.0, 0.5], [0.0, 0.9]])
    assert box_of_best_region(0, overlaps_RM) == 0 and box_of_best_region(2, overlaps_RM) == 1
    assert box_of_weighted_regions(np.array([0.9, 0.1, 0.3]), overlaps_RM) == 0  # 0.54 against 0.41
    assert box_of_weighted_regions(np.array([0.6, 0.5, 0.3]), overlaps_RM) == 1  # 0.36 against 0.58


# --- referring expressions


def test_cross_entropy_with_several_positives() -> None:
    logits_BR = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, -math.inf], [3.0, 1.0, 0.0]])
    positive_BR = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
    is_region_BR = logits_BR > -math.inf
    logits_BR.requires_grad_()
    loss_B = any_positive(logits_BR, positive_BR, is_region_BR)
    e = math.exp
    wanted = [-math.log((e(1) + e(0)) / (e(1) + e(2) + e(0))), -math.log(e(2) / (e(1) + e(2))), 0.0]
    assert loss_B.tolist() == pytest.approx(wanted, abs=1e-6)
    loss_B.sum().backward()
    assert logits_BR.grad is not None and bool(logits_BR.grad.isfinite().all()) and not logits_BR.grad[2].any()


@pytest.mark.parametrize(
    ("score", "wanted"),
    [
        ("cosine", ((0.5 - 0.6) ** 2 + (0.0 - 0.2) ** 2 + (1.0 - 1.0) ** 2) / 3),
        ("dot", (math.log1p(math.exp(-0.5)) + math.log(2) + math.log1p(math.exp(-1.0))) / 3),
        (
            "region",
            sum(math.log1p(math.exp(x)) - t * x for x, t in ((0.5, 0.6), (0.0, 0.2), (1.0, 1.0))) / 3,
        ),
    ],
)
def test_published_losses_are_means_over_regions(score: Any, wanted: float) -> None:
    module = ReferringModule(tiny_model(), ReferringConfig(score=score), seed=0)
    logits_BR = torch.tensor([[0.5, 0.0], [1.0, -math.inf]], dtype=torch.float64)
    labels = [{"overlaps": np.array([0.6, 0.2])}, {"overlaps": np.array([1.0])}]
    loss = module.loss(logits_BR, labels)
    assert float(loss.sum / loss.count) == pytest.approx(wanted, rel=1e-12)


def test_an_expression_is_compared_with_the_boxes_of_its_record() -> None:
    record = with_boxes((0, 0, 10, 10), (5, 0, 15, 10))
    found = read_expression({"box": [0, 0, 10, 10], "id": 4, "kind": "noun"}, record)
    assert found["overlaps"].tolist() == pytest.approx([1.0, 1 / 3])
    assert (found["id"], found["kind"], found["image_id"]) == (4, "noun", "7")
    assert read_expression({}, record)["overlaps"] is None
    for box in ([0, 0, 10], "box", [5, 0, 5, 9], [0, 0, 10, "x"], [0, 9, 10, 3]):
        with pytest.raises(DataError, match="expected pixels"):
            read_expression({"box": box}, record)
    with pytest.raises(DataError, match="has no regions to choose from"):
        read_expression({"box": [0, 0, 1, 1]}, NO_RECORD)


@pytest.mark.parametrize(
    ("score", "wanted"),
    [
        ("product", [[0.25, 0.75], [1.0, 0.0]]),
        ("dot", [[0.5, 0.75], [0.5, 0.0]]),
        ("region", [[0.5, 0.75], [0.5, 0.0]]),
        ("cosine", [[0.0, math.log(3)], [0.0, -math.inf]]),
    ],
)
def test_chances_of_regions(score: Any, wanted: list[list[float]]) -> None:
    module = ReferringModule(tiny_model(), ReferringConfig(score=score), seed=0)
    chances_BR = module.chances(torch.tensor([[0.0, math.log(3)], [0.0, -math.inf]]))
    assert chances_BR.numpy() == pytest.approx(np.array(wanted), abs=1e-6)


@pytest.mark.parametrize("score", ["product", "dot", "region"])
def test_negative_logits_turn_no_detectors_box_away(score: Any) -> None:
    """The second region, which is the best, has the first box; the second box is beside all regions."""
    module = ReferringModule(tiny_model(), ReferringConfig(score=score), seed=0)
    chances_R = module.chances(torch.tensor([[-3.0, -1.0]]))[0].numpy()
    assert box_of_weighted_regions(chances_R, np.array([[0.0, 0.0], [0.8, 0.0]])) == 0


@pytest.mark.parametrize("score", ["product", "dot", "cosine"])
def test_regions_that_differ_little_do_not_tie_in_half_precision(score: Any) -> None:
    """In bfloat16 256 + 1 is 256; the states themselves are exact."""
    model = tiny_model().to(torch.bfloat16)  # type: ignore[arg-type]
    module = ReferringModule(model, ReferringConfig(score=score), seed=0).to(torch.bfloat16)
    dim = model.config.hidden_size
    first_BD, regions_ND = (torch.zeros(num, dim, dtype=torch.bfloat16) for num in (1, 2))
    first_BD[0, :2], regions_ND[:, 0] = 16.0, 16.0
    regions_ND[1, 1] = 1 / 16
    scores = module._scores(first_BD, Packed(regions_ND, [2])).detach()
    assert scores.dtype == torch.float32 and float(scores[1]) > float(scores[0])
    if score == "dot":
        assert scores.tolist() == [256.0, 257.0]


def test_too_many_cross_layers() -> None:
    with pytest.raises(ValueError, match=r"referring.cross_layers is 9, the cross encoder has \d"):
        ReferringModule(tiny_model(), ReferringConfig(cross_layers=9), seed=0)


# --- entailment


def test_classes_stand_in_the_published_order() -> None:
    assert ENTAILMENT_CLASSES == ("contradiction", "neutral", "entailment")
    assert read_statement({"label": "entailment", "pair_id": "p"}, NO_RECORD)["class"] == 2
    assert read_statement({"pair_id": "p"}, NO_RECORD)["class"] is None
    with pytest.raises(DataError, match="label 'label' is '-', expected one of contradiction, neutral, entailment"):
        read_statement({"label": "-"}, NO_RECORD)
    loss = EntailmentModule(tiny_model(), seed=0).loss(torch.tensor([[0.0, math.log(2), 0.0]]), [{"class": 1}])
    assert float(loss.sum) == pytest.approx(math.log(2))


# --- questions


def test_soft_scores_of_answers_in_the_list() -> None:
    labels = {"answers": {"dog": 1.0, "puppy": 0.3, "wolf": 0.3}, "question_id": 5, "kind": "other"}
    found = vqa.read_labels({"dog": 4, "wolf": 0}, labels, NO_RECORD)
    assert sorted(found["targets"]) == [(0, 0.3), (4, 1.0)]
    assert (found["question_id"], found["kind"], found["annotations"]) == (5, "other", None)
    for answers in (["dog"], {"dog": "yes"}, {"dog": 1.5}, {"dog": True}):
        with pytest.raises(DataError, match="label 'answers'"):
            vqa.read_labels({}, {"answers": answers}, NO_RECORD)


def test_annotations_that_are_no_answers() -> None:
    labels = {"answers": {"dog": 1.0}, "question_id": 5}
    assert vqa.read_labels({}, labels | {"annotations": ["dog"]}, NO_RECORD)["annotations"] == ["dog"]
    for given in ([], "dog", [1]):
        with pytest.raises(DataError, match=r"label 'annotations' is .*, expected the answers of the annotators"):
            vqa.read_labels({}, labels | {"annotations": given}, NO_RECORD)


def test_binary_cross_entropy_is_summed_over_answers_and_every_question_counts() -> None:
    module = VqaModule(tiny_model(), VqaConfig(), ["dog", "wolf"], seed=0)
    logits_BA = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    loss = module.loss(logits_BA, [{"targets": [(0, 0.3)]}, {"targets": []}])

    def bce(x: float, target: float) -> float:
        return math.log1p(math.exp(x)) - target * x

    assert float(loss.count) == 2
    assert float(loss.sum) == pytest.approx(bce(1, 0.3) + bce(-2, 0) + bce(0, 0) + bce(3, 0), rel=1e-6)


def test_the_head_starts_from_that_of_masked_words() -> None:
    model, words = tiny_model(), WordPiece()
    answers = [words.tokens[row] for row in (5, 6)] + ["xq"]
    small = len(model.embeddings.word_embeddings.weight)

    class FewWords:
        unk_id = 1

        def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
            pieces = {answers[0]: [5], answers[1]: [6, 8], "xq": []}[text]
            assert all(piece < small for piece in pieces)
            return pieces, []

    module = VqaModule(model, VqaConfig(), answers, seed=0)
    module.begin_head(FewWords())  # type: ignore[arg-type]  # the vocabulary of the tiny model
    assert isinstance(module.head, RowHead) and module.head.decoder is not None
    rows = model.embeddings.word_embeddings.weight if model.token_head.decoder is None else model.token_head.decoder
    torch.testing.assert_close(module.head.decoder[0], rows[5])
    torch.testing.assert_close(module.head.decoder[1], (rows[6] + rows[8]) / 2)
    torch.testing.assert_close(module.head.decoder[2], rows[1])  # an answer without a wordpiece
    torch.testing.assert_close(module.head.dense.weight, model.token_head.dense.weight)
    torch.testing.assert_close(module.head.norm.weight, model.token_head.norm.weight)
    assert module.head.bias.sigmoid().tolist() == pytest.approx([1 / 3] * 3)  # one answer of three


def test_a_list_of_answers(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    with pytest.raises(DataError, match=r"vqa\.answers is not set: make the list"):
        load_answers(None)
    for content, message in (({"a": 1}, "holds no list"), ([], "holds no list"), (["a", "b", "a"], "names 'a' twice")):
        path.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(DataError, match=message):
            load_answers(str(path))
    path.write_text('["yes", "no"]', encoding="utf-8")
    assert load_answers(str(path)) == ["yes", "no"]


# --- what is trained


def test_parts_of_factor_0_and_a_probe_are_frozen() -> None:
    parts = ["embeddings", "text", "cross"]

    def frozen(*overrides: str) -> frozenset[str]:
        return frozen_parts(load_config(None, overrides), "entailment", parts)

    assert frozen() == frozenset()
    assert frozen("entailment.probe=true") == frozenset(parts)
    assert frozen("entailment.learning_rate_factors={head: 5, text: 0}") == {"text"}
    with pytest.raises(
        ValueError, match=r"factors\.tail is 2, but entailment trains no such part; choose from head, emb"
    ):
        frozen("entailment.learning_rate_factors={tail: 2}")
    with pytest.raises(ValueError, match=r"factors\.text is -1, expected a number of at least 0"):
        frozen("entailment.learning_rate_factors={text: -1}")


def test_the_probe_of_retrieval_trains_its_heads() -> None:
    module = TASKS["retrieval"].build(load_config(None, ["retrieval.probe=true"]), tiny_model(), seed=0)
    module.freeze_untrained()
    trained = {name for name, parameter in module.named_weights() if parameter.requires_grad}
    assert trained == {
        "text_proj", "visual_proj", "logit_scale", "itm_head.weight", "itm_head.bias", "pooler.dense.weight",
        "pooler.dense.bias",
    }  # fmt: skip
    everything = TASKS["retrieval"].build(Config(), tiny_model(), seed=0)
    assert everything.parts_in_training() == everything.trained_parts()


def test_layers_that_do_not_run_are_not_trained() -> None:
    module = ReferringModule(tiny_model(num_cross_layers=3), ReferringConfig(cross_layers=1), seed=0)
    module.freeze_untrained()
    cross = {n: p.requires_grad for n, p in module.named_weights() if n.startswith("cross_encoder.layers.")}
    assert all(trained == name.startswith("cross_encoder.layers.0.") for name, trained in cross.items())


def test_nothing_is_left_of_regions_but_their_number() -> None:
    batch = whole_batch()
    blind = without_regions(batch)
    assert torch.equal(blind.region_mask_BR, batch.region_mask_BR) and torch.equal(blind.tag_ids_BG, batch.tag_ids_BG)
    assert blind.region_features_BRF is not None and not blind.region_features_BRF.any()
    assert not blind.region_geometry_BR6.any() and batch.region_geometry_BR6.any()
